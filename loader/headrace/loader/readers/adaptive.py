"""The autopilot's reads: each piece of a file the way that is fastest for it, into the same memory.

What the page cache has is copied from there. The rest comes from the device the way that its `Pace` says.
Every block is asked about when its turn comes, so what another process brings in meanwhile is used.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from headrace.loader.memory import ask_for, resident
from headrace.loader.pace import Pace, Way
from headrace.loader.plan import PAGE
from headrace.loader.readers.direct import DirectFetch, DirectRefusedError
from headrace.loader.readers.fetch import BufferedFetch, Tally
from headrace.loader.source import SourceFile

_PRESENT, _ABSENT = 0.9, 0.1  # of a piece: it counts as wholly in the page cache, or as not in it at all
_SMALLEST = 512 * 1024  # pieces of this size are not divided further
_TRACE = 0.02  # a part that is not worth a word


class AdaptiveFetch:
    """Reads one complete file.

    Args:
        file: opened and complete.
        direct: for what is not in the page cache; closed with this.
        pace: of the file's device.
        always_direct: whatever the page cache holds, and whatever is faster.
        cold: next to nothing of it was in the page cache when that was decided.
    """

    def __init__(
        self,
        file: SourceFile,
        direct: DirectFetch,
        pace: Pace,
        *,
        always_direct: bool = False,
        cold: bool = False,
    ) -> None:
        self._file = file
        self._direct = direct
        self._buffered = BufferedFetch(file)
        self._pace = pace
        self._always_direct = always_direct
        self.cold = cold
        self._refused = ""
        self._tally = Tally()

    def bring(self, pages: memoryview, start: int, stop: int) -> None:
        base = start // PAGE * PAGE
        for begin, end, present in _joined(self._pieces(start, stop)):
            part = pages[begin // PAGE * PAGE - base : -(-end // PAGE) * PAGE - base]
            if present:
                began = time.perf_counter()
                self._buffered.bring(part, begin, end)
                self._tally.add("present", end - begin)
                self._pace.record("copied", end - begin, time.perf_counter() - began)
            else:
                self._bring_absent(part, begin, end)

    def _bring_absent(self, pages: memoryview, start: int, stop: int) -> None:
        way: Way = "direct" if self._always_direct else self._pace.next()
        began = time.perf_counter()
        if way == "direct" and not self._refused:
            try:
                self._direct.bring(pages, start, stop)
            except DirectRefusedError as refusal:
                self._refused = str(refusal)
            else:
                self._done("direct", stop - start, began)
                return
        # Asked for beforehand, these bytes are read at once and nothing is read ahead of them: that would come
        # twice, because the next block is probably being read directly.
        ask_for(self._file.fileno(), start, stop)
        self._buffered.bring(pages, start, stop)
        self._done("buffered", stop - start, began)

    def _done(self, way: Way, count: int, began: float) -> None:
        self._tally.add(way, count)
        self._pace.record(way, count, time.perf_counter() - began)

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[int, int, bool]]:
        part = 0.0 if self._always_direct else resident(self._file.fileno(), start, stop)
        if part is None or part <= _ABSENT:
            yield start, stop, False
        elif part >= _PRESENT:
            yield start, stop, True
        elif stop - start <= _SMALLEST:
            yield start, stop, part >= 0.5
        else:
            middle = (start + stop) // 2 // PAGE * PAGE
            yield from self._pieces(start, middle)
            yield from self._pieces(middle, stop)

    @property
    def name(self) -> str:
        direct, others = self._tally["direct"], self._tally["buffered"] + self._tally["present"]
        if others <= _TRACE * direct:
            return "direct"
        return "buffered" if direct <= _TRACE * others else "mixed"

    def outcome(self) -> str:
        total = sum(self._tally[kind] for kind in ("present", "direct", "buffered"))
        if not total:
            return ""
        words = {
            "present": "from the page cache",
            "direct": "directly from the device",
            "buffered": "through the page cache",
        }
        parts = [
            f"{self._tally[kind] / total:.0%} came {how}"
            for kind, how in words.items()
            if self._tally[kind] > _TRACE * total
        ]
        ways: dict[Way, str] = {"direct": "directly", "buffered": "through the page cache"}
        rates = [
            f"{rate / 1e9:.1f} GB/s {how}"
            for way, how in ways.items()
            if (rate := self._pace.rate(way)) is not None
        ]
        said = ", ".join(parts)
        if rates:
            said += f" (this device: {', '.join(rates)})"
        if self._refused:
            said += f"; not directly, because {self._refused}"
        return said

    def close(self) -> None:
        self._direct.close()


def _joined(pieces: Iterator[tuple[int, int, bool]]) -> Iterator[tuple[int, int, bool]]:
    """Neighbours that are alike become one."""
    last: tuple[int, int, bool] | None = None
    for begin, end, present in pieces:
        if last is not None and last[2] == present:
            last = (last[0], end, present)
            continue
        if last is not None:
            yield last
        last = (begin, end, present)
    if last is not None:
        yield last
