"""What things may be called, and what a mistyped word probably meant."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Final

from facelane_server import limits
from facelane_server.domain import FacelaneError, Reason

DEFAULT_GALLERY: Final = "default"
NAME: Final = r"^[A-Za-z0-9._-]{1,64}\Z"
"""Sources and API keys: for operators, in logs and file names."""
_IDENTIFIER: Final = re.compile(rf"[A-Za-z0-9\-_.@:]{{1,{limits.MAX_ID_CHARS}}}")


def is_name(value: str) -> bool:
    return re.match(NAME, value) is not None


def is_identifier(value: str) -> bool:
    """Whether ``value`` can be the id of a gallery or a subject."""
    return _IDENTIFIER.fullmatch(value) is not None


def check_identifier(value: str, field: str) -> str:
    """``value`` if it can name a gallery or a subject; else ARGUMENT_INVALID, which never
    holds the value itself."""
    if not is_identifier(value):
        raise FacelaneError(
            Reason.ARGUMENT_INVALID,
            f"{field}: write 1-{limits.MAX_ID_CHARS} of the characters A-Z a-z 0-9 - _ . @ :",
            metadata={"field": field},
        )
    return value


def gallery_name(gallery_id: str) -> str:
    """The gallery meant: empty is ``default``. Raises ARGUMENT_INVALID."""
    return check_identifier(gallery_id or DEFAULT_GALLERY, "gallery_id")


def hint(word: str, known: Iterable[str], *, label: str = "known", quote: str = "") -> str:
    """For an error about the unknown ``word``: the nearest known one, else all of them."""
    words = list(known)
    near = difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    if near:
        return f"did you mean {quote}{near[0]}{quote}?"
    return f"{label}: {', '.join(words) or 'none'}"
