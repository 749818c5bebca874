"""transformers: `from_pretrained`, with everything from headrace.

>>> from transformers import AutoModelForCausalLM, AutoTokenizer
>>> from headrace.loader.engines.transformers import from_pretrained
>>> model = from_pretrained(AutoModelForCausalLM, "s3://models/llama-3-8b")        # doctest: +SKIP
>>> tokenizer = from_pretrained(AutoTokenizer, "s3://models/llama-3-8b")           # doctest: +SKIP

The model class is given a configuration and a state dict of pending tensors (see `pending`): it builds the
model while bytes are read, and reading ends when the last chunk is staged. Before the class is called the
headers are compared with the checkpoint's index, by name; the class itself would fill in random numbers.

What goes wrong on this path, other than with the checkpoint itself, costs a warning and time: the half-loaded
model is dropped, and transformers loads the complete folder by its own means.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from headrace.cache.errors import (
    HeadraceError,
    IntegrityError,
    LoadError,
    MissingDependency,
    MissingTensor,
    UsageError,
)
from headrace.loader.checkpoint import INDEX_SUFFIX, Checkpoint, find_checkpoint, name_list
from headrace.loader.choose import ReadPath, check_read_path
from headrace.loader.dtypes import TORCH
from headrace.loader.engines.pending import (
    Headers,
    SingleTensors,
    StreamedTensors,
    pending,
    read_headers,
)
from headrace.loader.engines.small_files import can_be_whole, complete_folder, small_files, whole_folder
from headrace.loader.reference import open_source
from headrace.loader.source import DirectorySource, Source, SourceFile
from headrace.loader.verify import VerifyMode, check_for, check_verify

try:
    import transformers
    from transformers.models.auto.auto_factory import _BaseAutoModelClass, _get_model_class
except ModuleNotFoundError as missing:
    raise MissingDependency(
        "transformers is not installed: pip install 'headrace[transformers]'"
    ) from missing

# Keywords that say where on the hub files are: meaningless for a folder.
_HUB = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token", "code_revision")


@dataclass(frozen=True, slots=True)
class _Options:
    """headrace's own arguments of one call."""

    read_path: ReadPath
    threads: int | None
    verify: VerifyMode
    strict: bool


class _NotForUs(Exception):
    """Why a model is better loaded by transformers alone: `str()` ends the sentence "..., because"."""


def from_pretrained(
    model_class: Any,
    src: str | os.PathLike[str] | Source,
    *model_args: Any,
    root: str | None = None,
    domain: str | None = None,
    progress: Any = None,
    read_path: ReadPath = "auto",
    threads: int | None = None,
    verify: VerifyMode = "auto",
    strict: bool = False,
    **kwargs: Any,
) -> Any:
    """`model_class.from_pretrained(src, *model_args, **kwargs)`, with files and tensors from headrace.

    Args:
        model_class: a model class or `AutoModel...`; or anything else with a `from_pretrained` that reads
            small files, such as a tokenizer, a processor or a configuration.
        src: a directory, a model reference, which is staged as far as needed, or an open `Source`, which stays
            open.
        root, domain, progress: for staging a model reference.
        read_path, threads, verify: as for `load`.
        strict: refuse a checkpoint that lacks a parameter of the model, as a new head's; by default transformers
            initializes those and says so.
        kwargs: for `model_class.from_pretrained`: dtype, device_map, quantization_config, and so on.

    Raises:
        MissingTensor: the checkpoint lacks tensors or shards that its index names, or, when strict, the model.
        CheckpointError: files that are not safetensors, or contradict each other.
        HeadraceError: staging failed.
        UsageError: an argument that cannot be meant.
    Whatever transformers raises when it loads the folder by itself is raised as it is.
    """
    check_read_path(read_path)
    check_verify(verify)
    for name in ("state_dict", "gguf_file"):
        if kwargs.get(name) is not None:
            raise UsageError(f"{name} cannot be given here: tensors come from {src!r}")
    with contextlib.ExitStack() as stack:
        if isinstance(src, str | os.PathLike):
            source = open_source(src, root=root, domain=domain, progress=progress)
            stack.callback(source.close)
        else:
            source = src
        if not _is_model(model_class):
            folder = stack.enter_context(small_files(source))
            loaded = model_class.from_pretrained(folder, *model_args, **kwargs)
            if hasattr(loaded, "name_or_path"):
                loaded.name_or_path = source.name  # the folder may be a temporary one
            return loaded
        options = _Options(read_path, threads, verify, strict)
        return _model(model_class, source, model_args, kwargs, options)


