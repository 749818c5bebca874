"""`--load-format headrace`: made known to an engine once, or, where its version does not fit, not at all.

Nothing here may keep an engine from starting with another load format: what is wrong is said in a warning.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

LOAD_FORMAT = "headrace"

_registered: set[str] = set()


def register_once(engine: str, logger: str, register: Callable[[], None]) -> None:
    """Call `register`, unless it has succeeded for this engine before.

    Args:
        engine: its name, for the warning.
        logger: a name whose warnings the engine shows.
        register: imports the engine and makes the load format known to it.
    """
    if engine in _registered:
        return
    try:
        register()
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        logging.getLogger(logger).warning(
            "the load format headrace is not available, because this %s does not fit the plug-in: %s: %s",
            engine,
            type(error).__name__,
            error,
        )
        return
    _registered.add(engine)
