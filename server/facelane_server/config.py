"""The configuration: frozen, read from one TOML file, strict about what it does not know.

Every field has a default, so an empty file (or none) is a working CPU server on
a Unix socket. ``load`` names an unknown key and the nearest right one; ``check`` holds the
relations between values. Environment variables do not override: one file is the truth.
"""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import msgspec

from facelane_server import areas, limits
from facelane_server.addresses import LENT, default_socket, is_host_port, is_local
from facelane_server.areas import Line, Zone
from facelane_server.domain import Keeping, Stage
from facelane_server.gallery_rules import Even, GalleryRules, Naming, Ratio, Share
from facelane_server.naming import hint, is_name
from facelane_server.sampling import Tracing
from facelane_server.sources import Source, View

Isolation = Literal["process", "mps", "thread", "external"]
Precision = Literal["auto", "fp32", "fp16"]
Decode = Literal["auto", "cpu", "cuda"]
Sandbox = Literal["auto", "off", "required"]

Positive = Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]
NonNegative = Annotated[int, msgspec.Meta(ge=0, le=1_000_000_000)]
Seconds = Annotated[float, msgspec.Meta(gt=0.0, le=86_400.0)]


class ConfigError(Exception):
    """The configuration cannot be used; the message says where and what to write instead."""


class AddressError(ConfigError):
    """An address cannot be listened on now. It may be free later, so trying again helps."""


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    pass


class Tls(Section, frozen=True):
    cert_file: str = ""
    """PEM certificate chain; with it the server speaks TLS only."""
    key_file: str = ""
    """PEM private key."""
    client_ca_file: str = ""
    """When set, clients must present a certificate of this authority (mutual TLS)."""


class Auth(Section, frozen=True):
    mode: Literal["auto", "keys", "none"] = "auto"
    """``auto``: no keys on a Unix socket, which belongs to one user; keys anywhere else, loopback
    included, since every user of the machine reaches it."""
    keys_file: str = ""
    """TOML with ``[[keys]]`` (``facelane-server keys new``), ``[[roles]]`` and, for names in client
    certificates, ``[[certificates]]``; see roles.md."""
    denied_file: str = ""
    """Who is let in nowhere, one word a line: a key's name, its sha256 or the first 12 digits of
    it, a name in a certificate. Looked at twice a second, whatever else can be read; empty =
    ``keys_file`` with ``.denied`` behind it."""
    allow_plaintext: bool = False
    """Keys over an unencrypted connection off loopback are refused unless this is set."""


class Server(Section, frozen=True):
    listen: str = ""
    """``host:port`` or ``unix:/path``; empty = the socket ``grpc.sock`` in $RUNTIME_DIRECTORY
    (systemd), else in $XDG_RUNTIME_DIR/facelane, else in /tmp/facelane-UID, where clients look
    for it too."""
    socket_group: str = ""
    """A Unix socket is for the server's own user (mode 0600), and with this for a group as well
    (0660)."""
    drain_grace_s: Seconds = 10.0
    """How long open streams may finish after SIGTERM."""
    reflection: bool = True
    """Offer gRPC reflection (``grpcurl`` and friends)."""
    shards: Annotated[int, msgspec.Meta(ge=1, le=limits.MAX_SHARDS)] | Literal["auto"] = 1
    """Processes that serve at one address, each with streams and pools of its own: one ends near
    1,500 frames a second. Pools are as configured in each; their ``devices`` are dealt out.
    ``auto``: one for every four cores, and where a card is used at most four for each."""


