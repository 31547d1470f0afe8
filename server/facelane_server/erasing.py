"""``facelane-server erasure``: is a subject gone, as its receipt says?"""

from __future__ import annotations

import mmap
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer

from facelane_server.auditing import EX_BROKEN, ConfigOption, opened
from facelane_server.config import Config, ConfigError
from facelane_server.store import audit
from facelane_server.store.audit import AuditLog
from facelane_server.store.chain import Receipt
from facelane_server.store.database import Database
from facelane_server.store.opening import unlock

app = typer.Typer(no_args_is_help=True, help="Receipts of erasures.")


@app.callback()
def erasure() -> None:
    """Receipts of erasures."""


@app.command()
def verify(
    receipt: Annotated[
        Path, typer.Argument(help="A file with the receipt that DeleteSubject gave.")
    ],
    config: ConfigOption = None,
    scan: Annotated[
        list[Path] | None,
        typer.Option(
            help="Files and folders to look through byte by byte: the state folder, its "
            "free pages included, backups, logs; several times."
        ),
    ] = None,
    subject: Annotated[
        str, typer.Option(help="The subject's id, for --scan: it is in no receipt.")
    ] = "",
    key: Annotated[
        str, typer.Option(help="The key that it must be signed by, as noted before (base64).")
    ] = "",
) -> None:
    """Judge a receipt: signed by the store's key, written down in the audit log, no row left, the
    keys destroyed. Exit status 1 where something is wrong, or something was found."""
    try:
        found = Receipt.parse(receipt.read_bytes().strip())
    except (OSError, ValueError) as error:
        typer.echo(f"facelane-server: {receipt}: {error}", err=True)
        raise typer.Exit(EX_BROKEN) from None
    with opened(config) as (settings, database):
        wrong = problems(found, settings, database, key)
    for path, where in traces(scan or (), found, subject):
        wrong.append(f"{path}: something of the subject at byte {where}")
    for line in wrong:
        typer.echo(line, err=True)
    if wrong:
        raise typer.Exit(EX_BROKEN)
    typer.echo(
        f"subject {found.subject} of gallery {found.gallery} is gone: entry {found.entry} of the "
        f"audit log, {found.templates} templates; "
        + ("its keys are destroyed" if found.keys_gone_by_ns else "it was not encrypted")
    )


def problems(found: Receipt, settings: Config, database: Database, key: str = "") -> list[str]:
    """What speaks against a receipt, by the store as it is."""
    wrong = []
    with database.reading() as connection:
        head, stub = audit.heads(connection)
        own = key
        if not own and head is not None:
            try:
                own = AuditLog(database, unlock(database, settings, look=True)).public(connection)
            except ConfigError:
                own = head.key
                typer.echo("the log's own word for its key is taken: give --key", err=True)
        if head is None or found.log != head.log or not found.is_of(own):
            return ["the receipt is not signed by this store's key"]
        entry = next(audit.links(connection, found.entry - 1), None)
        pruned = stub is not None and found.entry <= stub.number
        if not pruned:
            shown = {} if entry is None else audit.shown(entry)
            told = (shown.get("number"), shown.get("action"), shown.get("subject"))
            if told != (found.entry, "SUBJECT_DELETED", found.code):
                wrong.append(f"entry {found.entry} of the audit log says nothing of it")
        if audit.has_rows(connection, found.subject):
            wrong.append("the store has rows or a key of the subject")
        if found.keys_gone_by_ns:
            oldest = audit.oldest_epoch_ns(connection)
            if oldest <= found.time_ns:
                wrong.append(
                    "the epoch key of that time is still there: it is destroyed within half a "
                    "minute while the server runs"
                )
    return wrong


def traces(places: Sequence[Path], found: Receipt, subject: str = "") -> Iterator[tuple[Path, int]]:
    """Where something of the subject lies: the row of its key, which opens all the rest, or its
    id as it is. The first place of each file."""
    patterns = [rb"subject-%d(?![0-9])" % found.subject]
    if subject:
        patterns.append(re.escape(subject.encode()))
    wanted = re.compile(b"|".join(patterns))
    for place in places:
        for path in sorted(place.rglob("*")) if place.is_dir() else [place]:
            if not path.is_file() or path.is_symlink():
                continue
            try:
                with path.open("rb") as stream:
                    if not path.stat().st_size:
                        continue
                    with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
                        if (hit := wanted.search(content)) is not None:
                            yield path, hit.start()
            except OSError as error:
                typer.echo(f"{path}: not looked at: {error.strerror}", err=True)
