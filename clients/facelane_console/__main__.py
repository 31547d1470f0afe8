"""``python -m facelane_console``."""

from __future__ import annotations

import sys

from facelane_console.cli import main

if __name__ == "__main__":
    sys.exit(main())
