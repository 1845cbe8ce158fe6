"""The `lowbit` command. Each subcommand imports what it needs, so that `--help` is instant."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import functools
import json
import logging
import os
import re
import sys
import time
from collections.abc import Collection
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .config import EngineConfig, ServerConfig
from .types import EngineFailed, LowbitError

logger = logging.getLogger(__name__)

EXIT_FAILURE = 1
EXIT_ENGINE_FAILED = 70  # a supervisor should start the server again
API_KEY_VARIABLE = "LOWBIT_API_KEY"  # not an option: others can read a command line
EXIT_INTERRUPTED = 130  # what a shell reports after Ctrl-C


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand; the exit status. A refusal is one line on stderr."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(
        level=arguments.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    try:
        status: int = arguments.run(arguments)
    except KeyboardInterrupt:
        print(file=sys.stderr)  # the shell's prompt begins on a line of its own
        return EXIT_INTERRUPTED
    except (LowbitError, ValueError, OSError) as error:
        # Refusals of ours are ValueErrors by contract; a traceback is for --log-level debug.
        logger.debug("refused", exc_info=error)
        line = " ".join(str(error).split())
        print(f"lowbit {arguments.command}: error: {line}", file=sys.stderr)
        return EXIT_FAILURE
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lowbit", description="Quantize and serve LLMs.")
    parser.add_argument("--version", action="version", version=f"lowbit {version('lowbit')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_quantize(commands)
    _add_plan(commands)
    _add_eval(commands)
    _add_convert(commands)
    _add_serve(commands)
    _add_keys(commands)
    _add_generate(commands)
    _add_chat(commands)
    benches = _add_bench(commands)
    _add_tune(commands)
    leaves = {**commands.choices, **benches.choices}
    del leaves["bench"]
    for command in leaves.values():
        command.formatter_class = argparse.ArgumentDefaultsHelpFormatter
        command.add_argument(
            "--log-level",
            default="info",
            choices=("debug", "info", "warning", "error"),
            help="how much to say on stderr",
        )
    return parser


Commands = Any  # argparse keeps the type of add_subparsers' result private


# quantize


def _add_quantize(commands: Commands) -> None:
    parser = commands.add_parser("quantize", help="turn a 16-bit model into a packed checkpoint")
    parser.add_argument("source", help="a Hugging Face folder, a hub id, or a .gguf file")
    parser.add_argument("out", type=Path, help="the folder to create")
    width = _add_layout_options(parser)
    width.add_argument(
        "--target-bpw",
        type=float,
        default=argparse.SUPPRESS,
        help="bits per weight, scales and zero points included: each layer gets 2, 3, 4 or 8 bits "
        "by what that costs its output",
    )
    _add_solver_options(parser)
    parser.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="text like that which the model will see: UTF-8, or .jsonl with one "
        '{"text": ...} or {"messages": [...]} a line; a built-in text if absent',
    )
    options: dict[str, Any] = {"type": int, "default": argparse.SUPPRESS}
    parser.add_argument(
        "--num-sequences", help="windows of calibration text (default: 16)", **options
    )
    parser.add_argument("--sequence-length", help="tokens of a window (default: 512)", **options)
    parser.add_argument("--seed", help="of the choice of windows (default: 0)", **options)
    parser.add_argument(
        "--activation-memory",
        dest="activation_memory_bytes",
        metavar="BYTES",
        help="for calibration activations; more are read back from disk (default: 2 GiB)",
        **options,
    )
    _add_device(parser)
    parser.add_argument(
        "--restart", action="store_true", help="discard what an unfinished run left"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="say what the run would cost and give, and stop"
    )
    parser.add_argument(
        "--eval", action="store_true", help="compare the result with the 16-bit model"
    )
    parser.set_defaults(run=_quantize)


def _quantize(arguments: argparse.Namespace) -> int:
    if arguments.dry_run:
        if "target_bpw" in arguments:
            raise ValueError("target_bpw is chosen from the weights; a dry run reads none")
        arguments.gpu, arguments.kv_tokens = None, 0
        return _plan(arguments)
    from ..quant.errors import PeerError
    from ..quant.gptq import SolverConfig
    from ..quant.pipeline import quantize
    from ..quant.units import format_bytes

    config = dataclasses.replace(_quant_config(arguments), damp_percent=arguments.damp_percent)
    settings = _given(
        arguments,
        (
            "target_bpw",
            "num_sequences",
            "sequence_length",
            "seed",
            "activation_memory_bytes",
            "device",
        ),
    )
    try:
        report = quantize(
            arguments.source,
            arguments.out,
            config,
            solver=SolverConfig(**_given(arguments, SOLVER_OPTIONS)),
            calibration_file=arguments.calibration,
            restart=arguments.restart,
            **settings,
        )
    except PeerError as error:
        logger.debug("%s", error)  # that process says why
        return EXIT_FAILURE
    if int(os.environ.get("RANK", "0")):
        return 0
    worst = max(report.modules, key=lambda module: module.relative_error, default=None)
    print(
        f"wrote {arguments.out}: {format_bytes(report.num_bytes_16bit)} at 16 bits, "
        f"{format_bytes(report.num_bytes_packed)} packed, {report.bits_per_weight:.2f} bits per "
        f"weight, {report.seconds:.0f} s"
        + (f"; largest relative error {worst.relative_error:.2%} at {worst.name}" if worst else "")
    )
    if arguments.eval:
        _print_quality(arguments.source, arguments.out)
    return 0


def _print_quality(source: str, out: Path) -> None:
    from ..quant.quality import evaluate_checkpoint

    quality = evaluate_checkpoint(source, out)
    found = quality.comparison
    print(
        f"on {found.num_tokens} tokens of {quality.text}: KL divergence {found.kl_divergence:.4f}, "
        f"the same first choice {found.top1_agreement:.2%}"
    )


# plan


def _add_plan(commands: Commands) -> None:
    parser = commands.add_parser(
        "plan", help="what quantizing would cost and give; reads no weights"
    )
    parser.add_argument(
        "source", help="a Hugging Face folder, its config.json alone, a hub id, or a .gguf file"
    )
    _add_layout_options(parser)
    options: dict[str, Any] = {"type": int, "default": argparse.SUPPRESS}
    parser.add_argument("--num-sequences", help="windows of calibration text", **options)
    parser.add_argument("--sequence-length", help="tokens of a window", **options)
    parser.add_argument(
        "--activation-memory",
        dest="activation_memory_bytes",
        metavar="BYTES",
        help="for calibration activations",
        **options,
    )
    _add_device(parser)
    parser.add_argument("--gpu", metavar="NAME", help="say whether the result fits: A100-80, L4, …")
    parser.add_argument(
        "--kv-tokens", type=int, default=2048, help="of KV cache that must fit the GPU, too"
    )
    parser.set_defaults(run=_plan)


def _plan(arguments: argparse.Namespace) -> int:
    from ..quant.gptq import SolverConfig
    from ..quant.plan import describe, plan_run

    plan = plan_run(
        arguments.source,
        _quant_config(arguments),
        solver=SolverConfig(**_given(arguments, SOLVER_OPTIONS)),
        gpu=arguments.gpu,
        kv_tokens=arguments.kv_tokens,
        **_given(
            arguments, ("num_sequences", "sequence_length", "activation_memory_bytes", "device")
        ),
    )
    print(describe(plan))
    return 0


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device",
        default=argparse.SUPPRESS,
        help="what to compute on: cpu, cuda, or cuda where there is a GPU (auto) (default: auto)",
    )


SOLVER_OPTIONS = (
    "act_order",
    "scale_search",
    "scale_norm",
    "signed_scales",
    "descent_sweeps",
    "drift",
    "drift_tokens",
    "precision",
)


def _add_solver_options(parser: argparse.ArgumentParser) -> None:
    """How codes are found. Their defaults are the solver's own, which this must not import."""
    parser.add_argument(
        "--damp-percent",
        type=float,
        default=0.01,
        help="of the Hessian's mean diagonal, added to its diagonal",
    )
    options: dict[str, Any] = {"default": argparse.SUPPRESS}
    parser.add_argument(
        "--act-order",
        help="static: inputs by falling importance; group: groups so; none (default: static)",
        **options,
    )
    parser.add_argument(
        "--scale-search",
        help="what a group's range minimises: the error as the Hessian weighs it (hessian), a norm "
        "of it (norm), or nothing (none) (default: hessian)",
        **options,
    )
    parser.add_argument(
        "--scale-norm", type=float, help="of --scale-search norm (default: 2.4)", **options
    )
    parser.add_argument(
        "--signed-scales",
        action=argparse.BooleanOptionalAction,
        help="symmetric grids with their extra code on the largest weight (default: on)",
        **options,
    )
    parser.add_argument(
        "--descent-sweeps",
        type=int,
        help="of coordinate descent over the finished codes (default: 4)",
        **options,
    )
    parser.add_argument(
        "--drift",
        help="what a layer makes up for beside its rounding: nothing (none), its inputs' errors "
        "(inputs), the residual stream's too (stream) (default: stream)",
        **options,
    )
    parser.add_argument(
        "--drift-tokens",
        type=int,
        help="of the calibration text that this is measured on, at most: faster (default: all)",
        **options,
    )
    parser.add_argument(
        "--precision",
        help="of linear layers while calibration text passes through them: bfloat16, float32, or "
        "the faster of the two on this processor, but float32 for 8 bits (auto) (default: auto)",
        **options,
    )


