"""The backend for NVIDIA GPUs: low-bit linear layers, paged attention and the rest in Triton.

Hidden states are float16 or bfloat16, sums float32; keys and values are either, or of 8 bits with a
scale for each token and head. Under TRITON_INTERPRET=1 all of it runs on the CPU, to be tested.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from . import triton_attention as paged
from . import triton_elementwise as elementwise
from . import triton_linear as low_bit
from . import triton_rope as rotary
from .interface import (
    Activation,
    AttentionPlan,
    AttentionSpec,
    BackendUnavailable,
    ForwardBatch,
    KernelBackend,
    KVCache,
    PreparedLinear,
)
from .packing import DenseWeight, FragmentWeight, LinearWeight
from .triton_launch import interpreted

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
_KV_DTYPES = _DTYPES | {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
_SCALE_DTYPE = torch.float32  # less than 4 bytes would not be copied ahead of a loop
_MIN_CAPABILITY = (8, 0)
_FP8_CAPABILITY = (8, 9)  # the first that converts float8_e4m3fn


@dataclass(frozen=True, slots=True)
class DenseLinear:
    weight: Tensor  # [N, K]
    bias: Tensor | None  # [N]

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]


@dataclass(frozen=True, slots=True)
class TritonPlan:
    batch: ForwardBatch


class TritonBackend(KernelBackend):
    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype = torch.float16,
        kv_dtype: torch.dtype | None = None,
    ) -> None:
        """`dtype` of hidden states, and of keys and values unless `kv_dtype` says otherwise."""
        tuning = low_bit.tuning_of(device)
        self.kv_dtype = kv_dtype or dtype
        self.name = (
            f"triton, {_name(dtype)}, KV cache {_name(self.kv_dtype)}, {tuning.gpu}, "
            f"{tuning.num_sms} SMs; "
            f"linear layers in fp32 sums to {tuning.gemv_max_rows} rows, on tensor cores to "
            f"{tuning.gemm_max_rows}, dequantized beyond; "
            + ("tiles as measured" if tuning.tiles else "default tiles (see `lowbit tune`)")
        )
        self.device = device
        self.hidden_dtype = dtype

    # Linear layers

    def prepare_linear(self, weight: LinearWeight) -> PreparedLinear:
        if isinstance(weight, DenseWeight):
            bias = None if weight.bias is None else self._hidden(weight.bias)
            return DenseLinear(self._hidden(weight.weight), bias)
        return low_bit.prepare(weight, self.device, self.hidden_dtype)

    def linear(self, x: Tensor, layer: PreparedLinear) -> Tensor:
        permutation = _permutation(layer)
        return _product(x if permutation is None else x.index_select(1, permutation), layer)

    def linear_residual(self, x: Tensor, layer: PreparedLinear, residual: Tensor) -> Tensor:
        permutation = _permutation(layer)
        x = x if permutation is None else x.index_select(1, permutation)
        return _product(x, layer, residual)

    def norm_linear(self, x: Tensor, norm: Tensor, eps: float, layer: PreparedLinear) -> Tensor:
        return _product(elementwise.rms_norm(x, norm, eps, _permutation(layer)), layer)

    def mlp(
        self,
        x: Tensor,
        norm: Tensor,
        eps: float,
        gate_up: PreparedLinear,
        down: PreparedLinear,
        activation: Activation = Activation.SILU,
    ) -> Tensor:
        normed = elementwise.rms_norm(x, norm, eps, _permutation(gate_up))
        parts = low_bit.part_sums(normed, gate_up) if isinstance(gate_up, FragmentWeight) else None
        order = _permutation(down)
        if parts is None:
            inner = elementwise.activate_mul(_product(normed, gate_up), activation, order)
        else:  # added up there: a launch less, and no rounding between the two
            inner = elementwise.activate_mul_parts(parts, activation, order, x.dtype)
        return _product(inner, down, x)

    def logits(self, x: Tensor, head: PreparedLinear) -> Tensor:
        """[S, C] -> [S, vocabulary] float32.

        Of a dense head the sums as they are: rounded to bfloat16, logits near 20 would be steps of
        1/8 apart, and the best candidates equal.
        """
        if not isinstance(head, DenseLinear) or x.device.type != "cuda":
            return super().logits(x, head)
        y = torch.mm(x, head.weight.t(), out_dtype=torch.float32)
        return y if head.bias is None else y + head.bias

    # Elementwise

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return elementwise.rms_norm(x, weight, eps)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        return elementwise.activate_mul(gate_up, Activation.SILU)

    def activate_mul(self, gate_up: Tensor, activation: Activation) -> Tensor:
        return elementwise.activate_mul(gate_up, activation)

    def rope(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        size = 2 * cos.shape[-1]
        first, second = x[..., :size].to(torch.float32).chunk(2, dim=-1)
        cos, sin = cos[:, None, :], sin[:, None, :]
        rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
        return torch.cat((rotated.to(x.dtype), x[..., size:]), dim=-1)

    # The KV cache

    def kv_head_bytes(self, head_dim: int) -> int:
        return super().kv_head_bytes(head_dim) + (_SCALE_DTYPE.itemsize if self._scaled else 0)

    def allocate_kv_cache(
        self, num_layers: int, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int
    ) -> list[KVCache]:
        """Zeros. float8 is held as uint8, which every operation on blocks knows."""
        is_float8 = self.kv_dtype is torch.float8_e4m3fn
        dtype = torch.uint8 if is_float8 else self.kv_dtype
        numbers = (num_blocks, block_size, num_kv_heads, head_dim)

        def scales() -> Tensor | None:
            """Those of a head's tokens side by side: one load brings a tile's."""
            if not self._scaled:
                return None
            shape = (num_blocks, num_kv_heads, block_size)
            return torch.zeros(shape, dtype=_SCALE_DTYPE, device=self.device).transpose(1, 2)

        return [
            KVCache(
                keys=torch.zeros(numbers, dtype=dtype, device=self.device),
                values=torch.zeros(numbers, dtype=dtype, device=self.device),
                key_scales=scales(),
                value_scales=scales(),
            )
            for _ in range(num_layers)
        ]

    @property
    def _scaled(self) -> bool:
        return self.kv_dtype in rotary.LARGEST

    def rope_and_store(
        self,
        qkv: Tensor,
        cos: Tensor,
        sin: Tensor,
        num_heads: int,
        cache: KVCache,
        batch: ForwardBatch,
    ) -> Tensor:
        return rotary.rope_and_store(qkv, cos, sin, num_heads, cache, batch.slot_mapping)

    def store(self, keys: Tensor, values: Tensor, cache: KVCache, slots: Tensor) -> None:
        rows = torch.cat((keys, values), dim=1).flatten(1)
        unrotated = rows.new_empty(len(rows), 0, dtype=torch.float32)
        rotary.rope_and_store(rows, unrotated, unrotated, 0, cache, slots)

    # Attention

    def plan_attention(self, batch: ForwardBatch) -> TritonPlan:
        return TritonPlan(batch)

    def attention(
        self, q: Tensor, cache: KVCache, plan: AttentionPlan, spec: AttentionSpec
    ) -> Tensor:
        assert isinstance(plan, TritonPlan)
        batch = plan.batch
        attended = paged.paged_attention(
            q,
            cache,
            batch.block_tables,
            batch.query_start,
            batch.context_lens,
            spec,
        )
        return attended.flatten(1)

    def _hidden(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, self.hidden_dtype)


def _permutation(layer: PreparedLinear) -> Tensor | None:
    return layer.input_permutation if isinstance(layer, FragmentWeight) else None


def _product(x: Tensor, layer: PreparedLinear, residual: Tensor | None = None) -> Tensor:
    """x W^T + b (+ residual), of an x in the layer's own order."""
    if isinstance(layer, FragmentWeight):
        return low_bit.linear(x, layer, residual)
    assert isinstance(layer, DenseLinear)
    y = F.linear(x, layer.weight, layer.bias)
    return y if residual is None else y + residual


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def create(
    dtype: str = "auto", kv_cache_dtype: str = "auto", model_dtype: torch.dtype | None = None
) -> TritonBackend:
    """Hidden states in `dtype`; where that is auto, in the model's own, if 16 bits, else float16.

    Raises BackendUnavailable where there is neither a GPU that will do nor the interpreter, and
    for a dtype that is unknown or that the GPU lacks.
    """
    device, capability = _find_device()
    for setting, name, known in (
        ("dtype", dtype, _DTYPES),
        ("kv_cache_dtype", kv_cache_dtype, _KV_DTYPES),
    ):
        if name != "auto" and name not in known:
            raise BackendUnavailable(
                f"{setting} is {name!r}; it must be one of auto, {', '.join(known)}"
            )
        if name == "bfloat16" and interpreted:
            raise BackendUnavailable(f"{setting} is 'bfloat16'; Triton's interpreter has none")
    if kv_cache_dtype == "fp8" and capability < _FP8_CAPABILITY:
        raise BackendUnavailable(
            "kv_cache_dtype is 'fp8'; it needs compute capability 8.9 or higher, and this GPU has "
            f"{capability[0]}.{capability[1]}; int8 takes as little memory"
        )
    own = model_dtype if model_dtype is torch.bfloat16 and not interpreted else torch.float16
    return TritonBackend(device, _DTYPES.get(dtype, own), _KV_DTYPES.get(kv_cache_dtype))


