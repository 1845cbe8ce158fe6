"""Every limit stands with its default in the documentation and in the help text."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
from lowbit.server import types
from lowbit.server.cli import main
from lowbit.server.config import EngineConfig, ServerConfig

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "grpc.md").read_text()
PAGES = [PAGE, (ROOT / "README.md").read_text(), (ROOT / "docs" / "scheduling.md").read_text()]
OPTIONS = {
    f"--{field.name.replace('_', '-')}": field.default
    for config in (ServerConfig, EngineConfig)
    for field in dataclasses.fields(config)
    if "help" in field.metadata
}
LIMITS = [name for name in OPTIONS if re.search("max-|-seconds|-bytes", name)]
FIELDS = {
    "chat": types.MAX_CHAT_MESSAGES,
    "request_id": types.MAX_REQUEST_ID_CHARACTERS,
    "tenant": types.MAX_TENANT_CHARACTERS,
    "stop": types.MAX_STOP_STRINGS,
    "stop_token_ids": types.MAX_STOP_TOKEN_IDS,
    "logit_bias": types.MAX_LOGIT_BIASES,
    "allowed_token_ids": types.MAX_ALLOWED_TOKEN_IDS,
    "n": types.MAX_SAMPLES,
    "top_logprobs": types.MAX_LOGPROBS,
    "json_schema": types.MAX_GRAMMAR_CHARACTERS,
    "choice": types.MAX_CHOICES,
}


def rows(name: str) -> list[str]:
    return [line for page in PAGES for line in page.splitlines() if f"| `{name}`" in line]


def as_written(default: Any) -> set[str]:
    written = {str(default), f"{default:g}", f"{default:,}"}
    if default == 0:
        written.add("off")
    for unit, size in (("MiB", 1 << 20), ("GiB", 1 << 30)):
        written.add(f"{default / size:g} {unit}")
    return written


@pytest.mark.parametrize("option", [name for name in LIMITS if OPTIONS[name] is not None])
def test_a_limit_of_the_server(option: str) -> None:
    stated = {cell.strip() for row in rows(option) for cell in re.split(r"[|,] ", row)}
    assert stated & as_written(OPTIONS[option]), rows(option)


@pytest.mark.parametrize("field", FIELDS)
def test_a_limit_of_a_request(field: str) -> None:
    (row,) = [line for line in PAGE.splitlines() if line.startswith("| ") and f"`{field}`" in line]
    assert str(FIELDS[field]) in re.findall(r"\d+", row)


def test_the_help_text_has_every_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    text = " ".join(capsys.readouterr().out.partition("options:")[2].split())
    for option in LIMITS:
        own = re.search(rf"{option} .*?\(default: ([^)]*)\)", text)
        assert own is not None and own[1] == str(OPTIONS[option]), option