def _is_model(model_class: Any) -> bool:
    return isinstance(model_class, type) and issubclass(
        model_class, transformers.PreTrainedModel | _BaseAutoModelClass
    )


def _model(
    model_class: Any, source: Source, model_args: tuple[Any, ...], kwargs: dict[str, Any], options: _Options
) -> Any:
    try:
        with small_files(source) as folder:
            model, info = _fast(model_class, source, folder, model_args, dict(kwargs), options)
    except (IntegrityError, MissingTensor, UsageError):
        raise  # the checkpoint is not whole or the call is wrong: no loader makes that good
    except _NotForUs as reason:
        _warn(f"{source.name} is loaded by transformers alone, because {reason}.")
        model, info = _default(model_class, source, model_args, kwargs)
    except Exception as error:
        if isinstance(error, HeadraceError) and not (isinstance(error, LoadError) and can_be_whole(source)):
            raise
        _warn(
            f"loading {source.name} through headrace failed ({type(error).__name__}: {_first_line(error)}), "
            f"so transformers loads it by itself."
        )
        model, info = _default(model_class, source, model_args, kwargs)
    missing = tuple(sorted(info["missing_keys"]))
    if options.strict and missing:
        raise MissingTensor(
            f"{source.name} lacks {name_list(missing)}, which {type(model).__name__} has: load it with the class "
            f"that it was saved from",
            missing,
        )
    return (model, info) if kwargs.get("output_loading_info") else model


# -- the fast path ----------------------------------------------------------------------------------------


def _fast(
    model_class: Any,
    source: Source,
    folder: Path,
    model_args: tuple[Any, ...],
    kwargs: dict[str, Any],
    options: _Options,
) -> tuple[Any, dict[str, Any]]:
    """The model and transformers' loading info.

    Raises:
        _NotForUs: with the reason.
    """
    _check_arguments(folder, kwargs)
    for name in _HUB:
        kwargs.pop(name, None)
    config, kwargs = _configuration(model_class, folder, kwargs)
    model_class, config = _concrete(model_class, config)
    weights, checkpoint = _checkpoint(source, config, kwargs)
    headers = read_headers(weights, checkpoint)
    tensors = _tensors(model_class, weights, headers, config, kwargs, options)
    try:
        kwargs["output_loading_info"] = True
        model, info = model_class.from_pretrained(
            None, *model_args, config=config, state_dict=pending(headers, tensors), **kwargs
        )
        if tensors.failure is not None:
            raise tensors.failure
    except Exception:
        # transformers keeps only the text of what a tensor failed with.
        if tensors.failure is not None:
            raise tensors.failure from None
        raise
    finally:
        tensors.close()
    _finish(model, source, folder, kwargs)
    return model, info


def _tensors(
    model_class: Any,
    weights: Source,
    headers: Headers,
    config: Any,
    kwargs: Mapping[str, Any],
    options: _Options,
) -> StreamedTensors | SingleTensors:
    """How the tensors are brought in: streamed if they stay as they are, one by one if they are converted."""
    device = _one_device(kwargs.get("device_map"))
    if _to_verify(weights, headers, options.verify):
        device = device or torch.device("cpu")  # only whole files can be verified
    elif device is None or not _kept_dtype(headers, config, kwargs) or _merged(model_class, config):
        return SingleTensors(weights, headers, private=options.read_path not in ("auto", "mapped"))
    tensors = StreamedTensors(
        weights, device, read_path=options.read_path, threads=options.threads, verify=options.verify
    )
    if device.type == "cpu":
        tensors.start()  # on a device only after transformers has sized up its memory
    return tensors


def _to_verify(weights: Source, headers: Headers, mode: VerifyMode) -> bool:
    for path in headers.files:
        with contextlib.closing(weights.open(path)) as file:
            if check_for(file, mode) is not None:
                return True
    return False


