"""The driver: a 16-bit model in, a packed checkpoint out, one decoder layer at a time.

Every Hessian is taken behind layers, and behind parts of the same layer, that are quantized
already, and the 16-bit model passes beside them, so later codes make up for earlier errors. In
memory at any time: one decoder layer in fp32, the same one as it is stored, one Hessian and its
factor, and the calibration batches' activations up to a limit. Finished layers are written at once
and survive the process: the same command goes on where it was killed.
"""

from __future__ import annotations

import ctypes
import dataclasses
import hashlib
import json
import logging
import math
import resource
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..kernels.packing import PackedEmbedding
from .activations import ActivationStore
from .calibration import calibration_batches, read_documents, render
from .checkpoint import CheckpointWriter, check_output, digest, verify_checkpoint
from .config import QuantConfig
from .devices import reporting_full_memory, resolve_device
from .distributed import Ranks, join_ranks
from .embedding import check_embedding, packed_embedding, quantize_embedding
from .errors import QuantError
from .formats import linear_tensors
from .gptq import SolverConfig
from .journal import Entry, Fingerprint, Journal
from .layers import LayeredModel
from .products import resolve_precision
from .report import ModuleReport, QuantizeReport, read_report, write_report
from .sensitivity import choose, measure, with_widths
from .source import Source, load_source
from .stages import Calibration, LayerQuantizer, find_targets, load_layer, to_fp16
from .workers import Workers, num_workers

logger = logging.getLogger(__name__)

