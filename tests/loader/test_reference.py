"""Loading by model reference: staged on the way, read from the store afterwards, the same tensors always."""

from __future__ import annotations

from pathlib import Path

from support.safetensors_files import entry, write_sharded

from headrace.loader import load, stream

SHARDS = {
    f"model-{shard}.safetensors": [entry(f"{shard}.{number}", "BF16", (300, 700)) for number in range(4)]
    for shard in "ab"
}


def test_a_reference_loads_while_it_is_staged_and_again_from_the_store(tmp_path: Path) -> None:
    folder, root = tmp_path / "origin", str(tmp_path / "store")
    write_sharded(folder, SHARDS, "model.safetensors.index.json")
    plain = load(folder)
    staging = load(f"file://{folder}", root=root)
    staged = load(f"file://{folder}", root=root)
    assert staging.digest() == staged.digest() == plain.digest()
    assert plain.stats.snapshot is None
    assert staging.stats.snapshot == staged.stats.snapshot is not None
    assert staging.stats.source == f"file://{folder}"
    assert {name for name, _ in stream(f"file://{folder}", root=root)} == set(plain.tensors)