def _add_layout_options(parser: argparse.ArgumentParser) -> Any:
    """What the quantized layers of a checkpoint look like. Returns the group that sets a width."""
    width = parser.add_mutually_exclusive_group()
    width.add_argument("--bits", type=int, default=4, help="of a weight's code")
    parser.add_argument(
        "--group-size", type=int, default=64, help="weights that share a scale; -1 is a whole row"
    )
    grid = parser.add_mutually_exclusive_group()
    grid.add_argument("--sym", action="store_true", default=True, help="grids around zero")
    grid.add_argument(
        "--asym", dest="sym", action="store_false", help="a zero point for every group instead"
    )
    parser.add_argument("--lm-head-bits", type=int, help="quantize the output head, too")
    parser.add_argument(
        "--embedding-bits",
        type=int,
        help="quantize the input embedding, too, to nearest; a head that is tied to it stays tied, "
        "unless it has bits of its own",
    )
    parser.add_argument(
        "--dynamic",
        action="append",
        metavar="REGEX=bits=8,group_size=32",
        help="for modules of these names; --dynamic=-:REGEX leaves them at 16 bits; repeatable",
    )
    parser.add_argument(
        "--format", help="gptq, gptq_v2 or compressed-tensors; gptq, or gptq_v2 with --asym"
    )
    return width


