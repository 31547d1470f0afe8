"""``python -m facelane_events``."""

from __future__ import annotations

import sys

from facelane_events.cli import main

if __name__ == "__main__":
    sys.exit(main())
