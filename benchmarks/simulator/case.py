"""What is simulated: nodes, links, a model, and what happens to them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import ceil, inf

from headrace.cache.errors import UsageError
from headrace.cache.policy.limits import Limits

GBIT = 1e9 / 8
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Case:
    """One run. Bytes, seconds, and bytes a second. Raises UsageError for what cannot be simulated.

    Attributes:
        nodes: that stage the model.
        model: its bytes.
        chunk: bytes of each chunk but the last.
        tensors: bytes of all tensors, in file order; empty: those of a Llama of that size.
        up, down: of each node.
        slow, slow_rate: so many nodes have that rate both ways.
        origin: all that the origin gives.
        connection: what one connection to the origin gives.
        first_byte: until the origin's first byte of a request.
        zones, zone_rate: nodes are spread over zones; what goes into and out of each of them, together.
        latency, far: round trip between nodes of one zone, and of two.
        tracker: round trip to the tracker and its work.
        overhead: seconds that a node spends on each chunk besides, such as verifying and writing it.
        slots: uploads of a node at once.
        join_over: nodes come evenly over this time.
        warm: fraction of the nodes that have the model.
        deaths, death_at, death_spread: so many nodes die, from then on, evenly over that time.
        noticed: after this time the tracker forgets a dead node.
        lease: of a claim.
        seed: of everything that is left to chance.
        exact: links are shared fairly at every moment; otherwise who comes first is served first, which is much
            quicker to work out. None: exact up to 64 nodes.
        limits: of the policy.
    """

    nodes: int = 8
    model: int = 512 * 10**6
    chunk: int = 4 * MIB
    tensors: tuple[int, ...] = ()
    up: float = 0.4 * GBIT
    down: float = 0.4 * GBIT
    slow: int = 0
    slow_rate: float = 0.05 * GBIT
    origin: float = 0.8 * GBIT
    connection: float = inf
    first_byte: float = 0.01
    zones: int = 1
    zone_rate: float = inf
    latency: float = 0.0005
    far: float = 0.001
    tracker: float = 0.001
    overhead: float = 0.0
    slots: int = 8
    join_over: float = 0.0
    warm: float = 0.0
    deaths: int = 0
    death_at: float = 0.0
    death_spread: float = 0.0
    noticed: float = 10.0
    lease: float = 10.0
    seed: int = 1
    exact: bool | None = None
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        for name in (
            "nodes",
            "model",
            "chunk",
            "up",
            "down",
            "origin",
            "connection",
            "slow_rate",
            "zones",
            "zone_rate",
            "slots",
        ):
            if not getattr(self, name) > 0:
                raise UsageError(f"{name} = {getattr(self, name):g}: give more than 0.")
        if not 0 <= self.warm <= 1:
            raise UsageError(f"warm = {self.warm:g} is no share of the nodes: give 0 to 1.")
        if self.tensors and sum(self.tensors) != self.model:
            raise UsageError(f"the tensors have {sum(self.tensors)} bytes together, the model {self.model}.")
        if self.slow < 0 or self.deaths < 0 or self.slow + self.deaths > self.cold:
            raise UsageError(
                f"{self.slow} slow nodes and {self.deaths} deaths do not fit: {self.cold} nodes have to get the model."
            )

    def sizes(self) -> list[int]:
        """Bytes of each chunk."""
        count = ceil(self.model / self.chunk)
        return [self.chunk] * (count - 1) + [self.model - self.chunk * (count - 1)]

    @property
    def cold(self) -> int:
        """Nodes that have nothing."""
        return self.nodes - int(self.nodes * self.warm)

    def bound(self) -> float:
        """Seconds that no way of staging the model on all cold nodes can beat: max(M/O, M/D, N*M/(O+N*U)).

        Nodes that have the model need nothing from the origin, and give without taking.
        """
        cold, warm = self.cold, self.nodes - self.cold
        if not cold:
            return 0.0
        slow = min(self.slow, cold)
        up = (self.nodes - slow) * self.up + slow * self.slow_rate
        origin = 0.0 if warm else self.model / self.origin
        return max(origin, self.model / self.down, cold * self.model / (self.origin + up))


def llama(model: int) -> tuple[int, ...]:
    """Tensors in the proportions of Llama 3 70B, together `model` bytes."""
    hidden, inner, layers, vocabulary = 8192, 28672, 80, 128256
    layer = [hidden, hidden * hidden, hidden * 1024, hidden * 1024, hidden * hidden]
    layer += [hidden, hidden * inner, hidden * inner, hidden * inner]
    shapes = [vocabulary * hidden, *(layer * layers), hidden, vocabulary * hidden]
    total = sum(shapes)
    edges, before = [], 0
    for shape in shapes:
        before += shape
        edges.append(model * before // total)
    return tuple(stop - start for start, stop in zip([0, *edges[:-1]], edges, strict=True))


_BIG = Case(
    nodes=1000,
    model=140 * 10**9,
    chunk=16 * MIB,
    up=25 * GBIT,
    down=25 * GBIT,
    origin=100 * GBIT,
    connection=100e6,
    first_byte=0.02,
)

PRESETS: Mapping[str, Case] = {
    "cluster": Case(),
    "death": Case(deaths=1, death_at=5.0),
    "slow": Case(slow=1),
    "large": _BIG,
}
