"""What a run came to: times, bytes, calls, the curve; as text, JSON and a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

from benchmarks.simulator.case import Case
from benchmarks.simulator.world import Node, World


@dataclass(frozen=True, slots=True)
class Result:
    """One run.

    Attributes:
        case: what was run.
        times: seconds that each cold node of full speed needed, from when it joined; sorted.
        slow: the same of slow nodes.
        unfinished: living nodes that never had everything.
        curve: the least complete/arrived of any node whose curve was drawn up, for f >= 0.25.
        points: that node's curve.
        progress: (seconds, fraction of all bytes that all cold nodes had then).
        counts: what was counted.
        seconds: simulated, from the start of the first node to the end of the last.
        cpu: seconds that working it out took.
    """

    case: Case
    times: tuple[float, ...]
    slow: tuple[float, ...]
    unfinished: int
    curve: float
    points: tuple[tuple[float, float], ...]
    origin: float
    far: int
    counts: Mapping[str, int]
    seconds: float
    cpu: float

    @classmethod
    def of(cls, world: World, cpu: float) -> Result:
        """What a world came to that has run."""
        case = world.case
        living = [node for node in world.nodes if not node.dead and not node.warm]
        curves = [node.curve for node in living if node.curve is not None]
        worst = min(curves, key=lambda curve: curve.worst, default=None)
        counts = world.counts
        return cls(
            case=case,
            times=_times(node for node in living if not node.slow),
            slow=_times(node for node in living if node.slow),
            unfinished=sum(node.finished == inf for node in living),
            curve=1.0 if worst is None else worst.worst,
            points=() if worst is None else tuple(worst.points),
            origin=counts.origin / case.model,
            far=counts.far,
            counts={
                "calls": counts.calls,
                "told": counts.told,
                "asked": counts.asked,
                "busy": counts.busy,
                "failed": counts.failed,
                "hedges": counts.hedges,
                "peer_bytes": counts.peers,
                "origin_bytes": counts.origin,
                "cut_bytes": counts.cut,
            },
            seconds=world.now,
            cpu=cpu,
        )

    def at(self, share: float) -> float:
        """The time within which that share of the nodes of full speed was done; infinite without any."""
        times = self.times
        return times[min(len(times) - 1, int(share * len(times)))] if times else inf

    def json(self) -> dict[str, Any]:
        """The figures by name."""
        case, counts = self.case, self.counts
        bound = case.bound()
        figures = {"median": self.at(0.5), "p99": self.at(0.99), "last": self.at(1.0)}
        return {
            "nodes": case.nodes,
            "model_bytes": case.model,
            "chunks": len(case.sizes()),
            "bound_seconds": bound,
            "seconds": figures,
            "ratio": {name: seconds / bound if bound else None for name, seconds in figures.items()},
            "slow_seconds": list(self.slow),
            "unfinished": self.unfinished,
            "origin_models": self.origin,
            "cross_zone_bytes": self.far,
            "tracker_calls": counts["calls"],
            "chunks_per_call": counts["told"] / max(1, counts["calls"]),
            "questions_per_chunk": counts["asked"] / max(1, counts["told"]),
            "calls_per_second": counts["calls"] / self.seconds if self.seconds else 0.0,
            "busy": counts["busy"],
            "failed": counts["failed"],
            "hedges": counts["hedges"],
            "peer_bytes": counts["peer_bytes"],
            "origin_bytes": counts["origin_bytes"],
            "completion": self.curve,
            "simulated_seconds": self.seconds,
            "cpu_seconds": self.cpu,
        }

    def __str__(self) -> str:
        case, figures = self.case, self.json()
        seconds, ratio = figures["seconds"], figures["ratio"]
        lines = [
            f"{case.nodes} nodes, {case.model / 1e9:g} GB in {figures['chunks']} chunks, "
            f"{case.deaths} deaths, {case.slow} slow, {case.nodes - case.cold} warm",
            f"  completion   median {seconds['median']:.2f} s, p99 {seconds['p99']:.2f} s, "
            f"last {seconds['last']:.2f} s",
        ]
        if ratio["p99"] is not None:
            lines.append(
                f"  bound        {figures['bound_seconds']:.2f} s: median {ratio['median']:.3f}, "
                f"p99 {ratio['p99']:.3f}, last {ratio['last']:.3f} times as long"
            )
        if self.slow:
            lines.append(f"  slow nodes   last {self.slow[-1]:.2f} s")
        if self.unfinished:
            lines.append(f"  UNFINISHED   {self.unfinished} nodes")
        lines += [
            f"  origin       {self.origin:.4f} models; cross-zone {self.far / 1e9:.2f} GB",
            f"  tracker      {figures['tracker_calls']} calls ({figures['calls_per_second']:.0f} a second), "
            f"{figures['chunks_per_call']:.1f} chunks gained in each, "
            f"{figures['questions_per_chunk']:.2f} questions a chunk",
            f"  transfers    {figures['busy']} found a peer busy, {figures['failed']} failed, "
            f"{figures['hedges']} second tries",
            f"  completeness at least {self.curve:.3f} f in complete tensors for f >= 0.25",
            f"  worked out   in {self.cpu:.1f} s of CPU",
        ]
        return "\n".join(lines)


def _times(nodes: Any) -> tuple[float, ...]:
    found: list[Node] = [node for node in nodes if node.finished < inf]
    return tuple(sorted(node.finished - node.joined for node in found))


def draw(results: Sequence[Result], target: Path) -> None:
    """Completion times of all nodes and the worst tensor-completion curve; of several runs: growth with nodes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    left, right = axes
    if len(results) == 1:
        times = results[0].times
        left.plot(times, [(at + 1) / len(times) for at in range(len(times))])
        left.axvline(results[0].case.bound(), color="C3", linewidth=0.8)
        left.set_xlabel("seconds; red: the bound")
        left.set_ylabel("share of the nodes that are done")
        right.plot(*zip(*results[0].points, strict=True))
        right.plot([0.25, 1], [0.2, 0.8], color="C3", linewidth=0.8)
        right.set_xlabel("arrived; red: the aim")
        right.set_ylabel("in complete tensors")
    else:
        nodes = [result.case.nodes for result in results]
        for name in ("median", "p99", "last"):
            left.plot(nodes, [result.json()["ratio"][name] for result in results], "o-", label=name)
        left.axhline(1.5, color="C3", linewidth=0.8)
        left.set_ylabel("times the bound; red: the aim")
        left.legend()
        right.plot(nodes, [result.json()["calls_per_second"] for result in results], "o-")
        right.set_ylabel("tracker calls a second")
        for axis in axes:
            axis.set_xscale("log")
            axis.set_xlabel("nodes")
            axis.set_ylim(bottom=0)
    figure.savefig(target, dpi=130)
    pyplot.close(figure)
