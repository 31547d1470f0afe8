"""What the workers of a pool are told and asked, by the package that they are to load."""

from __future__ import annotations

import re
from typing import Final

from facelane_server import config, limits
from facelane_server.domain import Encoding, Picture, Stage
from facelane_server.ipc.channel import ProtocolError
from facelane_server.ipc.messages import CropSpecMessage, Load, Ready
from facelane_server.models import canary
from facelane_server.models.api import AlignedCrop, ContextCrop, CropSpec
from facelane_server.models.package import Package
from facelane_server.pools.slots import Codec, SubjectResolver
from facelane_server.pools.tasks import DetectRequest, EmbedRequest, LivenessRequest, Request

_WHOLE: Final = re.compile(r"landlock [1-9]\d*, seccomp(, user [^,]+)?")
"""What ``worker.sandbox.Confinement`` says of itself when nothing is left out."""


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
            slots=(
                limits.JOBS_PER_DECODER
                if self._stage is Stage.DETECTOR and settings.decode == "cuda"
                else limits.JOBS_PER_WORKER
            ),
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
            canary_side=self._canary_side(package),
        )

    def check(self, package: Package, facts: Ready) -> None:
        """Raises ProtocolError when a worker loaded something else than it was told."""
        if facts.model_id != package.model_id or facts.embedding_dim != package.embedding_dim:
            raise ProtocolError(
                f"it has loaded {facts.model_id} instead of {package.model_id}: where the package "
                "was replaced, reload the model"
            )
        if not 1 <= facts.batch_max <= (self._settings.batch_max or limits.MAX_BATCH):
            raise ProtocolError("it takes other batches than it was told")
        if self._settings.sandbox == "required" and not _WHOLE.fullmatch(facts.sandbox):
            raise ProtocolError(f"sandbox = 'required', but its sandbox is: {facts.sandbox}")

    def codec(self, package: Package) -> Codec:
        return Codec(
            self._stage,
            [spec.size for spec in self._crops_of(package)],
            embedding_dim=package.embedding_dim,
            resolve=self._resolve,
        )

    def canaries(self, package: Package) -> list[Request]:
        """Cheap, and every model has an answer to them."""
        if self._stage is Stage.DETECTOR:
            return [
                DetectRequest(
                    Picture(
                        Encoding.BGR24,
                        picture.tobytes(),
                        picture.shape[1],
                        picture.shape[0],
                        picture.shape[1] * 3,
                    ),
                    max_faces=canary.MOST_FACES,
                    max_pixels=limits.MAX_PIXELS,
                )
                for picture in canary.pictures(self._canary_side(package))
            ]
        crops = tuple(canary.face(spec.size).tobytes() for spec in package.crops)
        if self._stage is Stage.RECOGNIZER:
            return [EmbedRequest(crops[0], want_vector=True)]
        return [LivenessRequest(crops)]

    def _canary_side(self, package: Package) -> int:
        return self._settings.max_side or package.manifest.input.max_side

    def _crops_of(self, package: Package) -> tuple[CropSpec, ...]:
        return self._crops if self._stage is Stage.DETECTOR else package.crops


def _crop_message(spec: CropSpec) -> CropSpecMessage:
    if isinstance(spec, AlignedCrop):
        return CropSpecMessage(spec.size)
    assert isinstance(spec, ContextCrop)
    return CropSpecMessage(spec.size, spec.scale)
