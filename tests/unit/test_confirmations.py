"""Who was seen is said once so many people have looked: what becomes of a candidate."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.unit.test_retention import report

from facelane_server.domain import Decision, FacelaneError, Reason
from facelane_server.events import EventKind
from facelane_server.store import audit, chain
from facelane_server.store import events as stored
from facelane_server.store.confirmations import Confirmation, State, confirm
from facelane_server.store.events import EventRecord
from facelane_server.store.gallery import Store
from facelane_server.store.masterkey import Source
from facelane_server.store.opening import open_store
from facelane_server.store.vault import open_vault
from facelane_server.watch import as_candidate


@contextlib.contextmanager
def opened(place: Path | str, folder: Path) -> Iterator[Store]:
    database = open_store(place)
    vault = open_vault(database, Source("", folder), mode="on")
    with contextlib.closing(Store(database, vault=vault)) as store:
        yield store


def candidates(store: Store, count: int = 1) -> None:
    for name in ("ada", "bo"):
        with contextlib.suppress(FacelaneError):
            store.create_subject("vault", name, "", {})
    records = [
        EventRecord(0, "SUBJECT_CANDIDATE", n + 1, "door", "s", "vault", report("ada", "bo"))
        for n in range(count)
    ]
    stored.append(store.database, store.vault, records, again=False)


def answer(store: Store, by: str, *, agrees: bool = True, sequence: int = 1, needed: int = 2,
           gallery: str = "vault", source: bool = True) -> Confirmation:  # fmt: skip
    audit.acting(audit.Actor(by, "/facelane.v1.EventService/ConfirmSighting"))
    try:
        return confirm(
            store,
            gallery_id=gallery,
            sequence=sequence,
            by=by,
            agrees=agrees,
            needed=needed,
            at_source=lambda _source: source,
            now_ns=99,
        )
    finally:
        audit.acting(audit.NOBODY)


def told(store: Store) -> list[tuple[str, int, str]]:
    found = stored.after(store.database, store.vault, 0)
    return [
        (r.kind, r.candidate, "" if r.track is None else r.track.identity.subject_id) for r in found
    ]


def test_two_keys_confirm_and_both_stand_in_the_log(place: Path | str, tmp_path: Path) -> None:
    with opened(place, tmp_path) as store:
        candidates(store)
        assert answer(store, "guard-1") == Confirmation(State.OPEN, 1, 2)
        assert answer(store, "guard-1") == Confirmation(State.OPEN, 1, 2), "one key counts once"
        assert len(told(store)) == 1
        assert answer(store, "guard-2") == Confirmation(State.CONFIRMED, 2, 2)
        assert told(store) == [
            ("SUBJECT_CANDIDATE", 0, "ada"), ("SUBJECT_SEEN", 1, "ada"),
        ]  # fmt: skip
        assert answer(store, "guard-3", agrees=False).state is State.CONFIRMED, "it is over"
        assert len(told(store)) == 2
        with store.database.reading() as connection:
            links = list(audit.links(connection))
            head, _ = audit.heads(connection)
            assert chain.verify(links, head, public=store.audit.public(connection)) is None
        entries = [audit.shown(link) for link in links]
        said = [e for e in entries if e["action"] == "CONFIRMED"]
        assert [(e["by"], e["event"], e["agrees"]) for e in said] == [
            ("guard-1", 1, "yes"), ("guard-2", 1, "yes"),
        ]  # fmt: skip
        assert {e["subject"] for e in said} == {store.audit.code("vault", "ada")}


def test_one_who_does_not_agree_ends_it(place: Path | str, tmp_path: Path) -> None:
    with opened(place, tmp_path) as store:
        candidates(store)
        answer(store, "guard-1")
        assert answer(store, "guard-2", agrees=False) == Confirmation(State.DENIED, 1, 2)
        assert answer(store, "guard-3").state is State.DENIED
        assert answer(store, "guard-2").state is State.DENIED, "that cannot be taken back"
        assert [kind for kind, *_ in told(store)] == ["SUBJECT_CANDIDATE"]


def test_whoever_agreed_may_take_it_back(tmp_path: Path) -> None:
    with opened(tmp_path / "g.db", tmp_path) as store:
        candidates(store)
        answer(store, "guard-1")
        assert answer(store, "guard-1", agrees=False).state is State.DENIED


def test_fewer_have_to_agree_than_when_it_was_asked(tmp_path: Path) -> None:
    """The gallery's setting was changed in between: enough have agreed, and nobody was told."""
    with opened(tmp_path / "g.db", tmp_path) as store:
        candidates(store, 2)
        for sequence in (1, 2):
            answer(store, "guard-1", sequence=sequence)
        assert answer(store, "guard-1", needed=1) == Confirmation(State.CONFIRMED, 1, 1)
        assert answer(store, "guard-2", needed=1, sequence=2) == Confirmation(State.CONFIRMED, 2, 1)
        assert [(kind, of) for kind, of, _ in told(store)][2:] == [
            ("SUBJECT_SEEN", 1), ("SUBJECT_SEEN", 2),
        ]  # fmt: skip


