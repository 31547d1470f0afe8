"""``facelane-server erasure``: is a subject gone, as its receipt says?"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer

from facelane_server import config as configuration
from facelane_server.auditing import EX_BROKEN, ConfigOption, opened
from facelane_server.config import Config, ConfigError
from facelane_server.domain import FacelaneError
from facelane_server.store import audit
from facelane_server.store.audit import Actor, AuditLog
from facelane_server.store.chain import Receipt
from facelane_server.store.database import Database
from facelane_server.store.gallery import Store
from facelane_server.store.held import id_of
from facelane_server.store.opening import open_store, place_of, unlock

_PART = 1 << 20
_OVERLAP = mmap.PAGESIZE
"""Bytes of memory that are searched at a time, and how far parts reach into each other."""

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
    text: Annotated[
        list[str] | None,
        typer.Option(help="What else is looked for, such as the name; several times."),
    ] = None,
    picture: Annotated[
        list[Path] | None,
        typer.Option(help="A picture whose bytes are looked for too; several times."),
    ] = None,
    process: Annotated[
        list[int] | None,
        typer.Option(help="The number of a process whose memory is looked through (root)."),
    ] = None,
    key: Annotated[
        str, typer.Option(help="The key that it must be signed by, as noted before (base64).")
    ] = "",
) -> None:
    """Judge a receipt: signed by the store's key, written down in the audit log, no row left, the
    keys destroyed. Exit status 1 where something is wrong, or something was found."""
    try:
        found = Receipt.parse(receipt.read_bytes().strip())
    except OSError as error:
        typer.echo(f"facelane-server: {receipt}: {error.strerror}", err=True)
        raise typer.Exit(EX_BROKEN) from None
    except ValueError as error:
        typer.echo(f"facelane-server: {receipt}: {error}", err=True)
        raise typer.Exit(EX_BROKEN) from None
    with opened(config) as (settings, database):
        wrong = problems(found, settings, database, key)

    def unread(path: Path | str, error: OSError) -> None:
        wrong.append(f"{path}: not looked at: {error.strerror}")

    try:
        more = [*(word.encode() for word in text or ()), *map(mark, picture or ())]
        for path, where in traces(scan or (), found, subject, more, unread):
            wrong.append(f"{path}: something of the subject at byte {where}")
        for pid in process or ():
            if (address := in_memory(pid, patterns_of(found, subject, more))) is not None:
                wrong.append(f"process {pid}: something of the subject at {address:#x}")
    except OSError as error:
        typer.echo(f"facelane-server: {error.filename}: {error.strerror}", err=True)
        raise typer.Exit(EX_BROKEN) from None
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


@app.command()
def again(
    receipts: Annotated[
        list[Path], typer.Argument(help="Files with receipts, one a line: all since the backup.")
    ],
    config: ConfigOption = None,
) -> None:
    """After a backup was restored: delete again whoever was deleted since it was made, as their
    receipts say. Beside a running server too."""
    try:
        found = [
            Receipt.parse(line)
            for path in receipts
            for line in path.read_bytes().splitlines()
            if line.strip()
        ]
        settings = configuration.load(config)
        audit.acting(Actor(f"operator uid {os.getuid()}", "erasure again"))
        with contextlib.closing(open_store(place_of(settings))) as database:
            store = Store(database, vault=unlock(database, settings))
            fresh = [erase_again(store, receipt) for receipt in found]
    except OSError as error:
        typer.echo(f"facelane-server: {error.filename}: {error.strerror}", err=True)
        raise typer.Exit(EX_BROKEN) from None
    except (ValueError, ConfigError, FacelaneError) as error:
        typer.echo(f"facelane-server: {error}", err=True)
        raise typer.Exit(EX_BROKEN) from None
    for text in filter(None, fresh):
        typer.echo(text)
    typer.echo(f"{sum(map(bool, fresh))} of {len(found)} were there again, and deleted", err=True)


def erase_again(store: Store, receipt: Receipt) -> str:
    """The new receipt; empty where nobody is there. Raises ``ValueError`` for a receipt that this
    store's key has not signed, so that nobody is deleted by a word of others."""
    with store.database.reading() as connection:
        public = store.audit.public(connection)
        if not receipt.is_of(public):
            raise ValueError(f"the receipt of entry {receipt.entry} is not signed by this store")
    subject_id = id_of(store, receipt.gallery, receipt.subject)
    # Numbers go on from where the backup was: by now it may be another's.
    if not subject_id or store.audit.code(receipt.gallery, subject_id) != receipt.code:
        return ""
    return store.delete_subject(receipt.gallery, subject_id, why="RESTORED").receipt


