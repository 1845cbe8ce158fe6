from __future__ import annotations

import dataclasses
import re
from itertools import pairwise
from pathlib import Path

import pytest
from lowbit.proto import generation_pb2 as pb
from lowbit.proto.regenerate import OUTPUTS, PROTO_FOLDER, SOURCES, regenerate
from lowbit.server.types import SamplingParams


def test_the_committed_code_is_what_the_generator_makes(tmp_path: Path) -> None:
    regenerate(tmp_path)
    for name in OUTPUTS:
        assert (tmp_path / name).read_bytes() == (PROTO_FOLDER / name).read_bytes(), name


@pytest.mark.parametrize("source", SOURCES)
def test_every_field_is_explained(source: str) -> None:
    lines = (PROTO_FOLDER / source).read_text().splitlines()
    fields = [
        (line, above) for above, line in pairwise(lines) if re.search(r"^ +[a-z].* = \d+;", line)
    ]
    assert len(fields) > 20
    assert [line for line, above in fields if not above.strip().startswith("//")] == []


def test_every_option_of_the_engine_can_be_asked_for() -> None:
    on_the_wire = set(pb.SamplingParams.DESCRIPTOR.fields_by_name)
    assert on_the_wire == {field.name for field in dataclasses.fields(SamplingParams)}


def test_an_option_that_is_not_set_is_told_from_zero() -> None:
    for field in pb.SamplingParams.DESCRIPTOR.fields:
        assert field.is_repeated or field.has_presence, field.name
