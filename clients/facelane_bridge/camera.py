"""One camera's life as a pure state machine: no clock, no socket, no thread.

The runner (``bridge.py``) feeds it events that carry the time, and carries out the
actions that it returns. Everything that decides *when* to give up, wait and try again
is here, so that it can be tested with made-up clocks.

::

                 Opened+frame                media clock stands still
    CONNECTING ───────────────▶ STREAMING ──────────────────────────▶ STALLED
      ▲   │  ▲                   │     ▲                              │   │
      │   │  └── (first frame)   │     └──────── it moves again ──────┘   │
      │   │ failed, too slow     │ failed                 stalled too long │
      │   ▼                      ▼                                         │
      └─ BACKOFF ◀───────────────┴─────────────────────────────────────────┘
         delay over
    any of them ── Stop, end of a finite source ──▶ STOPPED
    any of them ── failure for good, attempts spent ──▶ FAILED

A stall is judged by the **media clock**: a camera that keeps sending the same frozen
timestamp is as dead as one that sends nothing, although its socket is busy. How long it may
stand still follows the camera's own pace: one that gives a frame every ten seconds is slow,
not stalled.

Whether a failure is for good is decided from what the camera did before (``Outlook``): what
has given pictures in this run will give them again, whatever it answers while it starts.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, replace


class CameraState(enum.StrEnum):
    """Where a camera is in its life."""

    CONNECTING = "CONNECTING"
    """The source is being opened, or is open and has not given its first frame."""
    STREAMING = "STREAMING"
    """Frames arrive and the media clock advances."""
    STALLED = "STALLED"
    """The source is open, but the media clock has stood still for ``stall_after``."""
    BACKOFF = "BACKOFF"
    """The source is closed; it is opened again when the delay is over."""
    STOPPED = "STOPPED"
    """It was told to stop, or its source came to its end. Terminal."""
    FAILED = "FAILED"
    """Trying again cannot help, or the attempts are spent. Terminal."""

    @property
    def is_terminal(self) -> bool:
        return self in TERMINAL


class Outlook(enum.Enum):
    """What a failure says about the next try."""

    PASSING = "passing"
    """It may be gone with the next try."""
    SELDOM = "seldom"
    """The same, but the camera may count our tries: they are minutes apart."""
    UNPROVEN = "unproven"
    """For good, unless the camera has given pictures in this run; then it is passing."""
    REFUSED = "refused"
    """A password was sent and refused. As ``UNPROVEN``, and tried seldom."""
    HOPELESS = "hopeless"
    """A configuration that cannot work, whatever the camera does."""

    @property
    def is_seldom(self) -> bool:
        return self in (Outlook.SELDOM, Outlook.REFUSED)

    def is_final(self, *, proven: bool) -> bool:
        """Whether it is for good. ``proven``: the camera has given pictures in this run."""
        unproven = self in (Outlook.UNPROVEN, Outlook.REFUSED)
        return self is Outlook.HOPELESS or (unproven and not proven)


TERMINAL = frozenset({CameraState.STOPPED, CameraState.FAILED})
OPEN = frozenset({CameraState.CONNECTING, CameraState.STREAMING, CameraState.STALLED})
"""States in which a source exists and its reader's events are listened to."""

TRANSITIONS: Mapping[CameraState, frozenset[CameraState]] = {
    CameraState.CONNECTING: frozenset(
        {CameraState.STREAMING, CameraState.BACKOFF, CameraState.STOPPED, CameraState.FAILED}
    ),
    CameraState.STREAMING: frozenset(
        {CameraState.STALLED, CameraState.BACKOFF, CameraState.STOPPED, CameraState.FAILED}
    ),
    CameraState.STALLED: frozenset(
        {CameraState.STREAMING, CameraState.BACKOFF, CameraState.STOPPED, CameraState.FAILED}
    ),
    CameraState.BACKOFF: frozenset(
        {CameraState.CONNECTING, CameraState.STOPPED, CameraState.FAILED}
    ),
    CameraState.STOPPED: frozenset(),
    CameraState.FAILED: frozenset(),
}
"""The only changes of state there are. ``step`` refuses to make any other."""


