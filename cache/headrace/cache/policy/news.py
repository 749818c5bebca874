"""What the tracker has still to hear from this node, and how soon."""

from __future__ import annotations

from collections.abc import Iterable
from math import inf

from headrace.cache.tracker.protocol import Exchange


class News:
    """Gains and losses, claims given back, holders that had nothing; in the order in which they came up.

    Attributes:
        due: when the tracker has to hear it; infinite where there is nothing to say.
    """

    __slots__ = ("_gained", "_give_back", "_lost", "_missing", "due")

    def __init__(self) -> None:
        self._gained: dict[int, None] = {}
        self._lost: dict[int, None] = {}
        self._give_back: dict[int, None] = {}
        self._missing: dict[tuple[int, str], None] = {}
        self.due = inf

    def __len__(self) -> int:
        return len(self._gained) + len(self._lost) + len(self._give_back) + len(self._missing)

    @property
    def gains(self) -> int:
        """Chunks that are here and not announced."""
        return len(self._gained)

    def gained(self, chunk: int, due: float) -> None:
        """A chunk is here."""
        self._gained[chunk] = None
        self._lost.pop(chunk, None)
        if due < self.due:
            self.due = due

    def lost(self, chunk: int, due: float) -> None:
        """A chunk is here no more."""
        self._gained.pop(chunk, None)
        self._lost[chunk] = None
        self.due = min(self.due, due)

    def give_back(self, chunk: int, due: float) -> None:
        """A claimed chunk will not be read from the origin."""
        self._give_back[chunk] = None
        self.due = min(self.due, due)

    def missing(self, chunk: int, peer: str, due: float) -> None:
        """A holder did not have a chunk."""
        self._missing[chunk, peer] = None
        self.due = min(self.due, due)

    def claimed(self, chunk: int) -> None:
        """A claim is ours again: an older wish to give it back does not count any more."""
        self._give_back.pop(chunk, None)

    def take(
        self,
    ) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[tuple[int, str], ...]]:
        """All of it, to be said now: gained, lost, given back, missing."""
        taken = tuple(self._gained), tuple(self._lost), tuple(self._give_back), tuple(self._missing)
        self._gained, self._lost, self._give_back, self._missing = {}, {}, {}, {}
        self.due = inf
        return taken

    def unheard(self, said: Exchange, held: Iterable[int], due: float) -> None:
        """What was said may not have been heard: it is said again, as far as it is still so.

        Args:
            held: of the chunks that were said to be gained or lost, those that are here now.
        """
        here = set(held)
        for chunk in said.gained:
            if chunk in here:
                self._gained[chunk] = None
            else:
                self._lost[chunk] = None
        for chunk in said.lost:
            if chunk not in here:
                self._lost[chunk] = None
        self._give_back.update(dict.fromkeys(said.give_back))
        self._missing.update(dict.fromkeys(said.missing))
        if len(self):
            self.due = min(self.due, due)
