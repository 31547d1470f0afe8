"""The commands about the server, and what happens there."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Annotated

import typer

import facelane
from facelane import types
from facelane.cli import output
from facelane.cli.base import OK, PARTLY, Format, FormatOption

server_app = typer.Typer(no_args_is_help=True, help="The server: state and administration.")


@server_app.command("info")
def server_info(ctx: typer.Context, output_format: FormatOption = Format.table) -> None:
    """Version, models and limits."""
    console, _ = output.consoles()
    with ctx.obj.client() as client:
        info = client.server_info()
        target = client.target
    if output_format is Format.jsonl:
        output.json_line("server", info)
        return
    limits = info.limits
    rows: list[tuple[str, object]] = [
        ("server", f"{target}, version {info.version}{', draining' if info.draining else ''}"),
        ("started", info.start_time.isoformat(" ", "seconds") if info.start_time else "-"),
        ("streams", f"{info.open_streams} of {limits.max_streams}, window {limits.window}"),
        ("load", _load(info)),
        ("frame", f"at most {limits.max_frame_bytes} bytes, {limits.max_pixels} pixels"),
    ]
    if info.shards:
        told = ", ".join(f"{s.shard} {s.state.value} {s.open_streams}" for s in info.shards)
        rows.insert(3, ("shards", f"{told} (state, streams)"))
    rows.extend(("degraded", f"{d.component}: {d.message} ({d.cause})") for d in info.degradations)
    rows.extend(
        (m.task.value, f"{m.name} {m.version}{f' ({m.license})' if m.license else ''}")
        for m in info.models
    )
    console.print(output.key_values(rows))


def _load(info: facelane.ServerInfo) -> str:
    load = info.load
    if load is None:
        return "not known yet: too little has been analysed"
    fits = f"{load.headroom_streams} streams more fit"
    if load.thinned_streams:
        fits = f"{load.thinned_streams} streams are thinned to what can be served in time"
    return f"{load.offered_fps:.0f} of {load.capacity_fps:.0f} pictures/s; {fits}"


@server_app.command("pools")
def server_pools(ctx: typer.Context, output_format: FormatOption = Format.table) -> None:
    """The pools and their workers."""
    console, _ = output.consoles()
    with ctx.obj.client() as client:
        pools = client.pools()
    if output_format is Format.jsonl:
        for pool in pools:
            output.json_line("pool", pool)
        return
    table = output.table_of(
        "pool", "state", "queued", "done", "failed", "model", right=("queued", "done", "failed")
    )
    workers = output.table_of(
        "worker", "state", "device", "pid", "restarts", "memory", "last loss", "sandbox",
        right=("pid", "restarts", "memory"),
    )  # fmt: skip
    for pool in pools:
        counts = (str(pool.queued), str(pool.completed), str(pool.failed))
        table.add_row(pool.pool, pool.state.value, *counts, pool.model_id)
        budget = f" of {pool.memory_budget_bytes >> 20}" if pool.memory_budget_bytes else ""
        for worker in pool.workers:
            workers.add_row(
                worker.worker_id,
                worker.state.value,
                worker.device,
                str(worker.pid),
                str(worker.restarts),
                f"{worker.memory_bytes >> 20}{budget} MiB",
                worker.last_loss,
                worker.sandbox,
            )
    console.print(table)
    console.print()
    console.print(workers)


@server_app.command("health")
def server_health(
    ctx: typer.Context,
    service: Annotated[str, typer.Argument(help="A service; empty = the server in all.")] = "",
    wait: Annotated[float, typer.Option(min=0, help="Seconds to wait for SERVING.")] = 0.0,
) -> None:
    """SERVING or not; exit code 1 when not."""
    with ctx.obj.client() as client:
        if wait:
            client.wait_until_serving(wait, service=service)
        status = client.health(service)
    typer.echo(status.value)
    raise typer.Exit(OK if status is types.HealthStatus.SERVING else PARTLY)


@server_app.command("drain")
def server_drain(
    ctx: typer.Context,
    grace: Annotated[float, typer.Option(min=0, help="Seconds for open streams.")] = 30.0,
) -> None:
    """End the server; streams are told first."""
    with ctx.obj.client() as client:
        client.drain(grace)
    typer.echo(f"draining, the server ends within {grace:g} s")


@server_app.command("restart-worker")
def server_restart_worker(
    ctx: typer.Context,
    worker: Annotated[str, typer.Argument(help="pool#index, as `server pools` shows it.")],
) -> None:
    """Drain one worker and start it again."""
    with ctx.obj.client() as client:
        done = client.restart_worker(worker)
    typer.echo(f"{worker}: pid {done.old_pid} -> {done.new_pid}")


@server_app.command("reload")
def server_reload(
    ctx: typer.Context,
    pool: Annotated[str, typer.Argument(help="The pool.")],
    model: Annotated[str, typer.Argument(help="A package; empty = the present one again.")] = "",
    forget_templates: Annotated[
        bool,
        typer.Option(
            "--forget-templates", help="Change the recogniser although it knows nobody enrolled."
        ),
    ] = False,
) -> None:
    """Swap a pool's model without losing a frame."""
    with ctx.obj.client() as client:
        done = client.reload_model(pool, model, forget_templates=forget_templates)
    typer.echo(f"{pool}: {done.old_model_id} -> {done.new_model_id}")
    if done.templates_not_searched:
        typer.echo(f"{done.templates_not_searched} templates are of other models: not searched")
    if not done.remembered:
        typer.echo(f"a restart forgets this: set model in [pools.{pool}] of the configuration")