OPENING_STRETCH = 2.5
"""Of the opening time, for a source that is connected: slow cameras, far-off key frames."""
EARLY_FRAMES = 4
"""From so many on it is known how far a camera's frames are apart."""
GAP_STRETCH = 2.5
"""Of the longest recent gap between two frames: a longer one is a stall."""
GAP_DECAY = 0.9
"""How fast a long gap is forgotten, a frame."""
MAX_GAP_PATIENCE = 10.0
"""Times ``stall_after``, at most."""


@dataclass(frozen=True, slots=True)
class Policy:
    """How patient a camera is. Durations in seconds."""

    open_timeout: float = 10.0
    """From the start of opening to the first frame; ``OPENING_STRETCH`` times as long while
    the source is connected and something comes of it."""
    stall_after: float = 5.0
    """The media clock may stand still this long before the camera is called stalled; longer
    where the camera's own frames are further apart."""
    stall_limit: float = 15.0
    """A camera stalled this long is closed and opened again."""
    backoff_initial: float = 0.5
    backoff_max: float = 10.0
    refused_backoff: float = 120.0
    """After a password was refused for the second time in a row; doubled with each refusal,
    up to five times this."""
    healthy_after: float = 10.0
    """Streaming this long forgets the failed attempts before it."""
    max_attempts: int = 0
    """Failed attempts in a row before FAILED; 0 = try for ever."""

    def __post_init__(self) -> None:
        for name in (
            "open_timeout",
            "stall_after",
            "stall_limit",
            "backoff_initial",
            "refused_backoff",
        ):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be greater than 0")
        if self.backoff_max < self.backoff_initial:
            raise ValueError("backoff_max must not be less than backoff_initial")


# --- events ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class FrameArrived:
    """The reader gave a frame. ``media_time`` is seconds on the source's own clock."""

    now: float
    media_time: float


@dataclass(frozen=True, slots=True)
class SourceFailed:
    """Opening or reading failed."""

    now: float
    reason: str
    message: str
    outlook: Outlook = Outlook.PASSING


@dataclass(frozen=True, slots=True)
class SourceEnded:
    """A finite source (a file, a folder) gave its last frame."""

    now: float


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passed. To be sent at the latest when ``deadline`` says."""

    now: float
    connected: bool = False
    """The source is connected: whoever answers deserves patience."""
    seen: str = ""
    """What came of it that was no frame, in words."""


@dataclass(frozen=True, slots=True)
class Stop:
    """The operator wants an end."""

    now: float


@dataclass(frozen=True, slots=True)
class HeldBack:
    """The reader waits for *us*: no frame can come, and that is not the camera's fault."""

    now: float


Event = FrameArrived | HeldBack | SourceFailed | SourceEnded | Tick | Stop


class Action(enum.Enum):
    """What the runner has to do after a step, in this order."""

    CLOSE = "close"
    """Close the source and forget its reader, even if that one hangs."""
    OPEN = "open"
    """Start a new reader."""


@dataclass(frozen=True, slots=True)
class Camera:
    """The state and the little that it remembers. Times are on the runner's monotonic clock."""

    state: CameraState
    since: float
    """When ``state`` was entered."""
    attempts: int = 0
    """Failures in a row."""
    openings: int = 0
    """How often the source was opened in all."""
    media_time: float | None = None
    """The newest media time of this opening."""
    progress_at: float = 0.0
    """When the media clock last advanced."""
    streaming_since: float | None = None
    stretched: bool = False
    """This opening was given more time."""
    frames: int = 0
    """In this run, whether the clock moved or not. Greater than 0: it has worked."""
    gap: float = 0.0
    """Seconds between two frames: the longest of late."""
    refusals: int = 0
    """Of a password, since the last frame."""
    retry_at: float | None = None
    reason: str = ""
    message: str = ""

    @property
    def is_terminal(self) -> bool:
        return self.state.is_terminal