def _quant_config(arguments: argparse.Namespace) -> Any:
    from ..kernels.packing import SUPPORTED_BITS
    from ..quant.config import EMBEDDING_NAMES, QuantConfig

    dynamic = dict(_dynamic(text) for text in arguments.dynamic or ())
    if arguments.lm_head_bits is not None:
        dynamic = {"+:^lm_head$": {"bits": arguments.lm_head_bits}, **dynamic}
    bits = arguments.embedding_bits
    if bits is not None:
        if bits not in SUPPORTED_BITS:
            supported = ", ".join(map(str, SUPPORTED_BITS))
            raise ValueError(f"embedding_bits is {bits}; supported are {supported}")
        dynamic = {f"+:{EMBEDDING_NAMES}": {"bits": bits}, **dynamic}
    return QuantConfig(
        bits=arguments.bits,
        group_size=arguments.group_size,
        sym=arguments.sym,
        lm_head=arguments.lm_head_bits is not None,
        embeddings=bits is not None,
        checkpoint_format=arguments.format or ("gptq" if arguments.sym else "gptq_v2"),
        dynamic=dynamic,
    )


def _dynamic(text: str) -> tuple[str, dict[str, Any]]:
    """ "REGEX=bits=8,group_size=32" or "-:REGEX" as QuantConfig has it. Raises ValueError."""
    if text.startswith("-:"):
        return text, {}
    found = re.fullmatch(r"(.+?)=((?:\w+=[^=,]+,)*\w+=[^=,]+)", text)
    if found is None:
        raise ValueError(f"dynamic is {text!r}; it must be REGEX=bits=8,group_size=32 or -:REGEX")
    changes = dict(change.split("=") for change in found[2].split(","))
    try:
        return found[1], {key: json.loads(value) for key, value in changes.items()}
    except ValueError:
        raise ValueError(
            f"dynamic is {text!r}; its values must be numbers, true or false"
        ) from None


# eval


