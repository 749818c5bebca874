"""Loads safetensors into memory: fast, checked, and while the model is still being staged.

>>> from headrace.loader import load
>>> model = load("s3://bucket/llama-3-8b")          # doctest: +SKIP
>>> model.tensors["lm_head.weight"].shape           # doctest: +SKIP

Importing this needs torch, xxhash and the standard library, nothing else.
"""

from headrace.cache.safetensors import Header, TensorInfo, parse_header, read_header
from headrace.loader.api import Loaded, LoadStats, load, stream
from headrace.loader.digest import tensors_digest
from headrace.loader.drop_in import load_file, safe_open
from headrace.loader.ranks.session import Ranks
from headrace.loader.reference import open_source
from headrace.loader.slices import Experts, Fused, Part, Replicated, Rule, SlicePlan, Split
from headrace.loader.source import DirectorySource, Source, SourceFile

__all__ = [
    "DirectorySource",
    "Experts",
    "Fused",
    "Header",
    "LoadStats",
    "Loaded",
    "Part",
    "Ranks",
    "Replicated",
    "Rule",
    "SlicePlan",
    "Source",
    "SourceFile",
    "Split",
    "TensorInfo",
    "load",
    "load_file",
    "open_source",
    "parse_header",
    "read_header",
    "safe_open",
    "stream",
    "tensors_digest",
]
