"""``python -m facelane_server``, and ``facelane-server``."""

from __future__ import annotations

import gc
import sys

from facelane_server import allocator


def main() -> None:
    if sys.argv[1:2] in (["run"], ["shard"]):
        # Before the second that everything else takes to be imported: it may begin once again.
        allocator.one_heap()
        from facelane_server import heap

        # What is imported stays: to look through it every 700 objects finds nothing.
        gc.set_threshold(heap.YOUNG)
    from facelane_server import cli

    cli.main()


if __name__ == "__main__":
    main()