def _add_eval(commands: Commands) -> None:
    parser = commands.add_parser(
        "eval", help="compare quantized checkpoints with their 16-bit model"
    )
    parser.add_argument("reference", help="the 16-bit model: a folder, a hub id, or a .gguf file")
    parser.add_argument("checkpoints", type=Path, nargs="+", metavar="checkpoint")
    parser.add_argument(
        "--text",
        type=Path,
        metavar="FILE",
        help="text or .jsonl to compare on; a built-in text that calibration leaves out if absent",
    )
    options: dict[str, Any] = {"type": int, "default": argparse.SUPPRESS}
    parser.add_argument("--num-sequences", help="windows of that text (default: 32)", **options)
    parser.add_argument("--sequence-length", help="tokens of a window (default: 512)", **options)
    parser.add_argument("--seed", help="of the choice of windows (default: 0)", **options)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument(
        "--html", type=Path, metavar="FILE", help="write a page with tables and plots there"
    )
    parser.set_defaults(run=_eval)


def _eval(arguments: argparse.Namespace) -> int:
    from ..quant.quality import evaluate
    from ..quant.report import format_heading, format_row, write_evaluations

    evaluations: list[Any] = []
    for evaluation in evaluate(
        arguments.reference,
        arguments.checkpoints,
        text_file=arguments.text,
        **_given(arguments, ("num_sequences", "sequence_length", "seed")),
    ):
        if not evaluations:
            print(format_heading(evaluation))
        print(format_row(evaluation), flush=True)
        evaluations.append(evaluation)
    write_evaluations(evaluations, arguments.json, arguments.html)
    return 0


# convert


def _add_convert(commands: Commands) -> None:
    parser = commands.add_parser("convert", help="write a packed checkpoint in another format")
    parser.add_argument("checkpoint", type=Path, help="GPTQ, AWQ or compressed-tensors")
    parser.add_argument("out", type=Path, help="the folder to create")
    parser.add_argument(
        "--format",
        required=True,
        metavar="FORMAT",
        help="gptq (symmetric), gptq_v2 (also asymmetric) or compressed-tensors",
    )
    parser.set_defaults(run=_convert)


def _convert(arguments: argparse.Namespace) -> int:
    from ..quant.convert import convert

    done = convert(arguments.checkpoint, arguments.out, arguments.format)
    print(
        f"wrote {arguments.out}: {done.num_packed} layers from {done.read_format} to "
        f"{done.written_format}, {done.num_other} tensors as they were, "
        f"{done.num_bytes / 1e6:.1f} MB"
    )
    return 0


# bench, tune


def _add_bench(commands: Commands) -> Commands:
    parser = commands.add_parser("bench", help="measure this machine")
    benches: Commands = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    _add_bench_kernels(benches)
    _add_bench_engine(benches)
    return benches


def _add_bench_kernels(benches: Commands) -> None:
    parser = benches.add_parser("kernels", help="linear layers beside cuBLAS on a GPU")
    parser.add_argument("--quick", action="store_true", help="two layers instead of fifteen")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    parser.add_argument(
        "--budget-seconds",
        type=float,
        default=460.0,
        help="what does not fit is left out, and said to be; a third is for peers",
    )
    parser.set_defaults(run=_bench_kernels)


def _bench_kernels(arguments: argparse.Namespace) -> int:
    from .bench import kernels, peers, timing

    device = timing.cuda_device()
    whole = timing.Budget(arguments.budget_seconds)
    own = timing.Budget(arguments.budget_seconds * 2 / 3)
    facts = timing.device_facts(device)
    print(_setup(facts))
    shapes = kernels.QUICK_SHAPES if arguments.quick else kernels.SHAPES
    for line in kernels.check(device, shapes[0]):
        print(line, flush=True)
    rates = kernels.measure_rates(device, timing.time_in_graph)
    print(
        f"copies {rates.bytes_per_second / 1e12:.2f} TB/s, "
        f"fp16 products {rates.operations_per_second / 1e12:.0f} TFLOP/s; scales for "
        f"{kernels.GROUP_SIZE} weights"
    )
    print(kernels.HEADING)
    found: list[kernels.Result | kernels.NotMeasured] = []
    copies_of = functools.partial(timing.num_copies, device=device)
    for result in kernels.measure(
        device, timing.time_in_graph, copies_of, rates, shapes, budget=own
    ):
        print(kernels.format_result(result), flush=True)
        found.append(result)
    measured = [each for each in found if isinstance(each, kernels.Result)]
    dense = [result for result in measured if result.kernel == "cublas"]
    for result in peers.measure_peers(dense, rates, shapes, whole):
        print(kernels.format_result(result), flush=True)
        found.append(result)
    _print_figures(arguments, {**facts, **dataclasses.asdict(rates), **kernels.as_lists(found)})
    return 0


