"""Who reads what: disjoint, balanced shares of a file's blocks.

Through the page cache every rank brings in all that it needs, but each begins somewhere else: the file is cut
into stripes, as many of them as there are ranks make a round, and in each round a rank takes its own stripe
first. By the time it comes to the others' they are in memory. Whoever is slow is helped: what is not there yet
when its turn comes is read by who wants it, and never twice, because the page cache has one page for all.
Rounds keep the ranks together: what one reads is used by all soon after.
"""

from __future__ import annotations

from collections.abc import Sequence

from headrace.loader.plan import BLOCK, Block

_LONGEST = 8
"""Blocks of a stripe: long enough that the kernel sees sequential reads and reads ahead."""

_ROUNDS = 4
"""At least so many rounds are made of a file, so that also those of small files are balanced."""


def _stripe_blocks(size: int, ranks: int) -> int:
    """Blocks of one stripe of a file of `size` bytes."""
    blocks = -(-size // BLOCK)
    return max(1, min(_LONGEST, blocks // (_ROUNDS * ranks)))


def own_first(blocks: Sequence[Block], size: int, index: int, ranks: int) -> list[Block]:
    """The blocks in the order in which one rank reads them.

    Args:
        blocks: what it needs of a file.
        size: of the file, in bytes.
        index: which of the ranks this is, from 0.
        ranks: how many read the file.
    """
    stripe = _stripe_blocks(size, ranks) * BLOCK

    def place(block: Block) -> tuple[int, int]:
        number = block.start // stripe
        return number // ranks, (number - index) % ranks

    return sorted(blocks, key=place)  # stable: within a stripe as in the file


def owner(number: int, ranks: int) -> int:
    """Who reads block number `number` of a load whose blocks are handed over one by one."""
    return number % ranks
