"""Runs a command again and again beside a neighbour who never rests (``make test-busy``).

    python -m tests.busy --runs 10 -- COMMAND ...

On every second core of this machine a loop spins, at no lower priority than the command.
Prints each run's last line; ends with 1 if any of the runs failed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from contextlib import ExitStack

SPIN = "import os; os.sched_setaffinity(0, {%d})\nwhile True: pass"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("command", nargs="+")
    chosen = parser.parse_args()
    failed = 0
    with ExitStack() as stack:
        for core in sorted(os.sched_getaffinity(0))[1::2]:
            neighbour = stack.enter_context(
                subprocess.Popen([sys.executable, "-S", "-c", SPIN % core])
            )
            stack.callback(neighbour.kill)
        for number in range(1, chosen.runs + 1):
            done = subprocess.run(chosen.command, stdout=subprocess.PIPE, text=True, check=False)
            if done.returncode:
                failed += 1
                print(done.stdout)
            last = done.stdout.splitlines()[-1:] or ["no output"]
            print(f"run {number}: {'failed' if done.returncode else 'held'}: {last[0]}", flush=True)
    print(f"{chosen.runs - failed} of {chosen.runs} runs held")
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
