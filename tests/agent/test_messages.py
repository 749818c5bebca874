"""What another process counts, brought together over processes that die and versions that count less."""

from __future__ import annotations

from headrace.cache.progress import COUNTS, Progress
from headrace.prefetch.messages import Counted, progress_to_json


def other(fetched: int, claims: int, present: int = 0) -> Progress:
    progress = Progress(total=100, present=present)
    progress.add("peer", fetched)
    progress.count("claims", claims)
    return progress


def test_what_a_process_counted_before_it_died_stays() -> None:
    progress = Progress()
    counted = Counted(progress)
    counted.take(progress_to_json(other(10, 2)))
    counted.take(progress_to_json(other(30, 5)))
    counted.next_process()
    assert progress.counts["claims"] == 5
    counted.take(progress_to_json(other(20, 1, present=30)))
    assert progress.counts == {**dict.fromkeys(COUNTS, 0), "claims": 6}
    assert (progress.fetched["peer"], progress.present, progress.chunks) == (50, 0, 2)


def test_a_process_of_another_version_may_count_less_or_more() -> None:
    progress = Progress()
    counted = Counted(progress)
    counted.take(progress_to_json(other(10, 2)))
    counted.next_process()
    older = progress_to_json(other(20, 7, present=10))
    del older["counts"]
    counted.take(older)
    assert progress.counts["claims"] == 2
    counted.next_process()
    newer = progress_to_json(other(5, 1, present=30))
    newer["counts"] |= {"something_new": 3}
    counted.take(newer)
    assert progress.counts == {**dict.fromkeys(COUNTS, 0), "claims": 3}
    assert progress.fetched["peer"] == 35