def _setup(facts: dict[str, str | int]) -> str:
    return ", ".join(f"{name} {value}" for name, value in facts.items())


def _print_figures(arguments: argparse.Namespace, figures: dict[str, Any]) -> None:
    line = json.dumps(figures)
    if arguments.json:
        arguments.json.write_text(line + "\n")
    print(line)


def _add_bench_engine(benches: Commands) -> None:
    parser = benches.add_parser("engine", help="decoding, prefill and attention of whole models")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--checkpoint", type=Path, metavar="FOLDER", help="measure this one, at its own width"
    )
    what.add_argument(
        "--shape",
        nargs="+",
        metavar="NAME",
        help="random weights of SmolLM2-135M, Llama-3-8B, Llama-2-13B or LLaMA-65B; by default the "
        "first on a CPU, the others on a GPU",
    )
    options: dict[str, Any] = {"type": int, "nargs": "+", "default": argparse.SUPPRESS}
    parser.add_argument(
        "--bits", help="of random weights: 2, 3, 4, 8 or 16 (default: 4 3 8 16)", **options
    )
    parser.add_argument(
        "--batches", help="sequences that decode at a time (default: 1 8 32 128)", **options
    )
    parser.add_argument("--contexts", help="tokens of each (default: 512 8192)", **options)
    parser.add_argument(
        "--prefill-tokens", type=int, help="of a prompt (default: 2048)", default=argparse.SUPPRESS
    )
    parser.add_argument(
        "--budget-seconds",
        type=float,
        help="for all of it; what is not reached by then is left out (default: 420)",
        default=argparse.SUPPRESS,
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    _add_settings(parser, EngineConfig, BACKEND_SETTINGS)
    parser.set_defaults(run=_bench_engine)


BACKEND_SETTINGS = ("backend", "cpu_precision", "kv_cache_dtype", "dtype")
BENCH_SETTINGS = ("batches", "contexts", "prefill_tokens", "budget_seconds")


def _bench_engine(arguments: argparse.Namespace) -> int:
    from ..kernels.interface import load_backend
    from .bench import engine, stopwatch, subjects, timing
    from .model.info import model_dtype

    settings = engine.Settings(**_given(arguments, BENCH_SETTINGS))
    own_dtype = model_dtype(arguments.checkpoint) if arguments.checkpoint else None
    backend = load_backend(
        arguments.backend,
        arguments.cpu_precision,
        arguments.kv_cache_dtype,
        arguments.dtype,
        own_dtype,
    )
    widths = arguments.bits if "bits" in arguments else None
    if arguments.checkpoint:
        if widths is not None:
            raise ValueError(f"bits is {widths}; a checkpoint is measured at its own")
        models = [subjects.checkpoint_subject(arguments.checkpoint, backend)]
    else:
        models = subjects.shape_subjects(arguments.shape, widths, backend)
    facts = timing.device_facts(backend.device)
    bench = engine.Bench(
        backend=backend,
        timer=timing.timer_of(backend.device),
        bytes_per_second=timing.bytes_per_second(backend.device),
        settings=settings,
        marks=stopwatch.marks_of(backend.device),
    )
    print(_setup({**facts, "backend": backend.name}))
    print(f"memory {bench.bytes_per_second / 1e9:.1f} GB/s; greedy, blocks of 16 tokens")
    print(engine.HEADING)
    results = []
    for result in bench.run(models):
        print(engine.format_result(result), flush=True)
        results.append(result)
    _print_figures(
        arguments,
        {
            **facts,
            "backend": backend.name,
            "bytes_per_second": bench.bytes_per_second,
            "results": [dataclasses.asdict(result) for result in results],
        },
    )
    return int(any(isinstance(each, engine.Missing) and each.failed for each in results))


def _add_tune(commands: Commands) -> None:
    parser = commands.add_parser("tune", help="find the fastest tiles for this machine's GPU")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="instead of where the kernels look for them"
    )
    parser.set_defaults(run=_tune)


