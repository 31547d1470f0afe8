"""Which frames are traced; and that nothing is there for it where none are."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from facelane_server import config, limits, sampling, traces
from facelane_server.lanes import SilentObserver

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


def test_the_example_of_the_standard_is_read() -> None:
    found = sampling.parent(f"00-{TRACE}-{SPAN}-01")
    assert found == sampling.Parent(int(TRACE, 16), int(SPAN, 16))


@pytest.mark.parametrize(
    "context",
    [
        f"00-{TRACE}-{SPAN}-00",  # not sampled
        f"ff-{TRACE}-{SPAN}-01",  # no version
        f"00-{TRACE}-{SPAN}-01-more",
        f"00-{TRACE.upper()}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE}-{SPAN}",
        f"00-{TRACE}-{SPAN}-01\n",
        "x" * 100_000,
        "",
    ],
)
def test_what_is_no_sampled_context_is_none(context: str) -> None:
    assert sampling.parent(context) is None


def test_a_later_version_may_say_more() -> None:
    assert sampling.parent(f"01-{TRACE}-{SPAN}-03-what-it-says") is not None
    assert sampling.parent(f"01-{TRACE}-{SPAN}-01-{'x' * 1000}") is None


@given(st.text(max_size=80))
def test_any_text_is_read_without_a_fault(context: str) -> None:
    sampling.parent(context)


@given(
    steps=st.lists(
        st.tuples(st.booleans(), st.floats(0, 0.999), st.integers(0, 10**9)), max_size=300
    ),
    most=st.integers(1, 50),
    ratio=st.floats(0, 1),
)
def test_no_second_has_more_than_twice_what_it_may(
    steps: list[tuple[bool, float, int]], most: int, ratio: float
) -> None:
    """What has been saved up, and what comes meanwhile; of any second, whoever asks."""
    sampler, now, taken = sampling.Sampler(ratio, most), 1, []
    for asked, chance, passed in steps:
        now += passed
        if sampler.takes(asked=asked, chance=chance, now_ns=now):
            assert asked or chance < ratio
            taken.append(now)
    for since in taken:
        assert sum(since <= at < since + 10**9 for at in taken) <= 2 * most + 1


def test_without_an_endpoint_nothing_is_there() -> None:
    """No hook in a pool, no observer around a lane's, nothing imported."""
    code = (
        "import asyncio, sys\n"
        "import facelane, facelane_server.app\n"
        "from facelane_server import config, traces\n"
        "class Pool: on_answered = None\n"
        "async def main():\n"
        "    async with traces.exported(config.Config(), {'detector': Pool}) as made:\n"
        "        assert made is None and Pool.on_answered is None\n"
        "asyncio.run(main())\n"
        "assert not [name for name in sys.modules if name.startswith('opentelemetry')]\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    observer = SilentObserver()
    assert traces.watching(None, observer) is observer


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('endpoint = "collector:4317"', "http://host:port"),
        ('endpoint = "http://collector"', "http://host:port"),
        ("ratio = 0.1", "tracing.endpoint says nobody"),
        (f"frames_per_second = {limits.MAX_TRACED_PER_S + 1}", "<= 1000"),
        ('endpoints = ""', "did you mean `endpoint`"),
    ],
)
def test_a_wrong_setting_is_told(text: str, told: str) -> None:
    with pytest.raises(config.ConfigError) as failed:
        config.parse(f"[tracing]\n{text}\n")
    assert told in str(failed.value)
