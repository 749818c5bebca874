"""SGLang: `--load-format headrace`. SGLang calls `register` in each of its processes (`sglang.srt.plugins`).

SGLang has no registry of load formats; a `LoadConfig` whose format is a class is loaded by that class. So the
one hook here puts our class in place of the name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from headrace.loader.engines.load_format import LOAD_FORMAT, register_once

TARGET = "sglang.srt.configs.load_config.LoadConfig._verify_load_format"


def register() -> None:
    """Make the load format known to SGLang; more than once does nothing more."""
    register_once("SGLang", "sglang.headrace", _register)


def _register() -> None:
    from sglang.srt.arg_groups.choices import add_load_format_choices
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(TARGET, verify_load_format, HookType.AROUND)
    add_load_format_choices([LOAD_FORMAT])


def verify_load_format(original: Callable[[Any], None], config: Any) -> None:
    """Around `LoadConfig._verify_load_format`: the name becomes the class; any other format is SGLang's own."""
    name = config.load_format
    if isinstance(name, str) and name.lower() == LOAD_FORMAT:
        from headrace.loader.engines.sglang_loader import HeadraceModelLoader

        config.load_format = HeadraceModelLoader
        return
    original(config)