class Limits(Section, frozen=True):
    max_streams: Annotated[int, msgspec.Meta(ge=1, le=limits.MAX_STREAMS)] = 256
    """Streams open at one time; more are refused with STREAM_LIMIT."""
    window: Annotated[int, msgspec.Meta(ge=1, le=limits.MAX_WINDOW)] = 64
    """Frames of a stream without an outcome written; more are held back by flow control."""
    window_bytes: Annotated[int, msgspec.Meta(ge=1024, le=1024 * limits.MIB)] = 32 * limits.MIB
    """Picture bytes that a stream may hold on the server; one frame is always let in."""
    age_target_ms: Annotated[int, msgspec.Meta(ge=0, le=600_000)] = 100
    """Nineteen of twenty results are to be younger than this, from the receipt of their frame.
    When more comes than can be served so, an even part of every LATEST_WINS stream is taken, by
    weight; the others are dropped as THINNED. 0 = never."""
    min_fps: Annotated[float, msgspec.Meta(ge=0.0, le=1_000.0)] = 2.0
    """Analysed frames a second that a stream is let in for: while streams are thinned, one more
    that would leave each of its key with less is refused with CAPACITY."""
    video_cache_bytes: Annotated[int, msgspec.Meta(ge=64 * 1024, le=limits.MAX_VIDEO_CACHE)] = (
        8 * limits.MIB
    )
    """Video: what is kept of a stream since its last key frame, to be decoded again where a
    worker was lost. Of a group of pictures that is larger the rest waits for a key frame then."""
    max_frame_age_ms: Annotated[int, msgspec.Meta(ge=10, le=600_000)] = 1_000
    """LATEST_WINS: a frame older than this when a worker is free is dropped."""
    lossless_frame_age_ms: Annotated[int, msgspec.Meta(ge=10, le=3_600_000)] = 60_000
    """The same for LOSSLESS streams."""
    image_timeout_ms: Annotated[int, msgspec.Meta(ge=10, le=600_000)] = 10_000
    """For single pictures, where the caller sets no nearer deadline."""
    max_frame_bytes: Annotated[int, msgspec.Meta(ge=1024, le=limits.MAX_PICTURE_BYTES)] = (
        16 * limits.MIB
    )
    """Bytes of one picture as sent."""
    max_pixels: Annotated[int, msgspec.Meta(ge=4096, le=limits.MAX_PIXELS)] = 16_000_000
    """Width x height of one picture, checked in its header. Larger JPEGs, up to 65 megapixels (51
    where they have several scans), are decoded at 1/2, 1/4 or 1/8; others are refused."""
    max_faces: Annotated[int, msgspec.Meta(ge=1, le=limits.MAX_FACES)] = 32
    """Faces a picture, best score first."""
    slow_reader_s: Seconds = 30.0
    """A client that does not read its outcomes for so long loses its stream."""
    first_message_s: Seconds = 10.0
    """A stream must send its config, a single call its request, within this time."""


class Quotas(Section, frozen=True):
    """What the calls of one key may take at a time; keys can have more or less of their own.
    Where no keys are wanted there is one caller, and only ``limits`` count."""

    streams: Annotated[int, msgspec.Meta(ge=1, le=limits.MAX_STREAMS)] = 64
    """Streams open; more are refused with QUOTA_EXCEEDED."""
    calls: Annotated[int, msgspec.Meta(ge=1, le=limits.MAX_CALLS)] = 32
    """Single calls under way."""
    watchers: Annotated[int, msgspec.Meta(ge=1, le=limits.MAX_EVENT_WATCHERS)] = 16
    """Calls that watch events."""
    held_mib: Annotated[int, msgspec.Meta(ge=16, le=65_536)] = 256
    """Picture bytes that all streams and calls of the key hold; more is held back by flow
    control. Every stream may hold one picture."""


class Models(Section, frozen=True):
    path: tuple[str, ...] = ()
    """Folders with model packages, searched after the packages that ship with facelane."""


class Hosting(msgspec.Struct, frozen=True, kw_only=True):
    """What follows from how a pool's workers are isolated."""

    shares_process: bool = False
    """They are threads of one process, and share its memory, its context and its fate."""
    attaches: bool = False
    """Somebody else starts their processes."""
    can_double: bool = True
    """A second set can run beside the first."""
    needs_mps: bool = False


_HOSTING: Final[dict[Isolation, Hosting]] = {
    "process": Hosting(),
    "mps": Hosting(needs_mps=True),
    "thread": Hosting(shares_process=True, can_double=False),
    "external": Hosting(attaches=True, can_double=False),
}


