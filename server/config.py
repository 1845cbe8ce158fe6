"""Every knob of the server with its default and its limit: frozen, composed, strict."""

from __future__ import annotations

from dataclasses import dataclass, field


class InvalidConfig(ValueError):
    """A setting is out of range. The text names the setting, the value and the limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """What one engine may hold at a time."""

    backend: str = "auto"  # auto, cpu or reference
    block_size: int = 16  # tokens per KV-cache block
    kv_cache_memory_bytes: int = 1 << 30  # for the keys and values of all layers together
    max_model_len: int | None = None  # prompt plus completion, tokens; None: the model's own
    max_num_seqs: int = 64  # sequences in one step
    max_num_batched_tokens: int = 512  # tokens in one step, decodes first
    max_queued_requests: int = 1024  # waiting for their first step; more are refused

    def __post_init__(self) -> None:
        for name in ("block_size", "kv_cache_memory_bytes", "max_num_seqs", "max_queued_requests"):
            _require_positive(name, getattr(self, name))
        if self.max_model_len is not None:
            _require_positive("max_model_len", self.max_model_len)
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise InvalidConfig(
                f"max_num_batched_tokens is {self.max_num_batched_tokens}; "
                f"it must be at least max_num_seqs ({self.max_num_seqs})"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """How the server listens, what it accepts and how it ends."""

    host: str = "127.0.0.1"
    port: int = 50051  # 0 picks a free one
    metrics_port: int = 9464  # Prometheus; 0 picks a free one
    max_message_bytes: int = 4 << 20  # of one request
    drain_grace_seconds: float = 30.0  # how long running requests may finish after SIGTERM
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self) -> None:
        for name in ("port", "metrics_port"):
            value = getattr(self, name)
            if not 0 <= value < 1 << 16:
                raise InvalidConfig(f"{name} is {value}; it must lie in [0, 65535]")
        _require_positive("max_message_bytes", self.max_message_bytes)
        if self.drain_grace_seconds < 0:
            raise InvalidConfig(
                f"drain_grace_seconds is {self.drain_grace_seconds}; it must not be negative"
            )


def _require_positive(name: str, value: int) -> None:
    if value < 1:
        raise InvalidConfig(f"{name} is {value}; it must be at least 1")