DEFAULT_NUM_SEQUENCES = 16
DEFAULT_SEQUENCE_LENGTH = 512
DEFAULT_ACTIVATION_MEMORY_BYTES = 2 << 30
MIN_TARGET_BPW, MAX_TARGET_BPW = 2.0, 16.0
# Tokens in one forward pass of one thread, about. With 4,096 its intermediate results leave the
# processor's cache: norms, activations and rotary embeddings take some four times as long.
BATCH_TOKENS = 512
MAX_BATCH_SIZE = 8  # sequences in one forward pass
M_MMAP_THRESHOLD, MAPPED_BYTES = -3, 4 << 20  # glibc's name of the option, and its value
MAX_SCANNED_BYTES = 1 << 30  # of a source whose every weight is looked at before work starts
_NOT_WEIGHTS = (".bias", ".g_idx", ".weight_shape")  # what says nothing of a weight's precision


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a run is asked to do."""

    source: str  # a Hugging Face folder, a hub id or a .gguf file
    out: Path
    config: QuantConfig
    target_bpw: float | None  # bits per weight, by choosing the layers' widths
    solver: SolverConfig
    calibration_file: Path | None  # None: the built-in text
    num_sequences: int
    sequence_length: int
    seed: int
    activation_memory_bytes: int
    device: torch.device  # this process's

    def describe(self) -> dict[str, Any]:
        """Every setting that has an influence on the result."""
        file = self.calibration_file
        return {
            **dataclasses.asdict(self.config),
            **dataclasses.asdict(self.solver),  # behind what its precision follows
            "target_bpw": self.target_bpw,
            "calibration": "built-in" if file is None else file.name,
            "num_sequences": self.num_sequences,
            "sequence_length": self.sequence_length,
            "seed": self.seed,
            "device": self.device.type,
        }


@torch.inference_mode()
def quantize(
    source: str,
    out: Path,
    config: QuantConfig,
    *,
    target_bpw: float | None = None,
    solver: SolverConfig | None = None,
    calibration_file: Path | None = None,
    num_sequences: int = DEFAULT_NUM_SEQUENCES,
    sequence_length: int = DEFAULT_SEQUENCE_LENGTH,
    seed: int = 0,
    activation_memory_bytes: int = DEFAULT_ACTIVATION_MEMORY_BYTES,
    device: str = "auto",
    restart: bool = False,
    progress: bool = True,
) -> QuantizeReport:
    """Quantize SOURCE and write a checkpoint, with the report of the run, to the folder `out`.

    With `target_bpw` every group of linear layers that no rule of `config` names gets a width of
    its own, so that they have that many bits per weight together (see `sensitivity`).

    `device` is one of DEVICES. Layers pass there and are solved there one by one; what waits
    between two layers, and what is before and behind them, stays with the processor.

    Under `torchrun` every process calls this: they share the calibration batches and the solving,
    each with a GPU of its own where they compute on GPUs, and the first one writes. Raises a
    QuantError in one line: before work starts for an unsupported setting, an occupied `out`, an
    unusable source or calibration text, too little disk space, or an unfinished run with other
    settings (`restart` discards that one); later for a layer that cannot be solved. `out` does not
    exist then; finished layers stay in the journal next to it.
    """
    started = time.monotonic()
    _bound_heap()
    with join_ranks() as ranks:
        with ranks.together():
            own_device = resolve_device(device)
        settings = Settings(
            source=source,
            out=Path(out).absolute(),
            config=config,
            target_bpw=target_bpw,
            solver=_resolve(solver or SolverConfig(), config, own_device),
            calibration_file=calibration_file,
            num_sequences=num_sequences,
            sequence_length=sequence_length,
            seed=seed,
            activation_memory_bytes=activation_memory_bytes,
            device=own_device,
        )
        with ranks.together():
            prepared = _prepare(settings)
        with (
            _journal(settings, prepared, ranks, restart=restart) as journal,
            reporting_full_memory(own_device),
        ):
            run = _Run(settings, prepared, journal, ranks, started, progress=progress)
            return run.execute()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prepared:
    """What a run works on, checked."""

    source: Source
    model: LayeredModel
    text: str | None  # None: the built-in text


def _prepare(settings: Settings) -> _Prepared:
    """Refuse what can be refused before work starts, the cheapest first."""
    _check_settings(settings)
    if Journal(settings.out).read_digests() is None:
        check_output(settings.out)
    file = settings.calibration_file
    documents = None if file is None else read_documents(file)
    source = load_source(settings.source)
    model = LayeredModel(source, settings.device)
    if settings.config.lm_head and model.head_name is None:
        raise QuantError("lm_head is true; this model has no output head")
    find_targets(model, load_layer(model, 0), 0, settings.config, check=settings.target_bpw is None)
    check_embedding(settings.config, model.embedding_name, *_table(model).shape)
    _check_values(source, model, settings.config)
    _check_disk(settings, source, model)
    text = None if documents is None else render(documents, source.tokenizer)
    return _Prepared(source=source, model=model, text=text)


@contextmanager
def _journal(
    settings: Settings, prepared: _Prepared, ranks: Ranks, *, restart: bool
) -> Iterator[Journal]:
    """The run's journal; gone when the run is done, or when it failed with nothing to keep."""
    journal = Journal(settings.out)
    with ranks.together():
        if ranks.is_first:
            journal.claim(_fingerprint(settings, prepared), restart=restart)
            if journal.read_digests() is None:
                check_output(settings.out)  # now that nobody else has it
    done = False
    try:
        yield journal
        done = True
    finally:
        if ranks.is_first:
            if done or not journal.num_finished():
                journal.remove()
            else:
                logger.warning(
                    "%d finished layers are kept in %s; the same command goes on from there",
                    journal.num_finished(),
                    journal.folder,
                )
            journal.release()