class Pool(Section, frozen=True):
    model: str = ""
    """A package's name or folder; empty = the default of the stage."""
    workers: Annotated[int, msgspec.Meta(ge=1, le=limits.MAX_WORKERS)] = 1
    """Worker processes (threads, for ``thread``)."""
    spares: Annotated[int, msgspec.Meta(ge=0, le=4)] = 0
    """Warmed workers that take over at once when one is lost."""
    devices: tuple[str, ...] = ("auto",)
    """``cpu``, ``cuda:0``, ...; ``auto`` = cuda:0 where there is one, else cpu. Workers are
    spread over them in turn."""
    isolation: Isolation = "process"
    """``process``: own process, own CUDA context. ``mps``: the same under NVIDIA MPS, with
    ``sm_share``. ``thread``: threads of one process, own streams. ``external``: started by
    somebody else, attaches to ``socket``."""
    group: str = "shared"
    """``thread`` pools of one group are threads of one worker process."""
    socket: str = ""
    """``external``: the Unix socket that workers attach to; empty =
    ``<runtime dir>/<pool>.sock``."""
    batch_max: Annotated[int, msgspec.Meta(ge=0, le=limits.MAX_BATCH)] = 0
    """Largest batch that a worker takes; batches grow under load only. 0: 8 on CUDA; on a CPU
    4, and 1 for a detector, which gains nothing there and keeps others waiting."""
    threads: Annotated[int, msgspec.Meta(ge=1, le=256)] = 1
    """CPU threads of one worker."""
    precision: Precision = "auto"
    """``auto``: fp16 on CUDA, fp32 on the CPU."""
    graphs: bool = True
    """Capture CUDA graphs."""
    stream_priority: Annotated[int, msgspec.Meta(ge=-5, le=0)] = 0
    """CUDA stream priority; lower = sooner."""
    memory_mib: NonNegative = 0
    """Budget of one worker on its device, CUDA context included; 0 = no budget."""
    sm_share: Annotated[int, msgspec.Meta(ge=1, le=100)] = 100
    """``mps``: percentage of the multiprocessors."""
    max_side: Annotated[int, msgspec.Meta(ge=0, le=limits.MAX_SIDE)] = 0
    """Detector: longer side of the network's input; 0 = what the package says."""
    decode: Decode = "cpu"
    """Detector: who decodes. ``cuda``: the card, JPEG by nvJPEG (needs ``facelane[nvjpeg]``), video
    by NVDEC (``facelane[nvdec]``); frames then stay there, and what the card does not take the
    CPU decodes.
    ``auto``: the card where it can, else the CPU."""
    job_timeout_ms: Annotated[int, msgspec.Meta(ge=10, le=600_000)] = 5_000
    """A job that takes longer means that the worker hangs: it is killed."""
    load_timeout_s: Seconds = 120.0
    """Loading and warming up may take this long."""
    ping_interval_s: Seconds = 2.0
    """An idle worker is asked this often whether its inference loop lives."""
    restart_limit: Positive = 5
    """Losses within ``restart_window_s`` after which a worker is quarantined."""
    restart_window_s: Seconds = 120.0
    """See ``restart_limit``."""
    backoff_initial_s: Seconds = 0.05
    """Wait before the first restart; doubles, with jitter."""
    backoff_max_s: Seconds = 15.0
    """Longest wait before a restart."""
    quarantine_s: Seconds = 60.0
    """A quarantined worker is given one more try after this time."""
    canary_interval_s: Seconds = 10.0
    """An idle pool runs a real inference this often."""
    sandbox: Sandbox = "auto"
    """``auto``: workers are confined as far as this machine can (Landlock, seccomp, a user
    without rights where root starts them). ``required``: or they do not start. ``off``."""
    options: dict[str, str] = {}
    """Passed to the worker; for fault tests and benchmarks."""

    @property
    def hosting(self) -> Hosting:
        return _HOSTING[self.isolation]


class Pools(Section, frozen=True):
    detector: Pool = Pool()
    recognizer: Pool | None = Pool()
    liveness: Pool | None = Pool()


