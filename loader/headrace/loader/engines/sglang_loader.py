"""The model loader that SGLang's `--load-format headrace` becomes. Imports SGLang; see `sglang`.

It is SGLang's default loader with another source of tensors, so that everything around it (quantization, weight
updates from disk, which ask for a default loader) stays as it is. When reading fails midway, the model that was
half filled is dropped, and the default loader builds and fills another.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch
from sglang.srt.configs.load_config import LoadFormat
from sglang.srt.model_loader.loader import DefaultModelLoader
from sglang.srt.model_loader.weight_utils import maybe_add_mtp_safetensors
from torch import nn

from headrace.loader.engines.options import EngineOptions
from headrace.loader.engines.weights import (
    Place,
    Weights,
    check_whole,
    is_final,
    ranks,
    reference_for,
    staged,
)

logger = logging.getLogger("sglang.headrace")


class HeadraceModelLoader(DefaultModelLoader):  # type: ignore[misc]  # SGLang is not there when types are checked
    """Streams whole tensors from a directory, a stream directory or a model reference into SGLang's parameters.

    Extra configuration: `headrace.loader.engines.options.EngineOptions`; `unfilled` has no effect here.
    """

    def __init__(self, load_config: Any) -> None:
        self._options = EngineOptions.parse(load_config.model_loader_extra_config or {})
        super().__init__(
            dataclasses.replace(load_config, load_format=LoadFormat.SAFETENSORS, model_loader_extra_config={})
        )
        self._pass: Weights | None = None

    def download_model(self, model_config: Any) -> None:
        """Stage the model completely, where it is not a plain directory."""
        place = self._place(model_config.model_path, model_config.revision)
        if not place.plain:
            staged(place, self._options)

    def load_model(self, *, model_config: Any, device_config: Any) -> nn.Module:
        """Build the model and fill it.

        Raises:
            HeadraceError: what the checkpoint is wrong about, or what cannot be read by the default loader either.
        """
        reference_for(self._options.reference, model_config.model_path, serve=True)
        self._pass, failure = None, None
        try:
            model: nn.Module = super().load_model(model_config=model_config, device_config=device_config)
            return model
        except BaseException:
            failure = self._pass.failure if self._pass is not None else None
            if failure is None or not self._options.fallback or is_final(failure):
                raise
        logger.warning(
            "headrace could not read the weights (%s: %s); SGLang's default loader starts from the beginning",
            type(failure).__name__,
            failure,
        )
        place = self._place(model_config.model_path, model_config.revision)
        at = copy.copy(model_config)
        at.model_path, at.revision = staged(place, self._options), None
        check_whole(at.model_path)
        default: nn.Module = DefaultModelLoader(self.load_config).load_model(
            model_config=at, device_config=device_config
        )
        return default

    def _get_weights_iterator(
        self, source: Any, **resolved: Any
    ) -> Generator[tuple[str, torch.Tensor], None, None]:
        """As in the default loader. What models ask for beside their own safetensors is read by that."""
        place = self._place(source.model_or_path, source.revision)
        own = source.model_config is not None and source.allow_patterns_overrides is None
        if (
            not own
            or resolved.get("resolved_source") is not None
            or self.load_config.draft_model_idx is not None
            or (place.plain and self._has_files_beside(place, source.model_config))
        ):
            return super()._get_weights_iterator(source, **resolved)  # type: ignore[no-any-return]
        self._pass = Weights(place, self._options, shared=ranks() > 1)
        return ((source.prefix + name, tensor) for name, tensor in self._pass)

    def _place(self, model: str, revision: str | None) -> Place:
        return Place.of(model, revision, reference_for(self._options.reference, model))

    @staticmethod
    def _has_files_beside(place: Place, model_config: Any) -> bool:
        """Whether SGLang would read a file that the index does not name."""
        folder = Path(place.where)
        if not folder.is_dir():
            return False
        return bool(
            maybe_add_mtp_safetensors([], str(folder), "model.safetensors.index.json", model_config.hf_config)
        )
