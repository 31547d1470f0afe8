"""The installation: config, addresses, keys, certificate, gallery, master key, models, memory.

The last check is a real inference by real workers, started as the server starts them. A running
server is not disturbed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import msgspec

from facelane_server import addresses, config, limits, plan, traces
from facelane_server.doctor.report import Finding, Status
from facelane_server.domain import Encoding, FacelaneError, Picture, Stage
from facelane_server.edge.auth import Authenticator, read_file
from facelane_server.edge.tls import Certificates
from facelane_server.pools.host import Launchers
from facelane_server.pools.pool import Pool
from facelane_server.pools.tasks import DetectRequest, EmbedRequest, LivenessRequest, Request, Task
from facelane_server.served import ServedModels
from facelane_server.shards.dealing import cards, count
from facelane_server.store.gallery import Store
from facelane_server.store.opening import key_source, open_store, place_of, unlock
from facelane_server.store.vault import Vault

INFERENCE_TIMEOUT_S: Final = 120.0
MIN_DISK_MIB: Final = 256
MIN_CERTIFICATE_DAYS: Final = 14
SIDE: Final = 256


def check_config(path: Path | None) -> tuple[config.Config, Finding]:
    """The config, or the defaults when it cannot be used."""
    try:
        settings = config.load(path)
    except config.ConfigError as error:
        advice = "the other checks use the defaults; `facelane-server check` reads it again"
        return config.Config(), Finding("config", Status.FAIL, str(error), advice)
    where = str(path) if path is not None else "no file: defaults"
    return settings, Finding("config", Status.OK, where)


def check_listen(settings: config.Config) -> Finding:
    """Whether the address is free; a server that runs already is no fault."""
    listen = settings.listen
    if listen.startswith("unix:"):
        path = Path(listen.removeprefix("unix:").removeprefix("//"))
        if path.parent.is_dir() and os.access(path.parent, os.W_OK):
            return Finding("listen", Status.OK, listen)
        advice = f"make {path.parent} and let this user write to it"
        return Finding("listen", Status.FAIL, f"{listen}: its folder cannot be written to", advice)
    return _port_check("listen", "server.listen", listen)


def check_metrics(settings: config.Config) -> Finding:
    """Whether the address of the metrics is free. They need no key, wherever they listen."""
    listen = settings.metrics.listen
    if not listen:
        return Finding("metrics", Status.SKIP, "switched off")
    check = _port_check("metrics", "metrics.listen", listen)
    if check.status is Status.OK and not addresses.is_local(listen):
        return Finding("metrics", Status.OK, f"{check.detail}; whoever reaches it may read them")
    return check


def _port_check(name: str, key: str, listen: str) -> Finding:
    host, _, port = listen.rpartition(":")
    try:
        info = socket.getaddrinfo(
            host.strip("[]") or None, int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(info[0], info[1]) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(info[4])
    except OSError as error:
        advice = f"a server that runs already has it; otherwise set {key} to a free one"
        return Finding(name, Status.WARN, f"{listen}: {error.strerror}", advice)
    return Finding(name, Status.OK, f"{listen} is free")


_LENT: Final = "systemd lends it to the running service alone: not looked at"


def check_keys(settings: config.Config) -> Finding:
    """Who may call. Without keys, whoever reaches the address."""
    file = settings.auth.keys_file
    if file in settings.lent_by_systemd:
        return Finding("keys", Status.SKIP, f"{file}: {_LENT}")
    try:
        required = Authenticator.of(settings).required
    except config.ConfigError as error:
        advice = "`facelane-server keys new NAME --file FILE`"
        return Finding("keys", Status.FAIL, str(error), advice)
    if required:
        found = read_file(Path(file))
        certificates = f", {n} certificate(s)" if (n := len(found.certificates)) else ""
        return Finding("keys", Status.OK, f"{file}: {len(found.keys)} key(s){certificates}")
    if addresses.is_local(settings.listen):
        return Finding("keys", Status.OK, "none needed: reachable from this machine alone")
    advice = "whoever reaches the address may enrol, delete and drain: set auth.mode and keys_file"
    return Finding("keys", Status.WARN, "switched off", advice)


def check_tls(settings: config.Config) -> Finding:
    """The certificate, its key, its dates, and whom it is for."""
    section = settings.tls
    if not section.cert_file:
        if addresses.is_local(settings.listen):
            return Finding("tls", Status.SKIP, "not configured, not needed")
        advice = "pictures and keys cross the network unencrypted: set tls.cert_file and key_file"
        return Finding("tls", Status.WARN, "not configured", advice)
    if {section.cert_file, section.key_file, section.client_ca_file} & set(
        settings.lent_by_systemd
    ):
        return Finding("tls", Status.SKIP, f"{section.cert_file}: {_LENT}")
    try:
        certificates = Certificates.read(section)
    except config.ConfigError as error:
        return Finding("tls", Status.FAIL, str(error))
    assert certificates is not None
    facts = certificates.facts()
    if facts.problem:
        return Finding("tls", Status.FAIL, f"{section.cert_file} {facts.problem}")
    detail = f"{section.cert_file}: valid until {facts.ends:%Y-%m-%d}"
    if facts.ends - datetime.now(UTC) < timedelta(days=MIN_CERTIFICATE_DAYS):
        return Finding("tls", Status.WARN, detail, "renew it: clients refuse it afterwards")
    if not facts.names:
        advice = (
            "most clients look at nothing else: make it again with subjectAltName = DNS:..., IP:..."
        )
        return Finding("tls", Status.WARN, f"{detail}; it has no alternative names", advice)
    hosts = _reached_by(settings.listen)
    if not any(map(facts.covers, hosts)):
        advice = f"clients that come to one of those names refuse it; it is for {_few(facts.names)}"
        return Finding("tls", Status.WARN, f"{detail}; it is not for {_few(hosts)}", advice)
    if Path(section.key_file).stat().st_mode & 0o007:
        advice = f"chmod 600 {section.key_file}"
        return Finding("tls", Status.WARN, f"{section.key_file} can be read by others", advice)
    return Finding("tls", Status.OK, detail)


def _reached_by(listen: str) -> tuple[str, ...]:
    """Names and addresses that clients may connect to."""
    if listen.startswith("unix:"):
        return ("localhost",)
    host = listen.rpartition(":")[0].strip("[]")
    if host in ("0.0.0.0", "::", "*"):  # noqa: S104
        return tuple(dict.fromkeys((socket.gethostname(), socket.getfqdn())))
    return (host,)


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")


def check_gallery(settings: config.Config) -> Finding:
    """The store is whole, and a file's disk has room. Blocks: run it in a thread."""
    try:
        if isinstance(path := place_of(settings, look=True), str):
            return _check_database(path)
        if not path.exists():
            folder = next(p for p in path.parents if p.exists())
            if not (folder.is_dir() and os.access(folder, os.W_OK)):
                advice = "set gallery.path or state_dir to a folder that this user may write to"
                return Finding("gallery", Status.FAIL, f"{folder} cannot be written to", advice)
            return _with_disk(Finding("gallery", Status.OK, f"{path}: will be made"), folder)
        # Sealed or not: nobody's name is looked at.
        store = Store(path, vault=Vault(str(path), None, ()))
        try:
            wrong = store.check()
            subjects, templates = store.counts()
        finally:
            store.close()
    except FacelaneError as error:
        if "another server" in error.message:
            return Finding("gallery", Status.SKIP, "in use by a server that runs")
        return Finding("gallery", Status.FAIL, error.message)
    except config.ConfigError as error:
        return Finding("gallery", Status.FAIL, str(error))
    except OSError as error:
        advice = "look as the server's own user (sudo -u), or set gallery.path"
        detail = f"{path} cannot be looked at: {error.strerror}"
        return Finding("gallery", Status.FAIL, detail, advice)
    if wrong:
        return Finding("gallery", Status.FAIL, f"{path}: {wrong}", "restore a backup of the file")
    check = Finding(
        "gallery",
        Status.OK,
        f"{path}: {subjects} subjects, {templates} templates",
        facts={"subjects": subjects, "templates": templates},
    )
    return _with_disk(check, path.parent)


