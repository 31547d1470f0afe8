"""``facelane-server audit``: list, export and verify the log of who did what."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from facelane_server import config as configuration
from facelane_server.config import ConfigError
from facelane_server.domain import FacelaneError
from facelane_server.store import audit, chain
from facelane_server.store.audit import Action, AuditLog
from facelane_server.store.database import Database
from facelane_server.store.opening import open_store, place_of, unlock

app = typer.Typer(no_args_is_help=True, help="Who did what: the audit log.")

ConfigOption = Annotated[
    Path | None, typer.Option("--config", envvar="FACELANE_CONFIG", help="TOML file.")
]
EX_CONFIG = 78
EX_BROKEN = 1


def private(path: str, flags: int) -> int:
    """An opener of files that are this user's alone."""
    return os.open(path, flags, 0o600)


@contextlib.contextmanager
def opened(config: Path | None) -> Iterator[tuple[configuration.Config, Database]]:
    try:
        settings = configuration.load(config)
        with contextlib.closing(open_store(place_of(settings), look=True)) as database:
            yield settings, database
    except (ConfigError, FacelaneError) as error:
        typer.echo(f"facelane-server: {error}", err=True)
        raise typer.Exit(EX_CONFIG) from None


@app.command("list")
def list_entries(
    config: ConfigOption = None,
    by: Annotated[str, typer.Option(help="Only what this key did.")] = "",
    action: Annotated[
        str, typer.Option(help="Only this, for example ENROLLED, LOOKED_UP or REFUSED.")
    ] = "",
    gallery: Annotated[str, typer.Option(help="Only in this gallery.")] = "",
    subject: Annotated[
        str, typer.Option(help="Only what was done with this subject of --gallery.")
    ] = "",
    count: Annotated[int, typer.Option("-n", min=1, help="The newest so many.")] = 50,
    as_json: Annotated[bool, typer.Option("--json", help="One object a line.")] = False,
) -> None:
    """The newest entries, oldest first."""
    if action and action not in list(Action):
        raise typer.BadParameter(f"one of {', '.join(Action)}")
    with opened(config) as (settings, database):
        code = ""
        if subject:
            log = AuditLog(database, unlock(database, settings, look=True))
            with database.reading() as connection:
                log.public(connection)
            code = log.code(gallery or "default", subject)
        wanted = {"by": by, "action": action, "gallery": gallery, "subject": code}
        kept: list[dict[str, Any]] = []
        with database.reading() as connection:
            for link in audit.links(connection):
                entry = audit.shown(link)
                if all(entry.get(name, "") == value for name, value in wanted.items() if value):
                    kept = [*kept[-count + 1 :], entry] if count > 1 else [entry]
    for entry in kept:
        typer.echo(json.dumps(entry) if as_json else _line(entry))


def _line(entry: dict[str, Any]) -> str:
    when = datetime.fromtimestamp(entry["time_ns"] / 1e9, UTC)
    shown = ("number", "time_ns", "action", "by", "digest")
    rest = "  ".join(f"{name} {value}" for name, value in entry.items() if name not in shown)
    who = entry.get("by", "-")
    return f"{entry['number']:>8}  {when:%Y-%m-%d %H:%M:%S}Z  {entry['action']:<16}  {who}  {rest}"


@app.command()
def export(
    file: Annotated[Path, typer.Argument(help="JSON lines: entries, then stub and head.")],
    config: ConfigOption = None,
) -> None:
    """Write all of the log into a file, which `audit verify --file` can judge on its own."""
    with opened(config) as (_, database):
        try:
            with (
                open(file, "x", encoding="utf-8", opener=private) as stream,
                database.reading() as connection,
            ):
                count = 0
                for link in audit.links(connection):
                    raw = {
                        "number": link.number,
                        "time_ns": link.time_ns,
                        "body": link.body.decode("utf-8", "surrogateescape"),
                        "digest": link.digest.hex(),
                    }
                    stream.write(json.dumps(raw) + "\n")
                    count += 1
                head, stub = audit.heads(connection)
                for name, one in (("stub", stub), ("head", head)):
                    if one is not None:
                        stream.write(json.dumps({name: one.text()}) + "\n")
        except (OSError, ValueError) as error:
            typer.echo(f"facelane-server: {file}: {error}", err=True)
            raise typer.Exit(EX_CONFIG) from None
    typer.echo(f"{count} entries", err=True)


