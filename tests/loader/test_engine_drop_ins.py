"""accelerate, diffusers and safetensors' own callers through `patched_safetensors`, and without a patch."""

from __future__ import annotations

import importlib.util
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("safetensors", reason="safetensors is not installed")

import safetensors
import safetensors.torch
from safetensors.torch import save_file

from headrace.cache.errors import CheckpointError, MissingTensor
from headrace.loader import load, load_file
from headrace.loader import safe_open as our_safe_open
from headrace.loader.engines import patched_safetensors

needs_accelerate = pytest.mark.skipif(
    importlib.util.find_spec("accelerate") is None,
    reason="accelerate is not installed: make setup installs it",
)
needs_diffusers = pytest.mark.skipif(
    importlib.util.find_spec("diffusers") is None, reason="diffusers is not installed: make setup installs it"
)


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(8, 16)
        self.second = torch.nn.Linear(16, 4)

    def forward(self, values: torch.Tensor) -> Any:
        return self.second(torch.relu(self.first(values)))


@pytest.fixture
def net(tmp_path: Path) -> tuple[Net, Path]:
    """A small model, sharded as accelerate writes it."""
    torch.manual_seed(2)
    model = Net()
    index: dict[str, str] = {}
    for number, part in enumerate(("first", "second"), 1):
        name = f"model-0000{number}-of-00002.safetensors"
        tensors = {key: value for key, value in model.state_dict().items() if key.startswith(part)}
        save_file(tensors, tmp_path / name, {"format": "pt"})
        index |= dict.fromkeys(tensors, name)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return model, tmp_path


def test_names_are_exchanged_within_and_only_within(net: tuple[Net, Path]) -> None:
    theirs = safetensors.safe_open, safetensors.torch.load_file, vars(safetensors.torch)["safe_open"]
    with patched_safetensors():
        assert safetensors.torch.load_file is load_file
        shard = net[1] / "model-00001-of-00002.safetensors"
        with safetensors.safe_open(shard, framework="pt") as file:
            assert isinstance(file, our_safe_open)
        with safetensors.safe_open(shard, framework="numpy") as other:
            assert type(other.get_tensor("first.bias")).__name__ == "ndarray"
        with patched_safetensors():
            assert safetensors.torch.load_file is load_file
        assert safetensors.torch.load_file is load_file
    assert theirs == (
        safetensors.safe_open,
        safetensors.torch.load_file,
        vars(safetensors.torch)["safe_open"],
    )


def test_an_error_within_ends_the_exchange_too() -> None:
    theirs = safetensors.torch.load_file
    with pytest.raises(ZeroDivisionError), patched_safetensors():
        raise ZeroDivisionError
    assert safetensors.torch.load_file is theirs


def test_contexts_of_two_threads_may_overlap() -> None:
    theirs = safetensors.torch.load_file
    entered, leave = threading.Event(), threading.Event()

    def other() -> None:
        with patched_safetensors():
            entered.set()
            leave.wait(30)

    thread = threading.Thread(target=other)
    with patched_safetensors():
        thread.start()
        assert entered.wait(30)
    assert safetensors.torch.load_file is load_file
    leave.set()
    thread.join()
    assert safetensors.torch.load_file is theirs


@needs_accelerate
@pytest.mark.parametrize("device_map", [{"": "cpu"}, {"first": "cpu", "second": "cpu"}], ids=str)
def test_accelerate_loads_and_dispatches(net: tuple[Net, Path], device_map: dict[str, str]) -> None:
    from accelerate import init_empty_weights, load_checkpoint_and_dispatch

    model, folder = net
    with init_empty_weights():
        ours = Net()
    with patched_safetensors():
        ours = load_checkpoint_and_dispatch(ours, str(folder), device_map=device_map)
    values = torch.arange(8.0)
    assert torch.equal(ours(values), model(values))


@needs_accelerate
def test_accelerate_gets_headraces_errors(net: tuple[Net, Path]) -> None:
    from accelerate import init_empty_weights, load_checkpoint_and_dispatch

    shard = net[1] / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-8])
    with init_empty_weights():
        ours = Net()
    with pytest.raises(CheckpointError, match=shard.name), patched_safetensors():
        load_checkpoint_and_dispatch(ours, str(net[1]), device_map={"": "cpu"})


@needs_accelerate
def test_without_a_patch_the_tensors_are_assigned_and_dispatched(
    net: tuple[Net, Path], tmp_path: Path
) -> None:
    """What the documentation recommends: complete by the index, and while it is staged."""
    from accelerate import dispatch_model, init_empty_weights

    model, folder = net
    with init_empty_weights():
        ours = Net()
    ours.load_state_dict(load(f"file://{folder}", root=str(tmp_path / "store")).tensors, assign=True)
    ours = dispatch_model(ours, {"": "cpu"})
    values = torch.arange(8.0)
    assert torch.equal(ours(values), model(values))
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(MissingTensor):
        load(folder)


@needs_diffusers
@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning"
)  # diffusers' own, on import
def test_diffusers_loads_a_model(tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    torch.manual_seed(3)
    plain = AutoencoderKL(block_out_channels=[32], norm_num_groups=8).eval()
    plain.save_pretrained(tmp_path / "vae", max_shard_size="300KB")
    assert len(list((tmp_path / "vae").glob("*.safetensors"))) > 1
    with patched_safetensors():
        ours = AutoencoderKL.from_pretrained(tmp_path / "vae", low_cpu_mem_usage=False)
    other = AutoencoderKL.from_config(AutoencoderKL.load_config(tmp_path / "vae"))
    other.load_state_dict(load(tmp_path / "vae").tensors, assign=True)
    images = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        expected = plain(images).sample
        assert torch.equal(ours(images).sample, expected)
        assert torch.equal(other.eval()(images).sample, expected)
