"""Places by key, bytes by key, and what is kept for operators."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from facelane_server import config, limits
from facelane_server.domain import FacelaneError, Reason
from facelane_server.edge.auth import Key
from facelane_server.edge.quotas import Kind, Quotas
from facelane_server.edge.roles import ANYBODY, Caller, Role
from facelane_server.lanes import Allowance
from facelane_server.shards.board import Board, Holdings

CONFIG = config.parse("""
[limits]
max_streams = 16
[quotas]
streams = 4
calls = 2
watchers = 1
held_mib = 16
""")


def caller(name: str, *scopes: str, **fields: int) -> Caller:
    return Key(name, "0" * 64, scopes or ("analyze",), **fields).caller()  # type: ignore[arg-type]


def take(quotas: Quotas, stack: contextlib.ExitStack, kind: Kind, who: Caller, count: int) -> int:
    """How many of ``count`` places were given."""
    for given in range(count):
        try:
            stack.enter_context(quotas.place(kind, who))
        except FacelaneError:
            return given
    return count


def why(quotas: Quotas, kind: Kind, who: Caller) -> tuple[Reason, dict[str, str]] | None:
    try:
        with quotas.place(kind, who):
            return None
    except FacelaneError as error:
        return (error.reason, error.metadata) if error.retryable else None


def test_a_key_has_its_share_and_others_theirs() -> None:
    quotas = Quotas(CONFIG)
    with contextlib.ExitStack() as stack:
        greedy, honest = caller("greedy"), caller("honest")
        assert take(quotas, stack, Kind.STREAMS, greedy, 9) == 4
        assert why(quotas, Kind.STREAMS, greedy) == (
            Reason.QUOTA_EXCEEDED,
            {"quota": "streams", "limit": "4"},
        )
        assert take(quotas, stack, Kind.STREAMS, honest, 1) == 1
        assert why(quotas, Kind.CALLS, greedy) is None, "another kind"
    assert why(quotas, Kind.STREAMS, greedy) is None, "given back"
    assert quotas.taken(Kind.STREAMS) == 0


def test_a_share_is_of_all_shards_together_whatever_the_kind() -> None:
    board = Board.make(2)
    shards = [Quotas(CONFIG, elsewhere=Holdings(board, index)) for index in range(2)]
    keys = [caller("one"), caller("two"), caller("three")]
    shares = {Kind.STREAMS: 4, Kind.CALLS: 2, Kind.WATCHERS: 1, Kind.VIEWERS: 16, Kind.HEALTH: 64}
    shares[Kind.VIEWERS] = CONFIG.view.watchers_of_key
    shares[Kind.HEALTH] = limits.MAX_HEALTH_WATCHERS // 4
    with contextlib.ExitStack() as stack:
        # Every key has something of everything at one shard; none disturbs the other's rows.
        for key in keys:
            for kind in Kind:
                assert take(shards[0], stack, kind, key, 1) == 1
            assert shards[0].may_look_up(key, 600.0)
        for key in keys:
            with contextlib.ExitStack() as held:
                for kind, share in shares.items():
                    assert take(shards[1], held, kind, key, share) == share - 1, (key.name, kind)
            assert shards[1].may_look_up(key, 600.0)
    for kind, share in shares.items():
        with contextlib.ExitStack() as stack:
            assert take(shards[1], stack, kind, keys[1], share + 1) == share, "all was given back"
    board.close()


def test_the_servers_own_bounds_are_of_all_shards_together() -> None:
    board = Board.make(2)
    shards = [Quotas(CONFIG, elsewhere=Holdings(board, index)) for index in range(2)]
    for kind, most in ((Kind.STREAMS, 16), (Kind.VIEWERS, CONFIG.view.watchers)):
        with contextlib.ExitStack() as stack:
            assert take(shards[0], stack, kind, ANYBODY, most - 1) == most - 1
            assert take(shards[1], stack, kind, ANYBODY, 2) == 1
        assert shards[0].taken(kind) == shards[1].taken(kind) == 0
    board.close()


def test_a_key_may_have_more_or_less_of_its_own() -> None:
    quotas = Quotas(CONFIG)
    with contextlib.ExitStack() as stack:
        assert take(quotas, stack, Kind.STREAMS, caller("large", streams=9), 99) == 9
        assert take(quotas, stack, Kind.STREAMS, caller("small", streams=1), 99) == 1


def test_operators_find_a_place_when_others_have_taken_theirs() -> None:
    quotas = Quotas(CONFIG)
    kept = 16 // limits.OPERATORS_PART
    with contextlib.ExitStack() as stack:
        for name in "abcd":
            take(quotas, stack, Kind.STREAMS, caller(name), 9)
        assert quotas.taken(Kind.STREAMS) == 16 - kept
        assert quotas.full(Kind.STREAMS)
        assert why(quotas, Kind.STREAMS, caller("e")) == (Reason.STREAM_LIMIT, {"limit": "14"})
        operator = caller("ops", "admin")
        assert take(quotas, stack, Kind.STREAMS, operator, 9) == kept
        assert why(quotas, Kind.STREAMS, operator) == (Reason.STREAM_LIMIT, {"limit": "16"})
    assert not quotas.full(Kind.STREAMS)


def test_without_keys_the_bounds_of_the_server_alone_count() -> None:
    quotas = Quotas(CONFIG)
    with contextlib.ExitStack() as stack:
        assert take(quotas, stack, Kind.STREAMS, ANYBODY, 99) == 16
        with quotas.place(Kind.CALLS, ANYBODY) as allowance:
            assert allowance is None


def test_a_place_is_given_back_when_a_call_fails() -> None:
    quotas = Quotas(CONFIG)
    with pytest.raises(ZeroDivisionError), quotas.place(Kind.CALLS, caller("a")):
        raise ZeroDivisionError
    assert quotas.taken(Kind.CALLS) == 0
    assert quotas._allowances == {}, "nothing grows with keys"
    assert not quotas._by_key


def test_one_allowance_for_all_that_a_key_has_under_way() -> None:
    quotas = Quotas(CONFIG)
    with (
        quotas.place(Kind.STREAMS, caller("a")) as first,
        quotas.place(Kind.CALLS, caller("a")) as second,
        quotas.place(Kind.CALLS, caller("b")) as others,
    ):
        assert first is second
        assert first is not others
        assert first is not None
        with first.hold(16 * limits.MIB):
            assert first.full
            with pytest.raises(FacelaneError) as refused, first.hold(1):
                pass
            assert refused.value.reason is Reason.QUOTA_EXCEEDED
        assert not first.full


async def test_who_waits_for_room_is_woken_by_whoever_gives_it() -> None:
    allowance = Allowance(10)
    waiting = asyncio.Event()
    allowance.take(10)
    allowance.wake(waiting)
    allowance.take(5)
    allowance.give(4)
    assert not waiting.is_set()
    allowance.give(2)
    assert waiting.is_set()


def test_a_key_looks_up_as_many_faces_a_minute_as_its_role_says() -> None:
    now = [1000.0]
    quotas = Quotas(CONFIG, clock=lambda: now[0])
    role = Role("desk", ("identify",), lookups_per_minute=6)
    desk = Key("desk-1", "0" * 64, roles=("desk",)).caller({"desk": role})
    bound = desk.lookups_per_minute("identify", gallery="staff")
    assert bound == 6
    assert [quotas.may_look_up(desk, bound) for _ in range(8)] == [True] * 6 + [False] * 2
    with pytest.raises(FacelaneError) as told:
        quotas.look_up(desk, bound)
    assert (told.value.reason, told.value.retryable) == (Reason.QUOTA_EXCEEDED, True)
    assert told.value.metadata == {
        "quota": "lookups_per_minute",
        "limit": "6",
        "retry_after_s": "10",
    }
    other = Key("desk-2", "1" * 64, roles=("desk",)).caller({"desk": role})
    assert quotas.may_look_up(other, bound), "each key has its own"
    now[0] += 10
    assert [quotas.may_look_up(desk, bound) for _ in range(2)] == [True, False]
    now[0] += 3600
    assert sum(quotas.may_look_up(desk, bound) for _ in range(99)) == 6, "no more is saved up"
    nobody = Role("none", ("identify",), lookups_per_minute=0)
    assert not quotas.may_look_up(desk, float(nobody.lookups_per_minute or 0))
    assert all(quotas.may_look_up(ANYBODY, float("inf")) for _ in range(50))
    assert quotas.lookups["desk-2"] == 1
    assert quotas.lookups["desk-1"] == 6 + 1 + 6, "those that were refused are none"


def test_shards_give_a_key_together_what_its_role_says() -> None:
    """However many more are asked for, in each of them."""
    now, board = [1000.0], Board.make(2)
    shards = [Quotas(CONFIG, clock=lambda: now[0], elsewhere=Holdings(board, n)) for n in range(2)]
    role = Role("desk", ("identify",), lookups_per_minute=30)
    desk = Key("desk", "0" * 64, roles=("desk",)).caller({"desk": role})
    given = []
    for _ in range(4):
        given.append(0)
        for _ in range(600):
            now[0] += 0.1
            given[-1] += sum(quotas.may_look_up(desk, 30.0) for quotas in shards)
    assert given[0] <= 60, "what was saved up, and a minute's"
    assert all(29 <= of_minute <= 31 for of_minute in given[1:])
    board.close()