def _tune(arguments: argparse.Namespace) -> int:
    from ..kernels.triton_linear import tuning_of
    from ..kernels.tuning import TUNED_FOLDER, save_tuning
    from .bench import timing, tune

    device = timing.cuda_device()
    copies_of = functools.partial(timing.num_copies, device=device)
    best = tuning_of(device)
    for found, tuning in tune.Tuner(device, timing.time_in_graph, copies_of).run(best):
        print(found, flush=True)
        best = tuning
    print(f"wrote {save_tuning(best, version('triton'), arguments.out or TUNED_FOLDER)}")
    return 0


# serve


def _add_serve(commands: Commands) -> None:
    parser = commands.add_parser("serve", help="serve a checkpoint over gRPC")
    parser.add_argument("checkpoint", type=Path, help="a folder that `lowbit quantize` wrote")
    _add_settings(parser, ServerConfig)
    _add_settings(parser, EngineConfig)
    parser.set_defaults(run=_serve)


def _serve(arguments: argparse.Namespace) -> int:
    config = ServerConfig(
        **_settings(arguments, ServerConfig),
        engine=EngineConfig(**_settings(arguments, EngineConfig)),
    )
    from ..kernels.interface import load_backend
    from .engine.async_engine import AsyncEngine, engine_thread
    from .engine.build import build_and_warm_up, check_before_loading
    from .metrics import Metrics
    from .model.info import model_dtype, model_info
    from .model.loader import load_decoder
    from .rpc.deployment import Loaded
    from .rpc.server import GenerationServer, serve
    from .text.tokenizer import Tokenizer

    backend = load_backend(
        config.engine.backend,
        config.engine.cpu_precision,
        config.engine.kv_cache_dtype,
        config.engine.dtype,
        model_dtype(arguments.checkpoint),
    )
    check_before_loading(arguments.checkpoint, backend, config.engine)
    tokenizer = Tokenizer.from_folder(arguments.checkpoint)
    model = model_info(arguments.checkpoint, config.model_name)
    thread = engine_thread()
    metrics = Metrics()

    async def load() -> Loaded:
        started = time.monotonic()
        decoder = await asyncio.wrap_future(
            thread.submit(load_decoder, arguments.checkpoint, backend, config.engine.max_model_len)
        )
        engine = await asyncio.wrap_future(thread.submit(build_and_warm_up, decoder, config.engine))
        logger.info("loaded %s in %.1f s", arguments.checkpoint, time.monotonic() - started)
        async_engine = AsyncEngine(
            engine,
            on_step=metrics.observe_step,
            thread=thread,
            step_timeout_seconds=config.engine.step_timeout_seconds,
        )
        return Loaded(engine=async_engine, tokenizer=tokenizer, model=model)

    def announce(server: GenerationServer) -> None:
        if config.allow_insecure:
            logger.warning("allow_insecure is set: whoever reaches %s may call", config.host)
        print(
            f"lowbit serves {arguments.checkpoint} on {server.address}; "
            f"metrics on http://{server.metrics_address}/metrics",
            flush=True,
        )

    try:
        served = asyncio.run(serve(config, metrics, load, on_started=announce))
    except EngineFailed as error:
        logger.critical("the engine failed: %s", error)
        logging.shutdown()
        os._exit(EXIT_ENGINE_FAILED)  # not by returning: its thread may hang for ever
    if not served:
        os._exit(EXIT_INTERRUPTED)  # a thread that loads cannot be interrupted, and need not be
    return 0


def _add_settings(
    parser: argparse.ArgumentParser, config: type[Any], names: Collection[str] = ()
) -> None:
    """An option for each setting, or for those of the names."""
    for field in dataclasses.fields(config):
        if "help" in field.metadata and (not names or field.name in names):
            option = f"--{field.name.replace('_', '-')}"
            more: dict[str, Any] = {
                "type": field.metadata.get("type", type(field.default)),
                "choices": field.metadata.get("choices"),
            }
            if more["type"] is bool:
                more = {"action": argparse.BooleanOptionalAction}
            parser.add_argument(option, default=field.default, help=field.metadata["help"], **more)


def _settings(arguments: argparse.Namespace, config: type[Any]) -> dict[str, Any]:
    names = [field.name for field in dataclasses.fields(config) if "help" in field.metadata]
    return {name: getattr(arguments, name) for name in names}


# keys


def _add_keys(commands: Commands) -> None:
    parser = commands.add_parser("keys", help="make an API key for the file of `serve --api-keys`")
    parser.add_argument("tenant", help="whom the key names")
    parser.set_defaults(run=_keys)