def start(now: float) -> tuple[Camera, tuple[Action, ...]]:
    """A new camera; its first action is to open the source."""
    return Camera(CameraState.CONNECTING, now, openings=1, progress_at=now), (Action.OPEN,)


def backoff_delay(attempts: int, policy: Policy, jitter: float) -> float:
    """Seconds to wait after ``attempts`` failures in a row (1 = the first).

    Exponential with equal jitter: between half of the step and the whole of it, so
    that a hundred cameras behind one rebooted switch do not come back in one instant,
    and none of them hammers it at once. ``jitter`` is uniform in [0, 1).
    """
    # 2 ** 40 half-seconds is far above any backoff_max: the exponent needs a bound,
    # or a camera that is off for a week overflows the float.
    return _jittered(policy.backoff_initial, attempts, policy.backoff_max, jitter)


def _jittered(initial: float, attempts: int, most: float, jitter: float) -> float:
    return min(most, initial * 2.0 ** min(attempts - 1, 40)) * (0.5 + 0.5 * jitter)


def patience(camera: Camera, policy: Policy) -> float:
    """How long the media clock may stand still, seconds."""
    if 0 < camera.frames < EARLY_FRAMES:
        # How far its frames are apart is not known yet: the first ones may come in a heap.
        return max(policy.stall_after, 1.2 * policy.open_timeout)
    slow = min(GAP_STRETCH * camera.gap, MAX_GAP_PATIENCE * policy.stall_after)
    return max(policy.stall_after, slow)


def deadline(camera: Camera, policy: Policy) -> float | None:
    """The time by which a ``Tick`` is due, or ``None`` in a terminal state."""
    match camera.state:
        case CameraState.CONNECTING:
            return camera.since + policy.open_timeout * (
                OPENING_STRETCH if camera.stretched else 1.0
            )
        case CameraState.STREAMING:
            return camera.progress_at + patience(camera, policy)
        case CameraState.STALLED:
            return camera.since + policy.stall_limit
        case CameraState.BACKOFF:
            return camera.retry_at
        case _:
            return None


def step(
    camera: Camera, event: Event, policy: Policy, jitter: float
) -> tuple[Camera, tuple[Action, ...]]:
    """The camera after ``event``, and what is to be done about it.

    ``jitter`` in [0, 1) comes from outside, so that this stays a function. Events that
    do not concern the state (a late frame of a reader that was given up) change nothing.
    """
    after, actions = _step(camera, event, policy, jitter)
    if after.state is not camera.state and after.state not in TRANSITIONS[camera.state]:
        raise AssertionError(f"no transition from {camera.state} to {after.state}")
    return after, actions


def _step(
    camera: Camera, event: Event, policy: Policy, jitter: float
) -> tuple[Camera, tuple[Action, ...]]:
    if camera.is_terminal:
        return camera, ()
    is_open = camera.state in OPEN
    closing = (Action.CLOSE,) if is_open else ()
    match event:
        case Stop(now):
            return _enter(camera, CameraState.STOPPED, now, reason="STOPPED"), closing
        case SourceEnded(now) if is_open:
            return _enter(camera, CameraState.STOPPED, now, reason="ENDED"), closing
        case SourceFailed() if is_open:
            return _fail(camera, event, policy, jitter)
        case FrameArrived(now, media_time) if is_open:
            return _frame(camera, now, media_time, policy), ()
        case HeldBack(now) if is_open and camera.media_time is not None:
            return replace(camera, progress_at=max(camera.progress_at, now)), ()
        case Tick():
            return _tick(camera, event, policy, jitter)
        case _:
            return camera, ()


def _enter(camera: Camera, state: CameraState, now: float, *, reason: str = "") -> Camera:
    return replace(camera, state=state, since=now, reason=reason, message="", retry_at=None)


