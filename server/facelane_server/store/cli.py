"""``facelane-server store``: look at a store, and copy one into another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from facelane_server import config as configuration
from facelane_server.domain import FacelaneError

EX_UNAVAILABLE = 69

app = typer.Typer(
    help="The store of galleries and events: a SQLite file or a PostgreSQL database.",
    no_args_is_help=True,
)


def _fail(error: Exception) -> typer.Exit:
    typer.echo(f"facelane-server: {error}", err=True)
    return typer.Exit(EX_UNAVAILABLE)


def _place(address: str) -> Path | str:
    if address.startswith("postgresql://"):
        return address
    return Path(address.removeprefix("sqlite:///")).expanduser()


@app.command("check")
def check(
    config: Annotated[
        Path | None,
        typer.Option(
            "--config", "-c", help="TOML file; without it, the defaults.", envvar="FACELANE_CONFIG"
        ),
    ] = None,
) -> None:
    """Read all of the store and say whether it is whole; beside a running server too."""
    import contextlib

    from facelane_server.store.events import span
    from facelane_server.store.gallery import Store
    from facelane_server.store.opening import open_store, place_of

    try:
        place = place_of(configuration.load(config))
        with contextlib.closing(Store(open_store(place, look=True))) as store:
            wrong = store.check()
            subjects, templates = store.counts()
            forgotten, newest = span(store.database)
            name = store.database.name
    except (FacelaneError, configuration.ConfigError) as error:
        raise _fail(error) from None
    if wrong:
        typer.echo(f"{name}: {wrong}; restore a backup", err=True)
        raise typer.Exit(EX_UNAVAILABLE)
    typer.echo(
        f"{name}: whole; {subjects} subjects, {templates} templates, {newest - forgotten} events"
    )


@app.command("copy")
def copy(
    source: Annotated[
        str,
        typer.Argument(metavar="FROM", help="A SQLite file, or postgresql://user@host/database."),
    ],
    target: Annotated[str, typer.Argument(metavar="TO", help="The same; made, or empty.")],
) -> None:
    """Copy everything as it is at this moment: galleries, events, keys, the audit log. What is
    changed meanwhile is not in the copy: stop the servers before they move."""
    import contextlib

    from facelane_server.store import copying
    from facelane_server.store.opening import open_store

    def told(table: str, rows: int) -> None:
        if rows:
            typer.echo(f"{table}: {rows}")

    try:
        with (
            contextlib.closing(open_store(_place(source), look=True)) as old,
            contextlib.closing(open_store(_place(target))) as new,
        ):
            copying.copy(old, new, told)
            typer.echo(f"copied to {new.name}; name it in store.url (or gallery.path)")
    except FacelaneError as error:
        raise _fail(error) from None
