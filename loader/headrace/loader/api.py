"""`load` and `stream`: a model's tensors, from a directory, a file or a model reference."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed

from headrace.cache.errors import UsageError
from headrace.cache.safetensors import TensorInfo
from headrace.loader.checkpoint import find_checkpoint
from headrace.loader.choose import ReadPath, check_read_path
from headrace.loader.crew import Crew
from headrace.loader.digest import tensors_digest
from headrace.loader.gathering import GatherPlan
from headrace.loader.opening import DeviceReading, Opening
from headrace.loader.plan import FilePlan, Selection
from headrace.loader.ranks.session import Ranks, Session, together
from headrace.loader.readers.fetch import Fetch
from headrace.loader.readers.gather import DeviceGatherReader
from headrace.loader.readers.gpudirect import device_reader
from headrace.loader.readers.reader import FileReader
from headrace.loader.reference import open_source
from headrace.loader.sinks.cuda import CudaDevice
from headrace.loader.sinks.device import Device, Ring
from headrace.loader.slices import SlicePlan
from headrace.loader.source import DirectorySource, Source, SourceFile
from headrace.loader.trace import Span, Trace
from headrace.loader.transfer import DEFAULT_THREADS, Transfer
from headrace.loader.verify import VerifyMode, check_verify, reading

MAX_AHEAD = 1 << 30
"""By default `stream` reads at most this many bytes of complete tensors ahead of who takes them."""

_STREAM_IMAGE = 256 * 1024 * 1024  # memory of streamed tensors is returned in pieces of about this


@dataclass(frozen=True, slots=True)
class LoadStats:
    """What a load did.

    Attributes:
        source: what was loaded, as the user named it.
        snapshot: the snapshot id, where there is one.
        files: how many files were read.
        tensors: how many tensors were loaded.
        bytes: of these tensors.
        verified: bytes of the files that were compared with their digests meanwhile.
        seconds: from the call until every tensor was there.
        read_path: mapped, buffered, direct, or mixed.
        outside: seconds of these in which no thread was bringing bytes in, or waiting for some to be staged.
        trace: where the time went (summed over threads).
        explain: one sentence for each file: which read path, and why.
    """

    source: str
    snapshot: str | None
    files: int
    tensors: int
    bytes: int
    verified: int
    seconds: float
    read_path: str
    outside: float
    trace: tuple[Span, ...]
    explain: tuple[str, ...]

    @property
    def gigabytes_per_second(self) -> float:
        """1e9 bytes per second."""
        return self.bytes / 1e9 / self.seconds if self.seconds else 0.0

    def as_json(self) -> dict[str, Any]:
        """The fields of `headrace load --json`, without the digest."""
        return {
            "snapshot": self.snapshot,
            "tensors": self.tensors,
            "bytes": self.bytes,
            "verified": self.verified,
            "seconds": self.seconds,
            "gigabytes_per_second": self.gigabytes_per_second,
            "read_path": self.read_path,
            "trace": [asdict(span) for span in self.trace],
            "explain": list(self.explain),
        }


@dataclass(frozen=True, slots=True)
class Loaded:
    """A loaded model.

    Attributes:
        tensors: by name, in file order. Those of one file (on a device: of one slab) share one storage:
            clone a tensor before saving it alone.
        infos: dtype, shape and place as in the files' headers.
        stats: what the load did.
    """

    tensors: dict[str, torch.Tensor]
    infos: dict[str, TensorInfo]
    stats: LoadStats

    def digest(self) -> str:
        """The tensors digest of what is in memory now (see `headrace.loader.digest`)."""
        return tensors_digest(self.tensors, self.infos)


def load(
    src: str | os.PathLike[str] | Source,
    device: str | int | torch.device | Device = "cpu",
    *,
    names: Iterable[str] | None = None,
    patterns: Iterable[str] | None = None,
    read_path: ReadPath = "auto",
    slices: SlicePlan | None = None,
    verify: VerifyMode = "auto",
    group: Ranks | torch.distributed.ProcessGroup | None = None,
    threads: int | None = None,
    root: str | None = None,
    domain: str | None = None,
    progress: Any = None,
) -> Loaded:
    """Load a model's tensors. What is still being staged is read as it arrives.

    Args:
        src: a directory, a .safetensors or index file, a model reference, or an open `Source`, which stays
            open.
        device: "cpu", or a CUDA device.
        names, patterns: only these tensors, or those that match one of these globs; by default all.
        read_path: "mapped" (views of the file: nothing is copied, and the file must not change as long as
            the tensors live), "buffered" (private memory), "direct" (private memory, read around the page
            cache), or "auto", which takes for each part of each file what is fastest for it.
        slices: load of each tensor only what one rank of several needs, and read little else. `infos` has the
            slices' shapes; tensors that the rank does without are left out.
        verify: compare the bytes with their digests while they are read: "always", "boot" (what was not
            verified since the machine started), "never", or "auto" (what never was). Only what comes from a
            store has digests; what is being staged is verified before it can be read, in any case.
        group: the processes that load the same model at the same time, each calling this. Those of one node
            read each byte once for all of them, and succeed together or fail together (see `Ranks`).
        threads: that read, at most; by default 8. Where nothing is waited for, no more than cores.
        root, domain, progress: for staging a model reference.

    Tensors whose dtype torch lacks come as their bytes: uint8, one-dimensional.

    Raises:
        CheckpointError: files that are not safetensors, or contradict each other.
        MissingTensor: tensors or shards that the index or the caller names are not there.
        IntegrityError: bytes do not have their digest.
        LoadError: a file became shorter or changed meanwhile, memory ran out, or another rank of the group
            failed, ended, hangs, or wants something else; it is named.
        StagingStopped: a part is not staged, and nobody stages it any more.
        UsageError: an argument that cannot be meant.
    """
    selection = Selection.of(names, patterns)
    check_read_path(read_path)
    check_verify(verify)
    workers = _threads(threads)
    target = _device(device)
    trace = Trace()
    with contextlib.ExitStack() as stack:
        session = stack.enter_context(together(group))
        with trace.span("resolve"):
            source = _source(src, stack, root, domain, progress)
        transfer = Transfer(trace)
        _join(session, target, transfer, judged=True)
        for_device = _for_device(target, workers, stack, session)
        opening = _opening(source, selection, read_path, verify, transfer, for_device)
        opening.threads, opening.slices, opening.session = workers, slices, session
        stack.callback(opening.close)
        with Crew(transfer, workers) as crew:
            crew.finish(
                opening.run
            )  # not in a thread of its own: making thousands of tensors there takes longer
        if session is not None:
            session.check()
        tensors: dict[str, torch.Tensor] = {}
        with trace.span("place"):
            for reader in opening.readers:
                tensors.update(reader.take_all())
            if slices is not None:  # a file's ranges came before what was gathered
                tensors = {name: tensors[name] for name in opening.infos}
        if session is not None:
            with trace.span("together"):
                session.finish()
        stats = _stats(source, opening, trace)
    return Loaded(tensors, opening.infos, stats)


def stream(
    src: str | os.PathLike[str] | Source,
    device: str | int | torch.device | Device = "cpu",
    *,
    names: Iterable[str] | None = None,
    patterns: Iterable[str] | None = None,
    read_path: ReadPath = "auto",
    slices: SlicePlan | None = None,
    verify: VerifyMode = "auto",
    group: Ranks | torch.distributed.ProcessGroup | None = None,
    threads: int | None = None,
    max_ahead: int = MAX_AHEAD,
    root: str | None = None,
    domain: str | None = None,
    progress: Any = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, tensor) as tensors complete: in file order when everything is there, in the order in
    which their bytes arrive while staging.

    Reading pauses while complete tensors of `max_ahead` bytes wait to be taken. Memory is returned as the
    tensors are dropped, in pieces of about 256 MiB. Closing the generator stops reading.

    Arguments and errors are those of `load`. Some errors show late (a missing tensor, a damaged shard): what
    was yielded before is right, but only an iteration that ended by itself gave the whole model.
    """
    selection = Selection.of(names, patterns)
    check_read_path(read_path)
    check_verify(verify)
    if max_ahead <= 0:
        raise UsageError(f"max_ahead must be a positive number of bytes, not {max_ahead}")
    workers = _threads(threads)
    target = _device(device)

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        with contextlib.ExitStack() as stack:
            session = stack.enter_context(together(group))
            source = _source(src, stack, root, domain, progress)
            transfer = Transfer(Trace(), per_tensor=True, max_ahead=max_ahead)
            _join(session, target, transfer, judged=False)  # who takes the tensors may take their time
            for_device = _for_device(target, workers, stack, session)
            opening = _opening(source, selection, read_path, verify, transfer, for_device, _STREAM_IMAGE)
            opening.threads, opening.slices, opening.session = workers, slices, session
            stack.callback(opening.close)
            with Crew(transfer, workers) as crew:
                opened = crew.beside(opening.run)
                for ready in transfer.taken():
                    reader = ready.job.reader
                    yield reader.plan.infos[ready.number].name, reader.take(ready.number)
                crew.finish(opened.result)
            if session is not None:
                session.finish()

    return tensors()


