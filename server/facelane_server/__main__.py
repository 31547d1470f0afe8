"""``python -m facelane_server``."""

from __future__ import annotations

from facelane_server.cli import main

if __name__ == "__main__":
    main()
