"""``python -m bench [NAME ...]``: run benchmarks, store their results, print their tables."""

from __future__ import annotations

import argparse
import asyncio
import importlib
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Final

from rich.console import Console

from bench.material import MissingError
from bench.report import RESULTS, Report, command_line
from bench.settings import Settings

CPU: Final = (
    "overhead", "article", "front", "recovery", "revocation", "bridge", "overload", "gallery",
    "vault", "names", "fleet", "shards", "watchers", "wall",
)  # fmt: skip
GPU: Final = ("isolation", "leak", "streams", "decode")
ABOUT: Final = {
    "overhead": "the service against the same models in one loop; null models for its own cost",
    "article": "threads with polled queues, processes with pickled frames, and facelane",
    "front": "the server's own process: memory, imports, what it leaves, what a frame costs it",
    "recovery": "a recogniser worker is killed under load; with peers in their own environments",
    "revocation": "a key is removed: how long its streams and watchers live after SIGHUP",
    "bridge": "one camera's H.264 through bridge and server: decoded by the bridge, or passed on",
    "overload": "more cameras than fit: age of results, equal rates, every frame's outcome; "
    "overload:video with the device's own decoder",
    "gallery": "search at 10k to 1M templates against the memory's bandwidth; exactness",
    "shards": "several processes at one address: frames a second; an enrolment at every shard "
    "(matched-1m: at a million templates)",
    "vault": "what encryption at rest costs a start, an enrolment, an identification",
    "watchers": "some look at streams, stop reading, look at video: what it costs the streams",
    "wall": "pictures a second of the demo's clip on the console's live wall (needs chromium)",
    "names": "whom a real clip's faces are named after while answers are late; who may enrol",
    "fleet": "nodes killed, added and drained under 24 cameras: gaps, accounts (needs ray); "
    "fleet:bare on nodes begun by `ray start`",
    "isolation": "models sharing a card: alone, threads, processes, MPS, MPS with shares",
    "leak": "a model that leaks device memory is replaced beside two that behave",
    "streams": "how many cameras one card takes; 720p and 1080p, with -mps, -nvjpeg, -nvjpeg-mps, "
    "-h264 and (1080p) -h265, these with -mps, or -10 for ten analyses a second; "
    "without a card null models: 720p-null, 720p-h264-null; --servers N, --shards N",
    "decode": "JPEG decoding and face crops: on the host or on the card",
}


def _counts(text: str) -> tuple[int, ...]:
    counts = tuple(int(one) for one in text.split(","))
    if min(counts) < 1 or list(counts) != sorted(set(counts)):
        raise argparse.ArgumentTypeError("numbers of cameras, each more than the one before")
    return counts


def main() -> int:
    listing = "\n".join(
        f"  {name:<10} {ABOUT[name]}{' (GPU)' * (name in GPU)}" for name in (*CPU, *GPU)
    )
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Benchmarks of facelane. Without names: those for a CPU.",
        epilog=f"benchmarks:\n{listing}\n\nA NAME may be NAME:PART, for instance overhead:null; "
        "a part has a result of its own.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: does the code run?")
    parser.add_argument("--device", default="", help="cpu or cuda:N; default cuda:0 where it is")
    parser.add_argument("--frames", type=Path, help="a folder of JPEG files to use as frames")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--docs", type=Path, default=None, help="folder of drawings")
    parser.add_argument(
        "--shards", type=int, default=0, choices=range(1, 65), metavar="N",
        help="so many processes at one address (shards, streams)",
    )  # fmt: skip
    parser.add_argument(
        "--servers", type=int, default=1, choices=range(1, 17), metavar="N",
        help="so many independent servers share the card (streams; with a card under MPS)",
    )  # fmt: skip
    parser.add_argument(
        "--cameras", type=_counts, default=(), metavar="N,N",
        help="so many of them, until so many are not kept, instead of a search (streams)",
    )  # fmt: skip
    parser.add_argument(
        "--cache",
        type=Path,
        default=Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "facelane-bench",
        help="imported models, environments of the peers",
    )
    args = parser.parse_args()
    # As an exception, so that servers and workers are ended on the way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    chosen: list[tuple[str, str]] = []
    for item in args.names or CPU:
        name, _, part = item.partition(":")
        if name not in ABOUT:
            parser.error(f"no benchmark is called {name}; there are: {', '.join(ABOUT)}")
        chosen.append((name, part))
    console = Console(width=None if sys.stdout.isatty() else 160)
    failed = []
    for name, part in chosen:

        def keep(report: Report, part: str = part) -> Path:
            parts = (
                part,
                f"x{args.servers}" * (args.servers > 1),
                f"shards{args.shards}" * (args.shards > 1),
            )
            report.part = "-".join(filter(None, parts))
            return report.write(args.out, command_line())

        settings = Settings(
            smoke=args.smoke,
            device=args.device or ("cuda:0" if any(Path("/dev").glob("nvidia[0-9]*")) else "cpu"),
            cache=args.cache,
            docs=args.docs or args.out,
            frames=args.frames,
            only=(part,) if part else (),
            servers=args.servers,
            shards=args.shards,
            cameras=args.cameras,
            keep=keep,
        )
        console.print(f"[bold]{name}[/]{f', {part}' * bool(part)}: {ABOUT[name]}")
        try:
            report: Report = asyncio.run(importlib.import_module(f"bench.{name}").run(settings))
        except MissingError as error:
            console.print(f"  not run: {error}", style="red", markup=False)
            failed.append(name)
            continue
        except Exception:
            traceback.print_exc()
            failed.append(name)
            continue
        report.complete = True
        report.print(console)
        console.print(f"  stored: {keep(report)}\n", markup=False)
    if failed:
        console.print(f"not completed: {', '.join(failed)}", style="red")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
