"""Writes the Python code of the proto files: `python proto/regenerate.py`, with the `dev` extra.

Knows nothing of what the messages mean.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from grpc_tools import protoc  # type: ignore[import-untyped]

PROTO_FOLDER = Path(__file__).resolve().parent
SOURCES = ("generation.proto", "kserve.proto")
OUTPUTS = (
    "generation_pb2.py",
    "generation_pb2.pyi",
    "generation_pb2_grpc.py",
    "kserve_pb2.py",
    "kserve_pb2.pyi",
)


def regenerate(folder: Path) -> None:
    """Write the outputs into `folder`."""
    with tempfile.TemporaryDirectory() as scratch:
        # The virtual path makes the generated imports `from lowbit.proto import …`.
        status = protoc.main(
            [
                "protoc",
                f"-Ilowbit/proto={PROTO_FOLDER}",
                f"--python_out={scratch}",
                f"--pyi_out={scratch}",
                f"--grpc_python_out={scratch}",
                *(str(PROTO_FOLDER / name) for name in SOURCES),
            ]
        )
        if status != 0:
            raise RuntimeError(f"protoc ended with status {status}")
        for name in OUTPUTS:
            shutil.copyfile(Path(scratch, "lowbit", "proto", name), folder / name)


if __name__ == "__main__":
    regenerate(PROTO_FOLDER)
