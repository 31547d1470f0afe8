"""A folder of videos: who is in which of them, and when.

    python examples/videos.py FOLDER --out found --at-once 4

Writes ``found/NAME.jsonl`` for each video: a line for each appearance, with its subject (or
UNKNOWN), from when to when in seconds of the video, and how trustworthy its best picture was; and
prints one line when it is done. Videos that are H.264 or H.265 go to the server as they are, the
others are decoded here. Nothing is dropped: the server takes frames as fast as it analyses them.

What is finished is not done again, so it can be interrupted and called again. A file that cannot be
read is told, the others are done, and the exit code is 1. Needs PyAV (``facelane[bridge]``).
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import av

import facelane
from facelane.video import NotPassableError, access_units

SUFFIXES = (".mp4", ".mkv", ".mov", ".avi", ".ts", ".m4v", ".webm", ".h264", ".h265")


@dataclass
class Appearance:
    """One track of one video."""

    first: float
    last: float
    frames: int = 0
    subject: str = ""
    decision: str = "NOT_EVALUATED"
    liveness: str = "UNDECIDED"
    ood_score: float | None = None

    def seen(self, face: facelane.Face, offset: float) -> None:
        """What a track is said to be changes for the better: the last word counts."""
        self.last = offset
        self.frames += 1
        self.subject = face.identity.subject_id
        self.decision = face.identity.decision.value
        self.liveness = face.liveness.verdict.value
        if face.ood_score is not None:
            self.ood_score = max(face.ood_score, self.ood_score or 0.0)

    def line(self) -> str:
        return json.dumps(
            {
                "subject": self.subject or None,
                "decision": self.decision,
                "liveness": self.liveness,
                "from": round(self.first, 3),
                "to": round(self.last, 3),
                "frames": self.frames,
                "ood_score": None if self.ood_score is None else round(self.ood_score, 3),
            }
        )


def frames_of(path: Path) -> Iterator[facelane.Frame]:
    """As the file has them, where servers take that; else decoded."""
    units = access_units(path)
    try:
        first = next(units, None)
    except NotPassableError:
        yield from decoded(path)
        return
    if first is not None:
        yield first
        yield from units


def decoded(path: Path) -> Iterator[facelane.Frame]:
    with av.open(f"file:{path.absolute()}") as container:
        begin = None
        for number, frame in enumerate(container.decode(video=0)):
            at = number / 25 if frame.time is None else frame.time
            begin = at if begin is None else begin
            picture = facelane.Picture.raw(frame.to_ndarray(format="bgr24"))
            yield facelane.Frame(picture, max(0.0, at - begin))


def analyse(client: facelane.Client, path: Path, out: Path, gallery: str) -> dict[str, object]:
    """One video; what is told of it."""
    tracks: dict[int, Appearance] = {}
    counts = {"results": 0, "errors": 0}
    for outcome in client.analyze(frames_of(path), gallery=gallery, reconnect=None):
        if outcome.error is not None:
            counts["errors"] += 1
            continue
        if outcome.result is None:
            continue
        counts["results"] += 1
        for face in outcome.result.faces:
            at = outcome.stream_offset
            tracks.setdefault(face.track_id, Appearance(at, at)).seen(face, at)
    part = out.with_name(f".{out.name}.part")
    rows = sorted(tracks.values(), key=lambda track: track.first)
    part.write_text("".join(f"{row.line()}\n" for row in rows), encoding="utf-8")
    part.replace(out)
    people = sorted({row.subject for row in rows if row.subject})
    return {"video": path.name, **counts, "appearances": len(rows), "people": people}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--target", default=None, help="the server; default: this machine's")
    parser.add_argument("--token", default=None, help="the key's secret")
    parser.add_argument("--gallery", default="default", help="whom to look for")
    parser.add_argument("--out", type=Path, default=Path("found"), help="a folder")
    parser.add_argument("--at-once", type=int, default=2, help="videos at one time")
    chosen = parser.parse_args()
    videos = sorted(path for path in chosen.folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if not videos:
        print(f"no video in {chosen.folder}: {' '.join(SUFFIXES)}", file=sys.stderr)
        return 1
    chosen.out.mkdir(parents=True, exist_ok=True)
    failed = False
    with (
        contextlib.suppress(KeyboardInterrupt),
        facelane.Client(chosen.target, token=chosen.token) as client,
        concurrent.futures.ThreadPoolExecutor(chosen.at_once) as pool,
    ):
        work = {}
        for path in videos:
            out = chosen.out / f"{path.name}.jsonl"
            if out.exists():
                print(json.dumps({"video": path.name, "done": "before"}), flush=True)
            else:
                work[pool.submit(analyse, client, path, out, chosen.gallery)] = path
        try:
            for done in concurrent.futures.as_completed(work):
                try:
                    line = done.result()
                except (facelane.FacelaneError, av.FFmpegError, OSError) as error:
                    failed = True
                    why = error.reason if isinstance(error, facelane.FacelaneError) else str(error)
                    line = {"video": work[done].name, "failed": why}
                print(json.dumps(line), flush=True)
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            client.close()  # ends the streams, and with them the threads
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