def _check_arguments(folder: Path, kwargs: Mapping[str, Any]) -> None:
    """Raises: _NotForUs: an argument that the state dict path does not honour."""
    if kwargs.get("subfolder"):
        raise _NotForUs("it lies in a subfolder")
    if kwargs.get("use_safetensors") is False:
        raise _NotForUs("use_safetensors is False")
    device_map = kwargs.get("device_map")
    if isinstance(device_map, Mapping) and "disk" in device_map.values():
        raise _NotForUs("a part of it is to stay on disk")
    if kwargs.get("trust_remote_code") and (folder / "custom_generate").exists():
        raise _NotForUs("it brings its own generate function")
    if (folder / "adapter_config.json").exists() and transformers.utils.is_peft_available():
        raise _NotForUs("it has an adapter")
    if transformers.integrations.is_deepspeed_zero3_enabled():
        raise _NotForUs("DeepSpeed distributes it")


def _configuration(model_class: Any, folder: Path, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The configuration, and the keywords it left over, as the Auto classes do it."""
    config = kwargs.pop("config", None)
    if isinstance(config, transformers.PreTrainedConfig):
        return config, kwargs
    where = folder if config is None else config
    own = getattr(model_class, "config_class", None) or transformers.AutoConfig
    kept: dict[str, Any] = {
        name: kwargs.pop(name)
        for name in (
            "quantization_config",
            "output_loading_info",
            "device_map",
            "variant",
            "generation_config",
        )
        if name in kwargs
    }
    # "auto" is no dtype of a configuration; any other is meant for the model too.
    kept |= {name: kwargs[name] for name in ("dtype", "torch_dtype") if kwargs.get(name) is not None}
    for name in ("dtype", "torch_dtype"):
        if kwargs.get(name) == "auto":
            kwargs.pop(name)
    config, left = own.from_pretrained(where, return_unused_kwargs=True, **kwargs)
    return config, {**left, **kept}


def _concrete(model_class: Any, config: Any) -> tuple[Any, Any]:
    """The class that an Auto class stands for, and its configuration; they do not take a state dict.

    Raises:
        _NotForUs: a model whose loading needs more than a state dict.
    """
    if issubclass(model_class, _BaseAutoModelClass):
        if model_class.__name__ in (getattr(config, "auto_map", None) or {}):
            raise _NotForUs("its code comes with it")
        mapping = model_class._model_mapping
        if type(config) not in mapping:
            raise _NotForUs(f"{model_class.__name__} knows no class for it")
        model_class = _get_model_class(config, mapping)
        text_config = config.sub_configs.get("text_config")
        if text_config is not None and getattr(model_class, "config_class", None) == text_config:
            quantization = getattr(config, "quantization_config", None)
            config = config.get_text_config()
            if quantization is not None:
                config.quantization_config = quantization
    if getattr(type(config), "extra_files", ()):  # older versions have none
        raise _NotForUs("its class reads other files too")
    return model_class, config


def _checkpoint(source: Source, config: Any, kwargs: Mapping[str, Any]) -> tuple[Source, Checkpoint]:
    """The weights that transformers would choose, as a source that has no others.

    Raises:
        _NotForUs: they are not safetensors.
        MissingTensor: shards that the index names are not there.
    """
    only = source.only if isinstance(source, DirectorySource) else None
    if only is None:
        variant = kwargs.get("variant")
        middle = f".{variant}" if variant else ""
        named = getattr(config, "transformers_weights", None)
        wanted = (
            (named,) if named else (f"model{middle}.safetensors", f"model{INDEX_SUFFIX[:-5]}{middle}.json")
        )
        present = set(source.paths())
        only = next((path for path in wanted if path in present), None)
    if only is None or not only.endswith((".safetensors", ".json")):
        raise _NotForUs("it has no model.safetensors and no index of such files")
    checkpoint = find_checkpoint(source, only)
    if isinstance(source, DirectorySource):
        folder = complete_folder(source)
        assert folder is not None
        return DirectorySource(folder / only), checkpoint
    if checkpoint.index is not None and not checkpoint.index.endswith(INDEX_SUFFIX):
        raise _NotForUs(f"its index is called {checkpoint.index}")
    return _Part(source, (*checkpoint.files, *((checkpoint.index,) if checkpoint.index else ()))), checkpoint


class _Part:
    """Some files of a source; closing it leaves the source open."""

    def __init__(self, source: Source, paths: tuple[str, ...]) -> None:
        self.name = source.name
        self.snapshot = source.snapshot
        self._source = source
        self._paths = tuple(sorted(paths))

    def paths(self) -> tuple[str, ...]:
        return self._paths

    def open(self, path: str) -> SourceFile:
        return self._source.open(path)

    def close(self) -> None:
        """Nothing of its own."""


def _one_device(device_map: Any) -> torch.device | None:
    """The one device on which all tensors are to be; None if there are several, or transformers chooses."""
    if device_map is None:
        return torch.device("cpu")
    if isinstance(device_map, Mapping):
        if set(device_map) != {""}:
            return None
        device_map = device_map[""]
    if isinstance(device_map, int):
        return torch.device("cuda", device_map)
    try:
        device = torch.device(device_map)
    except RuntimeError:  # "auto" and its like
        return None
    return device if device.type in ("cpu", "cuda") else None


def _merged(model_class: Any, config: Any) -> bool:
    """Whether the class makes its parameters out of several tensors (experts, mostly): these must not keep the
    memory of their neighbours. True also where transformers does not say."""
    try:
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping
        from transformers.core_model_loading import WeightConverter
    except ImportError:  # this version has no such table there
        return True
    parts = [config, *(getattr(config, name, None) for name in type(config).sub_configs)]
    names = {model_class.__name__, *(getattr(part, "model_type", None) for part in parts)} - {None}
    return any(
        isinstance(step, WeightConverter)
        for name in names
        for step in get_checkpoint_conversion_mapping(name) or ()
    )


def _kept_dtype(headers: Headers, config: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether the model keeps its tensors in the dtype in which they are stored."""
    if (
        kwargs.get("quantization_config") is not None
        or getattr(config, "quantization_config", None) is not None
    ):
        return False
    if any(
        kwargs.get(name) is not None for name in ("distributed_config", "tp_plan", "tp_size", "device_mesh")
    ):
        return False
    asked = kwargs.get("dtype") if kwargs.get("dtype") is not None else kwargs.get("torch_dtype")
    stored = {TORCH.get(info.dtype) for info in headers.infos() if info.dtype.startswith(("F", "BF"))}
    if asked is None or asked == "auto":
        asked = config.dtype
        if asked is None:
            return len(stored) <= 1
    if isinstance(asked, str):
        asked = getattr(torch, asked, None)
    return isinstance(asked, torch.dtype) and stored <= {asked}


def _finish(model: Any, source: Source, folder: Path, kwargs: Mapping[str, Any]) -> None:
    """What transformers does with a folder and not with a state dict."""
    model.config.name_or_path = model.name_or_path = source.name
    if model.can_generate() and kwargs.get("generation_config") is None:
        generation = transformers.GenerationConfig
        try:
            model.generation_config = generation.from_pretrained(folder)
        except OSError:  # there is none: as transformers does, from the model's configuration
            model.generation_config = generation.from_pretrained(
                folder, config_file_name="config.json", _from_model_config=True
            )


# -- the way back -----------------------------------------------------------------------------------------


def _default(
    model_class: Any, source: Source, model_args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """transformers' own loader, on the complete folder, whose headers are compared with its index first."""
    folder = whole_folder(source)
    with contextlib.suppress(_NotForUs):
        config = kwargs.get("config")
        within = DirectorySource(folder / kwargs.get("subfolder", ""))
        weights, checkpoint = _checkpoint(within, config, kwargs)
        read_headers(weights, checkpoint)
    # A folder needs no question to the hub.
    arguments = {"local_files_only": True, **kwargs, "output_loading_info": True}
    model, info = model_class.from_pretrained(folder, *model_args, **arguments)
    return model, info


def _warn(sentence: str) -> None:
    warnings.warn(sentence, RuntimeWarning, stacklevel=4)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0].rstrip(".")