@app.command()
def verify(
    config: ConfigOption = None,
    file: Annotated[Path | None, typer.Option(help="An export, instead of the store.")] = None,
    checkpoint: Annotated[
        list[Path] | None,
        typer.Option(help="A file of checkpoints that was kept elsewhere; several times."),
    ] = None,
    key: Annotated[
        str, typer.Option(help="The key that it must be signed by, as noted before (base64).")
    ] = "",
) -> None:
    """Look whether anything was changed, removed, moved or cut off. Exit status 1 when it was."""
    try:
        kept = [head for path in checkpoint or () for head in _checkpoints(path)]
        if file is not None:
            links, head, stub = _exported(file)
            found = _judge(links, head, stub, kept, key)
        else:
            with opened(config) as (settings, database):
                if not key:
                    key = _own_key(settings, database)
                with database.reading() as connection:
                    head, stub = audit.heads(connection)
                    found = _judge(audit.links(connection), head, stub, kept, key)
    except (OSError, ValueError, KeyError) as error:
        typer.echo(f"facelane-server: {error}", err=True)
        raise typer.Exit(EX_BROKEN) from None
    if found is not None:
        typer.echo(f"entry {found.number}: {found.what}", err=True)
        raise typer.Exit(EX_BROKEN)
    if head is None:
        typer.echo("the log is empty")
        return
    typer.echo(f"nothing was changed up to entry {head.number}; signed by {head.key}")
    if not kept:
        typer.echo(
            "whether its end was cut off is seen by a checkpoint that was kept elsewhere "
            "(--checkpoint; audit.checkpoint)",
            err=True,
        )


def _judge(
    links: Iterator[chain.Link],
    head: chain.Head | None,
    stub: chain.Head | None,
    kept: list[chain.Head],
    key: str,
) -> chain.Finding | None:
    if not key and kept:
        key = kept[0].key
    if not key and head is not None:
        key = head.key
        typer.echo("the log's own word for its key is taken: give --key to know it", err=True)
    if head is None and kept:
        return chain.Finding(0, "the log is gone: a checkpoint knows of entries")
    return chain.verify(links, head, public=key, stub=stub, checkpoints=kept)


def _own_key(settings: configuration.Config, database: Database) -> str:
    """The key as the store's own keys have it; empty where they cannot be opened here."""
    try:
        log = AuditLog(database, unlock(database, settings, look=True))
        with database.reading() as connection:
            return log.public(connection) if audit.heads(connection)[0] else ""
    except ConfigError:
        return ""


def _checkpoints(path: Path) -> list[chain.Head]:
    """Of a file of lines that hold them: as ``audit.checkpoint`` writes it, syslog, or the
    server's own log."""
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        begin = line.find('{"log":')
        if begin >= 0:
            found.append(chain.Head.parse(line[begin : line.rindex("}") + 1]))
        elif '"checkpoint"' in line:
            found.append(chain.Head.parse(json.loads(line)["checkpoint"]))
    if not found:
        raise ValueError(f"{path} holds no checkpoint")
    return found


def _exported(path: Path) -> tuple[Iterator[chain.Link], chain.Head | None, chain.Head | None]:
    links, told = [], {}
    for line in path.read_text(encoding="utf-8").splitlines():
        raw = json.loads(line)
        if "number" in raw:
            body = raw["body"].encode("utf-8", "surrogateescape")
            digest = bytes.fromhex(raw["digest"])
            links.append(chain.Link(raw["number"], raw["time_ns"], body, digest))
        else:
            told.update({name: chain.Head.parse(text) for name, text in raw.items()})
    return iter(links), told.get("head"), told.get("stub")
