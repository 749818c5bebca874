"""What importing the loader costs the inference process, and what it offers."""

from __future__ import annotations

import json
import subprocess
import sys

import headrace.loader


def imported(statement: str) -> set[str]:
    script = f"import sys, json; {statement}; print(json.dumps(sorted(sys.modules)))"
    answer = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        capture_output=True, text=True, check=True, env={"PYTHONPATH": ":".join(sys.path)},
    )  # fmt: skip
    return set(json.loads(answer.stdout))


HEAVY = {
    "obstore", "fsspec", "s3fs", "boto3", "botocore", "aiohttp", "requests", "urllib3", "httpx", "click", "rich",
    "blake3", "cryptography", "grpc", "safetensors", "huggingface_hub", "sqlite3", "redis",
}  # fmt: skip


def test_importing_the_loader_adds_nothing_but_itself_to_torch() -> None:
    added = imported("import headrace.loader") - imported("import torch, xxhash")
    assert not HEAVY & added
    ours = {name for name in added if name == "headrace" or name.startswith("headrace.")}
    assert {name for name in ours if name.startswith("headrace.cache.")} == {
        "headrace.cache.compact",
        "headrace.cache.errors",
        "headrace.cache.paths",
        "headrace.cache.safetensors",
    }
    others = {name.partition(".")[0] for name in added - ours}
    assert others <= set(sys.stdlib_module_names)
    assert not {"http", "asyncio", "ssl"} & others


def test_the_header_parser_and_the_errors_need_no_torch() -> None:
    modules = imported("import headrace.cache.errors, headrace.cache.safetensors")
    assert not (HEAVY | {"torch", "numpy", "xxhash", "asyncio", "http"}) & modules


def test_what_the_loader_offers_is_what_it_says() -> None:
    assert set(headrace.loader.__all__) == {
        "DirectorySource", "Experts", "Fused", "Header", "LoadStats", "Loaded", "Part", "Ranks", "Replicated", "Rule",
        "SlicePlan", "Source", "SourceFile", "Split", "TensorInfo", "load", "load_file", "open_source",
        "parse_header", "read_header", "safe_open", "stream", "tensors_digest",
    }  # fmt: skip
    assert all(hasattr(headrace.loader, name) for name in headrace.loader.__all__)
