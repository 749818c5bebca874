"""How the node's bandwidth is shared between jobs: demand before pre-staging. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from headrace.cache.bandwidth import KINDS, Class
from headrace.prefetch.settings import Bandwidth

Paces = dict[Class, dict[str, float | None]]


def paces(bandwidth: Bandwidth, running: Sequence[Class]) -> Paces:
    """What each running job of a class may move of each kind, in bytes per second; None: no limit.

    While a demanded job runs, all pre-staging together gets `held_back`, and never more than half of the
    node's rate. Jobs of one class share evenly, and all together stay within the node's rate.
    """
    found: Paces = {"demand": {}, "prestage": {}}
    demanded, ahead = running.count("demand"), running.count("prestage")
    for kind in KINDS:
        total: int = getattr(bandwidth.total, kind)
        prestage = _least(total, getattr(bandwidth.prestage, kind))
        demand = _least(total, getattr(bandwidth.demand, kind))
        if demanded and ahead:
            prestage = _least(prestage, bandwidth.held_back, total // 2)
            demand = _least(total - prestage if total else 0, getattr(bandwidth.demand, kind))
        found["demand"][kind] = demand / max(1, demanded) if demand else None
        found["prestage"][kind] = prestage / max(1, ahead) if prestage else None
    return found


def _least(*rates: int) -> int:
    """The lowest of the limits that there are; 0: none."""
    return min((rate for rate in rates if rate), default=0)
