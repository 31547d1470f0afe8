"""The composition root, as far as it can be seen without processes."""

from __future__ import annotations

import itertools
import os
import socket
import tempfile
from pathlib import Path

import pytest
from tests.fakes.scripted_pool import ScriptedPools

from facelane_server import app, config, folders, tracking
from facelane_server.config import ConfigError
from facelane_server.domain import FacelaneError, Reason, Stage
from facelane_server.edge import address, health
from facelane_server.edge.streams import StreamRegistry
from facelane_server.lanes import Lane, LaneOptions, StageChanged
from facelane_server.served import ServedModels

NULL = {stage.value: f"null-{stage.value}" for stage in Stage}


def settings(**extra: str) -> config.Config:
    lines = [f'[pools.{stage}]\nmodel = "{model}"' for stage, model in NULL.items()]
    return config.parse("\n".join([*lines, *extra.values()]))


# -- health -----------------------------------------------------------------------------------


@pytest.mark.parametrize("draining", [False, True])
@pytest.mark.parametrize("able", list(itertools.product([False, True], repeat=3)))
def test_health_is_what_the_pools_can_do(able: tuple[bool, ...], draining: bool) -> None:
    detector, recognizer, liveness = able
    told = health.derive(dict(zip(Stage, able, strict=True)), draining=draining)
    assert told[health.PROCESS], "the process answers"
    alive = not draining
    assert told[""] == (alive and all(able))
    assert told["facelane.v1.AnalysisService"] == (alive and detector)
    assert told["facelane.v1.GalleryService"] == (alive and detector and recognizer)
    assert told["facelane.pool.liveness"] == (alive and liveness)
    for service in health.SERVICES:
        assert service in told


def test_health_tells_what_the_store_and_the_places_can_do() -> None:
    able = dict.fromkeys(Stage, True)
    told = health.derive(able, draining=False, keeps_changes=False, takes_watchers=False)
    assert told["facelane.v1.AnalysisService"]
    assert not told["facelane.v1.GalleryService"]
    assert not told["facelane.v1.EventService"]


def test_health_of_a_server_with_fewer_stages() -> None:
    told = health.derive({Stage.DETECTOR: True}, draining=False)
    assert told[""]
    assert not told["facelane.v1.GalleryService"]
    assert "facelane.pool.liveness" not in told
    assert not health.derive({}, draining=False)[""]


def test_only_changes_of_health_are_published() -> None:
    made = health.Health()
    able = dict.fromkeys(Stage, True)
    assert set(made.publish(able, draining=False)) >= {"", "facelane.pool.detector"}
    assert made.serving
    assert made.publish(able, draining=False) == []
    able[Stage.LIVENESS] = False
    assert set(made.publish(able, draining=False)) == {"", "facelane.pool.liveness"}
    assert not made.serving


# -- models -----------------------------------------------------------------------------------


def test_models_and_what_follows_from_them() -> None:
    models = ServedModels.resolve(settings())
    assert [p.name for p in models.packages.values()] == list(NULL.values())
    assert len(models.crops) == 2
    assert models.positions == {Stage.RECOGNIZER: (0,), Stage.LIVENESS: (1,)}
    assert models.thresholds.match == 0.5
    changed = ServedModels.resolve(
        settings(identity="[identity]\nmatch_threshold = 0.7\nood_threshold = 0.1")
    )
    assert (changed.thresholds.match, changed.thresholds.ood) == (0.7, 0.1)
    assert changed.thresholds.live == models.thresholds.live


def test_without_a_stage_its_thresholds_name_nobody() -> None:
    chosen = config.parse(
        '[pools]\nrecognizer = false\nliveness = false\n[pools.detector]\nmodel = "null-detector"'
    )
    models = ServedModels.resolve(chosen)
    assert models.crops == ()
    assert (models.thresholds.match, models.thresholds.live) == (1.0, 1.0)


def test_thresholds_that_contradict_a_package() -> None:
    with pytest.raises(ConfigError, match="identity: "):
        ServedModels.resolve(settings(identity="[identity]\nspoof_threshold = 1.0"))


def test_a_model_of_another_task() -> None:
    wrong = config.parse('[pools.detector]\nmodel = "null-liveness"')
    with pytest.raises(FacelaneError) as refused:
        ServedModels.resolve(wrong)
    assert refused.value.reason is Reason.MODEL_INVALID
    assert "null-liveness is a liveness, not a detector" in refused.value.message


# -- folders and sockets ----------------------------------------------------------------------


def test_where_state_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STATE_DIRECTORY", raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "xdg"))
    assert folders.state_dir(config.Config()) == tmp_path / "xdg" / "facelane"
    monkeypatch.setenv("STATE_DIRECTORY", f"{tmp_path}/systemd:/other")
    made = folders.state_dir(config.Config())
    assert made == tmp_path / "systemd"
    assert made.stat().st_mode & 0o777 == 0o700
    chosen = config.parse(f'state_dir = "{tmp_path}/chosen"')
    assert folders.state_dir(chosen) == tmp_path / "chosen"
    with pytest.raises(ConfigError, match="cannot be made"):
        folders.state_dir(config.parse('state_dir = "/dev/null/x"'))
    with (
        pytest.raises(ConfigError, match="runtime_dir /dev/null/x cannot be made"),
        folders.runtime_dir(config.parse('runtime_dir = "/dev/null/x"')),
    ):
        pass


