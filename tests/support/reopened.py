"""The program that opens a store again after a power loss; `loop.after_power_loss` starts it.

In its own mount namespace it mounts the image, binds another boot id over the kernel's, and then does
what the next boot does: look, recover, stage to the end. One JSON object says what it found.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import uuid
from collections import Counter
from pathlib import Path

_BOOT_ID = "/proc/sys/kernel/random/boot_id"


def mount(*how: str) -> None:
    subprocess.run(["mount", *how], check=True)


def look(root: Path, truth: dict[str, bytes], reference: str) -> dict[str, object]:
    """Nothing wrong is trusted by a reader, by a recovered stager, or at the end. Raises AssertionError."""
    # Imported here: the boot id has changed by now.
    from support.crashes import assert_nothing_wrong, phase
    from support.models import stage_small, visible

    from headrace.cache.chunkmap import ABSENT, DURABLE, WRITTEN, ChunkMap, boot_id
    from headrace.cache.errors import StoreError
    from headrace.cache.object import ObjectFolder, ObjectWriter, learned_digests
    from headrace.cache.store import Store

    assert boot_id() == Path(_BOOT_ID).read_text().strip()
    how_far = phase(root, len(truth))
    found: Counter[str] = Counter()
    torn: set[str] = set()
    states: dict[str, bytes] = {}
    folders: list[ObjectFolder] = []
    if (root / "format").exists():
        with Store.open(root, writable=False) as store:
            folders = [folder for domain in store.domains() for folder in domain.objects()]
    for folder in folders:
        try:
            folder.spec()
            learned_digests(folder, 1)
            with ChunkMap.open(folder.map, writable=False) as chunk_map:
                states[folder.id] = chunk_map.states()
        except (StoreError, FileNotFoundError):
            # Made a moment ago, and nothing of it was synced: the stager must make it again.
            assert not folder.complete
            torn.add(folder.id)
    found["torn objects"] = len(torn)
    found["read at once"] = assert_nothing_wrong(root, truth, torn)
    for folder in folders:
        if folder.id in torn or folder.complete:
            continue
        try:
            writer = ObjectWriter(folder, folder.spec())
        except (StoreError, FileNotFoundError):
            torn.add(folder.id)
            continue
        after = writer.map.states()
        writer.close()
        found["durable"] += after.count(DURABLE)
        found["hashed and right"] += after.count(WRITTEN)
        found["returned to absent"] += after.count(ABSENT) - states[folder.id].count(ABSENT)
    found["read after recovery"] = assert_nothing_wrong(root, truth, torn)
    stage_small(reference, root)
    assert visible(root) == truth
    return {"phase": how_far, **found}


def main() -> None:
    task = json.loads(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        disk = Path(folder) / "disk"
        disk.mkdir()
        mount("-o", task["options"], task["image"], str(disk))
        try:
            boot = Path(folder) / "boot_id"
            boot.write_text(f"{uuid.uuid4()}\n")
            mount("--bind", str(boot), _BOOT_ID)
            truth = {p: (Path(task["truth"]) / p).read_bytes() for p in task["files"]}
            print(json.dumps(look(disk / "store", truth, task["reference"])))
        finally:
            os.chdir("/")
            subprocess.run(["umount", str(disk)], check=True)


if __name__ == "__main__":
    main()