def _frame(camera: Camera, now: float, media_time: float, policy: Policy) -> Camera:
    camera = replace(camera, frames=camera.frames + 1, refusals=0)
    if camera.media_time is not None:
        if media_time <= camera.media_time:
            return camera  # a frozen clock is no sign of life
        gap = max(now - camera.progress_at, GAP_DECAY * camera.gap)
        camera = replace(camera, gap=gap)
    camera = replace(camera, media_time=media_time, progress_at=now)
    if camera.state is not CameraState.STREAMING:
        camera = replace(
            _enter(camera, CameraState.STREAMING, now), streaming_since=now, media_time=media_time
        )
    streaming_since = camera.streaming_since
    if (
        camera.attempts
        and streaming_since is not None
        and now - streaming_since >= policy.healthy_after
    ):
        # Only a camera that stays up is forgiven: one that opens, gives one frame and
        # falls over again keeps climbing the ladder.
        camera = replace(camera, attempts=0)
    return camera


def _tick(
    camera: Camera, tick: Tick, policy: Policy, jitter: float
) -> tuple[Camera, tuple[Action, ...]]:
    now, due = tick.now, deadline(camera, policy)
    if due is None or now < due:
        return camera, ()
    match camera.state:
        case CameraState.CONNECTING:
            if tick.connected and not camera.stretched:
                return replace(camera, stretched=True), ()
            message = "no frame came within the opening time; " + (
                tick.seen or "is the camera on and reachable?"
            )
            return _fail(camera, SourceFailed(now, "OPEN_TIMEOUT", message), policy, jitter)
        case CameraState.STREAMING:
            return _enter(camera, CameraState.STALLED, now, reason="MEDIA_CLOCK_STOOD_STILL"), ()
        case CameraState.STALLED:
            message = "the media clock stood still for too long; the source is opened again"
            return _fail(camera, SourceFailed(now, "STALLED", message), policy, jitter)
        case _:
            camera = replace(
                _enter(camera, CameraState.CONNECTING, now),
                openings=camera.openings + 1,
                media_time=None,
                progress_at=now,
                streaming_since=None,
                stretched=False,
            )
            return camera, (Action.OPEN,)


def _fail(
    camera: Camera, failed: SourceFailed, policy: Policy, jitter: float
) -> tuple[Camera, tuple[Action, ...]]:
    now, outlook = failed.now, failed.outlook
    took = now - camera.since if camera.state is CameraState.CONNECTING else 0.0
    attempts = camera.attempts + 1
    spent = policy.max_attempts > 0 and attempts >= policy.max_attempts
    final = spent or outlook.is_final(proven=camera.frames > 0)
    state = CameraState.FAILED if final else CameraState.BACKOFF
    camera = replace(
        _enter(camera, state, now, reason=failed.reason),
        message=failed.message,
        attempts=attempts,
        refusals=camera.refusals + outlook.is_seldom,
    )
    if state is CameraState.BACKOFF:
        delay = _delay(camera, outlook, now, policy, jitter)
        if not outlook.is_seldom:
            # From the beginning of the attempt: one that hung has left the camera alone for long.
            delay = max(delay - took, min(delay, policy.backoff_initial * (0.5 + 0.5 * jitter)))
        camera = replace(camera, retry_at=now + delay)
    return camera, (Action.CLOSE,)


def _delay(camera: Camera, outlook: Outlook, now: float, policy: Policy, jitter: float) -> float:
    if outlook.is_seldom and camera.refusals > 1:
        # One wrong password more locks no account, and a camera that starts may have erred.
        slow = policy.refused_backoff
        return _jittered(slow, camera.refusals - 1, 5 * slow, jitter)
    delay = backoff_delay(camera.attempts, policy, jitter)
    streamed = 0.0 if camera.streaming_since is None else now - camera.streaming_since
    if streamed >= 1.0:
        # Cameras that end every connection after a while are not left for longer than that.
        delay = min(delay, max(policy.backoff_initial, streamed))
    return delay
