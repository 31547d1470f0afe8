"""``docs/lines.schema.json`` is what ``facelane.lines`` says."""

from __future__ import annotations

import json
from pathlib import Path

from facelane import lines

PAGE = Path(__file__).resolve().parents[2] / "docs" / "lines.schema.json"


def test_the_page_is_what_the_module_says() -> None:
    said = json.loads(json.dumps(lines.schema()))
    stale = said != json.loads(PAGE.read_text())
    assert not stale, "run  python -m facelane.lines > docs/lines.schema.json"
