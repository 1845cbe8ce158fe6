"""Who a caller is, and whether what it asks for is within its limits."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import grpc.aio

from ...proto import generation_pb2 as pb
from ..types import DEFAULT_MAX_TOKENS, InvalidRequest, SamplingParams, SchedulingParams
from .completion import Completion
from .convert import PRIORITIES, scheduling_params_of
from .errors import PermissionDenied
from .tenants import KeyRing, Quotas, Tenant


class Admission:
    """Without keys everybody may do everything."""

    def __init__(self, keys: KeyRing | None) -> None:
        self._keys = keys
        self._quotas = Quotas()

    def caller_of(self, context: grpc.aio.ServicerContext[Any, Any]) -> Tenant | None:
        """Raises Unauthenticated."""
        if self._keys is None:
            return None
        return self._keys.tenant_of(context.invocation_metadata() or ())

    def request(self, caller: Tenant | None) -> AbstractContextManager[None]:
        """One request of the caller's, while the block lasts. Raises QuotaExceeded."""
        return nullcontext() if caller is None else self._quotas.request(caller)

    def count_request(self, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        """One that the engine has no part in. Raises Unauthenticated or QuotaExceeded."""
        caller = self.caller_of(context)
        if caller is not None:
            self._quotas.take_request(caller)

    @contextmanager
    def tokens(self, caller: Tenant | None, completion: Completion) -> Iterator[None]:
        """Count the prompt now and the completion at the block's end. Raises QuotaExceeded."""
        if caller is None:
            yield
            return
        self._quotas.take_prompt(caller, completion.num_prompt_tokens)
        try:
            yield
        finally:
            self._quotas.take_tokens(caller, completion.num_completion_tokens)

    def sampling(
        self, caller: Tenant | None, params: SamplingParams, num_prompt_tokens: int, limit: int
    ) -> SamplingParams:
        """Bounded by the caller's max_tokens. `limit` is max_model_len. Raises InvalidRequest."""
        if caller is None or caller.max_tokens is None:
            return params
        if params.max_tokens is None:
            most = min(DEFAULT_MAX_TOKENS, caller.max_tokens, limit - num_prompt_tokens)
            return dataclasses.replace(params, max_tokens=max(1, most))
        if params.max_tokens > caller.max_tokens:
            raise InvalidRequest(
                f"max_tokens is {params.max_tokens}; "
                f"tenant {caller.name} may have at most {caller.max_tokens}"
            )
        return params

    def scheduling(
        self, caller: Tenant | None, request: pb.GenerateRequest, remaining: float | None
    ) -> SchedulingParams:
        """`remaining` are the seconds until the call's own deadline.

        Raises InvalidRequest or PermissionDenied.
        """
        params = scheduling_params_of(request, request.tenant)
        if remaining is not None:
            # So that the engine lets go of it in time whatever becomes of the call.
            deadline = min(remaining, params.deadline_seconds or remaining)
            params = dataclasses.replace(params, deadline_seconds=deadline)
        if caller is None:
            return params
        if request.tenant not in ("", caller.name):
            raise PermissionDenied(
                f"tenant is {request.tenant!r}; the API key is that of {caller.name!r}"
            )
        priority = caller.priority
        if request.priority != pb.PRIORITY_UNSPECIFIED:
            priority = PRIORITIES[request.priority]
        if priority < caller.priority:
            raise PermissionDenied(
                f"priority is {priority.name}; "
                f"tenant {caller.name} may have at most {caller.priority.name}"
            )
        return dataclasses.replace(
            params, tenant=caller.name, priority=priority, weight=caller.weight
        )
