"""What the workers of a pool are told and asked, by the package that they are to load."""

from __future__ import annotations

from typing import Final

from facelane_server import config, limits
from facelane_server.domain import Encoding, Picture, Stage
from facelane_server.ipc.channel import ProtocolError
from facelane_server.ipc.messages import CropSpecMessage, Load, Ready
from facelane_server.models.api import AlignedCrop, ContextCrop, CropSpec
from facelane_server.models.package import Package
from facelane_server.pools.slots import Codec, SubjectResolver
from facelane_server.pools.tasks import DetectRequest, EmbedRequest, LivenessRequest, Request

_CANARY_SIDE: Final = 64


class Briefing:
    """``crops``: what a detector is to cut out; the packages of the other stages say what they
    take. ``resolve``: subjects of gallery snapshots, for recognisers."""

    def __init__(
        self,
        stage: Stage,
        settings: config.Pool,
        *,
        crops: tuple[CropSpec, ...],
        max_pixels: int,
        resolve: SubjectResolver | None,
    ) -> None:
        self._stage = stage
        self._settings = settings
        self._crops = crops
        self._max_pixels = max_pixels
        self._resolve = resolve

    def load(self, package: Package, worker_id: str, device: str) -> Load:
        settings = self._settings
        return Load(
            worker_id=worker_id,
            stage=self._stage,
            package=str(package.folder),
            device=device,
            batch_max=settings.batch_max,
            slots=limits.JOBS_PER_WORKER,
            request_slot_bytes=limits.REQUEST_SLOT_BYTES,
            response_slot_bytes=limits.RESPONSE_SLOT_BYTES,
            crops=tuple(_crop_message(spec) for spec in self._crops),
            precision=settings.precision,
            graphs=settings.graphs,
            threads=settings.threads,
            stream_priority=settings.stream_priority,
            memory_mib=settings.memory_mib,
            max_side=settings.max_side,
            max_pixels=self._max_pixels,
            decode=settings.decode,
            options=dict(settings.options),
            job_timeout_ms=settings.job_timeout_ms,
        )

    def check(self, package: Package, facts: Ready) -> None:
        """Raises ProtocolError when a worker loaded something else than it was told."""
        if facts.embedding_dim != package.embedding_dim:
            raise ProtocolError("the model is not what its package says")
        if not 1 <= facts.batch_max <= (self._settings.batch_max or limits.MAX_BATCH):
            raise ProtocolError("it takes other batches than it was told")
        if self._settings.sandbox == "required" and not facts.sandbox.startswith("landlock"):
            raise ProtocolError(f"sandbox = 'required', but its sandbox is: {facts.sandbox}")

    def codec(self, package: Package) -> Codec:
        return Codec(
            self._stage,
            [spec.size for spec in self._crops_of(package)],
            embedding_dim=package.embedding_dim,
            resolve=self._resolve,
        )

    def canary(self, package: Package) -> Request:
        """An even grey picture: cheap, and every model has an answer to it."""
        if self._stage is Stage.DETECTOR:
            data = b"\x60" * (_CANARY_SIDE * _CANARY_SIDE * 3)
            picture = Picture(Encoding.BGR24, data, _CANARY_SIDE, _CANARY_SIDE, _CANARY_SIDE * 3)
            return DetectRequest(picture, max_faces=1, max_pixels=limits.MAX_PIXELS)
        grey = tuple(b"\x60" * (spec.size * spec.size * 3) for spec in package.crops)
        if self._stage is Stage.RECOGNIZER:
            return EmbedRequest(grey[0])
        return LivenessRequest(grey)

    def _crops_of(self, package: Package) -> tuple[CropSpec, ...]:
        return self._crops if self._stage is Stage.DETECTOR else package.crops


def _crop_message(spec: CropSpec) -> CropSpecMessage:
    if isinstance(spec, AlignedCrop):
        return CropSpecMessage(spec.size)
    assert isinstance(spec, ContextCrop)
    return CropSpecMessage(spec.size, spec.scale)
