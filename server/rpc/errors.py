"""The error table at the edge: what a caller and the metrics are told of each failure."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final, NoReturn

import grpc
import grpc.aio
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import (  # type: ignore[import-untyped]
    code_pb2,
    error_details_pb2,
    status_pb2,
)
from grpc_status import rpc_status  # type: ignore[import-untyped]

from ...proto import generation_pb2 as pb
from ..metrics import RequestEnd
from ..types import (
    DeadlineExceeded,
    Draining,
    EngineFailed,
    InvalidRequest,
    QueueFull,
    QueueTimeout,
    Starting,
    TryLater,
)

logger = logging.getLogger(__name__)

ERROR_DOMAIN: Final = "lowbit"
# Status text travels in an HTTP/2 header, and clients bound those at 8 KiB.
_MAX_MESSAGE_CHARACTERS: Final = 1024
_SAMPLING_FIELDS: Final = frozenset(pb.SamplingParams.DESCRIPTOR.fields_by_name)


class UnsupportedField(InvalidRequest):
    """The request holds a field that this server does not have, or cannot do."""


class Unauthenticated(Exception):
    """The caller has not shown an API key that this server knows."""


class PermissionDenied(Exception):
    """The caller's API key does not allow this."""


class QuotaExceeded(TryLater):
    """A limit of the tenant is reached."""

    def __init__(self, tenant: str, text: str, *, retry_after_seconds: float) -> None:
        super().__init__(text, retry_after_seconds=retry_after_seconds)
        self.tenant = tenant


class NotFound(Exception):
    """The request names a model or a service that this server does not have."""


class ClientStalled(Exception):
    """The caller stopped reading what it asked for."""


@dataclass(frozen=True, slots=True)
class Failure:
    """One row of the table, filled in for one request."""

    status: status_pb2.Status  # with its details
    reason: str
    end: RequestEnd
    retry_after_seconds: float | None

    def as_message(self) -> pb.Error:
        """What the last part of a stream says of it."""
        return pb.Error(
            code=self.status.code,
            reason=self.reason,
            message=self.status.message,
            retryable=self.retry_after_seconds is not None,
        )


# Exception -> gRPC status, google.rpc.ErrorInfo.reason, and what the metrics count.
_TABLE: Final[dict[type[Exception], tuple[code_pb2.Code, str, RequestEnd]]] = {
    InvalidRequest: (code_pb2.INVALID_ARGUMENT, "INVALID_REQUEST", "invalid"),
    UnsupportedField: (code_pb2.UNIMPLEMENTED, "UNSUPPORTED_FIELD", "invalid"),
    QueueFull: (code_pb2.RESOURCE_EXHAUSTED, "QUEUE_FULL", "queue_full"),
    QueueTimeout: (code_pb2.RESOURCE_EXHAUSTED, "QUEUE_TIMEOUT", "queue_timeout"),
    QuotaExceeded: (code_pb2.RESOURCE_EXHAUSTED, "QUOTA_EXCEEDED", "quota_exceeded"),
    Starting: (code_pb2.UNAVAILABLE, "STARTING", "starting"),
    Draining: (code_pb2.UNAVAILABLE, "DRAINING", "draining"),
    Unauthenticated: (code_pb2.UNAUTHENTICATED, "UNAUTHENTICATED", "denied"),
    PermissionDenied: (code_pb2.PERMISSION_DENIED, "PERMISSION_DENIED", "denied"),
    NotFound: (code_pb2.NOT_FOUND, "NOT_FOUND", "invalid"),
    DeadlineExceeded: (code_pb2.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED", "deadline"),
    ClientStalled: (code_pb2.ABORTED, "CLIENT_STALLED", "stalled"),
    EngineFailed: (code_pb2.INTERNAL, "ENGINE_FAILED", "error"),
}


def describe(error: Exception, request_id: str) -> Failure:
    """Look an error up. What is not the caller's business is logged, not told."""
    if type(error) in _TABLE:
        code, reason, end = _TABLE[type(error)]
        text = str(error)
    else:
        logger.error("request %s failed unexpectedly", request_id, exc_info=error)
        code, reason, end = code_pb2.INTERNAL, "INTERNAL", "error"
        text = f"request {request_id} failed unexpectedly; the server's log says more"
    if isinstance(error, EngineFailed):
        text = f"request {request_id} failed: {text}"
    status = status_pb2.Status(code=code, message=text[:_MAX_MESSAGE_CHARACTERS])
    for detail in _details(error, reason, request_id, status.message):
        status.details.add().Pack(detail)
    retry_after = error.retry_after_seconds if isinstance(error, TryLater) else None
    return Failure(status, reason, end, retry_after)


async def abort(context: grpc.aio.ServicerContext[Any, Any], failure: Failure) -> NoReturn:
    """End the call with the failure as its status, details included."""
    status = rpc_status.to_status(failure.status)
    metadata = list(status.trailing_metadata)
    if failure.retry_after_seconds is not None:
        milliseconds = round(failure.retry_after_seconds * 1000)
        metadata.append(("grpc-retry-pushback-ms", str(milliseconds)))
    await context.abort(status.code, status.details, tuple(metadata))
    raise AssertionError("abort raises")


def _details(error: Exception, reason: str, request_id: str, text: str) -> Iterable[Message]:
    yield error_details_pb2.ErrorInfo(reason=reason, domain=ERROR_DOMAIN)
    if request_id:
        yield error_details_pb2.RequestInfo(request_id=request_id)
    if isinstance(error, InvalidRequest):
        yield error_details_pb2.BadRequest(
            field_violations=[
                error_details_pb2.BadRequest.FieldViolation(
                    field=_path(error.field), description=text, reason=reason
                )
            ]
        )
    if isinstance(error, TryLater):
        delay = Duration()
        delay.FromMilliseconds(round(error.retry_after_seconds * 1000))
        yield error_details_pb2.RetryInfo(retry_delay=delay)
    if isinstance(error, QuotaExceeded):
        violation = error_details_pb2.QuotaFailure.Violation(
            subject=f"tenant:{error.tenant}", description=text
        )
        yield error_details_pb2.QuotaFailure(violations=[violation])


def _path(field: str) -> str:
    """Where the request holds it."""
    return f"sampling.{field}" if field in _SAMPLING_FIELDS else field