class Identity(Section, frozen=True):
    """Overrides of what the packages say; unset = the package's value."""

    false_naming: Share = 0.001
    """The share of strangers that may be named. The match threshold follows from it, from the
    number of templates that are searched and from the face's OOD score, where the recogniser's
    package says how similar different people are to it; `facelane-server gallery check` shows
    what comes of it."""
    match_threshold: Ratio | None = None
    """Least cosine of a match, in place of `false_naming`."""
    agreeing_looks: Annotated[int, msgspec.Meta(ge=1, le=2)] = 2
    """How many looks at a face must agree before its track is named, where `false_naming` holds;
    one will do that would match at a hundredth of `false_naming`, too. 1: one will always do."""
    galleries: dict[str, Naming] = {}
    """`[identity.galleries.NAME]`: `false_naming` or `match_threshold` for one gallery."""
    sources: dict[str, Naming] = {}
    """`[identity.sources.NAME]`: the same for streams with this source id; it comes before the
    gallery's."""
    margin: Ratio | None = None
    """Least distance in cosine between the best subject and the next."""
    ood_threshold: Ratio | None = None
    """Least OOD score of a face that may be named."""
    enroll_ood: Ratio | None = None
    """Least OOD score of a face that may be enrolled; unset = half of `ood_threshold`. Between
    the two a face is enrolled with a warning."""
    live_threshold: Ratio | None = None
    """Liveness scores from here on are LIVE."""
    spoof_threshold: Ratio | None = None
    """Liveness scores below are SPOOF."""
    false_live: Even | None = None
    """The share of attacks that may be called LIVE: a track is LIVE only once a sequential test
    over its looks allows that, beside the thresholds. Unset = the thresholds alone."""
    false_spoof: Even = 0.01
    """The share of living faces that the same test may call SPOOF."""


class Tracking(Section, frozen=True):
    reinference_interval_s: Seconds = 3.0
    """A track is recognised again after this media time even without a better shot."""
    max_gap_s: Seconds = 1.0
    """A track that is not seen for so long (media time) ends."""
    min_iou: Ratio = 0.2
    """Least overlap that links a face to a track by itself."""
    max_centre_distance: Annotated[float, msgspec.Meta(gt=0.0, le=10.0)] = 1.0
    """In box widths."""
    better_shot_margin: Ratio = 0.05
    """A new shot of a track is embedded only if it promises this much more OOD score."""
    identity_max_age_s: Annotated[float, msgspec.Meta(ge=0.0, le=3600.0)] = 0.0
    """What a look has said of a track is shown for so long (media time), then it is
    NOT_EVALUATED until the face is seen again. 0 = twice ``reinference_interval_s``."""


class Store(Section, frozen=True):
    url: str = ""
    """Where galleries, events and keys are kept. Empty = a SQLite file (``gallery.path``), for the
    servers of one machine; ``postgresql://user@host:5432/database`` (PostgreSQL 15 or newer,
    ``pip install 'facelane[postgres]'``) for those of several. A password stands better in
    ``~/.pgpass`` or $PGPASSWORD."""
    lease_s: Annotated[float, msgspec.Meta(ge=2.0, le=86_400.0)] = 300.0
    """How long a server goes on naming people from memory while it cannot reach a store on another
    machine, where somebody may be deleted meanwhile. After that it names nobody until the store is
    back. A deletion waits as long for a server whose machine was lost."""
    encryption: Literal["auto", "on", "off"] = "auto"
    """Whether vectors, names, labels and ids lie encrypted in the store. ``auto``: in new ones, and
    in PostgreSQL where ``master_key`` is set; ``on``: one that lies open is encrypted at the next
    start; ``off``: not. What is encrypted stays so."""
    master_key: str = ""
    """Where the key is that opens the store: ``file:PATH`` (mode 0600), ``credential:NAME``
    (systemd's, which a TPM can seal), ``env:NAME``, or ``command:PROGRAM ARGUMENTS`` that prints
    it; 64 hexadecimal digits (``openssl rand -hex 32``). Empty = ``master.key`` in the state
    folder, made by the first start: then whoever has the disk has the key, too."""


