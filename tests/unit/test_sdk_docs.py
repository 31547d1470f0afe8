"""What the documentation shows runs: docstrings of the client and snippets of the pages.

Examples see a server that plays its part by script, and pictures of the names they use.
"""

from __future__ import annotations

import ast
import asyncio
import doctest
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tests.fakes import clips
from tests.fakes import scripted_server as fake

import facelane
from facelane import aio, calls, client

ROOT = Path(__file__).resolve().parent.parent.parent
JPEG = b"\xff\xd8\xff\xe0" + b"x" * 60


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return clips.write(tmp_path_factory.mktemp("clip"), "plain").read_bytes()


@pytest.fixture
def server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clip: bytes
) -> Iterator[fake.ScriptedServer]:
    (tmp_path / "clip.mp4").write_bytes(clip)
    for name in ("people", "grace", "hopper", "door"):
        (tmp_path / f"{name}.jpg").write_bytes(JPEG)
    monkeypatch.chdir(tmp_path)
    with fake.ScriptedServer() as made:
        monkeypatch.setenv("FACELANE_TARGET", made.target)
        yield made


def examples(module: ModuleType) -> list[doctest.DocTest]:
    found = doctest.DocTestFinder(exclude_empty=True).find(module)
    return [test for test in found if test.examples]


BLOCKING = [*examples(facelane), *examples(client), *examples(calls)]
ASYNC = examples(aio)


@pytest.mark.parametrize("example", BLOCKING, ids=lambda t: t.name)
def test_blocking_docstrings(example: doctest.DocTest, server: fake.ScriptedServer) -> None:
    made = facelane.Client(server.target)
    picture = facelane.Picture.encoded(JPEG)
    example.globs = {"facelane": facelane, "client": made, "pictures": [picture] * 3}
    # Where the text gives an address of its own, the examples' server stands in.
    for step in example.examples:
        step.source = step.source.replace("Client()", f"Client({server.target!r})").replace(
            "Client(token=", f"Client({server.target!r}, token="
        )
    try:
        report: list[str] = []
        runner = doctest.DocTestRunner(verbose=False)
        runner.run(example, out=report.append, clear_globs=False)
        assert not report, "\n".join(report)
        assert runner.tries > 0
        if example.globs["client"] is not made:
            example.globs["client"].close()
    finally:
        made.close()


@pytest.mark.parametrize("example", ASYNC, ids=lambda t: t.name)
async def test_asyncio_docstrings(
    example: doctest.DocTest, server: fake.ScriptedServer, capsys: pytest.CaptureFixture[str]
) -> None:
    async with aio.Client(server.target) as made:
        picture = facelane.Picture.encoded(JPEG)
        names: dict[str, Any] = {
            "facelane": facelane,
            "client": made,
            "picture": picture,
            "pictures": [picture] * 3,
        }
        for step in example.examples:
            value = await run_async(step.source, names)
            said = capsys.readouterr().out + ("" if value is None else f"{value!r}\n")
            assert said == step.want


async def run_async(source: str, names: dict[str, Any]) -> Any:
    """Runs code with top-level await; gives the value of its last bare expression."""
    tree = ast.parse(source)
    last = tree.body[-1]
    # The last expression of an `async with` is what a console would print.
    body = last.body if isinstance(last, ast.AsyncWith) else tree.body
    if isinstance(body[-1], ast.Expr):
        body[-1] = ast.Assign([ast.Name("_value", ast.Store())], body[-1].value)
        ast.fix_missing_locations(tree)
    code = compile(tree, "<docs>", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    result = eval(code, names)
    if inspect.isawaitable(result):
        await asyncio.wait_for(result, 30)
    return names.pop("_value", None)


def snippets(page: str) -> Iterator[str]:
    text = (ROOT / page).read_text()
    for match in re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        yield textwrap.dedent(match[1])


PAGES = [
    (page, number, code)
    for page in ("README.md", "docs/sdk.md", "docs/tracing.md")
    if (ROOT / page).exists()
    for number, code in enumerate(snippets(page), 1)
]


@pytest.mark.parametrize(
    ("page", "number", "code"), PAGES, ids=[f"{page}#{number}" for page, number, _ in PAGES]
)
async def test_pages(page: str, number: int, code: str, server: fake.ScriptedServer) -> None:
    """A snippet stands alone but for ``client`` and its pictures, where it makes none."""
    if "facelane.tracing" in code:
        pytest.importorskip("opentelemetry.sdk", reason="the extra [otel] is not installed")
    code = code.replace("Client()", f"Client({server.target!r})").replace(
        "Client(token=", f"Client({server.target!r}, token="
    )
    pictures = [facelane.Picture.encoded(JPEG)] * 3
    given = {"facelane": facelane, "pictures": pictures, "jpeg_frames": [JPEG] * 3}
    if "await" in code or "async " in code:
        await run_async(code, given)
        return

    def run() -> None:
        with facelane.Client(server.target) as made:
            names = {**given, "client": made}
            exec(compile(code, f"{page}#{number}", "exec"), names)
            if names["client"] is not made:
                names["client"].close()  # type: ignore[attr-defined]

    await asyncio.wait_for(asyncio.to_thread(run), 30)


def test_options_are_told_where_they_are_given() -> None:
    """A console shows the docstring, not the fields of the TypedDict."""
    single = inspect.getdoc(facelane.Client.analyze_image) or ""
    stream = inspect.getdoc(facelane.Client.analyze_stream) or ""
    given = set(inspect.signature(facelane.Client.analyze_stream).parameters)
    for option in facelane.AnalysisOptions.__annotations__:
        assert f"``{option}``" in single
    for option in facelane.StreamOptions.__annotations__:
        assert f"``{option}``" in single + stream or option in given


def test_there_is_something_to_run() -> None:
    assert len(BLOCKING) >= 4
    assert len(ASYNC) >= 2
    assert any(page == "docs/sdk.md" for page, _, _ in PAGES)
