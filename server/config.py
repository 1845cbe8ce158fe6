"""Every knob of the server with its default and its limit: frozen, composed, strict."""

from __future__ import annotations

import ipaddress
import math
from dataclasses import dataclass, field
from typing import Any

MAX_DRAFT_TOKENS = 32


class InvalidConfig(ValueError):
    """A setting is out of range. The text names the setting, the value and the limit."""


def _setting(default: Any, help: str, **more: Any) -> Any:
    """A field that the command line offers too: its help text travels with it."""
    return field(default=default, metadata={"help": help, **more})


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """What one engine may hold at a time."""

    backend: str = _setting(
        "auto",
        "kernels that run the model: triton on an NVIDIA GPU, cpu anywhere, reference to compare "
        "with; auto takes triton where there is a GPU",
        choices=("auto", "triton", "cpu", "reference"),
    )
    cpu_precision: str = _setting(
        "auto",
        "of the cpu backend: bfloat16 computes on packed weights, float32 is exact and holds "
        "float32 weights; auto takes bfloat16 where the processor has vector code for it",
        choices=("auto", "bfloat16", "float32"),
    )
    dtype: str = _setting(
        "auto",
        "of the triton backend: auto computes in bfloat16 where the checkpoint's config.json names "
        "it, else in float16",
        choices=("auto", "float16", "bfloat16"),
    )
    block_size: int = _setting(16, "tokens per KV-cache block")
    kv_cache_dtype: str = _setting(
        "auto",
        "int8 and fp8 hold almost twice the tokens in the same memory, a little less exactly; auto "
        "is what the backend computes in; all but int8 for triton alone, fp8 from compute "
        "capability 8.9 on",
        choices=("auto", "float16", "bfloat16", "fp8", "int8"),
    )
    kv_cache_memory_bytes: int | None = _setting(
        None,
        "for keys and values of all layers together; by default what weights and the largest step "
        "leave of a GPU, and 1 GiB on a CPU, or what one sequence of full length takes",
        type=int,
    )
    gpu_memory_ratio: float = _setting(
        0.9, "of a GPU's memory, for weights, keys and values and steps together"
    )
    cuda_graph_memory_bytes: int = _setting(
        1 << 30, "of a GPU, for recordings of decode steps; 0 launches each step's kernels anew"
    )
    max_model_len: int | None = _setting(
        None, "prompt plus completion, in tokens; by default the model's own limit", type=int
    )
    max_num_seqs: int = _setting(64, "sequences in one step")
    max_num_batched_tokens: int = _setting(512, "tokens in one step; decodes come first")
    max_draft_tokens: int = _setting(
        0,
        "guessed tokens of a sequence that one step verifies, where its text repeats itself or "
        "its prompt; changes no output; 0 is off",
    )
    max_queued_requests: int = _setting(1024, "requests that may wait; more are refused")
    max_queued_tokens: int = _setting(
        1 << 20, "tokens of waiting prompts together; more are refused"
    )
    max_queue_seconds: float = _setting(
        600.0, "how long a request may wait to be started; 0 waits for ever"
    )
    prefix_cache: bool = _setting(True, "keep the blocks of ended sequences for equal prompts")
    max_itl_stretch: float = _setting(
        1.6,
        "how much longer prompt tokens may make a step of running streams; 0 sets no limit but "
        "max_num_batched_tokens",
    )
    step_timeout_seconds: float = _setting(
        300.0, "a step that takes longer has hung: the server exits with status 70"
    )

    def __post_init__(self) -> None:
        for name in ("block_size", "max_num_seqs", "max_queued_requests", "max_queued_tokens"):
            _require_positive(name, getattr(self, name))
        if self.kv_cache_memory_bytes is not None:
            _require_positive("kv_cache_memory_bytes", self.kv_cache_memory_bytes)
        if self.cuda_graph_memory_bytes < 0:
            raise InvalidConfig(
                f"cuda_graph_memory_bytes is {self.cuda_graph_memory_bytes}; it must not be "
                "negative"
            )
        if not 0 < self.gpu_memory_ratio <= 1:
            raise InvalidConfig(
                f"gpu_memory_ratio is {self.gpu_memory_ratio}; it must be greater than 0 and at "
                "most 1"
            )
        for name in ("max_queue_seconds", "max_itl_stretch"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InvalidConfig(f"{name} is {getattr(self, name)}; it must not be negative")
        if 0 < self.max_itl_stretch <= 1:
            raise InvalidConfig(
                f"max_itl_stretch is {self.max_itl_stretch}; it must be 0 or greater than 1"
            )
        if not 0 < self.step_timeout_seconds < math.inf:
            raise InvalidConfig(
                f"step_timeout_seconds is {self.step_timeout_seconds}; it must be positive"
            )
        if self.max_model_len is not None:
            _require_positive("max_model_len", self.max_model_len)
        if not 0 <= self.max_draft_tokens <= MAX_DRAFT_TOKENS:
            raise InvalidConfig(
                f"max_draft_tokens is {self.max_draft_tokens}; it must lie in "
                f"[0, {MAX_DRAFT_TOKENS}]"
            )
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise InvalidConfig(
                f"max_num_batched_tokens is {self.max_num_batched_tokens}; "
                f"it must be at least max_num_seqs ({self.max_num_seqs})"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """How the server listens, what it accepts and how it ends."""

    host: str = _setting("127.0.0.1", "address to listen on, or unix:PATH")
    port: int = _setting(50051, "of the gRPC services; 0 picks a free one")
    model_name: str = _setting("", "what the model is called; by default its folder's name")
    metrics_port: int = _setting(9464, "of the Prometheus metrics; 0 picks a free one")
    max_message_bytes: int = _setting(4 << 20, "of one request")
    max_send_message_bytes: int = _setting(16 << 20, "of one reply")
    max_buffered_tokens: int = _setting(
        4096, "of one stream, made but not sent; beyond that its tokens wait in the engine's queue"
    )
    stall_timeout_seconds: float = _setting(
        30.0, "a caller that reads nothing for so long while there is something loses its request"
    )
    drain_grace_seconds: float = _setting(
        30.0, "how long running requests may go on after SIGTERM or Ctrl-C"
    )
    drain_pause_seconds: float = _setting(
        0.0,
        "how long requests are still taken after NOT_SERVING was reported on SIGTERM, for load "
        "balancers to notice",
    )
    allow_insecure: bool = _setting(
        False, "listen beyond this machine without TLS, or without API keys or client certificates"
    )
    tls_certificate: str = _setting("", "PEM file with the server's chain; read again on change")
    tls_key: str = _setting("", "PEM file with its private key; read again on change")
    tls_client_ca: str = _setting("", "PEM file; callers then need a certificate that it signed")
    api_keys: str = _setting(
        "",
        "TOML file of tenants with their keys and limits; callers then need a key; read again "
        "on change",
    )
    health_needs_key: bool = _setting(False, "health checks need a key, too, where there are keys")
    reflection: bool = _setting(True, "describe the services to clients that have no proto file")
    kserve: bool = _setting(
        False, "offer inference.GRPCInferenceService, too, for Triton's and KServe's clients"
    )
    vllm_engine: bool = _setting(
        False, "offer vllm.grpc.engine.VllmEngine, too, for the smg gateway"
    )
    control_host: str = _setting(
        "",
        "where ControlService listens instead, without keys or TLS: unix:PATH or an address of "
        "this machine",
    )
    control_port: int = _setting(0, "of control_host; 0 picks a free one")
    max_concurrent_streams: int = _setting(1024, "calls of one connection; more wait at the client")
    max_connection_age_seconds: float = _setting(
        0.0, "connections are renewed then, for load balancing; 0 keeps them"
    )
    max_connection_age_grace_seconds: float = _setting(
        600.0, "how long the calls of an aged connection may go on"
    )
    keepalive_seconds: float = _setting(60.0, "between pings to a silent client")
    keepalive_timeout_seconds: float = _setting(20.0, "for its answer; then it is gone")
    handshake_timeout_seconds: float = _setting(10.0, "for TLS and HTTP/2 to be set up")
    compression: str = _setting("none", "of replies", choices=("none", "gzip"))
    reuse_port: bool = _setting(False, "let other servers listen on the same port")
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self) -> None:
        for name in ("port", "metrics_port", "control_port"):
            value = getattr(self, name)
            if not 0 <= value < 1 << 16:
                raise InvalidConfig(f"{name} is {value}; it must lie in [0, 65535]")
        for name in (
            "max_message_bytes",
            "max_send_message_bytes",
            "max_buffered_tokens",
            "max_concurrent_streams",
        ):
            _require_positive(name, getattr(self, name))
        for name in (
            "stall_timeout_seconds",
            "keepalive_seconds",
            "keepalive_timeout_seconds",
            "handshake_timeout_seconds",
        ):
            if not 0 < getattr(self, name) < math.inf:
                raise InvalidConfig(f"{name} is {getattr(self, name)}; it must be positive")
        for name in (
            "drain_grace_seconds",
            "drain_pause_seconds",
            "max_connection_age_seconds",
            "max_connection_age_grace_seconds",
        ):
            if not 0 <= getattr(self, name) < math.inf:
                raise InvalidConfig(f"{name} is {getattr(self, name)}; it must not be negative")
        self._check_security()

    def _check_security(self) -> None:
        if bool(self.tls_certificate) != bool(self.tls_key):
            raise InvalidConfig("tls_certificate and tls_key must be set together")
        if self.tls_client_ca and not self.tls_certificate:
            raise InvalidConfig("tls_client_ca is set; it needs tls_certificate and tls_key")
        if self.control_host and not is_local(self.control_host):
            raise InvalidConfig(
                f"control_host is {self.control_host!r}; it must be an address of this machine "
                "alone, or unix:PATH"
            )
        if is_local(self.host) or self.allow_insecure:
            return
        missing = []
        if not self.tls_certificate:
            missing.append("TLS (tls_certificate, tls_key)")
        if not self.api_keys and not self.tls_client_ca:
            missing.append("callers' keys or certificates (api_keys or tls_client_ca)")
        if missing:
            raise InvalidConfig(
                f"host is {self.host!r}, which others can reach, without {' and '.join(missing)}; "
                "set them, listen on 127.0.0.1, or set allow_insecure"
            )


def is_local(host: str) -> bool:
    """Whether only this machine reaches a server that listens there."""
    if host.startswith("unix:") or host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _require_positive(name: str, value: int) -> None:
    if value < 1:
        raise InvalidConfig(f"{name} is {value}; it must be at least 1")
