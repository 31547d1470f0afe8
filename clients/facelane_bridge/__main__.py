"""``python -m facelane_bridge`` is ``facelane-bridge``."""

from __future__ import annotations

import sys

from facelane_bridge.cli import main

if __name__ == "__main__":
    sys.exit(main())
