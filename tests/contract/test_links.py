"""Links between the pages of the source tree lead to files, and to headings that are there.

The site's own test has those of its pages; this has every Markdown file, as a forge shows it.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HOMES = ("docs", "clients", "protos", "training", "examples", "deploy", "bench", "tests", "server")
PAGES = sorted(
    page
    for page in [*ROOT.glob("*.md"), *(p for home in HOMES for p in (ROOT / home).rglob("*.md"))]
    if "node_modules" not in page.parts
)


def prose(page: Path) -> str:
    return re.sub(r"(?ms)^```.*?^```$", "", page.read_text())


def anchors(page: Path) -> set[str]:
    """As forges make them of headings."""
    found = set()
    for heading in re.findall(r"(?m)^#+ +(.*?) *$", prose(page)):
        words = re.sub(r"[^\w\- ]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower())
        found.add(words.replace(" ", "-"))
    return found


def dead(page: Path) -> list[str]:
    found = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        path, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", link):
            continue  # of other places
        to = page.parent / path if path else page
        if not to.exists() or (anchor and to.suffix == ".md" and anchor not in anchors(to)):
            found.append(link)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_link_is_dead(page: Path) -> None:
    assert dead(page) == []


def test_a_dead_link_is_found(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# Keys and TLS\n")
    page = tmp_path / "page.md"
    page.write_text(
        "# One\n[a](other.md) [b](other.md#keys-and-tls) [c](#one) [d](https://x.example/y)\n"
        "[e](gone.md) [f](other.md#gone) [g](#two)\n```\n[h](in-code.md)\n```\n"
    )
    assert dead(page) == ["gone.md", "other.md#gone", "#two"]
