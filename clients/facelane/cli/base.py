"""What all commands share: exit codes, options, and the bar that shows their progress."""

from __future__ import annotations

import contextlib
import enum
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)

import facelane
from facelane.cli import output
from facelane.cli.sources import SourceError
from facelane.transport import read_token

OK: Final = 0
PARTLY: Final = 1
USAGE: Final = 2
REFUSED: Final = 3
UNREACHABLE: Final = 4
INTERRUPTED: Final = 130


class Format(enum.StrEnum):
    table = "table"
    jsonl = "jsonl"


@dataclass(frozen=True, slots=True)
class Access:
    """How the server is reached: the options that stand before the command."""

    target: str | None
    token_file: Path | None
    tls: facelane.Tls | None
    timeout: float
    proxy: bool

    @contextlib.contextmanager
    def client(self) -> Iterator[facelane.Client]:
        """A client for one command."""
        try:
            token = None
            if self.token_file is not None:
                token = functools.partial(read_token, self.token_file)
                token()
            made = facelane.Client(
                self.target, token=token, tls=self.tls, timeout=self.timeout, proxy=self.proxy
            )
        except facelane.ArgumentError as error:
            # No server has refused anything yet.
            raise SourceError(error.message) from None
        with made as client:
            yield client


GalleryOption = Annotated[str, typer.Option(help="The gallery.")]
FalseNamingOption = Annotated[
    float | None,
    typer.Option(help="The share of strangers that may be named: less than the server's."),
]
MatchThresholdOption = Annotated[
    float | None, typer.Option(min=0, max=1, help="Instead: the least cosine of a match.")
]
FormatOption = Annotated[
    Format, typer.Option("--format", "-f", help="A table for people, JSON lines for programs.")
]


def progress(what: str, total: int) -> tuple[Progress, Any]:
    """A bar on stderr; silent where nobody looks at it."""
    _, err = output.consoles()
    bar = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=err,
        transient=True,
        disable=not err.is_terminal,
    )
    return bar, bar.add_task(what, total=total or None)
