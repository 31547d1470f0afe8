"""The command writes to whatever it was given: Latin-1, ASCII, a closed stream, a full disk; and
takes arguments that are no text."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest

import facelane
from tests.fakes import scripted_server as fake
from tests.fakes.cameras import write_clip

NAME = "José 画像 \N{GRINNING FACE}"


@pytest.fixture(scope="module")
def server() -> Iterator[fake.ScriptedServer]:
    with fake.ScriptedServer() as made:
        with facelane.Client(made.target) as client:
            client.create_subject("jose", display_name=NAME, labels={"straße": "ö"})
        yield made


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.jpg"
    cv2.imwrite(str(path), np.full((48, 64, 3), 90, np.uint8))
    return path


def command(
    server: fake.ScriptedServer, *words: str | bytes, redirect: str = "", **environment: str
) -> subprocess.CompletedProcess[bytes]:
    """Runs the command as a shell would, with ``redirect`` behind it."""
    start = [sys.executable, "-m", "facelane.cli", "--target", server.target]
    return subprocess.run(
        ["sh", "-c", f'"$@" {redirect}', "sh", *start, *words],
        env={"PATH": "/usr/bin:/bin", **environment},
        capture_output=True, timeout=60, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    "encoding",
    ["latin-1", *(pytest.param(e, marks=pytest.mark.slow) for e in ("ascii", "cp1252", "utf-8"))],
)
def test_a_name_that_the_terminal_cannot_show(server: fake.ScriptedServer, encoding: str) -> None:
    given = {"PYTHONIOENCODING": encoding}
    table = command(server, "subjects", "list", **given)
    assert table.returncode == 0, table.stderr
    assert b"jose" in table.stdout
    assert NAME.encode(encoding, "replace").split()[0] in table.stdout
    lines = command(server, "subjects", "list", "--format", "jsonl", **given)
    assert lines.returncode == 0, lines.stderr
    subject = json.loads(lines.stdout.decode(encoding))
    assert subject["display_name"] == NAME
    assert subject["labels"] == {"straße": "ö"}


@pytest.mark.parametrize(
    "locale",
    ["C", *(pytest.param(c, marks=pytest.mark.slow) for c in ("C.UTF-8", "de_DE.ISO-8859-1"))],
)
def test_the_locale_decides_nothing(server: fake.ScriptedServer, locale: str) -> None:
    done = command(server, "subjects", "show", "jose", LC_ALL=locale, PYTHONUTF8="0")
    assert done.returncode == 0, done.stderr
    assert b"jose" in done.stdout


@pytest.mark.parametrize(
    ("redirect", "code"),
    [
        (">&-", 0),
        pytest.param("2>&-", 0, marks=pytest.mark.slow),
        pytest.param(">&- 2>&-", 0, marks=pytest.mark.slow),
        ("<&- >&- 2>&-", 0),
        ("> /dev/full", 2),
    ],
)
@pytest.mark.parametrize("form", ["table", pytest.param("jsonl", marks=pytest.mark.slow)])
def test_streams_that_are_closed_or_full(
    server: fake.ScriptedServer, photo: Path, redirect: str, code: int, form: str
) -> None:
    done = command(server, "analyze", str(photo), "--format", form, redirect=redirect)
    assert done.returncode == code, done.stderr
    assert b"Traceback" not in done.stderr
    # What was for people never went to the server in place of a socket.
    assert server.streams[-1][-1].frame.picture.data == photo.read_bytes()


@pytest.mark.parametrize("redirect", ["2>&-", ">&- 2>&-", "2> /dev/full"])
def test_an_error_that_nobody_hears_is_an_exit_code(
    server: fake.ScriptedServer, redirect: str
) -> None:
    assert command(server, "subjects", "show", "nobody", redirect=redirect).returncode == 3


@pytest.mark.slow
def test_arguments_that_are_no_text(server: fake.ScriptedServer, tmp_path: Path) -> None:
    for words in (("subjects", "show", b"jos\xe9"), ("subjects", "list", "--gallery", b"\xff\xfe")):
        done = command(server, *words)
        assert done.returncode == 2, done.stderr
        assert b"is not UTF-8" in done.stderr
        assert b"Traceback" not in done.stderr
    # A file's name may be anything.
    name = os.fsencode(tmp_path) + b"/jos\xe9.jpg"
    done, picture = cv2.imencode(".jpg", np.full((48, 64, 3), 90, np.uint8))
    assert done
    with open(name, "wb") as file:
        file.write(picture.tobytes())
    for source, form in ((name, "table"), (os.fsencode(tmp_path), "jsonl")):
        result = command(server, "analyze", source, "--format", form)
        assert result.returncode == 0, result.stderr
    line = json.loads(result.stdout.splitlines()[0])
    assert line["source"].endswith("jos\N{REPLACEMENT CHARACTER}.jpg")
    assert command(server, "enroll", "jose2", name).returncode == 0


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov"])
def test_an_annotated_video_for_which_there_is_no_room(
    server: fake.ScriptedServer, suffix: str, tmp_path: Path
) -> None:
    """FFmpeg crashed over a file whose head could not be written."""
    film = write_clip(tmp_path / "film.mp4", frames=90)
    full = tmp_path / f"out{suffix}"
    full.symlink_to("/dev/full")
    done = command(server, "analyze", str(film), "-o", str(full))
    assert done.returncode == 2, done
    assert b"No space left" in done.stderr
    assert b"Traceback" not in done.stderr
