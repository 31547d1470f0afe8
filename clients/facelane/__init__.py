"""facelane: faces in camera streams, with an identity, an OOD score and a liveness verdict.

>>> import facelane
>>> client = facelane.Client("127.0.0.1:50151")
>>> result = client.analyze_image(facelane.Picture.from_file("people.jpg"))
>>> for face in result.faces:
...     print(face.identity.decision, face.liveness.verdict)
MATCH LIVE

``Client`` blocks; ``facelane.aio.Client`` is the same for asyncio. Importing this package
imports neither torch nor numpy nor OpenCV.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from facelane import aio
from facelane.client import AnalyzeStream, Client, EventStream
from facelane.errors import (
    AlreadyExistsError,
    ArgumentError,
    AuthenticationError,
    CancelledError,
    ConflictError,
    ConnectionLostError,
    DeadlineExceededError,
    EnrollmentRefusedError,
    FacelaneError,
    HistoryLostError,
    NotFoundError,
    OverloadedError,
    PermissionDeniedError,
    PictureError,
    ProtocolError,
    Reason,
    RefusedError,
    ServerError,
    StreamClosedError,
    UnavailableError,
)
from facelane.transport import InsecureTokenWarning, Tls
from facelane.types import (
    AnalysisOptions,
    BoundingBox,
    Candidate,
    Decision,
    DropReason,
    Encoding,
    Enrollment,
    Event,
    EventKind,
    Face,
    Frame,
    FrameDrop,
    FrameError,
    FrameResult,
    HealthStatus,
    Identity,
    Liveness,
    LivenessVerdict,
    ModelInfo,
    ModelReloaded,
    Outcome,
    Overload,
    Picture,
    Point,
    PoolInfo,
    PoolState,
    Reconnect,
    ServerInfo,
    ServerLimits,
    Stage,
    StageTiming,
    StreamConfigOptions,
    StreamLimits,
    StreamOpened,
    StreamOptions,
    StreamSummary,
    StreamUpdate,
    StreamUpdateKind,
    Subject,
    Template,
    Verification,
    WorkerInfo,
    WorkerRestarted,
    WorkerState,
)

try:
    __version__ = version("facelane")
except PackageNotFoundError:
    # Run from a source tree that was never installed.
    __version__ = "0+unknown"

__all__ = [
    "AlreadyExistsError",
    "AnalysisOptions",
    "AnalyzeStream",
    "ArgumentError",
    "AuthenticationError",
    "BoundingBox",
    "CancelledError",
    "Candidate",
    "Client",
    "ConflictError",
    "ConnectionLostError",
    "DeadlineExceededError",
    "Decision",
    "DropReason",
    "Encoding",
    "Enrollment",
    "EnrollmentRefusedError",
    "Event",
    "EventKind",
    "EventStream",
    "Face",
    "FacelaneError",
    "Frame",
    "FrameDrop",
    "FrameError",
    "FrameResult",
    "HealthStatus",
    "HistoryLostError",
    "Identity",
    "InsecureTokenWarning",
    "Liveness",
    "LivenessVerdict",
    "ModelInfo",
    "ModelReloaded",
    "NotFoundError",
    "Outcome",
    "Overload",
    "OverloadedError",
    "PermissionDeniedError",
    "Picture",
    "PictureError",
    "Point",
    "PoolInfo",
    "PoolState",
    "ProtocolError",
    "Reason",
    "Reconnect",
    "RefusedError",
    "ServerError",
    "ServerInfo",
    "ServerLimits",
    "Stage",
    "StageTiming",
    "StreamClosedError",
    "StreamConfigOptions",
    "StreamLimits",
    "StreamOpened",
    "StreamOptions",
    "StreamSummary",
    "StreamUpdate",
    "StreamUpdateKind",
    "Subject",
    "Template",
    "Tls",
    "UnavailableError",
    "Verification",
    "WorkerInfo",
    "WorkerRestarted",
    "WorkerState",
    "__version__",
    "aio",
]
