"""``facelane-server subjects``: all that is held of somebody, for whoever asks what that is."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Annotated

import typer

from facelane_server import config as configuration
from facelane_server.auditing import EX_CONFIG, ConfigOption, private
from facelane_server.config import ConfigError
from facelane_server.domain import FacelaneError, Reason
from facelane_server.store import audit
from facelane_server.store.audit import Actor
from facelane_server.store.export import Export, export
from facelane_server.store.gallery import Store
from facelane_server.store.opening import open_store, place_of, unlock

EX_NOT_FOUND = 1

app = typer.Typer(no_args_is_help=True, help="Subjects, for those who look after the store.")


@app.callback()
def subjects() -> None:
    """Subjects, for those who look after the store."""


@app.command("export")
def export_subject(
    subject: Annotated[str, typer.Argument(help="The subject's id.")],
    out: Annotated[Path, typer.Option(help="A folder, which is made (mode 0700).")],
    gallery: Annotated[str, typer.Option(help="Its gallery.")] = "default",
    config: ConfigOption = None,
) -> None:
    """Write all that the store holds of somebody into a folder: subject.json and the pictures that
    were kept. For a request of access (article 15 of the GDPR); it stands in the audit log. Also
    beside a running server. Exit status 1 where there is no such subject."""
    try:
        settings = configuration.load(config)
        audit.acting(Actor(f"operator uid {os.getuid()}", "subjects export"))
        database = open_store(place_of(settings))
        with contextlib.ExitStack() as stack:
            stack.callback(database.close)
            store = Store(database, vault=unlock(database, settings))
            found = export(store, gallery, subject)
    except (ConfigError, FacelaneError) as error:
        typer.echo(f"facelane-server: {error}", err=True)
        missing = isinstance(error, FacelaneError) and error.reason is Reason.SUBJECT_NOT_FOUND
        raise typer.Exit(EX_NOT_FOUND if missing else EX_CONFIG) from None
    try:
        write(found, out)
    except OSError as error:
        typer.echo(f"facelane-server: {out}: {error.strerror}", err=True)
        raise typer.Exit(EX_CONFIG) from None
    typer.echo(
        f"{out}: {len(found.said['templates'])} templates, {len(found.pictures)} pictures, "
        f"{len(found.said['events'])} events, {len(found.said['audit'])} entries of the audit log",
        err=True,
    )


def write(found: Export, folder: Path) -> None:
    """Raises ``OSError``, also where the folder is there already."""
    folder.mkdir(mode=0o700, parents=True)
    for name, content in found.pictures.items():
        with open(folder / name, "xb", opener=private) as stream:
            stream.write(content)
    with open(folder / "subject.json", "x", encoding="utf-8", opener=private) as text:
        json.dump(found.said, text, indent=2, ensure_ascii=False)
        text.write("\n")
