"""A model made of hashes that notices every slot it should not have been told to read or write."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, replace

from lowbit.server.engine.scheduler import SchedulerOutput
from lowbit.server.engine.sequence import SampledToken, Sequence, SequenceResult

VOCAB = 50
EOS = 49
NOT_A_NUMBER = "nan"


class Violation(BaseException):
    """Passes through the engine, which takes an Exception for a step that failed."""


def check(holds: bool, what: str) -> None:
    if not holds:
        raise Violation(what)


@dataclass(frozen=True)
class Content:
    """Keys and values stand for the tokens up to theirs, and for the tenant who may see them."""

    tenant: str
    tokens: tuple[int, ...]


@dataclass(eq=False)
class CheckedStep:
    drawn: dict[Sequence, int] = field(default_factory=dict)  # for a step that follows
    results: list[SequenceResult] = field(default_factory=list)
    has_failed: bool = False

    def wait(self) -> list[SequenceResult]:
        if self.has_failed:
            raise RuntimeError("injected")
        return self.results


class CheckingRunner:
    """Writes a Content to the slot of every scheduled token and reads the whole context back.

    The next token is a hash of the context and the sequence's seed. Draft tokens are verified the
    way a model does it. Requests in `poisoned` compute what is not a number. What is launched is
    computed at once, as a device would in the order of the launches; tokens in `revised` are wrong
    until the host waits for them.
    """

    def __init__(
        self, block_size: int, elapse: Callable[[SchedulerOutput], None] = lambda output: None
    ) -> None:
        """`elapse` moves the clock by what a step takes."""
        self.block_size = block_size
        self.elapse = elapse
        self.slots: dict[int, Content | str] = {}
        self.poisoned: set[str] = set()
        self.revised: set[int] = set()
        self.num_ahead = 0  # steps launched before the last one's tokens were known
        self.fail_next = False
        self.fails_late = False  # the next step; it is found out when the host waits for it
        self.has_just_failed = False
        self.num_computed_tokens = 0
        self.num_partial_steps = 0

    def launch(self, output: SchedulerOutput, previous: CheckedStep | None = None) -> CheckedStep:
        """`previous` has drawn the tokens that are pending."""
        if self.fails_late or (previous is not None and previous.has_failed):
            self.fails_late, self.has_just_failed = False, True
            return CheckedStep(has_failed=True)
        drawn = previous.drawn if previous else {}
        contexts = {each: self._context(each, drawn) for each in output.sequences}
        step = CheckedStep()
        for sequence, result in self._compute(output, contexts).items():
            token = result.tokens[-1].token_id if result.tokens else 0
            is_revised = token in self.revised
            step.drawn[sequence] = (token + is_revised) % VOCAB
            step.results.append(replace(result, is_revised=is_revised))
        self.num_ahead += previous is not None
        return step

    def _context(self, sequence: Sequence, drawn: dict[Sequence, int]) -> list[int]:
        """The known tokens and the pending one."""
        if not sequence.num_pending_tokens:
            return list(sequence.token_ids)
        check(sequence in drawn, "a step follows one that drew no token for it")
        return [*sequence.token_ids, drawn[sequence]]

    def _compute(
        self, output: SchedulerOutput, contexts: dict[Sequence, list[int]]
    ) -> dict[Sequence, SequenceResult]:
        self.elapse(output)
        self.has_just_failed = self.fail_next
        if self.fail_next:
            self.fail_next = False
            # It got half way: what it should have written is anything.
            self._write([each for each in output.sequences if each.arrival % 2], contexts)
            raise RuntimeError("injected")
        self._copy_and_clear(output)
        complete = [each for each in output.sequences if self._compute_layers(each)]
        self._check_writes(output.sequences)
        self._write(complete, contexts)
        self.num_computed_tokens += sum(each.num_scheduled_tokens for each in complete)
        yielding = [each for each in output.sequences if each.yields_token]
        return {each: self._result(each, contexts[each]) for each in yielding}

    def _compute_layers(self, sequence: Sequence) -> bool:
        """Whether that completes the scheduled tokens. What is left of them is kept as `hidden`."""
        partial = sequence.partial
        if partial is None:
            return True
        ids, next_layer = partial.hidden or (sequence.scheduled_token_ids, 0)
        check(ids == sequence.scheduled_token_ids, "a partial chunk has changed between steps")
        check(partial.layers.start == next_layer, f"layer {next_layer} is left out or repeated")
        check(len(partial.layers) > 0, "a step computes no layer")
        partial.hidden = (ids, partial.layers.stop)
        self.num_partial_steps += 1
        return partial.is_last

    def _copy_and_clear(self, output: SchedulerOutput) -> None:
        before = dict(self.slots)
        targets = [target for _, target in output.block_copies]
        check(len(set(targets)) == len(targets), "a block is the target of two copies")
        for source, target in output.block_copies:
            for old, new in zip(self._slots_of(source), self._slots_of(target), strict=True):
                self.slots.pop(new, None)
                if old in before:
                    self.slots[new] = before[old]
        for block in output.blocks_to_clear:
            for slot in self._slots_of(block):
                self.slots.pop(slot, None)

    def _check_writes(self, sequences: SequenceOf[Sequence]) -> None:
        """A block that is written to stands in one sequence's table, once."""
        users: dict[int, int] = {}
        for sequence in sequences:
            for block in sequence.block_table:
                users[block] = users.get(block, 0) + 1
        for sequence in sequences:
            last = sequence.num_cached_tokens + sequence.num_scheduled_tokens - 1
            for position in (sequence.num_cached_tokens, last):
                block = sequence.block_table[position // self.block_size]
                check(users[block] == 1, f"a block that {users[block]} use is written to")

    def _write(self, sequences: SequenceOf[Sequence], contexts: dict[Sequence, list[int]]) -> None:
        for sequence in sequences:
            tokens = contexts[sequence] + sequence.draft_token_ids
            first = sequence.num_cached_tokens
            for position in range(first, first + sequence.num_scheduled_tokens):
                content = Content(sequence.tenant, tuple(tokens[: position + 1]))
                is_poisoned = sequence.request_id in self.poisoned
                self.slots[self._slot(sequence, position)] = (
                    NOT_A_NUMBER if is_poisoned else content
                )

    def _result(self, sequence: Sequence, context: list[int]) -> SequenceResult:
        if sequence.request_id in self.poisoned:
            return SequenceResult(error="not a number")
        self._check_context(sequence, context)
        tokens: list[SampledToken] = []
        context = list(context)
        for draft in [*sequence.draft_token_ids, None]:
            token = expected_next(context, sequence.seed)
            tokens.append(SampledToken(token, 0.0))
            context.append(token)
            if token != draft:
                break
        return SequenceResult(tuple(tokens))

    def _check_context(self, sequence: Sequence, context: list[int]) -> None:
        for position in range(len(context)):
            expected = Content(sequence.tenant, tuple(context[: position + 1]))
            found = self.slots.get(self._slot(sequence, position))
            check(found == expected, f"a stale slot is read: {found}, not {expected}")
        # Attention multiplies what it masks by 0, and 0 times NaN is NaN.
        for block in sequence.block_table:
            for slot in self._slots_of(block):
                check(self.slots.get(slot) != NOT_A_NUMBER, "a NaN of another sequence is read")

    def _slots_of(self, block: int) -> range:
        return range(block * self.block_size, (block + 1) * self.block_size)

    def _slot(self, sequence: Sequence, position: int) -> int:
        block = sequence.block_table[position // self.block_size]
        return block * self.block_size + position % self.block_size


class GuessingDrafter:
    """Often right, for it knows the model; every third guess is not."""

    def __init__(self) -> None:
        self.num_accepted = 0
        self.num_rejected = 0

    def propose(self, sequence: Sequence, num_running: int, max_draft_tokens: int) -> list[int]:
        context = list(sequence.token_ids)
        for _ in range(min(max_draft_tokens, sequence.num_tokens % 5)):
            token = expected_next(context, sequence.seed)
            context.append(token if len(context) % 3 else (token + 1) % VOCAB)
        return context[sequence.num_tokens :]

    def has_hope(self, sequence: Sequence, num_running: int) -> bool:
        return sequence.num_tokens % 3 > 0

    def observe(self, sequence: Sequence, num_draft_tokens: int, num_accepted_tokens: int) -> None:
        assert 0 <= num_accepted_tokens <= num_draft_tokens
        self.num_accepted += num_accepted_tokens
        self.num_rejected += num_draft_tokens - num_accepted_tokens


def expected_next(token_ids: list[int], seed: int) -> int:
    digest = hashlib.sha256(bytes(token_ids) + seed.to_bytes(8)).digest()
    return digest[0] % VOCAB


def expected_completion(prompt: list[int], seed: int, max_tokens: int) -> list[int]:
    """Up to the end of the sequence."""
    tokens = list(prompt)
    while len(tokens) - len(prompt) < max_tokens:
        tokens.append(expected_next(tokens, seed))
        if tokens[-1] == EOS:
            break
    return tokens[len(prompt) :]
