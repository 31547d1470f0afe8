"""``python -m tests.fuzz [TARGET ...] [--seconds 300]``: coverage-guided fuzzing by atheris.

Each target runs in processes of its own, half a minute each: instrumented comparisons keep what
they compare, arrays above all (without instruments memory does not grow). What it finds worth
keeping goes to a folder outside of the repository; an input that crashes or takes longer than ten
seconds is written to ``build/fuzz`` and ends the run with 1: mend it, and keep it in
``corpus/TARGET``.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
SLICE_S = 30
HUNG_S = 10
"""By the clock, beside others that want the processor too."""


def fuzz(name: str, arguments: list[str]) -> None:
    """In a process of its own: does not return."""
    import atheris

    with atheris.instrument_imports(include=["facelane", "facelane_server", "tests.fuzz"]):
        from tests.fuzz.targets import TARGETS
    atheris.Setup([sys.argv[0], *arguments], TARGETS[name])
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    names = sorted(path.name for path in (HERE / "corpus").iterdir())
    parser.add_argument("target", nargs="*", default=names, help=", ".join(names))
    parser.add_argument("--seconds", type=int, default=300, help="for each target")
    parser.add_argument("--runs", type=int, default=-1, help="inputs, instead of seconds")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options, rest = parser.parse_known_args()
    if options.child:
        fuzz(options.target[0], rest)
    if importlib.util.find_spec("atheris") is None:
        sys.stderr.write("it needs atheris: pip install 'atheris>=3,<4' (Python 3.11 to 3.13)\n")
        return 2
    artifacts = HERE.parents[1] / "build" / "fuzz"
    artifacts.mkdir(parents=True, exist_ok=True)
    failed, total = [], 0
    for name in options.target:
        with tempfile.TemporaryDirectory(prefix=f"facelane-fuzz-{name}-") as found:
            command = [
                *(sys.executable, "-m", "tests.fuzz", name, "--child"),
                *(found, str(HERE / "corpus" / name)),
                *(
                    "-max_len=65536",
                    f"-timeout={HUNG_S}",
                    "-rss_limit_mb=2048",
                    "-print_final_stats=1",
                ),
                *(f"-artifact_prefix={artifacts}/{name}-", f"-runs={options.runs}"),
            ]
            left = options.seconds
            code = done = slowest = 0
            while left > 0 and not code:
                span = min(left, SLICE_S)
                run = subprocess.run(
                    [*command, f"-max_total_time={span}"], check=False, stderr=subprocess.PIPE
                )
                code, said = run.returncode, run.stderr.decode(errors="replace")
                done += sum(map(int, re.findall(r"number_of_executed_units:\s*(\d+)", said)))
                for seconds in re.findall(r"slowest_unit_time_sec:\s*(\d+)", said):
                    slowest = max(slowest, int(seconds))
                if code:
                    sys.stderr.write(said)
                left = 0 if options.runs >= 0 else left - span
            total += done
            verdict = "FAILED" if code else "clean"
            print(f"{name}: {done} inputs, {verdict}, the slowest {slowest} s", flush=True)
            failed += [name] if code else []
    print(f"{total} inputs in all")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
