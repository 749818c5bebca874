"""The digest that each chunk must have, and whose word that is.

A publisher's counts alone where there is one. Else it is the digest that a node learned which read the chunk from
the origin: it protects against corruption on the way, not against a node that lies.
"""

from __future__ import annotations

from collections.abc import Mapping

from headrace.cache.numbering import Numbering


class Vouched:
    """The digests of one swarm's chunks."""

    def __init__(self, numbering: Numbering, algorithm: str) -> None:
        self._numbering = numbering
        self._learned: dict[int, bytes] = {}
        self.algorithm = algorithm

    def published(self, number: int) -> bytes | None:
        """What the publisher says."""
        at, index = self._numbering.locate(number)
        chunks = self._numbering.files[at].chunks
        return None if chunks is None else bytes.fromhex(chunks[index])

    def of(self, number: int) -> bytes | None:
        """The digest that the chunk must have, as far as known."""
        return self.published(number) or self._learned.get(number)

    def learn(self, digests: Mapping[int, bytes]) -> None:
        """What other nodes learned."""
        self._learned.update(digests)

    def contradicted(self, number: int, digest: bytes) -> bool:
        """Whether the origin's bytes have another digest than other nodes said; the origin's counts from now on."""
        before = self._learned.get(number)
        self._learned[number] = digest
        return before not in (None, digest) and self.published(number) is None