def test_where_sockets_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RUNTIME_DIRECTORY", raising=False)
    with folders.runtime_dir(config.Config()) as folder:
        assert folder.stat().st_mode & 0o777 == 0o700
    assert not folder.exists()
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(tmp_path / "run"))
    with folders.runtime_dir(config.Config()) as folder:
        assert folder == tmp_path / "run"
    assert folder.exists(), "systemd's folder is systemd's"


def test_what_a_killed_server_left_is_removed_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RUNTIME_DIRECTORY", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    left = tmp_path / f"{folders.RUN_PREFIX}left"
    (left / "mps").mkdir(parents=True)
    (left / "mps" / "control").touch()
    somebodys = tmp_path / "facelane-other"
    somebodys.mkdir()
    linked = tmp_path / f"{folders.RUN_PREFIX}link"
    linked.symlink_to(somebodys)
    guarded = tmp_path / f"{folders.RUN_PREFIX}guarded"
    (guarded / "mps").mkdir(parents=True)
    guard = folders._lock(guarded / "mps")
    assert guard is not None
    with folders.runtime_dir(config.Config()) as first:
        assert not left.exists()
        assert guarded.exists(), "its MPS daemon has not been told to quit"
        os.close(guard)
        with folders.runtime_dir(config.Config()) as second:
            assert first.exists(), "its server lives"
            assert second != first
            assert not guarded.exists()
        assert not second.exists()
        assert first.exists()
    assert sorted(tmp_path.iterdir()) == sorted([somebodys, linked])


def test_a_folder_that_was_swept_before_it_was_held_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RUNTIME_DIRECTORY", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    make, made = tempfile.mkdtemp, []

    def swept_at_once(**options: str) -> str:
        made.append(make(**options))
        if len(made) == 1:
            Path(made[0]).rmdir()
        return str(made[-1])

    monkeypatch.setattr(tempfile, "mkdtemp", swept_at_once)
    with folders.runtime_dir(config.Config()) as folder:
        assert [str(folder)] == made[1:]
        assert folder.is_dir()


@pytest.mark.parametrize(
    ("listen", "says"),
    [
        ("192.0.2.1:50151", "this machine has no such address"),
        ("nowhere.invalid:50151", "write an address of this machine"),
        ("unix:/no/such/folder/s.sock", "make a socket in /no/such/folder"),
    ],
)
def test_why_an_address_cannot_be_listened_on(listen: str, says: str) -> None:
    assert says in address._unusable(listen)


def test_a_taken_port_is_called_so() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        said = address._unusable(f"127.0.0.1:{taken.getsockname()[1]}")
    assert "another process has the port" in said


def test_a_socket_that_answers_is_somebodys(tmp_path: Path) -> None:
    path = tmp_path / "s.sock"
    assert not address._answers(path)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        assert not address._answers(path), "bound, and nobody listens"
        listener.listen()
        assert address._answers(path)
    assert not address._answers(path), "left behind"


# -- places -----------------------------------------------------------------------------------


def test_lane_ids_are_unique() -> None:
    streams = StreamRegistry()
    assert len({streams.next_id() for _ in range(100)}) == 100


async def test_a_stream_that_opens_into_the_end_is_told_and_one_that_opens_into_a_loss_too() -> (
    None
):
    pools = ScriptedPools()

    def lane(number: int) -> Lane:
        return Lane(
            number,
            "stream",
            LaneOptions(),
            pools.pipeline,
            window=8,
            window_bytes=1_000,
            tracking_params=tracking.Params(),
        )

    lanes = StreamRegistry()
    opened = lane(1)
    # Lost while the client was being told of the opening: no change to come tells of it.
    pools.liveness.available = False
    lanes.add(opened)
    assert await opened.take() == [StageChanged(Stage.LIVENESS, available=False)]
    lanes.drain(1)
    with pytest.raises(FacelaneError) as over:
        lanes.add(lane(2))
    assert over.value.reason is Reason.DRAINING
    assert len(lanes) == 1


def test_single_pictures_are_waited_for() -> None:
    lanes = StreamRegistry()
    assert lanes.at_rest
    with lanes.call():
        assert not lanes.at_rest
        lanes.drain(1)
    assert lanes.at_rest
    with pytest.raises(FacelaneError) as over, lanes.call():
        pass
    assert over.value.reason is Reason.DRAINING


# -- systemd ----------------------------------------------------------------------------------


async def test_a_reload_while_it_starts_does_not_tell_that_it_has_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "server.toml"
    path.write_text("")
    monkeypatch.setattr(app, "configure_logging", lambda _log: None)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        made = app.App(config.load(path), path)
        made.reload_config()
        with pytest.raises(BlockingIOError):
            manager.recv(4096)
        made.pools = {}
        await made.wait_ready()
        assert b"READY=1" in manager.recv(4096)
        made.reload_config()
        assert b"RELOADING=1" in manager.recv(4096)
        assert b"READY=1" in manager.recv(4096)
