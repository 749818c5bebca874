"""Slicing rules from the tensor-parallel plans of transformers.

Such a plan maps a module's or parameter's name, with `*` for each number, to a style: `"layers.*.mlp.up_proj":
"colwise"`. It is found in `base_model_tp_plan` of a configuration and `_tp_plan` of a model class. What each style
does to a parameter is taken from `transformers.distributed` (5.23) and, for styles that only older versions have,
from `transformers.integrations.tensor_parallel` (4.57); an exact name goes before its module's.

Plans speak of the parameters that transformers makes of a checkpoint, and since 5.0 those of all experts of a layer
are one. A checkpoint with a tensor for each expert and projection is sliced by the same plan, tensor by tensor.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from headrace.cache.errors import MissingDependency, UsageError
from headrace.loader.checkpoint import read_bytes
from headrace.loader.slices import Experts, Fused, Replicated, Rule, Shaped, SlicePlan, Slicing, Split
from headrace.loader.source import Source

_COLUMNS = ("colwise", "colwise_rep", "colwise_gather_output", "local_colwise")
_ROWS = ("rowwise", "rowwise_rep", "rowwise_split_input", "local_rowwise")
_PACKED_COLUMNS = ("packed_colwise", "local_packed_colwise")
_PACKED_ROWS = ("packed_rowwise", "local_packed_rowwise")
_EMBEDDINGS = {"embedding_rowwise": 0, "vocab_parallel_rowwise": 0, "embedding_colwise": 1}
_EXPERTS = "grouped_gemm"
_WHOLE = (
    "replicate", "replicated_with_grad_allreduce", "sequence_parallel", "mla_kv_a_proj", "all_reduce", "gather",
    "local", "isolated", "local_params", "moe_tp_experts", "moe_identity_expert", "ep_dispatch_experts", "ep_router",
)  # fmt: skip
STYLES = (*_COLUMNS, *_ROWS, *_PACKED_COLUMNS, *_PACKED_ROWS, *_EMBEDDINGS, _EXPERTS, *_WHOLE)
"""All styles that are understood. Those not named above concern activations: parameters stay whole."""

_KEYS_AND_VALUES = ("k_proj", "v_proj", "key_proj", "value_proj")

# What one projection of stacked experts is called where each expert has tensors of its own.
_UNSTACKED = {
    "gate_up_proj": ("gate_proj", "up_proj", "w1", "w3"),
    "down_proj": ("down_proj", "w2"),
}

_CONFIG = "config.json"
_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


def slices_from_tp_plan(
    plan: Mapping[str, str],
    rank: int,
    world: int,
    *,
    before: Iterable[Rule] = (),
    kv_heads: int | None = None,
    experts: int | None = None,
    uneven: bool = False,
) -> SlicePlan:
    """A slice plan from a tensor-parallel plan.

    Args:
        plan: name -> style. Any prefix may come before a name: the plan of a base model fits the checkpoint of
            a model around it.
        rank, world: this rank, and how many there are.
        before: rules that go first, for what the plan cannot say.
        kv_heads: how many heads the projections of keys and values have: with fewer than ranks, neighbouring
            ranks get the same one. Without it they are split like any other.
        experts: how many experts a layer has, where each has tensors of its own and the plan gives ranks
            whole experts.
        uneven: allow what does not divide, as transformers does: the last ranks get less.

    Raises:
        UsageError: an unknown style, or a rank outside the world.
    """
    exact: list[Rule] = []
    inside: list[Rule] = []
    for name, style in plan.items():
        if not isinstance(name, str) or style not in STYLES:
            raise UsageError(
                f"the tensor-parallel plan gives {name!r} the style {style!r}, which is none of {', '.join(STYLES)}"
            )
        heads = kv_heads if name.rpartition(".")[2] in _KEYS_AND_VALUES else None
        slicing = _slicing(style, heads, experts, uneven)
        exact.append(Rule(name, slicing, numbered=True))
        exact += _unstacked(name, style, slicing, experts, uneven)
        if style in _ROWS:  # added once, after the ranks' results
            inside.append(Rule(f"{name}.bias", Replicated(), numbered=True))
        inside.append(Rule(f"{name}.?", slicing, numbered=True))
    return SlicePlan(rank, world, (*before, *exact, *inside), strict=False)


def _slicing(style: str, heads: int | None, experts: int | None, uneven: bool) -> Slicing:
    if style in _COLUMNS:
        return Shaped(Split(0, heads, uneven), Split(-2, heads, uneven))
    if style in _ROWS:
        return Shaped(Split(0, None, uneven), Split(-1, None, uneven))
    if style in _PACKED_COLUMNS:
        return Shaped(Split(0, None, uneven), Fused(-2, 2, uneven))
    if style in _PACKED_ROWS:
        return Shaped(Replicated(), Fused(-1, 2, uneven))
    if style in _EMBEDDINGS:
        return Split(_EMBEDDINGS[style], None, uneven)
    return Experts(experts) if style == _EXPERTS else Replicated()


def _unstacked(name: str, style: str, slicing: Slicing, experts: int | None, uneven: bool) -> Iterator[Rule]:
    """Rules for a checkpoint in which each expert has tensors of its own."""
    module, _, projection = name.rpartition(".")
    around, _, last = module.rpartition(".")
    if last != "experts":
        return
    # What holds the experts has other names in checkpoints, as Mixtral's `block_sparse_moe`.
    holder = f"{around.rpartition('.')[0]}.?.experts" if "." in around else module
    if style == _EXPERTS:
        yield Rule(f"{holder}.*.{projection}.?", slicing, numbered=True)
    elif style in (*_ROWS, *_PACKED_ROWS):
        yield Rule(f"{holder}.*.{projection}.bias", Replicated(), numbered=True)
    for own in _UNSTACKED.get(projection, ()):
        if style in _ROWS:
            yield Rule(f"{holder}.*.{own}.bias", Replicated(), numbered=True)
        if style in (*_PACKED_COLUMNS, *_PACKED_ROWS):
            alone = _COLUMNS[0] if style in _PACKED_COLUMNS else _ROWS[0]
            yield Rule(f"{holder}.*.{own}.?", _slicing(alone, None, experts, uneven), numbered=True)
        else:
            yield Rule(f"{holder}.*.{own}.?", slicing, numbered=True)
    yield Rule(f"{holder}.*.{projection}.?", slicing, numbered=True)


def slices_from_transformers(
    model: Any,
    rank: int,
    world: int,
    *,
    before: Iterable[Rule] = (),
    uneven: bool = False,
) -> SlicePlan:
    """A slice plan for a model of transformers, from its tensor-parallel plan.

    Args:
        model: a model, on any device, also "meta"; or its configuration.
        rank, world, before, uneven: as `slices_from_tp_plan`.

    Raises:
        UsageError: the model has no tensor-parallel plan.
    """
    config = getattr(model, "config", model)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    counts = (_count(getattr(text, name, None)) for name in _EXPERT_COUNTS)
    return slices_from_tp_plan(
        tp_plan_of(model),
        rank,
        world,
        before=before,
        kv_heads=_count(getattr(text, "num_key_value_heads", None)),
        experts=next((count for count in counts if count is not None), None),
        uneven=uneven,
    )


def tp_plan_of(model: Any) -> dict[str, str]:
    """The tensor-parallel plan of a model of transformers, or of its configuration.

    A configuration has the base model's part; the head's is the model class's, which is looked up. Without the
    model itself a plan may also fit another of its towers, because their names are not known.

    Raises:
        UsageError: it has none.
    """
    plan = getattr(model, "tp_plan", None)
    if isinstance(plan, Mapping) and plan:
        return dict(plan)
    config = getattr(model, "config", model)
    plan = getattr(config, "base_model_tp_plan", None)
    if not plan and hasattr(config, "get_text_config"):
        plan = getattr(config.get_text_config(), "base_model_tp_plan", None)
    if not plan:
        raise UsageError(
            f"transformers has no tensor-parallel plan for {getattr(config, 'model_type', type(model).__name__)!r}: "
            "give one, or rules of your own"
        )
    # transformers shards the embedding by its vocabulary where the plan does not name it.
    return {"embed_tokens": "embedding_rowwise", **plan, **_head_plan(config)}


def slices_of_source(
    source: Source, rank: int, world: int, *, plan: Mapping[str, str] | None = None, uneven: bool = False
) -> SlicePlan:
    """A slice plan for a model in transformers' form, by its `config.json`.

    Args:
        source: the model; its `config.json` is waited for if it is still being staged.
        rank, world, uneven: as `slices_from_tp_plan`.
        plan: instead of what transformers has for the model; then only how many key-value heads and experts
            it has is taken from `config.json`, as far as there is one, and transformers is not needed.

    Raises:
        UsageError: there is no plan: no `config.json`, or transformers does not know the model or has none for it.
        MissingDependency: transformers is not installed.
    """
    config = _config(source)
    if plan is not None:
        text = (config or {}).get("text_config", config or {})
        heads = text.get("num_key_value_heads") if isinstance(text, dict) else None
        counts = [text[name] for name in _EXPERT_COUNTS if name in text] if isinstance(text, dict) else []
        return slices_from_tp_plan(
            plan, rank, world, kv_heads=_count(heads), experts=_count(next(iter(counts), None)), uneven=uneven
        )
    if config is None:
        raise UsageError(
            f"{source.name} has no config.json, from which its tensor-parallel plan could be known"
        )
    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise UsageError(
            f"config.json of {source.name} does not say what model it is (model_type): give a plan"
        )
    transformers = _transformers()
    if kind not in transformers.CONFIG_MAPPING:
        raise UsageError(
            f"transformers {transformers.__version__} does not know {kind!r}, the model of {source.name}: give a plan"
        )
    known = transformers.CONFIG_MAPPING[kind].from_dict(config)
    return slices_from_transformers(known, rank, world, uneven=uneven)


def _config(source: Source) -> dict[str, Any] | None:
    if _CONFIG not in source.paths():
        return None
    file = source.open(_CONFIG)
    try:
        while not file.ready(0, file.size):
            file.wait(0, file.size, timeout=1.0)
        config = json.loads(read_bytes(file, 0, file.size))
    except ValueError as error:
        raise UsageError(
            f"{_CONFIG} of {source.name} is not JSON ({error}): stage or download it again"
        ) from error
    finally:
        file.close()
    return config if isinstance(config, dict) else {}


def _count(number: object) -> int | None:
    return number if type(number) is int and number > 0 else None


def _head_plan(config: Any) -> Mapping[str, str]:
    names = getattr(config, "architectures", None) or ()
    if not names:
        return {}
    return getattr(getattr(_transformers(), names[0], None), "_tp_plan", None) or {}


def _transformers() -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise MissingDependency(
            "the tensor-parallel plan of a model is found by the library transformers, which cannot be imported "
            f"({error}): pip install transformers, or give the plan"
        ) from error
