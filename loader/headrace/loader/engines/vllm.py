"""vLLM: `--load-format headrace`. vLLM calls `register` in each of its processes (`vllm.general_plugins`).

Nothing of vLLM is imported before that.
"""

from __future__ import annotations

from headrace.loader.engines.load_format import LOAD_FORMAT, register_once


def register() -> None:
    """Make the load format known to vLLM; more than once does nothing more."""
    # vLLM configures no other logger than its own, so the name begins with vLLM's.
    register_once("vLLM", "vllm.plugins.headrace", _register)


def _register() -> None:
    from vllm.model_executor.model_loader import register_model_loader

    from headrace.loader.engines.vllm_loader import HeadraceModelLoader

    register_model_loader(LOAD_FORMAT)(HeadraceModelLoader)
