"""The model loader that `--load-format headrace` names. Imports vLLM; see `vllm` for how it is registered.

vLLM's own loader takes what it finds: a checkpoint that lacks a tensor runs, and answers wrongly. This one
compares all headers with the checkpoint's index before the first parameter is touched, and counts what reached
each parameter.

When reading fails midway, some parameters have been written and some not. vLLM's default loader then writes
all of them again, from the beginning, and is held to the same checks; where that cannot be (weights that are
quantized while they are loaded, a reload under way) the failure stands. What the checkpoint itself is wrong
about (a missing tensor, bytes that do not match their digest) is never handed to another loader.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Generator, Iterable
from typing import Any

import torch
from torch import nn
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import LinearBase, MergedColumnParallelLinear, QKVParallelLinear
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.ep_weight_filter import should_skip_weight

from headrace.cache.errors import MissingTensor
from headrace.loader.checkpoint import name_list
from headrace.loader.engines.filled import WrittenBytes, parts_missing
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

logger = init_logger("vllm.headrace")


class HeadraceModelLoader(BaseModelLoader):  # type: ignore[misc]  # vLLM is not there when types are checked
    """Streams whole tensors from a directory, a stream directory or a model reference into vLLM's parameters.

    Extra configuration: `headrace.loader.engines.options.EngineOptions`.
    """

    def __init__(self, load_config: Any) -> None:
        super().__init__(load_config)
        self._options = EngineOptions.parse(load_config.model_loader_extra_config or {})

    # -- what vLLM calls ------------------------------------------------------------------------------

    def download_model(self, model_config: Any) -> None:
        """Stage the model completely, where it is not a plain directory."""
        place = self._place(model_config)
        if not place.plain:
            staged(place, self._options)

    def load_weights(self, model: nn.Module, model_config: Any) -> None:
        """Fill the parameters of an initialized model.

        Raises:
            MissingTensor: tensors that the index names, or parameters that nothing was there for.
            HeadraceError: what cannot be read, where vLLM's own loader cannot do it either.
        """
        reference_for(self._options.reference, model_config.model, serve=True)
        if not self._streams(model, model_config):
            logger.info("headrace: vLLM's own loader reads this model, because it asks for other files")
            self._by_default(model, model_config, None)
            return
        weights = self._weights(model, model_config, self._expert_filter(model_config))
        written = WrittenBytes()
        failure: BaseException | None = None
        try:
            with written:
                loaded = _fill(model, self._all(model, weights))
        except BaseException:
            failure = weights.failure
            if failure is None or not self._may_fall_back(failure, model):
                raise
        if failure is None:
            self._check(model, model_config, written, loaded, weights.names)
            logger.info(
                "headrace: %d tensors, %.2f GB in %.2f s",
                len(weights.names),
                weights.bytes / 1e9,
                weights.seconds,
            )
            return
        # Outside the handler: the failed pass and its memory are gone by now.
        logger.warning(
            "headrace could not read the weights (%s: %s); vLLM's default loader starts from the beginning",
            type(failure).__name__,
            failure,
        )
        self._by_default(model, model_config, failure)

    def get_all_weights(
        self, model_config: Any, model: nn.Module
    ) -> Generator[tuple[str, torch.Tensor], None, None]:
        """All tensors of the checkpoint; vLLM asks for them to reload a model in place."""
        if self._streams(model, model_config):
            yield from self._all(model, self._weights(model, model_config))
        else:
            yield from self._default().get_all_weights(self._at(model_config), model)

    # -- where from -----------------------------------------------------------------------------------

    def _place(self, model_config: Any) -> Place:
        model = getattr(model_config, "model_weights", "") or model_config.model
        reference = reference_for(self._options.reference, model_config.model)
        return Place.of(model, model_config.revision, reference)

    def _streams(self, model: nn.Module, model_config: Any) -> bool:
        """Whether the weights are the checkpoint's safetensors as they are."""
        return (
            getattr(model, "allow_patterns_overrides", None) is None
            and model_config.quantization != "torchao"
        )

    def _weights(
        self, model: nn.Module, model_config: Any, skip_expert: Callable[[str], bool] | None = None
    ) -> Weights:
        unused = getattr(model, "is_unused_checkpoint_weight", None)
        filters = [skip for skip in (unused, skip_expert) if skip is not None]
        return Weights(
            self._place(model_config),
            self._options,
            shared=ranks() > 1,
            skip=(lambda name: any(skip(name) for skip in filters)) if filters else None,
        )

    def _all(self, model: nn.Module, weights: Weights) -> Generator[tuple[str, torch.Tensor], None, None]:
        """The checkpoint's tensors, and those of other checkpoints that some models ask for beside it."""
        yield from weights
        for source in getattr(model, "secondary_weights", ()):
            yield from self._default()._get_weights_iterator(source)

    def _expert_filter(self, model_config: Any) -> Callable[[str], bool] | None:
        """Under expert parallelism: tells tensors of experts that live on other ranks."""
        default = self._default()
        default._init_ep_weight_filter(model_config)
        local = default.local_expert_ids
        return None if local is None else lambda name: should_skip_weight(name, local)

    # -- when it does not work ------------------------------------------------------------------------

    def _may_fall_back(self, failure: BaseException, model: nn.Module) -> bool:
        if not self._options.fallback or is_final(failure):
            return False
        # Such a layer is converted as soon as it is full: giving it tensors again would spoil it.
        return not any(
            getattr(getattr(module, "quant_method", None), "uses_meta_device", False)
            for module in model.modules()
        )

    def _by_default(self, model: nn.Module, model_config: Any, failure: BaseException | None) -> None:
        """Let vLLM's default loader do it: because the model asks for it, or after a failure."""
        try:
            at = self._at(model_config)
        except Exception:
            if failure is None:
                raise
            # Why it could not be staged for the other loader is most likely the same.
            raise failure from None
        if failure is None:
            self._default().load_weights(model, at)
            return
        names, written = check_whole(at.model), WrittenBytes()
        with written:
            loaded = _fill(model, self._default().get_all_weights(at, model))
        self._check(model, model_config, written, loaded, names)

    def _default(self) -> Any:
        config = dataclasses.replace(
            self.load_config, load_format="safetensors", model_loader_extra_config={}
        )
        return DefaultModelLoader(config)

    def _at(self, model_config: Any) -> Any:
        """The configuration with a plain directory as its model, for vLLM's own loader."""
        at = copy.copy(model_config)
        at.model, at.model_weights = staged(self._place(model_config), self._options), ""
        return at

    # -- whether all of it is there -------------------------------------------------------------------

    def _check(
        self,
        model: nn.Module,
        model_config: Any,
        written: WrittenBytes,
        loaded: Iterable[str] | None,
        names: set[str],
    ) -> None:
        """Compare what was written with what the model consists of.

        Quantized models are left out: their parameters need not come from the checkpoint one by one.

        Raises:
            MissingTensor: parameters got nothing, or only a part of what they are fused from.
        """
        if model_config.quantization is not None:
            return
        loaded_names = None if loaded is None else set(loaded)
        draft = getattr(model_config, "runner", None) == "draft"
        packed = getattr(model, "packed_modules_mapping", None) or {}
        missing: list[str] = []
        seen: set[int] = set()
        for prefix, module in model.named_modules():
            for own, parameter in module.named_parameters(recurse=False):
                if id(parameter) in seen:  # tied
                    continue
                seen.add(id(parameter))
                name = f"{prefix}.{own}" if prefix else own
                share = written.share(parameter)
                claimed = not isinstance(module, LinearBase) if loaded_names is None else name in loaded_names
                if share < 1.0 and _is_missing(module, parameter, share, claimed, draft):
                    missing += parts_missing(name, packed, names)
        if not missing:
            return
        message = (
            f"the checkpoint {self._place(model_config).where} has nothing for {name_list(missing)}, "
            "which the model consists of: download it again"
        )
        if self._options.unfilled == "refuse":
            raise MissingTensor(message, tuple(missing))
        logger.warning("headrace: %s", message)


def _is_missing(module: nn.Module, parameter: nn.Parameter, share: float, loaded: bool, draft: bool) -> bool:
    """Whether a parameter that was written in part or not at all lacks something.

    Args:
        share: the part that was written.
        loaded: the model says that it loaded this parameter.
        draft: the model drafts for another, whose embeddings it may get.
    """
    if share == 0.0:
        return not loaded and not (draft and isinstance(module, VocabParallelEmbedding))
    # Embeddings are padded, and some models have their own ways; these two are filled to the last byte.
    standard = getattr(getattr(parameter, "weight_loader", None), "__self__", None) is module
    return type(module) in (QKVParallelLinear, MergedColumnParallelLinear) and standard


def _fill(model: Any, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str] | None:
    """Let the model load; returns the names of its parameters that it loaded, where it tells."""
    loaded: set[str] | None = model.load_weights(weights)
    return loaded
