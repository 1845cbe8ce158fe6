"""Who is next: strict priority classes, in a class the tenant served least, of a tenant the oldest.

What a tenant was served is counted in tokens over its weight (Sheng et al. 2024, "Fairness in
serving large language models": virtual token counters). A tenant that comes back from idleness
starts at most a burst ahead of the least served of those that are active: idleness earns that
much and no more.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from itertools import chain
from operator import attrgetter

from ..types import Priority
from .sequence import Account, Sequence

_ARRIVAL = attrgetter("arrival")
_BURST_TOKENS = 2048
_MAX_IDLE_ACCOUNTS = 1024  # in a class; the least served of more are forgotten, which costs nothing


class _PriorityClass:
    def __init__(self) -> None:
        self.accounts: dict[str, Account] = {}
        self.queues: dict[str, list[Sequence]] = {}  # by tenant, oldest first

    def open_account(self, tenant: str, weight: float) -> Account:
        account = self.accounts.setdefault(tenant, Account())
        if account.num_sequences == 0:
            active = [each.service for each in self.accounts.values() if each.num_sequences > 0]
            account.service = max(account.service, min(active, default=0.0) - _BURST_TOKENS)
        account.weight = weight
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
        tenants = self._classes[sequence.priority]
        sequence.account = tenants.open_account(sequence.tenant, sequence.weight)

    def close_account(self, sequence: Sequence) -> None:
        self._classes[sequence.priority].close_account(sequence.account)

    def fair_share(self, sequence: Sequence, total: int) -> float:
        """What of `total` is due to its tenant: all of it where no other was seen lately.

        Where all others are idle it is half, so that one that returns finds a place.
        """
        accounts = self._classes[sequence.priority].accounts
        if len(accounts) < 2:
            return total
        active = [each.weight for each in accounts.values() if each.num_sequences > 0]
        share = 0.5 if len(active) == 1 else sequence.account.weight / sum(active)
        return max(1.0, total * share)

    def has_running_below(self, priority: Priority) -> bool:
        """Whether a lower class runs."""
        return any(
            account.num_running > 0
            for each in Priority
            if each > priority
            for account in self._classes[each].accounts.values()
        )

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

    def before(self, sequence: Sequence) -> Iterator[Sequence]:
        """Those that start before one that arrives now, whatever comes later: the higher classes',
        and its tenant's of its own class."""
        for priority, each in self._classes.items():
            if priority < sequence.priority:
                yield from chain.from_iterable(each.queues.values())
        yield from self._classes[sequence.priority].queues.get(sequence.tenant, ())

    def first(self) -> Sequence | None:
        """Who is next; None when nobody waits."""
        for each in self._classes.values():
            if each.queues:
                return each.first()
        return None
