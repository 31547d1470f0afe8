"""What callers may: verbs, on galleries and sources, and how often. Pure.

``METHODS`` is the one table of who may call what. A method that does not stand in it is nobody's.
docs/roles.md is written from this module.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Final, Literal, get_args

import msgspec

from facelane_server.domain import FacelaneError, Reason
from facelane_server.naming import NAME

Verb = Literal[
    "analyze",
    "identify",
    "enroll",
    "reassign",
    "gallery.read",
    "gallery.write",
    "events",
    "view",
    "correct",
    "confirm",
    "audit",
    "admin",
    "waive-liveness",
    "loosen-naming",
]
VERBS: Final[tuple[Verb, ...]] = get_args(Verb)

MEANINGS: Final[dict[Verb, str]] = {
    "analyze": "send streams and pictures; without `identify` their faces come back unnamed",
    "identify": "ask who a face is: names in results, look-ups and verification",
    "enroll": "enrol a face, and its subject with the first one",
    "reassign": "enrol a face that matches another subject (else `FACE_OF_ANOTHER`)",
    "gallery.read": "list and read subjects, and have events say their names and labels",
    "gallery.write": "create, change and delete subjects and templates",
    "events": "watch events",
    "view": "look at the pictures of streams, except of private ones, and at those of events",
    "correct": "say of an event's face who it is, or is not, and take that back",
    "confirm": "say whether a candidate is who it was taken for, and hear of candidates",
    "audit": "read the audit log (no method of this version asks for it)",
    "admin": "restart workers, reload models, drain the server; nothing else",
    "waive-liveness": "have faces verified that are not LIVE",
    "loosen-naming": "ask for names that are less sure than the server is set up for",
}
BY_NAME_ALONE: Final[frozenset[Verb]] = frozenset({"waive-liveness", "loosen-naming"})
"""What nobody may who has no role that says so."""

Similarities = Literal["exact", "rounded", "withheld"]
_OPENNESS: Final[tuple[Similarities, ...]] = ("withheld", "rounded", "exact")

Pattern = Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
DEFAULT_WEIGHT: Final = 10

Scope = Literal["analyze", "gallery", "admin", "scores", "reassign", "waive-liveness"]
"""What a key could have before there were roles."""
SCOPES: Final[tuple[Scope, ...]] = get_args(Scope)

SCOPE_VERBS: Final[dict[Scope, tuple[Verb, ...]]] = {
    "analyze": ("analyze", "identify", "events"),
    "gallery": ("identify", "enroll", "correct", "gallery.read", "gallery.write"),
    "admin": tuple(verb for verb in VERBS if verb not in BY_NAME_ALONE),
    "scores": (),
    "reassign": ("reassign",),
    "waive-liveness": ("waive-liveness",),
}
"""The verbs that a scope stands for. ``scores`` and ``admin`` see similarities as they are."""


@dataclass(frozen=True, slots=True)
class Rule:
    """Whom a method is for. ``verb`` None: everybody whom the server knows. ``bound``: what of
    the request is compared with the caller's galleries and sources."""

    verb: Verb | None
    bound: tuple[Literal["gallery", "source"], ...] = ()


