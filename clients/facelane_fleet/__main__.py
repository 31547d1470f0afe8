"""``python -m facelane_fleet``."""

from __future__ import annotations

import sys

from facelane_fleet.cli import main

if __name__ == "__main__":
    sys.exit(main())
