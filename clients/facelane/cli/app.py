"""The commands. Each is a thin reading of its arguments around one use of the client."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

import facelane
from facelane.cli.analyze import analyze
from facelane.cli.base import INTERRUPTED, OK, REFUSED, UNREACHABLE, USAGE, Access
from facelane.cli.gallery import enroll, identify, subjects_app, verify
from facelane.cli.server import confirm, events, server_app
from facelane.cli.sources import SourceError

_EPILOG = (
    "Exit codes: 0 done, 1 done in part or answered no (some pictures failed, not verified, "
    "not serving), 2 wrong usage or an unreadable file, 3 refused by the server, "
    "4 the server cannot be reached or cannot serve, 130 interrupted."
)


def _fail(message: str, code: int) -> NoReturn:
    with contextlib.suppress(OSError):
        # Whoever reads errors may have gone: the exit code still says it.
        sys.stderr.write(f"facelane: {' '.join(message.split())}\n")
    raise typer.Exit(code)


class _Commands(TyperGroup):
    """The one place where errors become a line on stderr and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            # The reader of our stdout went away (`| head`): nothing is left to say.
            sys.stdout = None
            raise typer.Exit(OK) from None
        except (facelane.UnavailableError, facelane.DeadlineExceededError) as error:
            # The server is there, and serves: its gallery alone takes no change.
            gallery = error.reason == facelane.Reason.GALLERY_UNAVAILABLE
            _fail(str(error), REFUSED if gallery else UNREACHABLE)
        except facelane.FacelaneError as error:
            _fail(str(error), REFUSED)
        except UnicodeEncodeError as error:
            _fail(f"{error.object!r} is not UTF-8: the server takes no such text", USAGE)
        except (SourceError, OSError) as error:
            _fail(str(error), USAGE)


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    epilog=_EPILOG,
    pretty_exceptions_enable=False,
    help="Faces in pictures, videos and cameras, through a facelane server.",
)
app.command()(analyze)
for command in (enroll, identify, verify):
    app.command()(command)
app.add_typer(subjects_app, name="subjects")
app.add_typer(server_app, name="server")
app.command()(events)
app.command()(confirm)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(facelane.__version__)
        raise typer.Exit(OK)


@app.callback()
def _options(
    ctx: typer.Context,
    target: Annotated[
        str | None,
        typer.Option(
            envvar="FACELANE_TARGET",
            help="host:port or unix:/path of the server.",
            show_default="the socket of the server on this machine",
        ),
    ] = None,
    token_file: Annotated[
        Path | None,
        typer.Option(envvar="FACELANE_TOKEN_FILE", help="File that holds the access token."),
    ] = None,
    tls: Annotated[
        bool, typer.Option("--tls", help="TLS, with the system's authorities unless --tls-ca.")
    ] = False,
    tls_ca: Annotated[
        Path | None,
        typer.Option(envvar="FACELANE_TLS_CA", help="CA file (PEM); turns TLS on."),
    ] = None,
    client_cert: Annotated[
        Path | None,
        typer.Option(envvar="FACELANE_TLS_CERT", help="Who we are (PEM), with --client-key."),
    ] = None,
    client_key: Annotated[
        Path | None, typer.Option(envvar="FACELANE_TLS_KEY", help="The key of --client-cert.")
    ] = None,
    server_name: Annotated[
        str | None,
        typer.Option(
            envvar="FACELANE_TLS_SERVER_NAME",
            help="The name in the server's certificate, where it is not that of the target.",
        ),
    ] = None,
    no_proxy: Annotated[
        bool, typer.Option("--no-proxy", help="Never by the proxy that the environment names.")
    ] = False,
    timeout: Annotated[float, typer.Option(min=0.01, help="Seconds for one call.")] = 10.0,
    _show_version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    chosen = None
    if tls or tls_ca or client_cert or client_key or server_name:
        chosen = facelane.Tls(tls_ca, client_cert, client_key, server_name)
    ctx.obj = Access(target, token_file, chosen, timeout, not no_proxy)
