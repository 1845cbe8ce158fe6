"""Who may import whom, read off the syntax trees."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    path
    for folder in ("kernels", "proto", "quant", "server")
    for path in (ROOT / folder).rglob("*.py")
    if "_pb2" not in path.name
)

# Module or package -> what of ours it may import; a package stands for all its modules.
ALLOWED = {
    "kernels": {"kernels"},
    "proto": {"proto"},
    "quant": {"quant", "kernels.packing"},
    "server.types": set(),
    "server.config": set(),
    "server.metrics": {"server.types"},
    "server.model": {
        "server.model",
        "server.types",
        "kernels",
        "quant.checkpoint",
        "quant.errors",
    },
    "server.engine": {
        "server.engine",
        "server.model",
        "server.types",
        "server.config",
        "kernels.interface",
    },
    "server.text": {"server.text", "server.types"},
    "server.rpc": {
        "server.rpc",
        "server.engine.async_engine",
        "server.text",
        "server.types",
        "server.config",
        "server.metrics",
        "proto",
    },
    "server.client": {"server.client", "proto", "server.types"},
    "server.terminal": {"server.client", "server.types"},
    "server.bench": {"server.bench", "kernels"},
    "server.bench.engine": {
        "server.engine",
        "server.model",
        "server.types",
        "server.config",
    },
    "server.bench.stopwatch": {"server.engine.graph_runner"},
    "server.bench.subjects": {"server.model"},
    "server.cli": {"server", "quant", "kernels"},
}
# Third-party package -> the only places that may import it.
OWNERS = {
    "triton": ("kernels.triton_",),
    "prometheus_client": ("server.metrics",),
    "grpc": ("server.rpc", "server.client"),
    "grpc_health": ("server.rpc", "server.client"),
    "grpc_reflection": ("server.rpc",),
    "grpc_status": ("server.rpc", "server.client"),
    "smg_grpc_proto": ("server.rpc",),
    "torch": ("kernels", "quant", "server.bench", "server.engine", "server.model"),
    "psutil": ("server.engine.memory",),
    "transformers": ("quant", "server.text", "server.model.families"),
    "llguidance": ("server.text",),
}
NO_TORCH = (
    "sequence",
    "drafter",
    "constraints",
    "block_manager",
    "scheduler",
    "engine",
    "async_engine",
)


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> Iterator[tuple[ast.stmt, str]]:
    """Every import of a file as an absolute name, ours without the leading `lowbit.`."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            yield node, ".".join((*base, *(node.module or "").split("."))).strip(".")


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_imports_follow_the_plan(path: Path) -> None:
    module = module_name(path)
    rules = [allowed for package, allowed in ALLOWED.items() if within(module, package)]
    for _, name in imports(path):
        top = name.split(".")[0]
        if top in ("kernels", "proto", "quant", "server"):
            assert any(within(name, allowed) for rule in rules for allowed in rule), (
                f"{module} imports {name}"
            )
        elif top in OWNERS:
            assert module.startswith(OWNERS[top]), f"{module} imports {top}"


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_imports_stand_at_the_top_of_the_file(path: Path) -> None:
    if module_name(path) == "server.cli":
        return  # one command must not pay for another's imports
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            inner = [n for n in ast.walk(node) if isinstance(n, ast.Import | ast.ImportFrom)]
            assert not inner, f"{module_name(path)}.{node.name} imports inside"
        assert not (isinstance(node, ast.Name) and node.id == "TYPE_CHECKING")


@pytest.mark.parametrize("name", NO_TORCH)
def test_the_schedulers_side_of_the_engine_knows_no_torch(name: str) -> None:
    path = ROOT / "server" / "engine" / f"{name}.py"
    assert not any(within(imported, "torch") for _, imported in imports(path))