if TYPE_CHECKING:
    AskedKind = types.EventKind
else:
    AskedKind = enum.StrEnum(
        "AskedKind",
        {k.name: k.value for k in types.EventKind if k is not types.EventKind.UNSPECIFIED},
    )
    """What can be asked for: no event is UNSPECIFIED."""


def events(
    ctx: typer.Context,
    kind: Annotated[
        list[AskedKind] | None, typer.Option(help="Only these; may be given again.")
    ] = None,
    source: Annotated[
        list[str] | None, typer.Option(help="Of these sources alone; may be given again.")
    ] = None,
    gallery: Annotated[
        list[str] | None, typer.Option(help="Of these galleries alone; may be given again.")
    ] = None,
    resume_token: Annotated[str, typer.Option(help="Go on after this event.")] = "",
    count: Annotated[int, typer.Option(min=0, help="Stop after so many; 0 = never.")] = 0,
    output_format: FormatOption = Format.table,
) -> None:
    """Events as they happen, until interrupted; a broken connection is made again."""
    told = 0
    reconnect = facelane.Reconnect(max_attempts=10)
    with ctx.obj.client() as client:
        while True:
            try:
                with client.watch_events(
                    resume_token,
                    kind or (),
                    source_ids=source or (),
                    gallery_ids=gallery or (),
                    reconnect=reconnect,
                ) as stream:
                    resume_token = ""
                    for event in stream:
                        if output_format is Format.jsonl:
                            output.json_line("event", event)
                        else:
                            typer.echo(_event_words(event))
                        told += 1
                        if told == count:
                            break
                return
            except facelane.HistoryLostError as error:
                if resume_token:
                    raise  # The one that was given: the caller wants to know.
                typer.echo(f"facelane: {error.message}", err=True)


def _rule_words(rule: types.RuleReport) -> str:
    if rule.direction is not types.CrossingDirection.UNSPECIFIED:
        counts = f"in={rule.in_count} out={rule.out_count}"
        return f"line={rule.name} direction={rule.direction.value} {counts}"
    return f"zone={rule.name} dwell={rule.dwell:.1f}s inside={rule.inside}"


def confirm(
    ctx: typer.Context,
    sequence: Annotated[
        int, typer.Argument(help="The candidate's number (`facelane events` shows it).")
    ],
    gallery: Annotated[str, typer.Option(help="The candidate's gallery.")] = "default",
    agrees: Annotated[
        bool, typer.Option("--yes/--no", help="Whether it is the subject that it names.")
    ] = True,
) -> None:
    """Say of a candidate (SUBJECT_CANDIDATE) whether it is who it was taken for."""
    with ctx.obj.client() as client:
        done = client.confirm_sighting(sequence, agrees=agrees, gallery=gallery)
    typer.echo(f"{done.state.value}: {done.agreed} of {done.needed} agree")


def _event_words(event: types.Event) -> str:
    when = event.event_time.astimezone().strftime("%H:%M:%S") if event.event_time else "--:--:--"
    parts = [when, event.kind.value]
    if event.source_id:
        parts.append(f"source={event.source_id}")
    if event.track_id:
        parts.append(f"track={event.track_id}")
    if event.identity.subject_id:
        parts.append(f"subject={event.identity.subject_id}")
    if event.rule is not None:
        parts.append(_rule_words(event.rule))
    if event.kind is types.EventKind.SUBJECT_CANDIDATE:
        perhaps = f"perhaps={event.candidate_subject_id}"
        parts.append(f"sequence={event.sequence} gallery={event.gallery} {perhaps}")
    if event.ood_score is not None:
        parts.append(f"ood={event.ood_score:.2f}")
    if event.pool:
        parts.append(f"pool={event.pool}")
    if event.message:
        parts.append(event.message)
    return " ".join(parts)
