"""More cameras than a server can serve in time: each is thinned alike and told so, none goes
without an outcome, and one more is refused."""

from __future__ import annotations

import threading
from collections.abc import Iterable

import pytest
from tests.e2e import wire
from tests.e2e.conftest import Start
from tests.waiting import WAIT_S, until

import facelane

CAMERAS = 6
SLOW = "batch_max = 1\noptions = {{ 'fail.slow_ms' = '{ms}' }}"
"""A picture takes a worker so long."""


class Camera(threading.Thread):
    """Sends twenty frames a second until it is told to end."""

    def __init__(self, client: facelane.Client, number: int, together: threading.Barrier) -> None:
        """``together``: none sends before the streams of all are open. Who came later would be
        refused, as the test's last one is."""
        super().__init__(name=f"camera {number}", daemon=True)
        self._together = together
        self.rates: list[float] = []
        self.outcomes = self.thinned = 0
        self.sent = 0
        self.over = threading.Event()
        self._client = client
        self.summary: facelane.StreamSummary | None = None

    def run(self) -> None:
        picture = wire.picture()
        with self._client.analyze_stream(disable_tracking=True, on_update=self._told) as stream:
            reader = threading.Thread(target=self._read, args=(stream,), daemon=True)
            reader.start()
            self._together.wait(WAIT_S)
            while not self.over.wait(0.05):
                stream.send(picture)
                self.sent += 1
            stream.close_send()
            reader.join()
        self.summary = stream.summary

    def _read(self, stream: Iterable[facelane.Outcome]) -> None:
        for outcome in stream:
            self.outcomes += 1
            self.thinned += outcome.drop is not None and outcome.drop.reason == "THINNED"

    def _told(self, update: facelane.StreamUpdate) -> None:
        if update.kind is facelane.StreamUpdateKind.RATE:
            self.rates.append(update.rate_fps)


@pytest.mark.slow
def test_every_camera_is_thinned_told_and_answered_and_one_more_is_refused(start: Start) -> None:
    server = start(
        wire.pools(detector=SLOW.format(ms=5), recognizer=SLOW.format(ms=40)),
        "[limits]\nage_target_ms = 100\nmin_fps = 4.0",
    )
    with server.client() as client:
        together = threading.Barrier(CAMERAS)
        cameras = [Camera(client, number, together) for number in range(CAMERAS)]
        for camera in cameras:
            camera.start()
        until(lambda: all(any(camera.rates) for camera in cameras), what="all are told a rate")

        def overloaded() -> bool:
            """All of it told at once: each figure changes from one reading to the next."""
            load = client.server_info().load
            return load is not None and (
                load.thinned_streams == CAMERAS and load.load > 1.0 and load.headroom_streams == 0
            )

        until(overloaded, what="all are thinned, and it is told")

        def refused() -> facelane.FacelaneError | None:
            try:
                with client.analyze_stream() as stream:
                    stream.close_send()
                    for _ in stream:
                        pass
            except facelane.FacelaneError as error:
                return error
            return None

        error = until(refused, what="a stream is refused")
        assert error.reason == "CAPACITY"
        assert error.retryable
        assert error.metadata["open"] == str(CAMERAS)
        # Of this very answer: at min_fps there is no room for one stream more than are open.
        assert error.metadata["min_fps"] == "4"
        assert 0 <= int(error.metadata["fits"]) <= CAMERAS
        until(lambda: all(camera.thinned for camera in cameras), what="each gives a part")
        for camera in cameras:
            camera.over.set()
        for camera in cameras:
            camera.join(WAIT_S)
            assert not camera.is_alive()
            assert camera.outcomes == camera.sent
            summary = camera.summary
            assert summary is not None
            assert summary.drops_by_reason["THINNED"] == camera.thinned
            assert summary.received == summary.results + summary.drops + summary.errors
