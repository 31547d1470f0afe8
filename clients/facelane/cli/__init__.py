"""The ``facelane`` command: the client library for people and shell scripts."""

from __future__ import annotations

import os
import sys

from facelane.cli.streams import settle, steady

_INTERRUPTED = 130
_USAGE = 2
_EXTRA = frozenset({"msgspec", "typer", "rich", "cv2", "av", "numpy"})


def main() -> None:
    """The console script. Never returns: see ``facelane --help`` for its exit codes."""
    steady()
    try:
        from facelane.cli.app import app

        app(prog_name="facelane")
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in _EXTRA:
            raise
        sys.stderr.write(
            f"facelane: {missing} is not installed: run  pip install 'facelane[cli]'\n"
        )
        sys.exit(2)
    except SystemExit as end:
        code = end.code if settle() or end.code else _USAGE
        if code == _INTERRUPTED:
            # Threads may be inside of gRPC or FFmpeg, where nothing can stop them; to tear the
            # interpreter down around them ends in a crash now and then.
            os._exit(_INTERRUPTED)
        sys.exit(code)