class Audit(Section, frozen=True):
    keep_days: Annotated[int, msgspec.Meta(ge=1, le=36_500)] = 400
    """How long entries of the audit log are kept; a signed stub takes their place."""
    max_entries: Annotated[int, msgspec.Meta(ge=1_000, le=100_000_000)] = 1_000_000
    """More than that, and the oldest go first."""
    checkpoint: str = ""
    """Where the log's signed head is kept beside the server's own log, so that a cut end is found:
    a file that lines are added to (better on another machine), or ``syslog``."""
    checkpoint_every_s: Seconds = 300.0
    """How often, where something has been added."""


class Gallery(Section, frozen=True):
    path: str = ""
    """SQLite file of the store, where ``store.url`` names no other; empty =
    ``<state dir>/gallery.db``."""
    max_templates: Annotated[int, msgspec.Meta(ge=1, le=limits.MAX_TEMPLATES)] = 100_000
    """Templates in all galleries together; more enrolments are refused with GALLERY_FULL."""
    keep_chips: bool = False
    """Keep what the recogniser saw of each enrolled face (38 kB a template), sealed with the
    subject's key where the store is encrypted: after a change of recogniser, here or with
    ``server reload``, everybody is enrolled again by itself. Pictures of people: off unless
    wanted."""


class Events(Section, frozen=True):
    keep: Annotated[int, msgspec.Meta(ge=1_000, le=100_000_000)] = 1_000_000
    """Events that the store keeps; the oldest are forgotten first."""
    keep_days: Annotated[float, msgspec.Meta(gt=0.0, le=3_650.0)] = 30.0
    """How long the store keeps an event. A resume token of before is HISTORY_LOST."""
    unknown_after_s: Annotated[float, msgspec.Meta(ge=0.0, le=3600.0)] = 1.0
    """UNKNOWN_SEEN is told of a trusted face that nobody knows after this media time."""
    hidden_after_s: Annotated[float, msgspec.Meta(ge=0.0, le=3600.0)] = 2.0
    """FACE_HIDDEN is told of a face that is not trusted after this media time."""
    pictures: Keeping = Keeping.NONE
    """Of which faces events keep a picture, sealed with the key of whom it names, or one of its
    own: of nobody (``none``), of those that nobody is named for (``unknown``), of ``all``; of
    SUBJECT_SEEN, UNKNOWN_SEEN and SPOOF_SUSPECTED. ``[galleries.NAME]`` and ``[sources.NAME]``
    may say otherwise. The store has to be encrypted."""
    pictures_keep: Annotated[int, msgspec.Meta(ge=1, le=10_000_000)] = 100_000
    """Pictures that the store keeps; the oldest are deleted first."""
    pictures_keep_days: Annotated[float, msgspec.Meta(gt=0.0, le=3_650.0)] = 7.0
    """How long the store keeps a picture."""


class Metrics(Section, frozen=True):
    listen: str = "127.0.0.1:9151"
    """HTTP: ``/metrics``, Prometheus text, and ``/health[/NAME]``, 200 or 503; empty = off."""


class Log(Section, frozen=True):
    level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severity that is logged."""
    format: Literal["auto", "json", "console"] = "auto"
    """``auto``: console on a terminal, else JSON lines."""


class Monitor(Section, frozen=True):
    interval_s: Seconds = 1.0
    """Between two looks at the devices."""
    memory_warning: Ratio = 0.90
    """Share of a device's memory above which an event warns."""
    memory_warning_clear: Ratio = 0.85
    """Share below which the warning ends."""


