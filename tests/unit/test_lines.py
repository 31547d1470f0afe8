"""Command and bridge print one shape of JSON lines, and ``docs/lines.schema.json`` is it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import grpc
import jsonschema
import numpy as np
import pytest
from tests.fakes import scripted_server as fake
from typer.testing import CliRunner

from facelane.cli.app import app

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "lines.schema.json"
SCHEMA = json.loads(PAGE.read_text())


def strict(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema, which leaves room for fields to come, without that room."""
    closed = {
        name: {**part, "additionalProperties": False} if "properties" in part else part
        for name, part in schema["$defs"].items()
    }
    return {**schema, "$defs": closed}


jsonschema.Draft202012Validator.check_schema(SCHEMA)
VALIDATOR = jsonschema.Draft202012Validator(strict(SCHEMA))


@pytest.fixture
def server() -> Iterator[fake.ScriptedServer]:
    with fake.ScriptedServer() as made:
        made.event_burst = 3
        yield made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "grace"
    made.mkdir()
    for number in range(3):
        cv2.imwrite(str(made / f"{number}.jpg"), np.full((48, 64, 3), 40 * number, np.uint8))
    (made / "broken.jpg").write_bytes(b"no picture")
    (made / "notes.txt").write_text("x")
    return made


def valid(text: str) -> list[dict[str, Any]]:
    """The lines, each of which is what the schema says."""
    told: list[dict[str, Any]] = [json.loads(line) for line in text.splitlines()]
    for line in told:
        VALIDATOR.validate(line)
    return told


def test_what_the_command_prints(server: fake.ScriptedServer, folder: Path) -> None:
    picture = folder / "0.jpg"

    def run(*words: object) -> set[str]:
        start = ["--target", server.target, *map(str, words), "--format", "jsonl"]
        result = CliRunner().invoke(app, start, prog_name="facelane")
        assert result.exit_code in (0, 1), (result.output, result.exception)
        return {line["type"] for line in valid(result.stdout)}

    frame_error = fake.status(grpc.StatusCode.INTERNAL, "WORKER_LOST", "again", retryable="true")

    def mixed(requests: Iterator[fake.Request], _context: fake.Context) -> Iterator[fake.Response]:
        next(requests)
        yield fake.opened()
        bodies: list[dict[str, Any]] = [{}, {"drop": fake.drop("TOO_OLD")}, {"error": frame_error}]
        for request, body in zip(requests, bodies, strict=False):
            yield fake.outcome(request.frame, **body)
        yield fake.summary(results=1, drops=1, errors=1, drops_by_reason={"TOO_OLD": 1})

    server.scripts.append(mixed)
    assert run("analyze", folder) == {"result", "drop", "error", "passed_over", "summary"}
    assert run("enroll", folder.parent) == {"enrollment", "enrollment_summary"}
    assert run("identify", picture) == {"face"}
    assert run("verify", "grace", picture) == {"verification"}
    assert run("subjects", "list") == {"subject"}
    assert run("subjects", "show", "grace") == {"subject", "template"}
    assert run("server", "info") == {"server"}
    assert run("server", "pools") == {"pool"}
    assert run("events", "--count", "3") == {"event"}


def test_what_the_bridge_prints(server: fake.ScriptedServer, folder: Path) -> None:
    words = ["run", "--source", str(folder), "--target", server.target, "--pace", "fast"]
    done = subprocess.run(
        [sys.executable, "-m", "facelane_bridge", *words],
        capture_output=True, text=True, timeout=90, check=False,
    )  # fmt: skip
    told = {line["type"] for line in valid(done.stdout)}
    assert {"state", "result", "summary"} <= told, done.stderr


@pytest.mark.parametrize(
    "wrong",
    [
        {"type": "result"},
        {"type": "drop", "time": "", "camera": "", "frame_id": 1, "count": "1", "reason": "",
         "where": "server"},
        {"type": "nonsense"},
    ],
)  # fmt: skip
def test_what_is_no_line(wrong: dict[str, Any]) -> None:
    assert not VALIDATOR.is_valid(wrong)