_GALLERY: Final = ("gallery",)
METHODS: Final[dict[str, Rule]] = {
    "/facelane.v1.AnalysisService/AnalyzeStream": Rule("analyze", ("gallery", "source")),
    "/facelane.v1.AnalysisService/AnalyzeImage": Rule("analyze", _GALLERY),
    "/facelane.v1.GalleryService/CreateSubject": Rule("gallery.write", _GALLERY),
    "/facelane.v1.GalleryService/GetSubject": Rule("gallery.read", _GALLERY),
    "/facelane.v1.GalleryService/ListSubjects": Rule("gallery.read", _GALLERY),
    "/facelane.v1.GalleryService/UpdateSubject": Rule("gallery.write", _GALLERY),
    "/facelane.v1.GalleryService/DeleteSubject": Rule("gallery.write", _GALLERY),
    "/facelane.v1.GalleryService/ListTemplates": Rule("gallery.read", _GALLERY),
    "/facelane.v1.GalleryService/DeleteTemplate": Rule("gallery.write", _GALLERY),
    "/facelane.v1.GalleryService/EnrollFace": Rule("enroll", _GALLERY),
    "/facelane.v1.GalleryService/VerifyFace": Rule("identify", _GALLERY),
    "/facelane.v1.GalleryService/IdentifyFace": Rule("identify", _GALLERY),
    # Those of other sources and galleries are left out, instead of the call being refused.
    # The event says of which gallery and source it is.
    "/facelane.v1.GalleryService/CorrectIdentity": Rule("correct"),
    "/facelane.v1.GalleryService/UndoCorrection": Rule("correct", _GALLERY),
    "/facelane.v1.GalleryService/ListCorrections": Rule("correct", _GALLERY),
    "/facelane.v1.EventService/WatchEvents": Rule("events"),
    "/facelane.v1.EventService/ConfirmSighting": Rule("confirm", _GALLERY),
    "/facelane.v1.EventService/ListEvents": Rule("events"),
    # The event says of which gallery and source it is.
    "/facelane.v1.EventService/GetEventPicture": Rule("view"),
    "/facelane.v1.ViewService/ListStreams": Rule("view"),
    "/facelane.v1.ViewService/WatchStream": Rule("view", ("source",)),
    "/facelane.v1.AdminService/RestartWorker": Rule("admin"),
    "/facelane.v1.AdminService/ReloadModel": Rule("admin"),
    "/facelane.v1.AdminService/Drain": Rule("admin"),
    "/facelane.v1.ServerService/GetServerInfo": Rule(None),
    "/facelane.v1.ServerService/ListPools": Rule(None),
    "/grpc.health.v1.Health/Check": Rule(None),
    "/grpc.health.v1.Health/List": Rule(None),
    "/grpc.health.v1.Health/Watch": Rule(None),
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": Rule(None),
}


