"""Who is next: strict priority classes, in a class the tenant served least, of a tenant the oldest.

What a tenant was served is counted in tokens over its weight (Sheng et al. 2024, "Fairness in
serving large language models": virtual token counters). A tenant that comes back from idleness
starts level with the least served of those that are active, so idleness earns nothing.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from operator import attrgetter

from ..types import Priority
from .sequence import Account, Sequence

_ARRIVAL = attrgetter("arrival")
_MAX_IDLE_ACCOUNTS = 1024  # in a class; the least served of more are forgotten, which costs nothing


class _PriorityClass:
    def __init__(self) -> None:
        self.accounts: dict[str, Account] = {}
        self.queues: dict[str, list[Sequence]] = {}  # by tenant, oldest first

    def open_account(self, tenant: str) -> Account:
        account = self.accounts.setdefault(tenant, Account())
        if account.num_sequences == 0:
            active = [each.service for each in self.accounts.values() if each.num_sequences > 0]
            account.service = max(account.service, min(active, default=0.0))
        account.num_sequences += 1
        return account

    def close_account(self, account: Account) -> None:
        account.num_sequences -= 1
        if account.num_sequences > 0:
            return
        idle = [tenant for tenant, each in self.accounts.items() if each.num_sequences == 0]
        if len(idle) == len(self.accounts):
            self.accounts.clear()  # nobody is left to be compared with
        elif len(idle) > _MAX_IDLE_ACCOUNTS:
            del self.accounts[min(idle, key=lambda tenant: self.accounts[tenant].service)]

    def first(self) -> Sequence | None:
        heads = (queue[0] for queue in self.queues.values())
        return min(heads, key=lambda head: (head.account.service, head.arrival), default=None)


class WaitingQueue:
    """Sequences that wait, and what their tenants were served."""

    def __init__(self) -> None:
        self.num_tokens = 0
        self._num_sequences = 0
        self._classes = {priority: _PriorityClass() for priority in Priority}

    def __len__(self) -> int:
        return self._num_sequences

    def __iter__(self) -> Iterator[Sequence]:
        for each in self._classes.values():
            for queue in each.queues.values():
                yield from queue

    def open_account(self, sequence: Sequence) -> None:
        """Count the sequence among its tenant's, until `close_account`."""
        sequence.account = self._classes[sequence.priority].open_account(sequence.tenant)

    def close_account(self, sequence: Sequence) -> None:
        self._classes[sequence.priority].close_account(sequence.account)

    def push(self, sequence: Sequence) -> None:
        queue = self._classes[sequence.priority].queues.setdefault(sequence.tenant, [])
        insort(queue, sequence, key=_ARRIVAL)
        self._num_sequences += 1
        self.num_tokens += sequence.num_tokens

    def remove(self, sequence: Sequence) -> None:
        queues = self._classes[sequence.priority].queues
        queue = queues[sequence.tenant]
        removed = queue.pop(bisect_left(queue, sequence.arrival, key=_ARRIVAL))
        assert removed is sequence
        if not queue:
            del queues[sequence.tenant]
        self._num_sequences -= 1
        self.num_tokens -= sequence.num_tokens

    def first(self) -> Sequence | None:
        """Who is next; None when nobody waits."""
        for each in self._classes.values():
            if each.queues:
                return each.first()
        return None