def test_more_have_to_agree_than_when_it_was_told(tmp_path: Path) -> None:
    with opened(tmp_path / "g.db", tmp_path) as store:
        candidates(store)
        answer(store, "guard-1", needed=1)
        for agrees in (True, False):
            again = answer(store, "guard-2", agrees=agrees, needed=2)
            assert again == Confirmation(State.CONFIRMED, 1, 2), "it was told, and is over"
        assert [kind for kind, *_ in told(store)] == ["SUBJECT_CANDIDATE", "SUBJECT_SEEN"]


def test_one_look_is_enough_where_that_is_asked(tmp_path: Path) -> None:
    with opened(tmp_path / "g.db", tmp_path) as store:
        candidates(store)
        assert answer(store, "guard-1", needed=1).state is State.CONFIRMED
        assert [kind for kind, *_ in told(store)][-1] == "SUBJECT_SEEN"


def test_what_is_no_candidate(place: Path | str, tmp_path: Path) -> None:
    with opened(place, tmp_path) as store:
        candidates(store)
        seen = EventRecord(0, "SUBJECT_SEEN", 7, "door", "s", "vault", report("ada"))
        stored.append(store.database, store.vault, [seen], again=False)

        def refused(**more: object) -> None:
            with pytest.raises(FacelaneError) as error:
                answer(store, "guard-1", **more)  # type: ignore[arg-type]
            assert error.value.reason is Reason.EVENT_NOT_FOUND

        refused(sequence=2)  # told already
        refused(sequence=3)
        refused(sequence=2**62)
        refused(gallery="other")
        refused(source=False)
        answer(store, "guard-2")
        store.delete_subject("vault", "ada")
        refused()
        assert [e for e in told(store) if e[2]] == [], "nobody is named any more"


def test_every_order_of_answers_ends_alike_everywhere(tmp_path: Path) -> None:
    """Two servers of one store, in turns."""
    with opened(tmp_path / "g.db", tmp_path) as one, opened(tmp_path / "g.db", tmp_path) as two:
        orders = list(itertools.permutations(["a", "b", "-c"]))
        candidates(one, len(orders))
        for sequence, order in enumerate(orders, 1):
            stores = itertools.cycle((one, two))
            ends = [
                answer(store, word.strip("-"), agrees=word[0] != "-", sequence=sequence).state
                for store, word in zip(stores, order, strict=False)
            ]
            expected = State.CONFIRMED if order[2] == "-c" else State.DENIED
            assert ends[-1] is expected
        assert sum(kind == "SUBJECT_SEEN" for kind, *_ in told(two)) == 2


def test_other_events_of_such_a_gallery_name_nobody() -> None:
    named = report("ada", "bo")
    assert as_candidate(EventKind.SUBJECT_SEEN, named) == (EventKind.SUBJECT_CANDIDATE, named)
    for kind in EventKind:
        if kind is EventKind.SUBJECT_SEEN:
            continue
        same, without = as_candidate(kind, named)
        assert same is kind
        assert without.identity.decision is Decision.NOT_EVALUATED
        assert without.identity.subjects == frozenset()