class Role(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``[[roles]]`` of the keys file. ``galleries``, ``sources``: where its verbs count, names or
    patterns such as ``door-*``; empty = anywhere. ``lookups_per_minute``: how many faces it may
    have named; None = as many as it can send."""

    name: Annotated[str, msgspec.Meta(pattern=NAME)]
    verbs: tuple[Verb, ...]
    galleries: tuple[Pattern, ...] = ()
    sources: tuple[Pattern, ...] = ()
    similarities: Similarities = "rounded"
    lookups_per_minute: Annotated[int, msgspec.Meta(ge=0, le=1_000_000)] | None = None


@dataclass(frozen=True, slots=True)
class Grant:
    """Verbs that count together in one place. ``galleries``, ``sources``: each a set of patterns
    of which one must fit; those of the role and those of the key itself."""

    verbs: frozenset[Verb]
    galleries: tuple[tuple[str, ...], ...] = ()
    sources: tuple[tuple[str, ...], ...] = ()
    similarities: Similarities = "rounded"
    lookups_per_minute: int | None = None
    own_events: bool = False
    """Of events, those of streams that the caller has opened itself, and no others."""

    @classmethod
    def of(
        cls, role: Role, *, galleries: tuple[str, ...] = (), sources: tuple[str, ...] = ()
    ) -> Grant:
        """A role, as far as a key that is bound to galleries and sources has it."""
        return cls(
            frozenset(role.verbs),
            tuple(bound for bound in (role.galleries, galleries) if bound),
            tuple(bound for bound in (role.sources, sources) if bound),
            role.similarities,
            role.lookups_per_minute,
        )

    @classmethod
    def of_scopes(
        cls, scopes: Iterable[Scope], *, galleries: tuple[str, ...], sources: tuple[str, ...]
    ) -> Grant:
        """What a key's scopes stand for. A camera's key hears the sources that it is bound to; one
        that is bound to none, what its own streams tell: nothing says that the others' are for it.
        """
        had = frozenset(scopes)
        role = Role(
            "scopes",
            tuple(sorted({verb for scope in had for verb in SCOPE_VERBS[scope]})),
            similarities="exact" if had & {"scores", "admin"} else "rounded",
        )
        grant = cls.of(role, galleries=galleries, sources=sources)
        return dataclasses.replace(grant, own_events=not sources and "admin" not in had)

    def covers(self, verb: Verb, other: Grant) -> bool:
        """Whether it lets do this verb wherever the other one does, as often, and see as much."""
        return (
            verb in self.verbs
            and (not self.galleries or self.galleries == other.galleries)
            and (not self.sources or self.sources == other.sources)
            and (not self.own_events or other.own_events)
            and _OPENNESS.index(self.similarities) >= _OPENNESS.index(other.similarities)
            and self.most_lookups >= other.most_lookups
        )

    @property
    def most_lookups(self) -> float:
        """A minute; infinity = no bound."""
        return float("inf") if self.lookups_per_minute is None else self.lookups_per_minute


@dataclass(frozen=True, slots=True)
class Caller:
    """Who makes a call. ``grants`` None: nobody has to show anything here, and everybody may
    all but ``BY_NAME_ALONE``. ``proof``: the hash of a key, or the name in a certificate.
    ``streams``: how many it may have open, None = as ``quotas.streams`` says."""

    name: str = ""
    grants: tuple[Grant, ...] | None = None
    weight: int = DEFAULT_WEIGHT
    streams: int | None = None
    expires: datetime | None = None
    proof: str = dataclasses.field(default="", repr=False)

    @property
    def known(self) -> bool:
        """Whether it had to show who it is."""
        return self.grants is not None

    @property
    def expired(self) -> bool:
        return self.expires is not None and datetime.now(UTC) >= self.expires

    @property
    def verbs(self) -> frozenset[Verb]:
        """All that it may somewhere."""
        if self.grants is None:
            return frozenset(VERBS) - BY_NAME_ALONE
        return frozenset(verb for grant in self.grants for verb in grant.verbs)

    def may(self, verb: Verb, *, gallery: str | None = None, source: str | None = None) -> bool:
        """Whether it may do so in this gallery and at this source; None = anywhere."""
        if self.grants is None:
            return verb not in BY_NAME_ALONE
        return any(True for _ in self._there(verb, gallery, source))

    def place(
        self, verb: Verb, *, gallery: str = "", default: str = "", source: str | None = None
    ) -> tuple[str, str]:
        """The gallery and the source meant. Whoever may in one gallery alone, or at one source,
        need not name it; ``default``: the gallery of those who name none. Source None: the
        method has none. Raises PERMISSION_DENIED."""
        if self.grants is None:
            return gallery or default, source or ""
        its_source = False
        for grant in self.grants:
            if verb not in grant.verbs:
                continue
            there = _meant(gallery, gallery or default, grant.galleries)
            at = "" if source is None else _meant(source, source, grant.sources)
            if there is not None and at is not None:
                return there, at
            its_source |= at is not None
        field = "gallery_id" if its_source else "source_id"
        raise FacelaneError(
            Reason.PERMISSION_DENIED,
            f"the key is not for this {field}; name one that it is for, or ask for another key",
            metadata={"field": field, "scope": verb},
        )

    def require(self, verb: Verb, *, gallery: str, source: str) -> None:
        """Raises PERMISSION_DENIED unless it may do so with what belongs to this gallery and this
        source, each of which may be none: that is nobody's who is bound to some (``place`` takes
        none for the only one that is allowed)."""
        if not self.may(verb, gallery=gallery, source=source):
            raise FacelaneError(
                Reason.PERMISSION_DENIED,
                "the key is not for the gallery or the source of this; ask for another key",
                metadata={"scope": verb},
            )

    def unbound(self, verb: Verb) -> bool:
        """Whether it may do so everywhere."""
        return self.grants is None or any(
            verb in grant.verbs and not (grant.galleries or grant.sources or grant.own_events)
            for grant in self.grants
        )

    def hears(self, source_id: str, gallery_id: str, sender: str) -> bool:
        """Whether an event of this source and gallery, of a stream that the caller of the name
        ``sender`` has opened, is for this one; what belongs to none is for those who are bound to
        nothing."""
        if self.grants is None:
            return True
        own = sender == self.name != ""
        return any(
            _hears(grant, source_id, gallery_id)
            for grant in self.grants
            if "events" in grant.verbs and (own or not grant.own_events)
        )

    def similarities(
        self, verb: Verb, *, gallery: str | None = None, source: str | None = None
    ) -> Similarities:
        """How similarities are shown to it there, by the most open of its grants."""
        if self.grants is None:
            return "exact"
        shown = (_OPENNESS.index(g.similarities) for g in self._there(verb, gallery, source))
        return _OPENNESS[max(shown, default=0)]

    def lookups_per_minute(self, verb: Verb, *, gallery: str, source: str | None = None) -> float:
        """Faces that it may have named in a gallery; infinity = no bound."""
        if self.grants is None:
            return float("inf")
        return max((g.most_lookups for g in self._there(verb, gallery, source)), default=0.0)

    def at_least(self, other: Caller) -> bool:
        """Whether it may all that the other one may."""
        if other.grants is None or self.grants is None:
            return self.grants is None
        return all(
            any(mine.covers(verb, grant) for mine in self.grants)
            for grant in other.grants
            for verb in grant.verbs
        )

    def _there(self, verb: Verb, gallery: str | None, source: str | None) -> Iterator[Grant]:
        for grant in self.grants or ():
            if (
                verb in grant.verbs
                and (gallery is None or _fits(grant.galleries, gallery))
                and (source is None or _fits(grant.sources, source))
            ):
                yield grant


ANYBODY: Final = Caller()


def _among(patterns: tuple[str, ...], value: str) -> bool:
    return any(fnmatch.fnmatchcase(value, pattern) for pattern in patterns)


def _fits(bounds: tuple[tuple[str, ...], ...], value: str) -> bool:
    return all(_among(patterns, value) for patterns in bounds)


def _meant(given: str, value: str, bounds: tuple[tuple[str, ...], ...]) -> str | None:
    """The value, or, where none was given, the only one that there can be; None = refused."""
    if _fits(bounds, value):
        return value
    if not given:
        for patterns in bounds:
            if len(patterns) == 1 and not set("*?[") & set(patterns[0]):
                return patterns[0] if _fits(bounds, patterns[0]) else None
    return None


def _hears(grant: Grant, source_id: str, gallery_id: str) -> bool:
    if not (grant.sources or grant.galleries):
        return True
    if not _fits(grant.sources, source_id):
        return False
    if grant.galleries and gallery_id:
        return _fits(grant.galleries, gallery_id)
    return bool(grant.sources or grant.own_events)


def page() -> str:
    """The tables of docs/roles.md, in Markdown."""
    verbs = "".join(f"| `{verb}` | {MEANINGS[verb]} |\n" for verb in VERBS)
    methods = "".join(
        f"| `{method.lstrip('/')}` | {'any' if rule.verb is None else f'`{rule.verb}`'} "
        f"| {' and '.join(rule.bound) or '-'} |\n"
        for method, rule in METHODS.items()
    )
    scopes = "".join(
        f"| `{scope}` | {', '.join(f'`{verb}`' for verb in SCOPE_VERBS[scope]) or '-'} "
        f"| {'as they are' if scope in ('scores', 'admin') else 'rounded'} |\n"
        for scope in SCOPES
    )
    return (
        f"| verb | lets its holder |\n|---|---|\n{verbs}\n"
        f"| method | verb | where it must count |\n|---|---|---|\n{methods}\n"
        f"| scope of before | verbs | similarities |\n|---|---|---|\n{scopes}"
    )
