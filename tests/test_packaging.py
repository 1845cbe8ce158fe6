"""What pyproject.toml says against what the folders hold."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

from lowbit.kernels.tuning import default_tuning, save_tuning

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


def test_an_installed_wheel_finds_its_tuning(tmp_path: Path) -> None:
    source, wheels, site = tmp_path / "source", tmp_path / "wheels", tmp_path / "site"
    no_caches = shutil.ignore_patterns("__pycache__")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, source / folder, ignore=no_caches)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    gpu = default_tuning("NVIDIA Test 1", 7, (9, 0))
    save_tuning(gpu, "3.7.1", source / "kernels" / "tuned")
    options = ["--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", str(wheels)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(source)], check=True)
    (wheel,) = wheels.iterdir()
    zipfile.ZipFile(wheel).extractall(site)
    for data in ("proto/generation.proto", "quant/templates/report.html"):
        assert (site / "lowbit" / data).is_file()
    code = (
        f"import sys; sys.path.insert(0, {str(site)!r})\n"
        "from lowbit.kernels.tuning import *\n"
        "defaults = default_tuning('NVIDIA Test 1', 7, (9, 0))\n"
        "print(load_tuning(defaults, '3.7.1') is not defaults)"
    )
    # Without site-packages: this checkout is installed there, too.
    command = [sys.executable, "-I", "-S", "-c", code]
    assert subprocess.run(command, capture_output=True, text=True).stdout.strip() == "True"
