"""grpc.health.v1, derived from what the pools can do now.

======================================  =================================================
service name                            SERVING when
======================================  =================================================
``""``                                  every configured pool can infer
``facelane.v1.AnalysisService``         the detector pool can infer (other stages degrade
                                        in-band)
``facelane.v1.GalleryService``          the detector and the recogniser pool can infer, and
                                        the gallery can keep changes: its file is where it
                                        was, its disk has room
``facelane.v1.EventService``            a place is left among those who watch
``facelane.pool.<stage>``               that pool can infer
``facelane.process``                    always, while the process answers (liveness probe)
======================================  =================================================

Draining makes all but ``facelane.process`` NOT_SERVING.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, Final

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from facelane.v1 import (
    admin_service_pb2,
    analysis_service_pb2,
    event_service_pb2,
    gallery_service_pb2,
    server_service_pb2,
    view_service_pb2,
)
from facelane_server.domain import Stage
from facelane_server.edge.errors import Context

SERVICES: Final = tuple(
    module.DESCRIPTOR.services_by_name[name].full_name
    for module, name in (
        (analysis_service_pb2, "AnalysisService"),
        (gallery_service_pb2, "GalleryService"),
        (event_service_pb2, "EventService"),
        (view_service_pb2, "ViewService"),
        (server_service_pb2, "ServerService"),
        (admin_service_pb2, "AdminService"),
    )
)
PROCESS: Final = "facelane.process"

SERVING: Final = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING: Final = health_pb2.HealthCheckResponse.NOT_SERVING
_UNKNOWN: Final = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


def pool_service(stage: Stage) -> str:
    return f"facelane.pool.{stage.value}"


def derive(
    can_infer: Mapping[Stage, bool],
    *,
    draining: bool,
    keeps_changes: bool = True,
    takes_watchers: bool = True,
) -> dict[str, bool]:
    """Which services serve, given which of the configured pools can infer, whether the gallery
    keeps what is changed, and whether a place is left for those who watch events. Pure."""
    detector = can_infer.get(Stage.DETECTOR, False)
    recognizer = can_infer.get(Stage.RECOGNIZER, False)
    serving = {
        "": all(can_infer.values()) and detector,
        "facelane.v1.AnalysisService": detector,
        "facelane.v1.GalleryService": detector and recognizer and keeps_changes,
        "facelane.v1.EventService": takes_watchers,
        "facelane.v1.ViewService": True,
        "facelane.v1.ServerService": True,
        "facelane.v1.AdminService": True,
        **{pool_service(stage): able for stage, able in can_infer.items()},
    }
    if draining:
        serving = dict.fromkeys(serving, False)
    serving[PROCESS] = True
    return serving


class Statuses(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """``grpc.health.v1``, as it is told. The library's own writes to each who watches while it
    holds what all others wait for, and whoever tells of a change: one that reads nothing would keep
    the truth from everybody."""

    def __init__(self) -> None:
        self._serving = {"": False}
        self._changed = asyncio.Event()

    def tell(self, serving: Mapping[str, bool]) -> None:
        """From now on these names serve, or do not; never waits."""
        self._serving = dict(serving)
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def _of(self, name: str) -> health_pb2.HealthCheckResponse.ServingStatus:
        able = self._serving.get(name)
        return _UNKNOWN if able is None else SERVING if able else NOT_SERVING

    async def Check(
        self, request: health_pb2.HealthCheckRequest, context: Context
    ) -> health_pb2.HealthCheckResponse:
        status = self._of(request.service)
        if status == _UNKNOWN:
            await context.abort(grpc.StatusCode.NOT_FOUND, "health knows no such name")
        return health_pb2.HealthCheckResponse(status=status)

    async def List(self, request: Any, context: Context) -> Any:
        return health_pb2.HealthListResponse(
            statuses={
                name: health_pb2.HealthCheckResponse(status=self._of(name))
                for name in self._serving
            }
        )

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Context) -> None:
        told = None
        while True:
            changed = self._changed  # of what is read next: nothing is missed while it is written
            status = self._of(request.service)
            if status != told:
                await context.write(health_pb2.HealthCheckResponse(status=status))
                told = status
            await changed.wait()


class Health:
    """Publishes ``derive``'s answer; only changes are sent to watchers."""

    def __init__(self) -> None:
        self.servicer = Statuses()
        self._published: dict[str, bool] = {}
        self.own: dict[str, bool] = {}
        """Of this process alone."""
        self.shared: Callable[[], None] | None = None
        """Where there are several, whoever sees to it that ``overall`` is called; told of each
        change of ``own``."""
        self.keeps_changes = True
        """Of the gallery; told with the next ``publish``."""
        self.takes_watchers = True

    @property
    def serving(self) -> bool:
        """Whether the server as a whole serves."""
        return self._published.get("", False)

    def find(self, service: str) -> bool | None:
        """Whether the service serves; None for a name that there is not (yet)."""
        return self._published.get(service)

    def publish(self, can_infer: Mapping[Stage, bool], *, draining: bool) -> list[str]:
        """Returns the names whose status changed."""
        wanted = derive(
            can_infer,
            draining=draining,
            keeps_changes=self.keeps_changes,
            takes_watchers=self.takes_watchers,
        )
        changed = [n for n, able in wanted.items() if self.own.get(n) is not able]
        self.own = wanted
        if self.shared is None:
            self.overall(wanted)
        else:
            self.shared()
        return changed

    def overall(self, wanted: dict[str, bool]) -> None:
        """Tells this of the server as a whole."""
        if wanted != self._published:
            self._published = wanted
            self.servicer.tell(wanted)