class _Run:
    """One run of one process, between its journal and its checkpoint."""

    def __init__(
        self,
        settings: Settings,
        prepared: _Prepared,
        journal: Journal,
        ranks: Ranks,
        started: float,
        *,
        progress: bool,
    ) -> None:
        self._settings = settings
        self._config = settings.config
        self._source = prepared.source
        self._model = prepared.model
        self._text = prepared.text
        self._journal = journal
        self._ranks = ranks
        self._started = started
        self._seconds_before = journal.read_seconds()  # of processes that were killed
        self._progress = progress and ranks.is_first

    def execute(self) -> QuantizeReport:
        if self._is_written():
            return self._check_written()
        tokens = self._tokens()
        self._config = self._choose_widths(tokens)
        batches = tokens.split(batch_size(tokens.shape[1]))
        own = self._ranks.share(len(batches))
        num_drift = self._num_drift_batches(batches)
        own_drift = [batch for batch in own if batch < num_drift]
        limit = self._settings.activation_memory_bytes
        store = ActivationStore(self._journal.folder, limit // 2 if num_drift else limit)
        wanted = (
            ActivationStore(self._journal.folder, limit // 2, kind="wanted") if num_drift else None
        )
        stores = {store: own} if wanted is None else {store: own, wanted: own_drift}
        count = num_workers(_hidden_size(self._source), self._settings.device)
        with Workers(count) as workers, self._bar() as bar:
            quantizer = LayerQuantizer(
                self._model,
                self._config,
                self._settings.solver,
                Calibration(
                    batches=own,
                    drift_batches=own_drift,
                    all_drift=num_drift == len(batches),
                    num_passes=sum(len(batches[i]) for i in [*own, *own_drift]),
                    own_tokens=sum(batches[i].numel() for i in own),
                    num_tokens=tokens.numel(),
                ),
                store,
                wanted,
                self._ranks,
                workers,
                activation_memory_bytes=self._settings.activation_memory_bytes,
                on_group=lambda reports: bar.set_postfix_str(_describe(reports), refresh=True),
            )
            embedding = self._finish_embedding(tokens.numel())
            first = self._resume(quantizer, stores, batches, embedding)
            bar.update(first)
            for index in range(first, self._model.num_layers):
                self._finish_layer(index, quantizer, stores)
                bar.update()
            self._finish_head(quantizer)
        with self._ranks.together():
            if self._ranks.is_first:
                self._write(tokens.numel())
        return read_report(self._settings.out)[0]

    def _tokens(self) -> Tensor:
        """The calibration windows, [S, L] int64, drawn once for all processes and restarts."""
        settings, source = self._settings, self._source
        with self._ranks.together():
            if self._ranks.is_first and self._journal.read_tokens() is None:
                limit = getattr(source.config, "max_position_embeddings", sys.maxsize)
                tokens = calibration_batches(
                    source,
                    self._text,
                    num_sequences=settings.num_sequences,
                    sequence_length=min(settings.sequence_length, limit),
                    seed=settings.seed,
                    max_model_bytes=settings.activation_memory_bytes,
                    progress=self._progress,
                    device=settings.device,
                )
                self._journal.write_tokens(tokens)
        found = self._journal.read_tokens()
        assert found is not None
        return found

    def _num_drift_batches(self, batches: Sequence[Tensor]) -> int:
        """How many of the run's first batches the 16-bit model's hidden states are kept for."""
        solver = self._settings.solver
        if solver.drift == "none":
            return 0
        if solver.drift_tokens is None:
            return len(batches)
        return min(len(batches), -(-solver.drift_tokens // batches[0].numel()))

    def _choose_widths(self, tokens: Tensor) -> QuantConfig:
        """The run's config; with a target, widths that are measured once for all restarts."""
        target = self._settings.target_bpw
        if target is None:
            return self._config
        with self._ranks.together():
            if self._ranks.is_first and self._journal.read_widths() is None:
                candidates = list(
                    tqdm(
                        measure(self._model, tokens, self._config),
                        desc="measuring",
                        unit="group",
                        disable=not self._progress,
                    )
                )
                self._journal.write_widths(choose(candidates, target))
        widths = self._journal.read_widths()
        assert widths is not None
        outside = {
            self._model.embedding_name: self._config.embeddings,
            self._model.head_name: self._config.lm_head,
        }
        others = [name for name, quantized in outside.items() if quantized and name is not None]
        return with_widths(self._config, widths, others=others)

    def _seconds(self) -> float:
        """Of the run so far: those of earlier processes count up to their last finished layer."""
        return self._seconds_before + time.monotonic() - self._started

    def _is_written(self) -> bool:
        """Whether an earlier process gave OUT its name and was killed before it was done."""
        out = self._settings.out
        return self._journal.read_digests() is not None and out.is_dir() and any(out.iterdir())

    def _check_written(self) -> QuantizeReport:
        with self._ranks.together():
            if self._ranks.is_first:
                verify_checkpoint(self._settings.out, self._journal.read_digests() or {})
        return read_report(self._settings.out)[0]

    def _resume(
        self,
        quantizer: LayerQuantizer,
        stores: Mapping[ActivationStore, Sequence[int]],
        batches: Sequence[Tensor],
        embedding: PackedEmbedding | None,
    ) -> int:
        """How many layers are finished; what their successor reads is in the stores."""
        first = self._journal.num_finished()
        if first:
            logger.info("%d of %d layers are finished", first, self._model.num_layers)
        with self._ranks.together():
            if not first or not all(store.holds(first, own) for store, own in stores.items()):
                # The 16-bit model's hidden states, in the second store, start at its own embedding.
                for (store, own), table in zip(stores.items(), (embedding, None), strict=False):
                    for batch in own:
                        store.put(0, batch, self._model.embed(batches[batch], table))
                for index in range(first):
                    quantizer.replay_layer(index, self._journal.read_layer(index))
        self._clean(stores, first)
        return first

    def _finish_embedding(self, num_tokens: int) -> PackedEmbedding | None:
        """The quantized embedding: the layers behind it make up for its errors, too."""
        config, name = self._config, self._model.embedding_name
        if config.for_embedding(name) is None:
            return None
        with self._ranks.together():
            if self._ranks.is_first and self._journal.read_embedding() is None:
                solver, table = self._settings.solver, _table(self._model)
                entry = quantize_embedding(name, table, config, solver, num_tokens=num_tokens)
                self._journal.write_embedding(entry)
        found = self._journal.read_embedding()
        assert found is not None
        return packed_embedding(found, name, config)

    def _finish_layer(
        self, index: int, quantizer: LayerQuantizer, stores: Iterable[ActivationStore]
    ) -> None:
        entry = quantizer.quantize_layer(index)
        with self._ranks.together():
            if self._ranks.is_first:
                self._journal.write_layer(index, entry)
                self._journal.write_seconds(self._seconds())
        self._clean(stores, index + 1)
        _return_free_memory()

    def _clean(self, stores: Iterable[ActivationStore], layer: int) -> None:
        """Every process is done with the files of other layers."""
        with self._ranks.together():
            pass
        with self._ranks.together():
            if self._ranks.is_first:
                for store in stores:
                    store.keep_only(layer)

    def _finish_head(self, quantizer: LayerQuantizer) -> None:
        if not self._config.lm_head or self._journal.read_head() is not None:
            return
        weight, bias = self._head()
        entry = quantizer.quantize_head(weight, bias)
        with self._ranks.together():
            if self._ranks.is_first:
                self._journal.write_head(entry)

    def _head(self) -> tuple[Tensor, Tensor | None]:
        tensors, name = self._model.other_tensors(), self._model.head_name
        weight = self._model.embedding_name if self._model.tied_head else name
        return tensors[f"{weight}.weight"], tensors.get(f"{name}.bias")

    def _write(self, num_tokens: int) -> None:
        """Put the checkpoint together, a layer at a time, and read it again."""
        settings, config, journal = self._settings, self._config, self._journal
        totals = _Totals()
        expected: dict[str, str] = {}
        with CheckpointWriter(
            settings.out, self._config_json(), config, partial=journal.partial
        ) as writer:
            for entry in chain(journal.entries(self._model.num_layers), [self._outside()]):
                packed: dict[str, Tensor] = {}
                for name, weight in entry.packed.items():
                    packed |= linear_tensors(name, weight, config)
                    expected[name] = digest(weight)
                for name, tensor in entry.tensors.items():
                    expected[name] = digest(tensor)
                totals.add(entry, packed)
                writer.add({**entry.tensors, **packed})
            report = self._report(num_tokens, totals)
            writer.add_files(self._source.write_companions)
            writer.add_files(lambda folder: write_report(folder, report, None))
            journal.write_digests(expected)
        try:
            verify_checkpoint(settings.out, expected)
        except QuantError:
            shutil.rmtree(settings.out, ignore_errors=True)
            raise

    def _outside(self) -> Entry:
        """What stands before and behind the layers at 16 bits.

        A tied head that is quantized is untied by that: the embedding is still written. An
        embedding that is quantized is still the head of a model that ties them.
        """
        tensors, embedding = self._model.other_tensors(), self._model.embedding_name
        if self._config.for_embedding(embedding) is not None:
            del tensors[f"{embedding}.weight"]
        if self._settings.config.lm_head:
            for part in ("weight", "bias"):
                tensors.pop(f"{self._model.head_name}.{part}", None)
        return Entry(tensors=to_fp16(tensors))

    def _config_json(self) -> dict[str, Any]:
        config = {**self._source.config_json, "dtype": "float16"}
        if self._settings.config.lm_head:
            config["tie_word_embeddings"] = False
        return config

    def _report(self, num_tokens: int, totals: _Totals) -> QuantizeReport:
        return QuantizeReport(
            source=self._settings.source,
            settings={**self._settings.describe(), **dataclasses.asdict(self._config)},
            seconds=self._seconds(),
            num_calibration_tokens=num_tokens,
            num_bytes_16bit=_num_bytes_16bit(self._source),
            num_bytes_packed=totals.num_bytes,
            bits_per_weight=totals.bits_per_weight,
            peak_memory_bytes=_peak_memory_bytes(),
            modules=tuple(totals.modules),
        )

    def _bar(self) -> tqdm[Any]:
        return tqdm(
            total=self._model.num_layers,
            desc="quantizing",
            unit="layer",
            disable=not self._progress,
        )


def batch_size(sequence_length: int) -> int:
    """Sequences in one forward pass."""
    return max(1, min(MAX_BATCH_SIZE, BATCH_TOKENS // sequence_length))


class _Totals:
    """What a checkpoint adds up to."""

    def __init__(self) -> None:
        self.num_bytes = 0  # of every tensor
        self.num_packed_bytes = 0  # of codes, scales and zero points
        self.num_weights = 0  # that are quantized
        self.modules: list[ModuleReport] = []

    def add(self, entry: Entry, packed: dict[str, Tensor]) -> None:
        """An entry, and its packed layers as they lie in the checkpoint."""
        self.modules += entry.modules
        self.num_weights += sum(w.in_features * w.out_features for w in entry.packed.values())
        self.num_bytes += sum(t.nbytes for t in chain(entry.tensors.values(), packed.values()))
        self.num_packed_bytes += sum(
            tensor.nbytes for name, tensor in packed.items() if not name.endswith(_NOT_WEIGHTS)
        )

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.num_packed_bytes / self.num_weights if self.num_weights else 16.0


def _resolve(solver: SolverConfig, config: QuantConfig, device: torch.device) -> SolverConfig:
    """What the run does on this machine: a restart on another one must do the same."""
    precision = resolve_precision(solver.precision, config.bits, device)
    return replace(solver, damp_percent=config.damp_percent, precision=precision)


def _bound_heap() -> None:
    """Let glibc map large blocks one by one, for good: by itself it soon takes those below 32 MiB
    from a heap, where what is freed stays between blocks that live on. Smaller blocks are better
    off there: pages that are mapped anew are cleared anew.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, MAPPED_BYTES)


def _return_free_memory() -> None:
    """glibc keeps what was freed between blocks that live on: behind the seventh layer of the 135M
    model, with 64 sequences, 1.74 GB instead of 1.30 GB.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _describe(reports: Sequence[ModuleReport]) -> str:
    """A group of linear layers for the progress line, by the one that came out worst."""
    worst = max(reports, key=lambda report: report.relative_error)
    seconds = sum(report.seconds for report in reports)
    fallback = " (rounded to nearest)" if worst.fallback else ""
    return (
        f"{worst.name} error {worst.relative_error:.2%}{fallback} "
        f"damp {worst.damp_percent:g} {seconds:.1f} s"
    )


def _check_settings(settings: Settings) -> None:
    config = settings.config
    if config.desc_act:
        raise QuantError("desc_act is true; checkpoints like that are read, never made")
    if config.checkpoint_format == "awq":
        raise QuantError("checkpoint_format is 'awq'; this format is read, never written")
    target = settings.target_bpw
    if target is not None and not MIN_TARGET_BPW <= target <= MAX_TARGET_BPW:
        raise QuantError(
            f"target_bpw is {target:g}; it must lie in [{MIN_TARGET_BPW}, {MAX_TARGET_BPW}]"
        )
    if settings.activation_memory_bytes < 0:
        value = settings.activation_memory_bytes
        raise QuantError(f"activation_memory_bytes is {value}; it must be at least 0")


def _table(model: LayeredModel) -> Tensor:
    """The input embedding as it is stored, [V, C]."""
    return model.other_tensors()[f"{model.embedding_name}.weight"]


def _check_values(source: Source, model: LayeredModel, config: QuantConfig) -> None:
    """All of a small model; of a large one what stands outside the layers.

    Raises QuantError for a tensor that is not finite, or outside the layers beyond the fp16 range,
    unless it is quantized.
    """
    small = _num_bytes_16bit(source) <= MAX_SCANNED_BYTES
    names = sorted(source.places) if small else []
    tensors = {name: source.tensor(source.places[name]) for name in names}
    outside = model.other_tensors()
    for name, tensor in {**tensors, **outside}.items():
        largest = max(abs(float(value)) for value in torch.aminmax(tensor))
        if not math.isfinite(largest):
            raise QuantError(f"tensor {name} holds values that are not finite")
        stays = name in outside and not _is_quantized(name, model, config)
        if stays and largest > torch.finfo(torch.float16).max:
            raise QuantError(f"tensor {name} holds values beyond the fp16 range")
    source.release()


def _is_quantized(name: str, model: LayeredModel, config: QuantConfig) -> bool:
    """Whether a tensor outside the layers is."""
    if name == f"{model.embedding_name}.weight":
        return config.for_embedding(model.embedding_name) is not None
    return config.lm_head and name == f"{model.head_name}.weight"


def _check_disk(settings: Settings, source: Source, model: LayeredModel) -> None:
    """The checkpoint, its layers in the journal, and the activations before and behind a layer.

    Raises QuantError when they cannot fit; their size is known to a few percent.
    """
    whole = _num_bytes_16bit(source)
    outside = sum(2 * tensor.numel() for tensor in model.other_tensors().values())
    packed = (whole - outside) * settings.config.bits // 16
    hidden_size = _hidden_size(source)
    num_tokens = settings.num_sequences * settings.sequence_length
    models = 1 if settings.solver.drift == "none" else 2
    needed = outside + 2 * packed + models * 2 * 4 * num_tokens * hidden_size
    parent = settings.out.parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise QuantError(
            f"{settings.out}: {needed >> 20} MiB are needed, {free >> 20} MiB are free"
        )


def _hidden_size(source: Source) -> int:
    return int(getattr(source.config.get_text_config(), "hidden_size", 0))


def _fingerprint(settings: Settings, prepared: _Prepared) -> Fingerprint:
    """What must be the same for a run to go on with the layers of another one."""
    text = prepared.text
    return {
        "model": _identify(prepared.source),
        **{key: str(value) for key, value in settings.describe().items()},
        "calibration text": "built-in" if text is None else _hash(text.encode()),
        **{f"version of {name}": version(name) for name in ("lowbit", "torch", "transformers")},
    }


def _identify(source: Source) -> str:
    """The files of a local source by name, size and time; of a hub's model, its name."""
    path = Path(source.name).expanduser()
    files = [path] if path.is_file() else sorted(filter(Path.is_file, path.glob("*.*")))
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return _hash(json.dumps([source.config_json, stats or source.name], default=str).encode())


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _num_bytes_16bit(source: Source) -> int:
    return sum(2 * math.prod(source.shape(name)) for name in source.names())


def _peak_memory_bytes() -> int:
    """Of this program; the kernel's figure for the process may be that of who started it."""
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.exists() else ():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
