"""One decoder layer of any transformers model at a time: load it, run it, name its tensors.

Everything a layer is given besides the hidden states (positions, masks, rotary embeddings, ALiBi)
comes from the model's own forward pass, run once per batch shape with the layers left out. That
works because sequences are never padded: those values depend on the shape alone. Knows nothing of
quantization.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..kernels.packing import PackedEmbedding
from .devices import CPU
from .errors import SourceError
from .products import compute_with, project, project_in_fp32
from .skeleton import Skeleton, assign
from .source import Source

MAX_SHAPES = 2  # whose layer arguments are kept: full batches and a last, smaller one
PROBE_SHAPE = (1, 4)  # of a batch that is enough to run a layer and see what it does

Call = tuple[tuple[Any, ...], dict[str, Any]]  # what a layer is given besides the hidden states


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearGroup:
    """Linear layers of one decoder layer that read the same input tensor, in order of execution."""

    names: tuple[str, ...]  # relative to the layer, e.g. ("self_attn.q_proj", "self_attn.k_proj")
    # The module whose input the group's output is added to, if it is the residual stream: "" is the
    # layer itself.
    stream: str | None = None


class _Stop(Exception):
    """Ends the model's forward pass where everything is known that it was run for."""


class LayeredModel:
    """A transformers model of which one layer at a time is in memory.

    Next to that layer stand the parts before and behind all layers in fp32, but the embedding and
    the head, which stay memory-mapped as they are stored. Layers are loaded to `device` and run
    there; what is before and behind them stays with the processor.
    """

    num_layers: int
    head_name: str | None  # "lm_head"; None for encoders
    tied_head: bool  # the head's weight is the input embedding
    embedding_name: str  # on disk: "model.embed_tokens"

    def __init__(self, source: Source, device: torch.device = CPU) -> None:
        self.device = device
        self._source = source
        self._skeleton = Skeleton(source.config)
        self._model = self._skeleton.model
        self._layers_name, self._layers = find_layers(self._model)
        self.num_layers = len(self._layers)
        embedding, self._head = self._model.get_input_embeddings(), _find_head(self._model)
        embedding_path = _path_of(self._model, embedding)
        self.embedding_name = self._skeleton.checkpoint_name(embedding_path)
        head_name = _path_of(self._model, self._head)
        self.head_name = head_name if self._skeleton.is_causal else None
        self.tied_head = f"{head_name}.weight" in self._skeleton.tied
        self._returns_tuple: bool | None = None
        self._calls: dict[tuple[int, ...], list[Call]] = {}
        self._lock = Lock()  # of the calls: to find one out, the model is run
        self._fill_resident({f"{embedding_path}.weight", f"{head_name}.weight"})
        self._stand_in: PackedEmbedding | None = None  # for the embedding, during `embed`
        self._look_up_in_fp32(embedding)
        self._check_calls()
        self._head.forward = partial(project_in_fp32, linear=self._head)
        source.release()  # layers are read through mappings of their own

    def layer_name(self, index: int) -> str:
        """The layer's name in the model: "model.layers.3"."""
        return f"{self._layers_name}.{index}"

    def embed(self, ids: Tensor, table: PackedEmbedding | None = None) -> Tensor:
        """[B, L] int64 -> the hidden states before the first layer, [B, L, C] fp32.

        Those of a model whose input embedding is `table`, if that is given.
        """
        found: list[Tensor] = []

        def stop(hidden: Tensor, call: Call) -> Tensor:
            found.append(hidden)
            raise _Stop

        self._stand_in = table
        try:
            self._run(ids, {0: stop})
        finally:
            self._stand_in = None
        return found[0]

    def load_layer(self, index: int, *, products: torch.dtype | None = None) -> nn.Module:
        """The layer with its weights, read now, in fp32 on `device`.

        With `products` the matrices of its linear layers are held in 16 bits and multiplied in that
        dtype: for fp32 they stay as they are in the source, mapped from there where the format
        allows it, and are converted whenever they are used. Routers, which a rounded product can
        tip, compute in fp32.
        """
        # Its configuration is shared: nothing writes to it, and the model's is a copy already.
        layer = copy.deepcopy(self._layers[index], {id(self._model.config): self._model.config})
        prefix = f"{self.layer_name(index)}."
        linears = {n: m for n, m in layer.named_modules() if isinstance(m, nn.Linear)}
        for name in self._layer_tensors(index):
            stored = self._source.tensor(self._source.places[prefix + name])
            path, _, leaf = name.rpartition(".")
            keeps = products is not None and path in linears and leaf == "weight"
            dtype = stored.dtype if keeps else torch.float32
            assign(layer, name, stored.to(self.device, dtype, copy=not keeps))
        for module in layer.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(self.device)
        for name, linear in linears.items():
            if products is None:
                # GPT-2 stores them transposed.
                linear.weight = nn.Parameter(linear.weight.contiguous(), requires_grad=False)
            elif products == torch.bfloat16 and not is_router(name):
                weight = linear.weight.to(products).contiguous()
                linear.weight = nn.Parameter(weight, requires_grad=False)
            else:
                compute_with(project_in_fp32, linear)
                continue
            compute_with(project, linear)
        self._source.release()
        if self._returns_tuple is None:  # before anyone's hooks are on it
            self._learn_returns(layer)
        return layer

    def call_layer(self, layer: nn.Module, index: int, hidden: Tensor) -> Tensor:
        """What the model's own forward does for unpadded sequences. [B, L, C] -> [B, L, C]

        on `device`, wherever the hidden states were.
        """
        args, kwargs = self._calls_for(hidden.shape)[index]
        output = layer(hidden.to(self.device), *args, **kwargs)
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result

    def linear_groups(self, layer: nn.Module, index: int) -> list[LinearGroup]:
        """The layer's linear layers, found by running it; routers are never among them."""
        names = {module: name for name, module in layer.named_modules()}
        calls: list[tuple[nn.Module, Tensor]] = []
        outputs: dict[nn.Module, Tensor] = {}

        def note(module: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], Tensor):
                calls.append((module, args[0]))

        def keep(module: nn.Module, _: object, output: Tensor) -> None:
            outputs[module] = output

        linears = {m for m, n in names.items() if isinstance(m, nn.Linear) and not is_router(n)}
        handles = [module.register_forward_pre_hook(note) for module in names]
        handles += [linear.register_forward_hook(keep) for linear in linears]
        try:
            ids = torch.arange(math.prod(PROBE_SHAPE)).view(PROBE_SHAPE)
            result = self.call_layer(layer, index, self.embed(ids))
        finally:
            for handle in handles:
                handle.remove()
        groups: list[tuple[Tensor, list[nn.Module]]] = []
        for module, inputs in calls:
            if module in linears:
                for tensor, members in groups:
                    if tensor is inputs:
                        members.append(module)
                        break
                else:
                    groups.append((inputs, [module]))
        tensors = [*((names[module], inputs) for module, inputs in calls), (None, result)]
        return [
            LinearGroup(
                names=tuple(names[module] for module in members),
                stream=_find_stream(outputs[members[0]], tensors) if len(members) == 1 else None,
            )
            for _, members in groups
        ]

    def head_input(self, hidden: Tensor) -> Tensor:
        """What the head reads, given the last layer's output. [B, L, C] -> [B, L, C']."""
        found: list[Tensor] = []

        def stop(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            found.append(args[0])
            raise _Stop

        handle = self._head.register_forward_pre_hook(stop)
        try:
            self._run_behind(hidden)
        finally:
            handle.remove()
        return found[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """Given the last layer's output. [B, L, C] -> [B, L, vocabulary] fp32."""
        output = self._run_behind(hidden)
        logits: Tensor = output.logits
        return logits

    def layer_tensors(self, layer: nn.Module, index: int, quantized: set[str]) -> dict[str, Tensor]:
        """Everything in the layer but the weights and biases of the linear layers `quantized`
        (names relative to the layer), as a new checkpoint names and stores it; on the
        processor.
        """
        prefix = f"{self.layer_name(index)}."
        state = layer.state_dict()
        tensors: dict[str, Tensor] = {}
        for name in self._layer_tensors(index):
            if name.rpartition(".")[0] not in quantized:
                transposed = self._skeleton.is_transposed(prefix + name)
                tensor = state[name].t().contiguous() if transposed else state[name]
                tensors[self._skeleton.checkpoint_name(prefix + name)] = tensor.cpu()
        return tensors

    def checkpoint_name(self, index: int, linear: str) -> str:
        """What a new checkpoint calls a linear layer (its name relative to layer `index`)."""
        return self._skeleton.checkpoint_name(f"{self.layer_name(index)}.{linear}")

    def other_tensors(self) -> dict[str, Tensor]:
        """Everything outside the layers as it is stored, as a new checkpoint names it."""
        return {
            self._skeleton.checkpoint_name(name): self._source.tensor(self._source.places[name])
            for name in self._outside_names()
        }

    def _outside_names(self) -> list[str]:
        prefix = f"{self._layers_name}."
        return [name for name in self._source.places if not name.startswith(prefix)]

    def _layer_tensors(self, index: int) -> list[str]:
        """Names relative to the layer."""
        prefix = f"{self.layer_name(index)}."
        return [n.removeprefix(prefix) for n in self._source.places if n.startswith(prefix)]

    def _look_up_in_fp32(self, embedding: Any) -> None:
        """Make the embedding, of any dtype, compute in fp32: it converts the rows it looks up."""
        embedding.padding_idx = None  # concerns gradients; must be a row of the few looked up
        stored: Tensor = embedding.weight

        def choose_rows(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            ids, places = args[0].unique(return_inverse=True)
            table = self._stand_in
            rows = stored[ids].float() if table is None else table.rows(ids)
            module.weight = nn.Parameter(rows, requires_grad=False)
            return (places, *args[1:])

        def restore(module: nn.Module, args: object, output: object) -> None:
            module.weight = stored

        embedding.register_forward_pre_hook(choose_rows)
        embedding.register_forward_hook(restore)

    def _fill_resident(self, as_stored: set[str]) -> None:
        for name in self._outside_names():
            tensor = self._source.tensor(self._source.places[name])
            self._skeleton.fill(name, tensor if name in as_stored else tensor.to(torch.float32))

    def _run_behind(self, hidden: Tensor) -> Any:
        if self._returns_tuple is None:
            self.load_layer(0)
        ids = torch.zeros(hidden.shape[:2], dtype=torch.int64)
        return self._run(ids, {self.num_layers - 1: lambda _, call: hidden})

    def _run(self, ids: Tensor, stand_ins: dict[int, Callable[[Tensor, Call], Tensor]]) -> Any:
        """The model's forward pass with layers that pass on what they get, or do as told."""
        with _replaced(self._layers, stand_ins, bool(self._returns_tuple)):
            try:
                return self._model(ids, use_cache=False)
            except _Stop:
                return None
            except (RuntimeError, TypeError, ValueError) as error:
                kind, reason = self._model.config.model_type, str(error).partition("\n")[0]
                raise SourceError(
                    f"model type {kind!r} cannot be run layer by layer ({reason})"
                ) from error

    def _check_calls(self) -> None:
        """Raises SourceError when a layer reads something of the tokens past the hidden states."""
        ids = torch.zeros(PROBE_SHAPE, dtype=torch.int64)
        if not _same(self._first_call(ids), self._first_call(ids + 1)):
            kind = self._model.config.model_type
            raise SourceError(f"model type {kind!r}: its layers read more than hidden states")

    def _first_call(self, ids: Tensor) -> Call:
        calls: list[Call] = []

        def stop(_: Tensor, call: Call) -> Tensor:
            calls.append(call)
            raise _Stop

        self._run(ids, {0: stop})
        return calls[0]

    def _learn_returns(self, layer: nn.Module) -> None:
        """Whether this model's layers return a tensor or a tuple; any layer of it tells."""
        ids = torch.zeros(PROBE_SHAPE, dtype=torch.int64)
        (args, kwargs), hidden = self._moved(self._first_call(ids)), self.embed(ids)
        output = layer(hidden.to(self.device), *args, **kwargs)
        self._returns_tuple = isinstance(output, tuple)

    def _calls_for(self, shape: torch.Size) -> list[Call]:
        """What every layer is given besides hidden states of that shape. Threads may ask."""
        key = tuple(shape[:2])
        with self._lock:
            if key not in self._calls:
                while len(self._calls) >= MAX_SHAPES:
                    self._calls.pop(next(iter(self._calls)))
                self._calls[key] = self._moved(self._capture(key))
            return self._calls[key]

    def _moved(self, value: Any) -> Any:
        """All tensors inside a value on `device`; one that stands there many times only once."""
        moved: dict[int, Tensor] = {}

        def move(tensor: Tensor) -> Tensor:
            return moved.setdefault(id(tensor), tensor.to(self.device))

        return tree_map_only(Tensor, move, value)

    def _capture(self, shape: tuple[int, ...]) -> list[Call]:
        calls: list[Call] = []

        def record(hidden: Tensor, call: Call) -> Tensor:
            calls.append(call)
            if len(calls) == self.num_layers:
                raise _Stop
            return hidden

        self._run(
            torch.zeros(shape, dtype=torch.int64), dict.fromkeys(range(self.num_layers), record)
        )
        return calls


@contextmanager
def _replaced(
    layers: nn.ModuleList,
    stand_ins: dict[int, Callable[[Tensor, Call], Tensor]],
    returns_tuple: bool,
) -> Iterator[None]:
    """Layers without weights, whose forward passes do nothing but what `stand_ins` say."""

    def forward_of(index: int) -> Callable[..., Any]:
        stand_in = stand_ins.get(index)

        def forward(*args: Any, **kwargs: Any) -> Any:
            if args:
                hidden, args = args[0], args[1:]
            else:
                hidden = kwargs.pop("hidden_states")
            output = hidden if stand_in is None else stand_in(hidden, (args, kwargs))
            return (output, None) if returns_tuple else output

        return forward

    for index, layer in enumerate(layers):
        layer.forward = forward_of(index)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def find_layers(model: Any) -> tuple[str, nn.ModuleList]:
    """The list of as many modules as the configuration says there are layers; the outermost."""
    for name, module in model.named_modules():
        if type(module) is nn.ModuleList and len(module) == model.config.num_hidden_layers:
            return str(name), module
    raise SourceError(f"model type {model.config.model_type!r}: its layers were not found")


def _same(left: object, right: object) -> bool:
    """Whether all tensors inside two values of the same structure are equal."""
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict) and isinstance(right, dict):
        return all(_same(left[key], right[key]) for key in left)
    if isinstance(left, tuple | list) and isinstance(right, tuple | list):
        return all(map(_same, left, right))
    return True


def _find_stream(output: Tensor, tensors: Sequence[tuple[str | None, Tensor]]) -> str | None:
    """The name of the tensor whose sum with `output` is another one of them."""
    fitting = [
        (name, tensor.reshape(output.shape))  # some families flatten tokens on their way
        for name, tensor in tensors
        if tensor.numel() == output.numel() and tensor.shape[-1] == output.shape[-1]
    ]
    for i, (name, before) in enumerate(fitting):
        total = before + output
        if bool(before.any()) and any(torch.equal(total, after) for _, after in fitting[i + 1 :]):
            return name
    return None


def _find_head(model: Any) -> Any:
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise SourceError(f"model type {model.config.model_type!r}: its output head was not found")
    return head


def _path_of(model: nn.Module, wanted: nn.Module) -> str:
    return str(next(name for name, module in model.named_modules() if module is wanted))


def is_router(name: str) -> bool:
    """A linear layer that chooses or weighs experts: "mlp.gate", "mlp.shared_expert_gate"."""
    leaf = name.rpartition(".")[2]
    return leaf in ("gate", "router") or leaf.endswith("_gate")
