"""``python -m facelane.cli``."""

from __future__ import annotations

from facelane.cli import main

main()
