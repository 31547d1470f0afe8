"""Writes the tables of docs/roles.md from edge/roles.py.

usage: python docs/generate_roles.py [--check]
"""

from __future__ import annotations

import sys
from pathlib import Path

from facelane_server.edge import roles

TARGET = Path(__file__).with_name("roles.md")
MARK = "<!-- From here on written by docs/generate_roles.py. -->\n"


def page() -> str:
    head, mark, _ = TARGET.read_text().partition(MARK)
    assert mark
    return f"{head}{mark}\n{roles.page()}"


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(0 if TARGET.read_text() == page() else "stale: python docs/generate_roles.py")
    TARGET.write_text(page())