def _source(
    src: str | os.PathLike[str] | Source,
    stack: contextlib.ExitStack,
    root: str | None,
    domain: str | None,
    progress: Any,
) -> Source:
    if not isinstance(src, str | os.PathLike):
        return src
    source = open_source(src, root=root, domain=domain, progress=progress)
    stack.callback(source.close)
    return source


def _opening(
    source: Source,
    selection: Selection,
    read_path: ReadPath,
    verify: VerifyMode,
    transfer: Transfer,
    for_device: DeviceReading | None,
    max_image: int | None = None,
) -> Opening:
    only = source.only if isinstance(source, DirectorySource) else None
    with transfer.trace.span("resolve"):
        checkpoint = find_checkpoint(source, only, reading(verify))
    return Opening(source, checkpoint, selection, read_path, transfer, max_image, for_device, verify=verify)


def _stats(source: Source, opening: Opening, trace: Trace) -> LoadStats:
    used = {reader.name for reader in opening.readers}
    return LoadStats(
        source=source.name,
        snapshot=source.snapshot,
        files=len(opening.files),
        tensors=len(opening.infos),
        bytes=sum([info[4] - info[3] for info in opening.infos.values()]),
        verified=sum(reader.check.verified_bytes for reader in opening.readers if reader.check),
        seconds=trace.elapsed(),
        read_path=used.pop() if len(used) == 1 else "mixed" if used else "none",
        outside=trace.outside(),
        trace=trace.spans(),
        explain=tuple(opening.explain),
    )


