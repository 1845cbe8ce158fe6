"""The error table at the edge: what a caller and the metrics are told of each failure."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Final

import grpc

from ..metrics import RequestEnd
from ..types import (
    DeadlineExceeded,
    Draining,
    EngineFailed,
    InvalidRequest,
    QueueFull,
    QueueTimeout,
)

logger = logging.getLogger(__name__)

# Status text travels in an HTTP/2 header, and clients bound those at 8 KiB.
_MAX_DETAILS_CHARACTERS: Final = 1024


class UnsupportedField(InvalidRequest):
    """The request holds a field that this server's revision of the wire does not have."""


@dataclass(frozen=True, slots=True)
class Failure:
    status: grpc.StatusCode
    details: str
    end: RequestEnd


_TABLE: Final[dict[type[Exception], tuple[grpc.StatusCode, RequestEnd]]] = {
    InvalidRequest: (grpc.StatusCode.INVALID_ARGUMENT, "invalid"),
    UnsupportedField: (grpc.StatusCode.UNIMPLEMENTED, "invalid"),
    QueueFull: (grpc.StatusCode.RESOURCE_EXHAUSTED, "queue_full"),
    QueueTimeout: (grpc.StatusCode.RESOURCE_EXHAUSTED, "queue_timeout"),
    DeadlineExceeded: (grpc.StatusCode.DEADLINE_EXCEEDED, "deadline"),
    Draining: (grpc.StatusCode.UNAVAILABLE, "draining"),
}


def describe(error: Exception, request_id: str) -> Failure:
    """Look an error up. What is not the caller's business is logged, not told."""
    if type(error) in _TABLE:
        status, end = _TABLE[type(error)]
        return Failure(status, str(error)[:_MAX_DETAILS_CHARACTERS], end)
    if isinstance(error, EngineFailed):
        text = f"request {request_id} failed: {error}"
    else:
        logger.error("request %s failed unexpectedly", request_id, exc_info=error)
        text = f"request {request_id} failed unexpectedly; the server's log says more"
    return Failure(grpc.StatusCode.INTERNAL, text[:_MAX_DETAILS_CHARACTERS], "error")