def _check_database(url: str) -> Finding:
    try:
        database = open_store(url, look=True)
        unread = Vault(database.name, None, ())
        with contextlib.closing(Store(database, vault=unread)) as store:
            wrong = store.check()
            subjects, templates = store.counts()
    except FacelaneError as error:
        return Finding("gallery", Status.FAIL, error.message)
    name = store.database.name
    if wrong:
        return Finding("gallery", Status.FAIL, f"{name}: {wrong}", "restore a backup")
    facts = {"subjects": subjects, "templates": templates}
    detail = f"{name}: {subjects} subjects, {templates} templates"
    return Finding("gallery", Status.OK, detail, facts=facts)


def _with_disk(check: Finding, folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free // limits.MIB
    if free >= MIN_DISK_MIB:
        return check
    detail = f"{check.detail}; {free} MiB free on its disk"
    return Finding(check.name, Status.WARN, detail, "free some space: enrolments will fail")


def check_master_key(settings: config.Config) -> Finding:
    """Whether it can be had, opens what is there, and everything is encrypted that has to be.
    Blocks: run it in a thread."""
    name = "master key"
    try:
        source = key_source(settings, look=True)
        if source is not None and (why := source.elsewhere):
            return Finding(name, Status.SKIP, f"{source.name}: {why}")
        keys = () if source is None else source.read()
        place = place_of(settings, look=True)
        if isinstance(place, Path) and not place.exists():
            encrypts = source is not None and settings.store.encryption != "off"
        else:
            with contextlib.closing(open_store(place, look=True)) as database:
                encrypts = unlock(database, settings, look=True).encrypts
                if not encrypts and source is not None and settings.store.encryption == "on":
                    encrypts = True  # by the next start
    except config.ConfigError as error:
        return Finding(name, Status.FAIL, str(error), "the server does not start without it")
    except FacelaneError as error:  # the gallery's own check says more
        return Finding(name, Status.SKIP, f"the store cannot be looked at: {error.message}")
    except OSError as error:
        advice = "look as the server's own user (sudo -u)"
        return Finding(name, Status.FAIL, f"it cannot be looked at: {error.strerror}", advice)
    if settings.keeps_pictures and not encrypts:
        advice = "set store.encryption = 'on', or events.pictures to 'none'"
        return Finding(name, Status.FAIL, "events keep pictures in a store that lies open", advice)
    if not encrypts:
        advice = "what is kept of people lies on the disk as it is: store.encryption = 'on'"
        return Finding(name, Status.WARN, "the store is not encrypted", advice)
    assert source is not None
    detail = f"{source.name}: {len(keys)} key(s)" if keys else f"{source.name}: will be made"
    return Finding(name, Status.OK, detail)


def check_tracing(settings: config.Config) -> Finding:
    if not settings.tracing.endpoint:
        return Finding("tracing", Status.SKIP, "switched off")
    try:
        traces.check(settings.tracing)
    except config.ConfigError as error:
        return Finding("tracing", Status.FAIL, str(error))
    return Finding("tracing", Status.OK, f"to {settings.tracing.endpoint}")


def check_memory(settings: config.Config, models: ServedModels) -> Finding:
    """Whether the models fit their cards, as the server asks before it loads them. Blocks: run it
    in a thread."""
    shards = count(settings, cores=len(os.sched_getaffinity(0)), cards=cards())
    made = plan.make_plan(settings, models.packages, plan.read_devices(), shards=shards)
    if made.problems:
        advice = "`facelane-server plan` shows what each pool takes"
        return Finding("memory", Status.FAIL, "; ".join(made.problems), advice)
    if not made.devices:
        return Finding("memory", Status.SKIP, "no pool is on a card")
    return Finding("memory", Status.OK, f"what the pools take fits {len(made.devices)} device(s)")


def check_models(settings: config.Config) -> tuple[ServedModels | None, tuple[Finding, ...]]:
    """The packages that the config names, their manifests and the hashes of their weights."""
    try:
        models = ServedModels.resolve(settings)
    except (FacelaneError, config.ConfigError) as error:
        advice = "`facelane-server models list` shows what there is"
        return None, (Finding("models", Status.FAIL, str(error), advice),)
    checks = []
    sound = True
    for stage, package in models.packages.items():
        name = f"model {stage.value}"
        try:
            for part in package.manifest.weights:
                package.read_weights(part)
        except (FacelaneError, OSError) as error:
            sound = False
            checks.append(
                Finding(name, Status.FAIL, str(error), "copy or import the package once more")
            )
            continue
        if package.random_weights:
            advice = "for benchmarks only: it recognises nobody"
            checks.append(Finding(name, Status.WARN, f"{package.model_id}: random", advice))
        else:
            checks.append(Finding(name, Status.OK, package.model_id))
    return models if sound else None, tuple(checks)


async def check_inference(settings: config.Config, models: ServedModels, stage: Stage) -> Finding:
    """One worker of the stage, as the server starts it, and one real inference."""
    name = f"inference {stage.value}"
    chosen = settings.stages[stage]
    if chosen.hosting.attaches or chosen.hosting.needs_mps:
        return Finding(name, Status.SKIP, f"isolation is {chosen.isolation}: it needs the server")
    pool_settings = msgspec.structs.replace(chosen, workers=1, spares=0, isolation="process")
    package = models.packages[stage]
    with tempfile.TemporaryDirectory(prefix="facelane-doctor-") as folder:
        launchers = Launchers(Path(folder))
        pool = Pool(
            stage,
            pool_settings,
            package,
            launchers.for_pool(stage.value, pool_settings),
            crops=models.crops if stage is Stage.DETECTOR else (),
        )
        try:
            return await _infer(name, pool, _request(stage, package))
        finally:
            await pool.stop(2.0)
            await launchers.close()


def _request(stage: Stage, package: Any) -> Request:
    """An even grey picture."""
    if stage is Stage.DETECTOR:
        picture = Picture(Encoding.BGR24, b"\x60" * (SIDE * SIDE * 3), SIDE, SIDE, SIDE * 3)
        return DetectRequest(picture, max_faces=1, max_pixels=limits.MAX_PIXELS)
    crops = tuple(b"\x60" * (spec.size * spec.size * 3) for spec in package.crops)
    return EmbedRequest(crops[0]) if stage is Stage.RECOGNIZER else LivenessRequest(crops)


async def _infer(name: str, pool: Pool, request: Request) -> Finding:
    began = time.monotonic()
    await pool.start()
    if not await _ready(lambda: pool.available, lambda: pool.info().losses >= 2):
        worker = pool.info().workers[0]
        why = worker.last_loss or f"it is {worker.life.name.lower()}"
        advice = "the worker's own message is above; `facelane-server models verify` loads it alone"
        return Finding(name, Status.FAIL, f"no worker was ready: {why}", advice)
    started = time.monotonic() - began
    deadline_ns = time.monotonic_ns() + int(INFERENCE_TIMEOUT_S * 1e9)
    future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    task: Task[Any] = Task(request, 1, 1, deadline_ns, future)
    pool.submit(task)
    try:
        async with asyncio.timeout(INFERENCE_TIMEOUT_S + 5):
            await future
    except FacelaneError as error:
        return Finding(name, Status.FAIL, f"{error.reason.value}: {error.message}")
    except TimeoutError:
        return Finding(name, Status.FAIL, f"no answer in {INFERENCE_TIMEOUT_S:.0f} s")
    took_ms = (task.finished_ns - task.dispatched_ns) / 1e6
    worker = pool.info().workers[0]
    memory = f", {worker.memory_mib} MiB" if worker.memory_mib else ""
    return Finding(
        name,
        Status.OK,
        f"{worker.device}: ready in {started:.1f} s, answered in {took_ms:.1f} ms{memory}; "
        f"sandbox: {worker.sandbox}",
        facts={
            "device": worker.device,
            "start_s": round(started, 3),
            "answer_ms": round(took_ms, 3),
            "memory_mib": worker.memory_mib,
            "sandbox": worker.sandbox,
        },
    )


async def _ready(available: Callable[[], bool], hopeless: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + INFERENCE_TIMEOUT_S
    while time.monotonic() < deadline and not hopeless():
        if available():
            return True
        await asyncio.sleep(0.02)
    return available()