class Config(Section, frozen=True):
    server: Server = Server()
    tls: Tls = Tls()
    auth: Auth = Auth()
    limits: Limits = Limits()
    quotas: Quotas = Quotas()
    models: Models = Models()
    pools: Pools = Pools()
    identity: Identity = Identity()
    tracking: Tracking = Tracking()
    store: Store = Store()
    audit: Audit = Audit()
    gallery: Gallery = Gallery()
    view: View = View()
    sources: dict[str, Source] = {}
    """``[sources.NAME]``, or ``[sources."ward-*"]``: what holds for streams of one source."""
    galleries: dict[str, GalleryRules] = {}
    """``[galleries.NAME]``: what holds for the people of one gallery; see privacy.md."""
    events: Events = Events()
    metrics: Metrics = Metrics()
    log: Log = Log()
    monitor: Monitor = Monitor()
    tracing: Tracing = Tracing()
    zones: tuple[Zone, ...] = ()
    """`[[zones]]`: parts of cameras' pictures that events tell of; see zones.md."""
    lines: tuple[Line, ...] = ()
    """`[[lines]]`: lines across which faces are counted."""
    state_dir: str = ""
    """Where the gallery lives; empty = $STATE_DIRECTORY (systemd), else
    $XDG_STATE_HOME/facelane, else ~/.local/state/facelane."""
    runtime_dir: str = ""
    """Sockets; empty = $RUNTIME_DIRECTORY (systemd), else a fresh private folder."""

    @property
    def listen(self) -> str:
        """The address that the server listens on."""
        return self.server.listen or f"unix:{default_socket()}"

    @property
    def wants_keys(self) -> bool:
        """Whether clients need a key."""
        if self.auth.mode == "auto":
            known = self.listen.startswith("unix:") or (
                is_local(self.listen) and bool(self.tls.client_ca_file)
            )
            return bool(self.auth.keys_file) or not known
        return self.auth.mode == "keys"

    @property
    def lent_by_systemd(self) -> tuple[str, ...]:
        """Files that systemd lends to the running service (LoadCredential=), as far as this
        process cannot see them."""
        named = (
            self.auth.keys_file,
            self.tls.cert_file,
            self.tls.key_file,
            self.tls.client_ca_file,
        )
        return tuple(
            path for path in named if path.startswith(LENT) and not os.access(path, os.R_OK)
        )

    @property
    def keeps_pictures(self) -> bool:
        """Whether events of any stream keep pictures."""
        said: list[Keeping | None] = [self.events.pictures]
        said += [rules.pictures for rules in self.galleries.values()]
        said += [source.pictures for source in self.sources.values()]
        return any(one not in (None, Keeping.NONE) for one in said)

    @property
    def stages(self) -> dict[Stage, Pool]:
        """The pools in pipeline order; without stages that are switched off."""
        pools = {Stage(name): getattr(self.pools, name) for name in Pools.__struct_fields__}
        return {stage: pool for stage, pool in pools.items() if pool is not None}


_UNKNOWN = re.compile(r"Object contains unknown field `(?P<key>[^`]*)`(?: - at `\$?(?P<path>.*)`)?")


def _fields_at(path: str) -> tuple[str, ...]:
    """Names that are known at a msgspec path such as ``.pools.detector``."""
    kind: Any = Config
    for name in filter(None, re.sub(r"\[[^]]*\]", "", path).split(".")):
        hints = {f.name: f.type for f in msgspec.structs.fields(kind)}
        found = hints.get(name)
        if found is None:
            return ()
        for candidate in (found, *getattr(found, "__args__", ())):
            if isinstance(candidate, type) and issubclass(candidate, msgspec.Struct):
                kind = candidate
                break
        else:
            return ()
    return tuple(f.name for f in msgspec.structs.fields(kind))


def parse(text: str, *, source: str = "<config>") -> Config:
    """A config from TOML text. Raises ``ConfigError``."""
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{source}: not valid TOML: {error}") from None
    except RecursionError:
        raise ConfigError(f"{source}: not valid TOML: nested too deeply") from None
    except ValueError:
        raise ConfigError(f"{source}: not valid TOML: a number of too many digits") from None
    # TOML has no null: `[pools] liveness = false` switches a stage off.
    pools = raw.get("pools")
    if isinstance(pools, dict):
        for stage in Stage:
            if stage is not Stage.DETECTOR and pools.get(stage) is False:
                pools[stage] = None
    try:
        config = msgspec.convert(raw, Config)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{source}: {_explain(str(error))}") from None
    check(config, source=source)
    return config


def _explain(message: str) -> str:
    found = _UNKNOWN.match(message)
    if not found:
        return message.replace("`$", "`").replace("at `.", "at `")
    key, path = found["key"], found["path"] or ""
    where = f"[{path.strip('.')}]" if path.strip(".") else "the top level"
    known = _fields_at(path)
    return f"unknown key `{key}` in {where}; {hint(key, known, label='known keys', quote='`')}"


