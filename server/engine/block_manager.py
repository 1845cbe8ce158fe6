"""Who owns which KV-cache block. No torch, no policy: the scheduler decides who must give way."""

from __future__ import annotations

from collections.abc import Iterable

from .sequence import Sequence


class NoFreeBlocks(Exception):
    """Fewer blocks are free than the sequence needs now."""


class BlockManager:
    """Hands out blocks of `block_size` tokens, by number, from a fixed pool."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        assert num_blocks > 0 and block_size > 0
        self.num_blocks = num_blocks
        self.block_size = block_size
        # A stack: the block freed last is the one most likely still in a CPU cache.
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def num_free_blocks(self) -> int:
        return len(self._free)

    @property
    def usage_ratio(self) -> float:
        return 1 - len(self._free) / self.num_blocks

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def can_grow(self, sequence: Sequence, num_tokens: int) -> bool:
        return self._missing_blocks(sequence, num_tokens) <= len(self._free)

    def grow(self, sequence: Sequence, num_tokens: int) -> None:
        """Extend the block table until it holds `num_tokens`. Raises NoFreeBlocks."""
        missing = self._missing_blocks(sequence, num_tokens)
        if missing > len(self._free):
            raise NoFreeBlocks(f"{missing} blocks needed, {len(self._free)} free")
        sequence.block_table.extend(self._free.pop() for _ in range(missing))

    def growable_tokens(self, sequence: Sequence) -> int:
        """How many tokens the block table could hold with all blocks that are free now."""
        return (len(sequence.block_table) + len(self._free)) * self.block_size

    def trim(self, sequence: Sequence) -> None:
        """Give back the blocks behind the last known token."""
        kept = self.blocks_for(sequence.num_tokens)
        self._free.extend(reversed(sequence.block_table[kept:]))
        del sequence.block_table[kept:]

    def release(self, sequence: Sequence) -> None:
        """Give all blocks of the sequence back."""
        self._free.extend(reversed(sequence.block_table))
        sequence.block_table.clear()

    def check_integrity(self, sequences: Iterable[Sequence]) -> None:
        """Every block is free or owned by exactly one of the sequences. Raises AssertionError."""
        owned = [block for sequence in sequences for block in sequence.block_table]
        assert len(owned) + len(self._free) == self.num_blocks, "a block is lost or counted twice"
        assert set(owned).isdisjoint(self._free), "a block is both free and owned"
        assert len(set(owned)) == len(owned), "a block has two owners"
        assert len(set(self._free)) == len(self._free), "a block was freed twice"

    def _missing_blocks(self, sequence: Sequence, num_tokens: int) -> int:
        return max(0, self.blocks_for(num_tokens) - len(sequence.block_table))