def mark(picture: Path) -> bytes:
    """Bytes from the middle of a file, which no other has. Raises ``OSError``, also for one that
    has none."""
    content = picture.read_bytes()
    if not content:
        raise OSError(errno.ENODATA, "it is empty", str(picture))
    return content[len(content) // 2 :][:64]


Patterns = Sequence[re.Pattern[bytes]]


def patterns_of(found: Receipt, subject: str, more: Sequence[bytes] = ()) -> Patterns:
    """What is looked for: the row of the subject's key, which opens all the rest, its id as it is,
    and what else is named. Each by itself: what begins with letters is found many times as fast."""
    words = [re.escape(word) for word in (subject.encode(), *more) if word]
    return [re.compile(word) for word in (rb"subject-%d(?![0-9])" % found.subject, *words)]


def _first(wanted: Patterns, content: bytes | mmap.mmap) -> int | None:
    hits = [hit.start() for one in wanted if (hit := one.search(content)) is not None]
    return min(hits, default=None)


def in_memory(pid: int, wanted: Patterns) -> int | None:
    """The first address at which a process has it. Raises ``OSError`` where it may not be read."""
    with open(f"/proc/{pid}/maps", encoding="ascii", errors="replace") as lines:
        regions = [line.split()[:2] for line in lines if "[v" not in line]
    with (
        open(f"/proc/{pid}/mem", "rb", 0) as memory,
        open(f"/proc/{pid}/pagemap", "rb", 0) as pagemap,
    ):
        for where, rights in regions:
            first, last = (int(part, 16) for part in where.split("-"))
            for begin in range(first, last if rights[0] == "r" else first, _PART):
                end = min(begin + _PART + _OVERLAP, last)
                try:
                    # Much is set aside and was never touched; to read it would make it.
                    pagemap.seek(begin // mmap.PAGESIZE * 8)
                    if not _are_there(pagemap.read((end - begin) // mmap.PAGESIZE * 8)):
                        continue
                    memory.seek(begin)
                    part = memory.read(end - begin)
                except OSError:  # a device's, or gone meanwhile
                    break
                if (hit := _first(wanted, part)) is not None:
                    return begin + hit
    return None


def _are_there(pages: bytes) -> bool:
    """Whether one is in memory or swapped out; see proc_pid_pagemap(5)."""
    return any(top & 0xC0 for top in pages[7::8])


def traces(
    places: Sequence[Path],
    found: Receipt,
    subject: str = "",
    more: Sequence[bytes] = (),
    unread: Callable[[Path | str, OSError], None] = lambda *_: None,
) -> Iterator[tuple[Path, int]]:
    """Where something of the subject lies, see ``patterns_of``. The first place of each file.
    ``unread`` is told of what could not be looked at. Raises ``OSError`` for a place that is not
    there."""
    wanted = patterns_of(found, subject, more)
    for place in [one.resolve(strict=True) for one in places]:
        for path in _files(place, unread) if place.is_dir() else [place]:
            try:
                if not path.is_file() or path.is_symlink() or not path.stat().st_size:
                    continue
                with (
                    path.open("rb") as stream,
                    mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content,
                ):
                    if (hit := _first(wanted, content)) is not None:
                        yield path, hit
            except FileNotFoundError:
                continue  # gone meanwhile
            except (OSError, ValueError) as error:  # emptied meanwhile is a ValueError
                if isinstance(error, OSError):
                    unread(path, error)


def _files(folder: Path, unread: Callable[[Path | str, OSError], None]) -> Iterator[Path]:
    def failed(error: OSError) -> None:
        unread(error.filename or folder, error)

    for where, folders, names in os.walk(folder, onerror=failed):
        folders.sort()
        yield from (Path(where, name) for name in sorted(names))