def _keys(arguments: argparse.Namespace) -> int:
    from .rpc.tenants import hash_key, new_key

    key = new_key()
    print(f"# The key, shown this once: {key}")
    print(f'[tenants.{json.dumps(arguments.tenant)}]\nkeys = ["{hash_key(key)}"]')
    return 0


# generate and chat


def _add_generate(commands: Commands) -> None:
    parser = commands.add_parser("generate", help="complete a prompt on a running server")
    parser.add_argument("prompt", nargs="?", default="-", help="text; - reads it from stdin")
    parser.add_argument(
        "--chat", action="store_true", help="send the prompt as a user's chat message"
    )
    _add_client_options(parser)
    parser.set_defaults(run=_generate)


def _add_chat(commands: Commands) -> None:
    parser = commands.add_parser("chat", help="talk to a running server; Ctrl-D ends")
    parser.add_argument("--system", help="a system message to begin with")
    _add_client_options(parser)
    parser.set_defaults(run=_chat)


def _add_client_options(parser: argparse.ArgumentParser) -> None:
    from .client import DEFAULT_ADDRESS

    parser.add_argument(
        "--address",
        default=DEFAULT_ADDRESS,
        help=f"of the server; the variable {API_KEY_VARIABLE} holds the key where it needs one",
    )
    parser.add_argument(
        "--tls-ca", type=Path, metavar="FILE", help="use TLS, with the authority in this PEM file"
    )
    options: dict[str, Any] = {"default": argparse.SUPPRESS}  # absent: the server's own default
    parser.add_argument("--temperature", type=float, help="0 is greedy", **options)
    parser.add_argument("--top-k", type=int, help="keep the K most likely tokens", **options)
    parser.add_argument("--top-p", type=float, help="keep this probability mass", **options)
    parser.add_argument("--min-p", type=float, help="drop tokens less likely than", **options)
    penalty: dict[str, Any] = {"type": float, **options}
    parser.add_argument("--presence-penalty", help="for what was said already", **penalty)
    parser.add_argument("--frequency-penalty", help="for every time it was said", **penalty)
    parser.add_argument("--repetition-penalty", help="the prompt counts too; 1 is off", **penalty)
    parser.add_argument("--seed", type=int, help="the same seed, the same tokens", **options)
    parser.add_argument("--max-tokens", type=int, help="of the completion", **options)
    parser.add_argument("--min-tokens", type=int, help="before it may stop", **options)
    parser.add_argument(
        "--stop", action="append", help="end before this text; may be repeated", **options
    )
    parser.add_argument("--ignore-eos", action="store_true", **options)
    _add_structured_output(parser.add_mutually_exclusive_group())


def _add_structured_output(group: Any) -> None:
    options: dict[str, Any] = {"default": argparse.SUPPRESS}
    group.add_argument("--json-schema", help="answer with JSON of this schema", **options)
    group.add_argument("--regex", help="answer with a match of this expression", **options)
    group.add_argument("--grammar", help="answer in this Lark or GBNF grammar", **options)
    group.add_argument(
        "--choice", action="append", help="answer with this text; repeat for each choice", **options
    )


SAMPLING_OPTIONS = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "max_tokens",
    "min_tokens",
    "stop",
    "ignore_eos",
    "json_schema",
    "regex",
    "grammar",
    "choice",
)


def _generate(arguments: argparse.Namespace) -> int:
    from . import terminal

    text = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    with _client(arguments) as client:
        terminal.generate(
            client, text, as_chat=arguments.chat, **_given(arguments, SAMPLING_OPTIONS)
        )
    return 0


def _chat(arguments: argparse.Namespace) -> int:
    from . import terminal

    with _client(arguments) as client:
        terminal.chat(client, arguments.system, **_given(arguments, SAMPLING_OPTIONS))
    return 0


def _client(arguments: argparse.Namespace) -> Any:
    from .client import Client, Tls

    tls = Tls(root_certificates=arguments.tls_ca.read_bytes()) if arguments.tls_ca else None
    return Client(arguments.address, api_key=os.environ.get(API_KEY_VARIABLE), tls=tls)


def _given(arguments: argparse.Namespace, names: tuple[str, ...]) -> dict[str, Any]:
    """Options that are on the command line; the others keep the defaults of whom they concern."""
    return {name: getattr(arguments, name) for name in names if name in arguments}
