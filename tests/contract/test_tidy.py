"""The tests' own rules: nothing that a slow or busy machine can break gets in."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
FILES = [path for path in sorted(TESTS.rglob("*.py")) if path != Path(__file__)]

# What is not written in a test -> what is written instead.
BANNED = {
    r"\b(process_time|thread_time|perf_counter)(_ns)?\b": "a benchmark under bench/",
    r"assert\b.*\b(elapsed|took|duration|latency)\w*\s*<": "a benchmark under bench/",
    r"\bmark\.(flaky|xfail)\b|\breruns\b": "a test that holds every time",
    r"(127\.0\.0\.1|localhost|\[::1?\]|0\.0\.0\.0):(?!50151\b|554\b|99999\b)[1-9]\d+": (
        "port 0 read back, or running_server.free_port()"
    ),
    r"\bsleep\((?!0\))[0-9]?(\.[0-9]+)?\)(?!.*#)": (
        "until() of waiting.py; or, behind a #, what the time itself is needed for"
    ),
    r"\ba?until\(.*, [0-5]?[0-9](\.\d+)?(\)|, )": (
        "the wait that waiting.py has, which is long enough"
    ),
    r"\bwait_for\(.*, [12]?[0-9]\)|\basyncio\.timeout\([12]?[0-9]\)": (
        "30 seconds or more; they cost nothing but where the test fails"
    ),
    r"\b(process|worker|reader|thread)\.(wait|join|communicate)\((timeout=)?[12]?[0-9]\)": (
        "30 seconds or more; they cost nothing but where the test fails"
    ),
}

CLOCKS = {"monotonic", "perf_counter", "process_time", "thread_time", "time"}
READ = re.compile(rf"\b({'|'.join(sorted(CLOCKS))})(_ns)?\(")
"""Text without any of it judges no clock, and need not be parsed."""


def banned_lines(text: str) -> Iterator[str]:
    # Most files have none of a kind.
    there = {pattern: instead for pattern, instead in BANNED.items() if re.search(pattern, text)}
    for number, line in enumerate(text.splitlines() if there else (), 1):
        for pattern, instead in there.items():
            if re.search(pattern, line):
                yield f"{number}: {line.strip()} -> {instead}"


def judged_durations(text: str) -> Iterator[str]:
    """Asserts that a duration stays below something, however it got its name. A lower bound
    is no fault: no machine is too slow for it."""
    if not READ.search(text):
        return
    tree = ast.parse(text)
    for scope in ast.walk(tree):
        if not isinstance(scope, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if not reads_a_clock(scope):
            continue
        durations: set[str] = set()

        def lasts(node: ast.AST, durations: set[str] = durations) -> bool:
            """Whether a difference of clocks is in there."""
            return any(
                (isinstance(part, ast.Name) and part.id in durations)
                or (
                    isinstance(part, ast.BinOp)
                    and isinstance(part.op, ast.Sub)
                    and any(reads_a_clock(side) for side in (part.left, part.right))
                )
                for part in ast.walk(node)
            )

        for node in ast.walk(scope):
            if isinstance(node, ast.Assign) and lasts(node.value):
                durations |= {t.id for t in node.targets if isinstance(t, ast.Name)}
            elif isinstance(node, ast.AnnAssign | ast.AugAssign) and isinstance(
                node.target, ast.Name
            ):
                if node.value is not None and lasts(node.value):
                    durations.add(node.target.id)
            elif (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr == "append"
                and isinstance(node.func.value, ast.Name)
                and any(map(lasts, node.args))
            ):
                durations.add(node.func.value.id)
        for node in ast.walk(scope):
            for compare in ast.walk(node) if isinstance(node, ast.Assert | ast.Return) else ():
                if not isinstance(compare, ast.Compare):
                    continue
                sides = [compare.left, *compare.comparators]
                for left, op, right in zip(sides, compare.ops, sides[1:], strict=False):
                    short = left if isinstance(op, ast.Lt | ast.LtE) else right
                    if isinstance(op, ast.Lt | ast.LtE | ast.Gt | ast.GtE) and lasts(short):
                        yield f"{node.lineno}: {ast.unparse(compare)} -> a benchmark under bench/"


def reads_a_clock(node: ast.AST) -> bool:
    return any(
        isinstance(part, ast.Call) and _name(part.func).removesuffix("_ns") in CLOCKS
        for part in ast.walk(node)
    )


def _name(called: ast.expr) -> str:
    """Without the module ``time``; nothing for what is no plain name."""
    if isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name):
        return called.attr if called.value.id == "time" else ""
    return called.id if isinstance(called, ast.Name) else ""


def test_nothing_that_a_busy_machine_can_break() -> None:
    found = [
        f"{path.relative_to(TESTS)}:{fault}"
        for path in FILES
        for rule in (banned_lines, judged_durations)
        for fault in rule(path.read_text())
    ]
    assert found == []


@pytest.mark.parametrize(
    "wrong",
    [
        "assert time.monotonic() - begun < 1",
        "assert 0.1 <= time.time() - begun <= 2",
        "assert 1 > monotonic() - begun",
        "took = time.monotonic() - begun\nassert took < 1",
        "found = []\nfound.append(time.monotonic_ns() - begun)\nassert max(found) < 1",
        "rest = 5 - (time.monotonic() - begun)\nreturn rest < 1",
        "a = time.process_time()",
        "assert summary.elapsed_s < 1",
        "time.sleep(0.5)",
        "until(ready, 5)",
        'server = start("127.0.0.1:8080")',
        "process.wait(10)",
        "await asyncio.wait_for(task, 5)",
    ],
)
def test_the_rules_find_what_they_are_for(wrong: str) -> None:
    body = "".join(f"    {line}\n" for line in wrong.splitlines())
    text = f"def test() -> None:\n{body}"
    assert [*banned_lines(text), *judged_durations(text)]


@pytest.mark.parametrize(
    "fine",
    [
        "assert time.monotonic() - begun >= 0.5",
        "time.sleep(0.5)  # the interval itself is what is tested",
        "until(ready, what='ready')",
        "assert await auntil(lambda: told > 2)",
        "await asyncio.wait_for(task, 60)",
    ],
)
def test_the_rules_leave_alone_what_holds_on_any_machine(fine: str) -> None:
    text = f"async def test() -> None:\n    {fine}\n"
    assert [*banned_lines(text), *judged_durations(text)] == []