def _threads(threads: int | None) -> int:
    if threads is None:
        return DEFAULT_THREADS
    if threads < 1:
        raise UsageError(f"threads must be at least 1, not {threads}")
    return threads


def _device(device: str | int | torch.device | Device) -> Device | None:
    """The device to copy to; None for host memory."""
    if isinstance(device, str | int | torch.device):
        try:
            named = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        except RuntimeError as error:
            raise UsageError(f"{device!r} is not a device: use cpu or cuda:N") from error
        if named.type == "cpu":
            return None
        if named.type != "cuda":
            raise UsageError(f"loading to {named} is not supported: use cpu or cuda:N")
        return CudaDevice(named)
    return device


def _join(session: Session | None, target: Device | None, transfer: Transfer, *, judged: bool) -> None:
    """Let what happens to other ranks stop the reading; `judged`: they may expect progress of this one."""
    if session is None:
        return
    session.device = "" if target is None else target.torch_device.type
    transfer.on_stop = session.stop
    session.watch(transfer.trace.events if judged else None, transfer.stop)


def _for_device(
    target: Device | None, workers: int, stack: contextlib.ExitStack, session: Session | None
) -> DeviceReading | None:
    if target is None:
        return None
    # Two for each thread: one is being filled while the other is copied from.
    ring = Ring(target, 2 * workers)
    stack.callback(ring.close)

    def reader(file: SourceFile, plan: FilePlan, fetch: Fetch) -> FileReader:
        if isinstance(plan, GatherPlan):
            return DeviceGatherReader(file, plan, target, ring)
        if session is not None:
            made = session.device_reader(file, plan, fetch, target, ring)
            if made is not None:
                return made
        return device_reader(file, plan, fetch, target, ring)

    return reader
