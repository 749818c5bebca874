"""One rank of a real tensor-parallel load by transformers, compared with the slices that headrace loads.

Run as a program: RANK WORLD FILE FOLDER... ; prints one line of JSON for each folder: {"folder", "compared", "sharded",
"different": [names]}. FILE is where the ranks find each other. A folder whose name ends in `-ep` gets its experts
whole, by transformers' plan for that.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from headrace.loader import load
from headrace.loader.slices import SlicePlan
from headrace.loader.source import DirectorySource
from headrace.loader.tp_plan import slices_from_tp_plan, slices_of_source

_PARTS = {"gate_up_proj": (("w1", "gate_proj"), ("w3", "up_proj")), "down_proj": (("w2", "down_proj"),)}


def main() -> None:
    rank, world, meeting = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    for folder in sys.argv[4:]:
        print(json.dumps({"folder": folder, **compare(folder, rank, world)}), flush=True)
    dist.destroy_process_group()


def compare(folder: str, rank: int, world: int) -> dict[str, Any]:
    expert_parallel = folder.endswith("-ep")
    sizes = {"tp_size": world, "ep_size": world if expert_parallel else 1}
    model = AutoModelForCausalLM.from_pretrained(
        folder, distributed_config=DistributedConfig(**sizes), dtype="auto"
    )
    plan: SlicePlan
    if expert_parallel:
        plan = slices_from_tp_plan({**model.tp_plan, **model.ep_plan}, rank, world, experts=4)
    else:
        plan = slices_of_source(DirectorySource(Path(folder)), rank, world)
    ours = load(folder, slices=plan).tensors
    different, sharded = [], 0
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        theirs = parameter.data
        if hasattr(theirs, "to_local"):
            theirs = theirs.to_local()
            sharded += 1
        own = ours[name] if name in ours else _assembled(name, ours)
        if own.shape != theirs.shape or not torch.equal(own, theirs):
            different.append(name)
    return {"compared": len(parameters), "sharded": sharded, "different": different}


def _assembled(name: str, ours: dict[str, torch.Tensor]) -> torch.Tensor:
    """A parameter that transformers makes of several of a checkpoint's tensors, or calls otherwise."""
    holder, _, last = name.replace(".mlp.", ".block_sparse_moe.").rpartition(".")
    if last not in _PARTS:
        return ours[f"{holder}.{last}"]
    holder = next(
        one.rpartition(".experts.")[0] for one in ours if one.startswith(_layer(name)) and ".experts." in one
    )
    experts = sorted(
        {int(one.split(".experts.")[1].split(".")[0]) for one in ours if one.startswith(holder + ".experts.")}
    )
    return torch.stack(
        [torch.cat([_part(ours, holder, n, names) for names in _PARTS[last]]) for n in experts]
    )


def _layer(name: str) -> str:
    return ".".join(name.split(".")[:3]) + "."


def _part(ours: dict[str, torch.Tensor], holder: str, expert: int, names: tuple[str, ...]) -> torch.Tensor:
    found = [ours[one] for name in names if (one := f"{holder}.experts.{expert}.{name}.weight") in ours]
    return found[0]


if __name__ == "__main__":
    main()
