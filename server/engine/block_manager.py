"""Who owns which KV-cache block. No torch, no policy: the scheduler decides who must give way.

A full block is known by a hash of all tokens up to its end, chained block by block from a salt of
its tenant. A block that nobody uses any more keeps its hash, and its content, until the space is
needed: the least recently used one goes first, and of one sequence the last block before the first.
"""

from __future__ import annotations

import hashlib
import secrets
from array import array
from bisect import bisect
from collections import Counter, OrderedDict
from collections.abc import Iterable

from .sequence import Sequence


class NoFreeBlocks(Exception):
    """Fewer blocks are free than the sequence needs now."""


class BlockManager:
    """Hands out blocks of `block_size` tokens, by number, from a fixed pool.

    Sequences may share a block that none of them will write to again. Before a sequence writes to
    a block that it shares, it gets a copy of its own (see `take_copies`).
    """

    def __init__(self, num_blocks: int, block_size: int, *, prefix_cache: bool = True) -> None:
        assert num_blocks > 0 and block_size > 0
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_evictions = 0
        self._prefix_cache = prefix_cache
        # A stack: the block freed last is the one most likely still in a CPU cache.
        self._free = list(range(num_blocks - 1, -1, -1))
        self._reusable: OrderedDict[int, None] = OrderedDict()  # unused but cached, oldest first
        self._num_users = [0] * num_blocks
        self._hashes: list[bytes | None] = [None] * num_blocks
        self._blocks: dict[bytes, int] = {}  # by hash
        self._soiled: set[int] = set()  # free, and may hold numbers that are not finite
        self._clears: list[int] = []
        self._copies: list[tuple[int, int]] = []
        # Without it, whoever knows a tenant's name could compute hashes; timing tells more anyway.
        self._secret = secrets.token_bytes(32)

    @property
    def num_free_blocks(self) -> int:
        """Blocks that nobody uses, cached ones included."""
        return len(self._free) + len(self._reusable)

    @property
    def usage_ratio(self) -> float:
        return 1 - self.num_free_blocks / self.num_blocks

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def can_admit(self, sequence: Sequence, num_spare_blocks: int = 0) -> bool:
        """Whether all known tokens fit, and `num_spare_blocks` are free after that."""
        hits = self._find_prefix(sequence)
        num_revived = sum(self._num_users[block] == 0 for block in hits)
        num_new = self.blocks_for(sequence.num_tokens) - len(hits)
        return num_revived + num_new + num_spare_blocks <= self.num_free_blocks

    def uncached(self, sequence: Sequence) -> tuple[bytes | None, int]:
        """(hash of the first full block that the prefix cache lacks, number of tokens from it on).

        Sequences that share any of what is not cached share that block. Quicker than finding the
        blocks, and if wrong then about too few tokens: where blocks in the middle were evicted.
        """
        num_hits, hash_there = 0, None
        if self._prefix_cache:
            num_blocks = (sequence.num_tokens - 1) // self.block_size
            hashes = self._hash(sequence, num_blocks)[:num_blocks]
            num_hits = bisect(hashes, False, key=lambda each: each not in self._blocks)
            hash_there = hashes[num_hits] if num_hits < num_blocks else None
        return hash_there, sequence.num_tokens - num_hits * self.block_size

    def admit(self, sequence: Sequence) -> None:
        """Blocks for all known tokens; `num_cached_tokens` is what the prefix cache holds of them.

        Raises NoFreeBlocks. The last known token is never taken from the cache: its logits are
        wanted.
        """
        assert not sequence.block_table
        if not self.can_admit(sequence):
            raise NoFreeBlocks(f"{sequence.num_tokens} tokens, {self.num_free_blocks} blocks free")
        hits = self._find_prefix(sequence)
        for block in hits:
            if self._num_users[block] == 0:
                del self._reusable[block]
            self._num_users[block] += 1
        sequence.block_table = hits
        sequence.num_cached_tokens = len(hits) * self.block_size
        sequence.num_committed_blocks = len(hits)
        self.grow(sequence, sequence.num_tokens)

    def grow(self, sequence: Sequence, num_tokens: int) -> None:
        """Room to write from `num_cached_tokens` up to `num_tokens`, shared with nobody.

        Raises NoFreeBlocks, and then has changed nothing.
        """
        table = sequence.block_table
        missing = -(-num_tokens // self.block_size) - len(table)
        first = sequence.num_cached_tokens // self.block_size
        must_copy = first < len(table) and self._is_shared(table[first])
        if missing <= 0 and not must_copy:
            return
        if max(missing, 0) + must_copy > self.num_free_blocks:
            raise NoFreeBlocks(f"{missing} blocks needed, {self.num_free_blocks} free")
        if must_copy:
            self._replace(table, first)
        for _ in range(missing):
            table.append(self._allocate())

    def growable_tokens(self, sequence: Sequence) -> int:
        """How many tokens the block table could hold with all blocks that are free now."""
        return (len(sequence.block_table) + self.num_free_blocks) * self.block_size

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Share the parent's prompt; the child computes only its last token again."""
        assert not child.block_table
        child.block_table = parent.block_table[: self.blocks_for(child.num_prompt_tokens)]
        for block in child.block_table:
            self._num_users[block] += 1
        child.num_cached_tokens = child.num_prompt_tokens - 1
        child.block_hashes = parent.block_hashes[: child.num_prompt_tokens // self.block_size]
        child.num_committed_blocks = child.num_cached_tokens // self.block_size

    def commit(self, sequence: Sequence) -> None:
        """Let other sequences find the blocks that are full by now."""
        num_full = sequence.num_cached_tokens // self.block_size
        if num_full > sequence.num_committed_blocks and self._prefix_cache:
            hashes = self._hash(sequence, num_full)
            for i in range(sequence.num_committed_blocks, num_full):
                block = sequence.block_table[i]
                # Of two blocks with the same content only the first is found.
                if hashes[i] not in self._blocks and self._hashes[block] is None:
                    self._blocks[hashes[i]] = block
                    self._hashes[block] = hashes[i]
        sequence.num_committed_blocks = num_full

    def trim(self, sequence: Sequence) -> None:
        """Give back the blocks behind the last known token, where only draft tokens were."""
        kept = self.blocks_for(sequence.num_tokens)
        self._release_blocks(sequence.block_table[kept:])
        self.soil(sequence.block_table[kept:])
        del sequence.block_table[kept:]

    def release(self, sequence: Sequence, *, num_verified_tokens: int) -> None:
        """Give all blocks of the sequence back.

        What is behind the first `num_verified_tokens`, and not found in the prefix cache, may be
        numbers that are not finite. It is cleared before it is used again: a weight of 0 does not
        hide a NaN.
        """
        self._release_blocks(sequence.block_table)
        unverified = sequence.block_table[num_verified_tokens // self.block_size :]
        self.soil(block for block in unverified if self._hashes[block] is None)
        sequence.block_table = []
        sequence.num_cached_tokens = 0
        sequence.num_committed_blocks = 0

    def forget(self, sequence: Sequence) -> None:
        """Let nobody find the sequence's blocks in the prefix cache any more."""
        for block in sequence.block_table:
            if self._hashes[block] is not None:
                self._drop_hash(block)

    def soil(self, blocks: Iterable[int]) -> None:
        """Have those blocks that are free cleared before they are used again."""
        self._soiled.update(block for block in blocks if self._num_users[block] == 0)

    def take_clears(self) -> list[int]:
        """Blocks to zero before the step's forward pass, but after its copies."""
        clears, self._clears = self._clears, []
        return clears

    def take_copies(self) -> list[tuple[int, int]]:
        """Pairs (source, target) to copy before the step's forward pass, as if all at once."""
        copies, self._copies = self._copies, []
        return copies

    def check_integrity(self, sequences: Iterable[Sequence]) -> None:
        """Every block is free, cached or used by as many sequences as it counts.

        Raises AssertionError.
        """
        users = Counter(block for sequence in sequences for block in sequence.block_table)
        for block, num_users in enumerate(self._num_users):
            assert users[block] == num_users, f"block {block} counts its users wrongly"
        unused = [*self._free, *self._reusable]
        assert len(set(unused)) == len(unused), "a block was freed twice"
        assert len(unused) + len(users) == self.num_blocks, "a block is lost"
        assert users.keys().isdisjoint(unused), "a block is both free and used"
        cached = {block for block, digest in enumerate(self._hashes) if digest is not None}
        assert cached == set(self._blocks.values()) and len(cached) == len(self._blocks)
        assert all(self._hashes[block] == digest for digest, block in self._blocks.items())
        assert cached.issuperset(self._reusable) and cached.isdisjoint(self._free)
        assert self._soiled.issubset(self._free)

    def _is_shared(self, block: int) -> bool:
        return self._num_users[block] > 1 or self._hashes[block] is not None

    def _replace(self, table: list[int], index: int) -> None:
        target = self._allocate()
        self._copies.append((table[index], target))
        if target in self._clears:  # it is written over as a whole
            self._clears.remove(target)
        self._release_blocks(table[index : index + 1])
        table[index] = target

    def _allocate(self) -> int:
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._reusable.popitem(last=False)
            self._drop_hash(block)
            self.num_evictions += 1
        self._num_users[block] = 1
        if block in self._soiled:
            self._soiled.remove(block)
            self._clears.append(block)
        return block

    def _release_blocks(self, blocks: list[int]) -> None:
        for block in reversed(blocks):  # the last one is evicted first
            self._num_users[block] -= 1
            if self._num_users[block] > 0:
                continue
            if self._hashes[block] is None:
                self._free.append(block)
            else:
                self._reusable[block] = None
        if self._copies:  # what nobody will use is not copied to
            self._copies = [pair for pair in self._copies if self._num_users[pair[1]] > 0]

    def _drop_hash(self, block: int) -> None:
        digest = self._hashes[block]
        assert digest is not None
        del self._blocks[digest]
        self._hashes[block] = None

    def _find_prefix(self, sequence: Sequence) -> list[int]:
        """The cached blocks that the known tokens begin with; changes nothing."""
        if not (self._prefix_cache and sequence.reads_prefix_cache):
            return []
        hits: list[int] = []
        num_blocks = (sequence.num_tokens - 1) // self.block_size
        for digest in self._hash(sequence, num_blocks)[:num_blocks]:
            block = self._blocks.get(digest)
            if block is None:
                break
            hits.append(block)
        return hits

    def _hash(self, sequence: Sequence, num_blocks: int) -> list[bytes]:
        """At least the first `num_blocks` hashes of the sequence, which remembers them."""
        hashes = sequence.block_hashes
        size = self.block_size
        previous = hashes[-1] if hashes else self._salt(sequence.tenant)
        for i in range(len(hashes), num_blocks):
            tokens = array("I", sequence.token_ids[i * size : (i + 1) * size])
            previous = hashlib.sha256(previous + tokens.tobytes()).digest()
            hashes.append(previous)
        return hashes

    def _salt(self, tenant: str) -> bytes:
        return hashlib.sha256(self._secret + tenant.encode()).digest()
