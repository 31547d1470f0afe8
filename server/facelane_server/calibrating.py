"""``facelane-server liveness``: thresholds of single sources, from what their own faces score."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, NoReturn

import msgspec
import typer

from facelane_server import config as configuration
from facelane_server import folders, limits, served
from facelane_server.auditing import EX_CONFIG, ConfigOption
from facelane_server.config import ConfigError
from facelane_server.domain import FacelaneError, Stage
from facelane_server.events import EventKind
from facelane_server.liveness import calibration
from facelane_server.liveness.band import LivenessBand
from facelane_server.liveness.calibration import Calibrated, Refusal, Refused
from facelane_server.liveness.records import NAME, Record, RecordsError, write
from facelane_server.naming import is_name
from facelane_server.served import ServedModels
from facelane_server.store import events
from facelane_server.store.audit import Action, Actor, AuditLog, Deed
from facelane_server.store.opening import open_store, place_of, unlock

EX_REFUSED = 1

app = typer.Typer(no_args_is_help=True, help="Liveness thresholds of single sources.")

SourceArgument = Annotated[str, typer.Argument(metavar="SOURCE", help="The streams' source id.")]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]


@app.command("calibrate")
def calibrate(
    source: SourceArgument,
    hours: Annotated[
        float,
        typer.Option(min=0.01, max=24 * 366, help="From the tracks that ended in so many hours."),
    ] = 1.0,
    results: Annotated[
        Path | None,
        typer.Option(
            help="From these results instead, of a recording: JSON lines as `facelane analyze "
            "--json` prints them; - reads stdin."
        ),
    ] = None,
    not_live: Annotated[
        float,
        typer.Option(
            min=0.01, max=0.2, help="The share of living faces that may not be LIVE (UNDECIDED)."
        ),
    ] = calibration.NOT_LIVE,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would come of it, and change nothing.")
    ] = False,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Give one source liveness thresholds of its own, from tracks of people who were there.

    Let the camera see living people for an hour, then calibrate: the last score of each track
    says what living people score there. Where they are held up the threshold falls, where they
    score higher than they need to it rises; no further than the tracks are sure of, and within
    bounds: what the model refuses by far is never LIVE. It holds from the server's next start or
    reload (SIGHUP) on; `liveness forget` takes it back. Exit status 1 where the tracks do not
    tell enough, 78 where something cannot be read.
    """
    if not is_name(source):
        raise typer.BadParameter("a source id is 1-64 of letters, digits, and - _ .")
    with _failing():
        settings = configuration.load(config)
        model, base = _judge(settings)
        told = (
            _of_events(settings, source, hours) if results is None else _of_lines(results, source)
        )
        scores = [score for score in told if score is not None]
        found = calibration.calibrate(scores, base, not_live=not_live)
        if isinstance(found, Refused):
            _refuse(source, found, len(told) - len(scores))
        record = Record(
            model=model,
            base=base,
            band=found.band,
            made=datetime.now(UTC).isoformat(timespec="seconds"),
            tracks=found.tracks,
            far=found.far,
            not_live=not_live,
        )
        if not dry_run:
            _keep(settings, source, record)
    if as_json:
        typer.echo(json.dumps({**shown(source, record), **_figures(found)}, indent=2))
    else:
        typer.echo(_told(source, record, found))
        typer.echo(
            "nothing was changed" if dry_run else "it holds from the next start or reload (SIGHUP)"
        )


@app.command("list")
def list_sources(config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """The sources that were calibrated, and whether each holds."""
    with _failing():
        settings = configuration.load(config)
        records = served.calibrations(settings)
        model, base = _judge(settings)
    if as_json:
        rows = [
            {**shown(source, record), "not_in_force": record.stale(model, base)}
            for source, record in sorted(records.items())
        ]
        typer.echo(json.dumps({"sources": rows}, indent=2))
        return
    for source, record in sorted(records.items()):
        typer.echo(line(source, record, record.stale(model, base)))
    if not records:
        typer.echo("no source is calibrated")


@app.command("forget")
def forget(source: SourceArgument, config: ConfigOption = None) -> None:
    """Take a source's calibration back: from the next start or reload (SIGHUP) on the model's
    thresholds hold there again. Exit status 1 where there is none."""
    with _failing():
        settings = configuration.load(config)
        if source not in served.calibrations(settings):
            typer.echo(f"facelane-server: {source} is not calibrated", err=True)
            raise typer.Exit(EX_REFUSED)
        _keep(settings, source, None)
    typer.echo(f"{source}: forgotten; it holds from the next start or reload (SIGHUP)")


def line(source: str, record: Record, stale: str) -> str:
    """A calibration in words; ``stale``: why it is not in force, empty = it is."""
    said = (
        f"liveness of {source}: LIVE from {record.band.live:.3f} (model {record.base.live:g}), "
        f"SPOOF below {record.band.spoof:.3f} ({record.base.spoof:g}); {record.tracks} tracks, "
        f"{record.made[:10]}"
    )
    return f"{said}; not in force, {stale}: calibrate again" if stale else said


def lines(settings: configuration.Config, models: ServedModels) -> Iterator[str]:
    """Of all calibrations, for `check`. Raises ``ConfigError``."""
    path = folders.state_path(settings) / NAME
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):  # `check` says elsewhere that no folder can be
        return
    except PermissionError:
        yield f"not looked at: {path}: only the service's own user may"
        return
    package = models.packages.get(Stage.LIVENESS)
    base = LivenessBand(models.thresholds.live, models.thresholds.spoof)
    for source, record in sorted(served.calibrations(settings).items()):
        stale = "no liveness runs" if package is None else record.stale(package.model_id, base)
        yield line(source, record, stale)


