"""What `load.py` measures: where the model lies, who is compared with whom, and what is claimed."""

from __future__ import annotations

from dataclasses import dataclass

MB = 1e6
FIXED = ("headrace-mapped", "headrace-buffered", "headrace-direct")
AUTOPILOT = 1.15


@dataclass(frozen=True, slots=True)
class Against:
    """A claim: the median of the paired ratios of time, ours / `rival`, is at most `limit`.

    With `upper` the upper end of its interval must be, too.
    """

    rival: str
    limit: float
    upper: bool = False


@dataclass(frozen=True, slots=True)
class Bound:
    """A claim on our median alone: `what` is cpu (s/GB), beyond (MB of memory), or outside (s outside reads)."""

    what: str
    limit: float
    unit: str


@dataclass(frozen=True, slots=True)
class Case:
    """One comparison.

    Attributes:
        name: for `--case`.
        title: the question.
        ours: the loader the claims are about.
        place, state: keys of `places.PLACES` and `places.STATES`.
        claims: ratios; their rivals run in every pair.
        bounds: on `ours` alone.
        others: loaders that only appear in the table, in the first few rounds.
        small: the model of 20,000 small tensors.
        part: of `--size`.
        autopilot: the claim is `AUTOPILOT` x the best of the fixed paths, whichever that is here.
        least: pairs, at least.
        device: only with a CUDA device.
    """

    name: str
    title: str
    ours: str = "headrace"
    place: str = "disk"
    state: str = "cold"
    claims: tuple[Against, ...] = ()
    bounds: tuple[Bound, ...] = ()
    others: tuple[str, ...] = ()
    small: bool = False
    part: float = 1.0
    autopilot: bool = False
    least: int = 0
    device: bool = False


_CPU = Bound("cpu", 0.1, "CPU s/GB")
_MEMORY = Bound("beyond", 64 * MB, "MB beyond the tensors")
# Besides, the ring of pinned buffers: two of 8 MiB for each of at most 8 threads.
_RING = Bound("beyond", 64 * MB + 16 * (8 << 20), "MB of host memory, ring included")


def _autopilot(name: str, title: str, place: str, state: str, part: float = 1.0) -> Case:
    return Case(name, title, "headrace", place, state, bounds=(_MEMORY,), part=part, autopilot=True, least=20)


CASES = (
    Case(
        "cold",
        "cold, the disk as it is",
        claims=(Against("raw O_DIRECT", 1.05), Against("runai", 1.05, upper=True)),
        bounds=(_CPU, _MEMORY),
        others=("load_file", "safe_open+clone", "fastsafetensors", "runai-buffered", *FIXED),
    ),
    Case(
        "cold-verified",
        "cold, the disk as it is, every byte verified against the snapshot's digests",
        ours="headrace-verify",
        place="store",
        claims=(Against("raw O_DIRECT", 1.12),),
        bounds=(_MEMORY,),
        others=("headrace",),
    ),
    Case(
        "fast",
        "cold, xfs on a buffered loop device",
        place="fast",
        claims=(Against("raw O_DIRECT", 1.2),),
        bounds=(_CPU, _MEMORY),
        others=("runai", "load_file", "safe_open+clone", "fastsafetensors", *FIXED),
    ),
    Case(
        "warm",
        "warm, into private memory",
        ours="headrace-buffered",
        state="warm",
        claims=(
            Against("safe_open+clone", 1 / 3),
            Against("raw read(2)", 1 / 0.85),
            Against("runai", 1.0),
            Against("runai-buffered", 1.0),
        ),
        bounds=(_MEMORY,),
        others=("fastsafetensors", "headrace"),
    ),
    Case(
        "mapped-small",
        "warm, mapped, page cache in small folios",
        ours="headrace-mapped",
        state="warm, small folios",
        claims=(Against("load_file", 0.6),),
        bounds=(_MEMORY,),
        others=("headrace",),
    ),
    Case(
        "mapped-large",
        "warm, mapped, page cache in large folios",
        ours="headrace-mapped",
        state="warm",
        claims=(Against("load_file", 1.0),),
        bounds=(_MEMORY,),
        others=("headrace",),
    ),
    Case(
        "small",
        "20,000 small tensors, warm",
        state="warm",
        claims=tuple(
            Against(peer, 1 / 1.4)
            for peer in ("load_file", "runai", "safe_open+clone", "fastsafetensors", "runai-buffered")
        ),
        bounds=(Bound("outside", 0.040, "s outside read calls"), _MEMORY),
        others=("headrace-buffered",),
        small=True,
    ),
    Case(
        "small-cold",
        "20,000 small tensors, cold",
        claims=(),
        bounds=(Bound("outside", 0.040, "s outside read calls"), _MEMORY),
        others=("raw O_DIRECT", "load_file", "runai", "safe_open+clone", "fastsafetensors"),
        small=True,
    ),
    _autopilot("auto-cold", "autopilot: cold", "disk", "cold", 0.25),
    _autopilot("auto-warm", "autopilot: warm", "disk", "warm"),
    _autopilot("auto-half", "autopilot: every other block in the page cache", "disk", "half warm", 0.25),
    _autopilot("auto-tmpfs", "autopilot: tmpfs", "tmpfs", "as it is"),
    _autopilot("auto-fuse", "autopilot: FUSE mount", "fuse", "cold", 0.25),
    _autopilot("auto-fast", "autopilot: fast device", "fast", "cold", 0.5),
    _autopilot("auto-throttled", "autopilot: device of 300 MB/s", "throttled", "cold", 0.08),
    Case(
        "device",
        "page cache to device memory",
        state="warm",
        claims=(
            Against("pinned copy", 1 / 0.9),
            Against("load_file", 1.0),
            Against("fastsafetensors", 1.0),
            Against("runai", 1.0),
            Against("instanttensor", 1.0),
        ),
        bounds=(_RING,),
        others=("safe_open+clone",),
        device=True,
    ),
    Case(
        "device-cold",
        "cold disk to device memory",
        claims=(Against("instanttensor", 1.05), Against("runai", 1.05)),
        bounds=(_RING,),
        others=("load_file", "fastsafetensors"),
        device=True,
    ),
)
STAGING = "staging"
"""The case that has a server instead of rivals: see `staged.py`."""
