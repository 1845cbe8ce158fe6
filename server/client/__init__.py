"""The Python client of lowbit.v1, blocking and asyncio. Knows the wire, nothing of the server.

Failures are `grpc.RpcError`s: `code()` is the status, `details()` says what went wrong.
"""

import grpc

from .client import DEFAULT_ADDRESS, SERVICE_NAME, AsyncClient, Client, Tls
from .messages import (
    AbortOutcome,
    Completion,
    Delta,
    GenerateOptions,
    Generation,
    Load,
    LogLevel,
    Model,
    Prompt,
    SamplingOptions,
    ServerInfo,
    ServerState,
    Timings,
    Token,
    Tokenization,
    Usage,
)

RpcError = grpc.RpcError
"""What every call raises when it fails."""

__all__ = [
    "DEFAULT_ADDRESS",
    "SERVICE_NAME",
    "AbortOutcome",
    "AsyncClient",
    "Client",
    "Completion",
    "Delta",
    "GenerateOptions",
    "Generation",
    "Load",
    "LogLevel",
    "Model",
    "Prompt",
    "RpcError",
    "SamplingOptions",
    "ServerInfo",
    "ServerState",
    "Timings",
    "Tls",
    "Token",
    "Tokenization",
    "Usage",
]
