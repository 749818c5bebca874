"""vLLM: `--load-format headrace`. vLLM calls `register` in each of its processes (`vllm.general_plugins`).

Nothing of vLLM is imported before that, and nothing here may keep vLLM from starting with another load format:
what is wrong is said in a warning, and then the load format is not there.
"""

from __future__ import annotations

import logging

LOAD_FORMAT = "headrace"

_registered = False


def register() -> None:
    """Make the load format known to vLLM; more than once does nothing more."""
    global _registered
    if _registered:
        return
    try:
        from vllm.model_executor.model_loader import register_model_loader

        from headrace.loader.engines.vllm_loader import HeadraceModelLoader

        register_model_loader(LOAD_FORMAT)(HeadraceModelLoader)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        # Under a name that vLLM shows: it configures no other logger than its own.
        logging.getLogger("vllm.plugins.headrace").warning(
            "the load format headrace is not available, because this vLLM does not fit the plug-in: %s: %s",
            type(error).__name__,
            error,
        )
        return
    _registered = True
