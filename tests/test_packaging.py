"""What pyproject.toml says against what the folders hold."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = ("kernels", "proto", "quant", "server")


def test_every_package_is_listed_with_its_folder() -> None:
    found = {
        "lowbit." + ".".join(path.parent.relative_to(ROOT).parts): str(
            path.parent.relative_to(ROOT)
        )
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("__init__.py")
    }
    setuptools = PYPROJECT["tool"]["setuptools"]
    assert sorted(setuptools["packages"]) == sorted(found)
    assert setuptools["package-dir"] == found


def test_no_folder_with_code_lacks_an_init() -> None:
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            assert (path.parent / "__init__.py").is_file(), path


def test_clashing_names_stay_inert() -> None:
    # transformers looks for a package `kernels`, proto-plus for one called `proto`.
    for folder in ("kernels", "proto"):
        source = (ROOT / folder / "__init__.py").read_text()
        assert re.fullmatch(r'"""[^"]*"""\n', source)
    assert not (ROOT / "conftest.py").exists()


def test_the_cpu_path_never_imports_triton() -> None:
    code = (
        "import sys; from lowbit.kernels.interface import load_backend; load_backend('cpu');"
        "import lowbit.server.cli, lowbit.server.engine.build, lowbit.server.rpc.server;"
        "print('triton' in sys.modules)"
    )
    command = [sys.executable, "-P", "-c", code]
    assert subprocess.run(command, capture_output=True, text=True).stdout.strip() == "False"


def test_the_command_line_answers_without_heavy_imports() -> None:
    code = (
        "import sys\nfrom lowbit.server.cli import main\n"
        "try: main(['serve', '--help'])\nexcept SystemExit: pass\n"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    command = [sys.executable, "-P", "-c", code]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "[]"