def _find_device() -> tuple[torch.device, tuple[int, int]]:
    """The GPU and its compute capability; the CPU that interprets has every one."""
    if not torch.cuda.is_available():
        if interpreted:
            return torch.device("cpu"), (99, 0)
        raise BackendUnavailable(
            "backend is 'triton'; it needs a CUDA device, and PyTorch finds none; "
            "backend cpu works without"
        )
    capability = torch.cuda.get_device_capability()
    if capability < _MIN_CAPABILITY:
        raise BackendUnavailable(
            f"backend is 'triton'; it needs compute capability 8.0 or higher, and "
            f"{torch.cuda.get_device_name()} has {capability[0]}.{capability[1]}; "
            "backend cpu works without"
        )
    _check_launcher()
    return torch.device("cuda", torch.cuda.current_device()), capability


def _check_launcher() -> None:
    """Triton compiles what launches its kernels when it is first asked for it, in C."""
    try:
        triton.runtime.driver.active.get_current_device()
    except Exception as error:  # no compiler, no headers, no libcuda: each has its own
        reason = " ".join(str(error).split())
        raise BackendUnavailable(
            f"backend is 'triton'; Triton cannot launch kernels here: {reason}; besides the driver "
            "it needs a C compiler (gcc, clang or CC) and Python's headers; backend cpu works "
            "without"
        ) from error
