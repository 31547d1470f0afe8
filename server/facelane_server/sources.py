"""What holds for streams of one source, and for looking at them; pure."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from typing import Annotated, TypeVar

import msgspec

from facelane_server import limits
from facelane_server.domain import Keeping

T = TypeVar("T")


class Source(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What holds for streams of one source; NAME may be a pattern, such as ``"ward-*"``."""

    private: bool = False
    """Nobody may look at its streams (``ViewService``), and no event keeps a picture of it. The
    client of a stream may ask for the same."""
    pictures: Keeping | None = None
    """Of which faces events of its streams keep pictures; before what their gallery says. Unset =
    as there."""


class View(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Looking at streams (``ViewService``), for keys with the verb ``view``."""

    enabled: bool = True
    """Off: no stream can be looked at."""
    watchers: Annotated[int, msgspec.Meta(ge=1, le=limits.MAX_VIEWERS)] = 64
    """Looks at streams under way, of all keys; more are refused with STREAM_LIMIT."""
    watchers_of_key: Annotated[int, msgspec.Meta(ge=1, le=limits.MAX_VIEWERS)] = 32
    """The same of one key: QUOTA_EXCEEDED."""


def keeping(
    general: Keeping, of_gallery: Keeping | None, named: Mapping[str, Source], source_id: str
) -> Keeping:
    """Of which faces of a stream events keep pictures."""
    found = fitting(named, source_id)
    if any(source.private for source in found):
        return Keeping.NONE
    said = [source.pictures for source in found if source.pictures is not None]
    return [*said, of_gallery or general][0]


def fitting(named: Mapping[str, T], source_id: str) -> list[T]:
    """What is said of a source: under its own name first, then under patterns in their order."""
    own = [named[source_id]] if source_id in named else []
    return own + [
        value
        for name, value in named.items()
        if name != source_id and fnmatch.fnmatchcase(source_id, name)
    ]
