"""The audit log's chain: whatever is done to it is found."""

from __future__ import annotations

import random
from dataclasses import replace

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from facelane_server.store.chain import START, Finding, Head, Link, Signer, digest_of, verify

SIGNER = Signer(bytes(range(32)))


def chain(
    count: int, *, first: int = 1, before: bytes = START, salt: str = ""
) -> tuple[list[Link], list[Head]]:
    """Entries, and the head at each of them."""
    links, heads = [], []
    for number in range(first, first + count):
        body = f'{{"action":"ENROLL","actor":"desk-{number % 7}{salt}","n":{number}}}'.encode()
        time_ns = 1_700_000_000_000_000_000 + number * 1_000_003
        before = digest_of(before, number, time_ns, body)
        links.append(Link(number, time_ns, body, before))
        if count < 100 or number == first + count - 1 or number % 997 == 0:
            heads.append(SIGNER.head("log", number, time_ns, before))
    return links, heads


def check(links: list[Link], head: Head | None, *kept: Head) -> Finding | None:
    return verify(links, head, public=SIGNER.public, checkpoints=kept)


def test_ten_thousand_entries_and_every_change_is_found() -> None:
    links, heads = chain(10_000)
    head = heads[-1]
    assert check(links, head, *heads) is None
    dice = random.Random(15)
    tried = 0
    # Verifying goes from the first entry on; the rest is verified from a digest that is known.
    for at in dice.sample(range(1, 9_999), 550):
        lower = max(0, at - 2)
        window = links[lower : at + 3]
        start = SIGNER.head("log", lower, 0, links[lower - 1].digest if lower else START, stub=True)
        end = window[-1]
        told = SIGNER.head("log", end.number, end.time_ns, end.digest)
        here = at - lower

        def found(changed: list[Link], start: Head = start, told: Head = told) -> bool:
            return verify(changed, told, public=SIGNER.public, stub=start) is not None

        assert not found(window)
        link = window[here]
        position = dice.randrange(len(link.body))
        body = bytearray(link.body)
        body[position] ^= 1 << dice.randrange(8)
        digest = bytearray(link.digest)
        digest[dice.randrange(32)] ^= 1 << dice.randrange(8)
        swapped = [*window]
        swapped[here], swapped[here + 1] = swapped[here + 1], swapped[here]
        for changed in (
            [*window[:here], replace(link, body=bytes(body)), *window[here + 1 :]],
            [*window[:here], replace(link, digest=bytes(digest)), *window[here + 1 :]],
            [*window[:here], replace(link, time_ns=link.time_ns ^ 1), *window[here + 1 :]],
            [*window[:here], *window[here + 1 :]],
            swapped,
            window[:here],
        ):
            tried += 1
            assert found(changed), at
    assert tried >= 2_000


def test_a_whole_log_finds_what_is_done_to_it_and_says_where() -> None:
    links, heads = chain(60)
    head = heads[-1]
    changed = [*links]
    changed[20] = replace(links[20], body=links[20].body[:-1])
    told = check(changed, head)
    assert told is not None
    assert (told.number, told.what) == (21, "an entry was changed")
    # Somebody who goes on from there with digests of his own has no head for it.
    forged, _ = chain(40, first=21, before=links[19].digest, salt="x")
    assert check([*links[:20], *forged], head) is not None
    assert check([*links[:20], *forged], None) is not None
    other = Signer(bytes(32)).head("log", 60, 0, forged[-1].digest)
    assert check([*links[:20], *forged], other) is not None
    # The same key's head of another log.
    assert check(links, SIGNER.head("other", 60, 0, links[-1].digest), heads[10]) is not None
    assert check(links, msgspec.structs.replace(head, stub=True)) is not None
    assert check([], None) is None
    assert check([], head) is not None


def test_a_cut_end_is_found_by_a_checkpoint_kept_elsewhere() -> None:
    links, heads = chain(60)
    assert check(links[:40], heads[39]) is None, "as it was then"
    told = check(links[:40], heads[39], heads[45])
    assert told is not None
    assert "cut off" in told.what
    assert check(links, heads[59], heads[45]) is None
    # And a log that was begun anew.
    fresh, fresh_heads = chain(60, salt="y")
    assert check(fresh, fresh_heads[59], heads[45]) is not None


def test_what_retention_ended_has_a_stub() -> None:
    links, heads = chain(60)
    last = links[29]
    stub = SIGNER.head("log", 30, 5, last.digest, stub=True)

    def rest(stub: Head | None, *kept: Head, links: list[Link] = links[30:]) -> Finding | None:
        return verify(links, heads[59], public=SIGNER.public, stub=stub, checkpoints=kept)

    assert rest(stub, heads[10], heads[29], heads[50]) is None
    assert rest(None) is not None
    assert rest(heads[29]) is not None, "a head is no stub: who cuts off the beginning has heads"
    assert rest(stub, links=links[31:]) is not None
    assert rest(msgspec.structs.replace(stub, number=31), links=links[31:]) is not None


@given(st.data())
def test_a_head_is_the_text_that_was_signed(data: st.DataObject) -> None:
    head = SIGNER.head("log", 7, 8, bytes(32))
    assert Head.parse(head.text()) == head
    assert head.is_of(SIGNER.public)
    assert not head.is_of(Signer(bytes(32)).public)
    field = data.draw(st.sampled_from(["log", "number", "time_ns", "digest", "signature"]))
    value = getattr(head, field)
    other = value + 1 if isinstance(value, int) else data.draw(st.text().filter(value.__ne__))
    assert not msgspec.structs.replace(head, **{field: other}).is_of(SIGNER.public)


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"log": 1}', "\ufffd"])
def test_what_is_no_checkpoint(text: str) -> None:
    with pytest.raises(ValueError, match="no checkpoint"):
        Head.parse(text)
