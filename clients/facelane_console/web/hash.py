"""What the built page was made of: ``python hash.py`` writes it, a test compares it, and so nobody
needs node who only uses the page.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

WEB = Path(__file__).resolve().parent
MANIFEST = WEB.with_name("static") / "manifest.json"


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def described() -> dict[str, dict[str, str]]:
    """Digests of the sources, and of what was built of them, by path."""
    named = ("index.html", "package.json", "package-lock.json", "tsconfig.json", "vite.config.ts")
    sources = [*(WEB / name for name in named), *sorted((WEB / "src").rglob("*"))]
    static = MANIFEST.parent
    built = [path for path in sorted(static.rglob("*")) if path.is_file() and path != MANIFEST]
    return {
        "sources": {p.relative_to(WEB).as_posix(): digest(p) for p in sources if p.is_file()},
        "built": {p.relative_to(static).as_posix(): digest(p) for p in built},
    }


if __name__ == "__main__":
    MANIFEST.write_text(json.dumps(described(), indent=1) + "\n")
