"""Faults while a cluster stages: whoever survives has every byte, or says clearly why not; and the origin sends each
byte once, besides what expired claims, and in a partition each island, have to read again. Counted at the origin.

`campaigns/cluster_faults.py` is the long form.
"""

from __future__ import annotations

import pytest
from support.bed import Bed, Make
from support.faults import FAULTS, Fault, suffer

pytestmark = [pytest.mark.root, pytest.mark.service]


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if not fault.long], ids=lambda fault: fault.name)
def test_whoever_survives_has_every_byte(bed: Bed, make: Make, fault: Fault) -> None:
    cluster = make(4)
    ended = suffer(bed, cluster, fault, cluster.members[-1], at=0.3)
    assert not ended.early, "it was over before the fault"