def shown(source: str, record: Record) -> dict[str, Any]:
    return {"source": source, **msgspec.to_builtins(record)}


@contextlib.contextmanager
def _failing() -> Iterator[None]:
    try:
        yield
    except (ConfigError, FacelaneError, RecordsError) as error:
        typer.echo(f"facelane-server: {error}", err=True)
        raise typer.Exit(EX_CONFIG) from None


def _judge(settings: configuration.Config) -> tuple[str, LivenessBand]:
    """The liveness model's id, and its thresholds without a calibration."""
    models = ServedModels.resolve(settings)
    package = models.packages.get(Stage.LIVENESS)
    if package is None:
        raise ConfigError("this server judges no liveness: pools.liveness = false")
    return package.model_id, LivenessBand(models.thresholds.live, models.thresholds.spoof)


def _of_events(settings: configuration.Config, source: str, hours: float) -> list[float | None]:
    since_ns = time.time_ns() - int(hours * 3600 * 1_000_000_000)
    with contextlib.closing(open_store(place_of(settings), look=True)) as database:
        ended = events.reports(
            database,
            EventKind.TRACK_ENDED.value,
            source,
            since_ns,
            limits.MAX_CALIBRATION_TRACKS,
        )
    return [track.liveness.score for track in ended]


class _Face(msgspec.Struct):
    track_id: int
    liveness_score: float | None = None


class _Result(msgspec.Struct):
    """A line, whatever its type: the others have no faces."""

    camera: str = ""
    stream_id: str = ""
    faces: list[_Face] = []


def _of_lines(path: Path, source: str) -> list[float | None]:
    try:
        if str(path) == "-":
            return tracks_of(sys.stdin.buffer, source)
        with path.open("rb") as stream:
            return tracks_of(stream, source)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None


def tracks_of(lines: Iterable[bytes], source: str) -> list[float | None]:
    """The last score of each track of the source's results; None of those without any. Faces
    without a track, of pictures, are one each. Raises ``ConfigError``."""
    decode = msgspec.json.Decoder(_Result).decode
    found: dict[tuple[str, int], float | None] = {}
    cameras: set[str] = set()
    for number, text in enumerate(lines, 1):
        if not text.strip():
            continue
        try:
            result = decode(text)
        except msgspec.DecodeError as error:
            raise ConfigError(f"line {number} is no result of `facelane`: {error}") from None
        if result.camera != source:
            if result.camera and len(cameras) < limits.MAX_CALIBRATED_SOURCES:
                cameras.add(result.camera)
            continue
        for face in result.faces:
            track = (result.stream_id, face.track_id) if face.track_id else ("", -len(found) - 1)
            if face.liveness_score is not None or track not in found:
                found[track] = face.liveness_score
        if len(found) > limits.MAX_CALIBRATION_TRACKS:
            raise ConfigError(f"more than {limits.MAX_CALIBRATION_TRACKS} tracks; take fewer lines")
    if not found and cameras:
        named = ", ".join(sorted(cameras)[:5])
        raise ConfigError(f"no line is of {source}; the results are of {named}")
    return list(found.values())


def _refuse(source: str, found: Refused, unjudged: int) -> NoReturn:
    counted = f"{found.tracks} tracks tell something, {found.far} are refused by far" + (
        f", {unjudged} were not judged" if unjudged else ""
    )
    what = {
        Refusal.TOO_FEW: f"it takes {found.wanted}: let it see more people, or take more --hours",
        Refusal.REFUSED_BY_FAR: "no threshold mends that: look at its light, focus and distance, "
        "or at who stood there",
    }[found.reason]
    typer.echo(f"facelane-server: {found.reason.value}: {source}: {counted}; {what}", err=True)
    raise typer.Exit(EX_REFUSED)


def _keep(settings: configuration.Config, source: str, record: Record | None) -> None:
    """Writes it down, in the audit log first; None = forgets it."""
    method = "liveness forget" if record is None else "liveness calibrate"
    told = () if record is None else (("live", f"{record.band.live:.4f}"),)
    deed = Deed(
        Action.ADMINISTERED,
        Actor(f"operator uid {os.getuid()}", method),
        told=(("source", source), *told),
    )
    with contextlib.closing(open_store(place_of(settings))) as database:
        AuditLog(database, unlock(database, settings)).write([deed])
    records = dict(served.calibrations(settings))
    if record is None:
        records.pop(source, None)
    else:
        records[source] = record
    write(folders.state_dir(settings), records)


def _figures(found: Calibrated) -> dict[str, Any]:
    return {
        "interval": list(found.interval),
        "live_before": found.before.live,
        "live_after": found.after.live,
        "spoof_before": found.before.spoof,
        "spoof_after": found.after.spoof,
    }


def _told(source: str, record: Record, found: Calibrated) -> str:
    low, high = found.interval
    moved = found.band.live - record.base.live
    why = (
        f"held up: the model's {record.base.live:g} lies above"
        if moved < 0
        else f"more than they need: the model's {record.base.live:g} lies below"
        if moved > 0
        else f"as they should: the model's {record.base.live:g} lies within"
    )
    return (
        f"{source}: {record.tracks} tracks, {record.far} refused by far and left out\n"
        f"the score that {record.not_live:.0%} of living faces stay under is {low:.3f} to "
        f"{high:.3f}: {why}\n"
        f"LIVE from {record.band.live:.3f} (before {record.base.live:.3f}): "
        f"{found.before.live:.1%} of these tracks before, {found.after.live:.1%} after\n"
        f"SPOOF below {record.band.spoof:.3f} (before {record.base.spoof:.3f}): "
        f"{found.before.spoof:.1%} before, {found.after.spoof:.1%} after"
    )
