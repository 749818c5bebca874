"""A process with a real SGLang, as far as it goes without a GPU: its plug-in loader, its `LoadConfig` and its
model loaders. `python sglang_child.py MODEL_DIRECTORY REFERENCE ROOT` prints what it saw as JSON.

torchvision, which SGLang imports for images, has no build that fits torch for the CPU: an empty stand-in takes
its place, and nothing here calls it.
"""

from __future__ import annotations

import hashlib
import importlib.machinery
import inspect
import json
import sys
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock


def stand_in(*names: str) -> None:
    for name in names:
        module = MagicMock(__name__=name, __path__=[], __version__="0.0.0")
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        sys.modules[name] = module


def digests(weights: Any) -> dict[str, str]:
    import torch

    return {
        name: hashlib.sha256(bytes(tensor.contiguous().view(torch.uint8).numpy())).hexdigest()
        for name, tensor in weights
    }


def main(model: str, reference: str, root: str) -> dict[str, Any]:
    transforms = ("transforms", "transforms.functional", "transforms.v2", "transforms.v2.functional")
    stand_in("torchvision", "torchvision.io", *(f"torchvision.{name}" for name in transforms))

    from sglang.srt.arg_groups import choices
    from sglang.srt.configs.load_config import LoadConfig, LoadFormat
    from sglang.srt.model_loader import loader as loaders
    from sglang.srt.plugins import load_plugins

    load_plugins()
    load_plugins()
    config = SimpleNamespace(
        model_path=model, revision=None, hf_config=SimpleNamespace(architectures=["Any"])
    )

    def weights(**extra: Any) -> dict[str, str]:
        load_config = LoadConfig(load_format="headrace", model_loader_extra_config=extra)
        made = loaders.get_model_loader(load_config)
        source = loaders.DefaultModelLoader.Source.init_new(config, None)
        return digests(made._get_weights_iterator(source))

    made = loaders.get_model_loader(LoadConfig(load_format="Headrace", model_loader_extra_config="{}"))
    default = loaders.DefaultModelLoader
    result: dict[str, Any] = {
        "choices": choices.LOAD_FORMAT_CHOICES.count("headrace"),
        "loader": f"{type(made).__module__}.{type(made).__name__}",
        "is_default": isinstance(made, default),
        "others": LoadConfig(load_format="safetensors").load_format is LoadFormat.SAFETENSORS,
        "directory": weights(),
        "reference": weights(reference=reference, root=root),
        "same_parameters": {
            name: list(inspect.signature(getattr(type(made), name)).parameters)[:2]
            == list(inspect.signature(getattr(default, name)).parameters)[:2]
            for name in ("__init__", "download_model", "load_model", "_get_weights_iterator")
        },
    }
    try:
        LoadConfig(load_format="no-such-format")
    except ValueError as error:
        result["unknown"] = str(error)
    try:
        loaders.get_model_loader(LoadConfig(load_format="headrace", model_loader_extra_config={"treads": 1}))
    except Exception as error:  # noqa: BLE001  (the test looks at it)
        result["option"] = f"{type(error).__name__}: {error}"
    return result


if __name__ == "__main__":
    print("\n" + json.dumps(main(*sys.argv[1:])))