def load(path: Path | None) -> Config:
    """The config of a file, or the defaults without one. Raises ``ConfigError``."""
    if path is None:
        config = Config()
        check(config, source="defaults")
        return config
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not valid TOML: it is not UTF-8 text") from None
    return parse(text, source=str(path))


def check(config: Config, *, source: str) -> None:
    """Relations between values. Raises ``ConfigError``."""

    def fail(message: str) -> None:
        raise ConfigError(f"{source}: {message}")

    listen = config.listen
    if not listen.startswith("unix:") and not is_host_port(listen):
        fail(f"server.listen: `{listen}` is neither host:port nor unix:/path")
    if config.metrics.listen and not is_host_port(config.metrics.listen):
        fail(f"metrics.listen: `{config.metrics.listen}` is not host:port; empty switches it off")
    if bool(config.tls.cert_file) != bool(config.tls.key_file):
        fail("tls: cert_file and key_file go together")
    if config.tls.client_ca_file and not config.tls.cert_file:
        fail("tls.client_ca_file needs cert_file and key_file")
    if config.auth.mode == "keys" and not config.auth.keys_file:
        fail("auth.keys_file is missing; create one with `facelane-server keys new`")
    if config.wants_keys and not config.auth.keys_file:
        reach = "every user of this machine" if is_local(listen) else "other machines"
        fail(
            f"server.listen `{listen}` can be reached by {reach}, so clients need keys: set "
            "auth.keys_file (create one with `facelane-server keys new`), listen on a Unix "
            "socket, or switch authentication off knowingly with auth.mode = 'none'"
        )
    if config.server.socket_group and not listen.startswith("unix:"):
        fail("server.socket_group is for Unix sockets")
    if not is_local(listen):
        encrypted = bool(config.tls.cert_file) or config.auth.allow_plaintext
        if config.auth.mode != "none" and not encrypted:
            fail(
                f"keys would cross the network unencrypted to `{listen}`: set tls.cert_file "
                "and tls.key_file, or accept it knowingly with auth.allow_plaintext = true"
            )
    if config.monitor.memory_warning_clear > config.monitor.memory_warning:
        fail("monitor.memory_warning_clear must not exceed monitor.memory_warning")
    naming = {
        f"identity.{kind}": getattr(config.identity, kind) for kind in ("galleries", "sources")
    }
    for kind, table in {**naming, "galleries": config.galleries}.items():
        for key in table:
            if not is_name(key):
                fail(f"{kind}.{key}: the name must be 1-64 of letters, digits, and - _ .")
    if any(rules.confirm for rules in config.galleries.values()) and not config.wants_keys:
        fail("galleries.NAME.confirm wants keys, which say who confirms: set auth.keys_file")
    live, spoof = config.identity.live_threshold, config.identity.spoof_threshold
    if live is not None and spoof is not None and spoof > live:
        fail("identity.spoof_threshold must not exceed identity.live_threshold")
    for name, pool in config.stages.items():
        if not pool.devices:
            fail(f"pools.{name}.devices is empty")
        for device in pool.devices:
            if not re.fullmatch(r"auto|cpu|cuda:\d{1,2}", device):
                fail(f"pools.{name}.devices: `{device}` is none of auto, cpu, cuda:N")
        if pool.spares and pool.hosting.shares_process:
            fail(f"pools.{name}: spares need isolation = 'process', 'mps' or 'external'")
        if pool.hosting.needs_mps and "cpu" in pool.devices:
            fail(f"pools.{name}: isolation = 'mps' needs CUDA devices")
        if pool.backoff_initial_s > pool.backoff_max_s:
            fail(f"pools.{name}.backoff_initial_s must not exceed backoff_max_s")
    if found := areas.problem((*config.zones, *config.lines), placed=True):
        fail(found)
    if found := config.tracing.problem():
        fail(found)
    if config.store.url and not re.match(r"(postgresql://|sqlite:///)", config.store.url):
        fail("store.url begins with postgresql:// (or sqlite:///, before a path)")
    if config.store.url and config.gallery.path:
        fail("store.url and gallery.path name two places for one store; keep one of them")
    if config.limits.window * 2 > limits.MAX_POOL_QUEUE:
        fail("limits.window is too large")
