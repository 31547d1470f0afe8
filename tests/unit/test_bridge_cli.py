"""The bridge's command line, and how it finds its server, within this process."""

from __future__ import annotations

import builtins
import json
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import structlog
from tests.fakes.cameras import jpeg, write_clip
from tests.fakes.scripted_server import ScriptedServer, refusing

import facelane
from facelane_bridge import cli, config, reader
from facelane_bridge.bridge import new_client
from facelane_bridge.config import ConfigError, ServerSettings


@pytest.fixture(autouse=True)
def own_logging() -> Iterator[None]:
    yield
    structlog.reset_defaults()


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    return write_clip(tmp_path / "clip.mp4", frames=5)


def test_run_with_a_table(clip: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with ScriptedServer() as server:
        code = cli.main(
            ["run", "--table", "--source", str(clip), "--pace", "fast", "--target", server.target]
        )
    assert code == 0
    assert "5 frames = 5 results" in capsys.readouterr().out


def test_run_with_lines(clip: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with ScriptedServer() as server:
        code = cli.main(
            ["--log-format", "text", "run", "--source", str(clip), "--pace", "fast", "--target",
             server.target, "--name", "door", "--max-fps", "100", "--gallery", "staff"]
        )  # fmt: skip
        opening = server.streams[0][0].config
    assert code == 0
    out, err = capfd.readouterr()
    lines = [json.loads(line) for line in out.splitlines()]
    assert sum(line["type"] == "result" for line in lines) == 5
    assert (opening.source_id, opening.options.gallery_id) == ("door", "staff")
    assert "camera opened" in err


def test_status_is_logged_and_counted(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    clip = write_clip(tmp_path / "clip.mp4", frames=10)
    with ScriptedServer() as server:
        file = tmp_path / "bridge.toml"
        file.write_text(
            f'status_interval = 0.2\n[server]\ntarget = "{server.target}"\n'
            f'[[camera]]\nname = "door"\nsource = "{clip}"\n'
        )
        assert cli.main(["--log-format", "json", "run", str(file)]) == 0
    events = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    status = [event for event in events if event["event"] == "camera status"]
    assert status
    assert status[-1]["camera"] == "door"
    assert status[-1]["frames"] > 0


@pytest.mark.parametrize(
    ("script", "code"),
    [
        (refusing(grpc.StatusCode.NOT_FOUND, "SUBJECT_NOT_FOUND"), cli.EXIT_SERVER),
        (None, cli.EXIT_CAMERA_FAILED),
    ],
)
def test_exit_codes(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], script: Any, code: int
) -> None:
    with ScriptedServer(*([script] if script else [])) as server:
        arguments = ["run", "--source", str(tmp_path / "none.mp4"), "--target", server.target]
        assert cli.main(arguments) == code


def test_check(clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(jpeg(1))
    with ScriptedServer() as server:
        file = tmp_path / "bridge.toml"
        file.write_text(
            f'[server]\ntarget = "{server.target}"\n'
            f'[[camera]]\nname = "file"\nsource = "{clip}"\n'
            f'[[camera]]\nname = "folder"\nsource = "{folder}"\n'
            f'[[camera]]\nname = "gone"\nsource = "{tmp_path}/none.mp4"\n'
        )
        assert cli.main(["check", str(file)]) == cli.EXIT_CAMERA_FAILED
        out = capsys.readouterr().out.splitlines()
        assert out[0].startswith("file: ok, file, h264, 64x48, 10 fps, 0.5 s, passed on as it is")
        assert out[1].startswith("folder: ok, folder, pictures, 5 fps, 0.2 s, passed on as it is")
        assert out[2] == "gone: FAILED NOT_FOUND: the file does not exist"
        assert out[3].endswith("SERVING")
        assert cli.main(["check", "--cameras-only", "--source", str(clip)]) == cli.EXIT_OK
    arguments = ["check", "--source", str(clip), "--target", server.target]
    assert cli.main(arguments) == cli.EXIT_SERVER
    assert "UNREACHABLE" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["run"], "give either"),
        (["run", "--source", "x.mp4", "a.toml"], "give either"),
        (["run", "none.toml"], "no such file"),
        (["run", "none.toml", "--max-fps", "3"], "--max-fps: with a configuration file"),
        (["run", "--source", "rtsp://u:hunter2@h/x"], "credentials_env"),
        (["run", "--source", "x.mp4", "--max-fps", "-3"], "max_fps: expected float >= 0"),
    ],
)
def test_usage(arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == cli.EXIT_USAGE
    out, err = capsys.readouterr()
    assert err.startswith("facelane-bridge: ")
    assert text in err
    assert "hunter2" not in out + err


def test_a_command_that_there_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["frobnicate"])
    assert ended.value.code == cli.EXIT_USAGE
    assert "invalid choice" in capsys.readouterr().err


@pytest.mark.parametrize(("mode", "warned"), [(0o600, False), (0o640, False), (0o604, True)])
def test_secrets_that_all_can_read_are_warned_about(
    clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], mode: int, warned: bool
) -> None:
    secret = tmp_path / "yard.camera"
    secret.write_text("admin:hunter2")
    secret.chmod(mode)
    arguments = ["check", "--cameras-only", "--source", str(clip), "--credentials-file"]
    assert cli.main([*arguments, str(secret)]) == cli.EXIT_OK
    said = capsys.readouterr().err
    assert ("can be read by every user" in said and str(secret) in said) == warned
    assert "hunter2" not in said


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.strip() == facelane.__version__


def test_a_check_that_breaks_is_told_and_not_called_late(
    clip: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Breaking:
        def open(self) -> None:
            raise ZeroDivisionError("rtsp://admin:hunter2@cam")

        def close(self) -> None:
            pass

    monkeypatch.setattr(reader, "open_source", lambda _: Breaking())
    assert cli.main(["check", "--source", str(clip), "--cameras-only"]) == cli.EXIT_CAMERA_FAILED
    said = capsys.readouterr()
    assert "the reader broke (ZeroDivisionError)" in said.out
    assert "hunter2" not in said.out + said.err


def test_help_names_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["run", "--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert "a camera failed for good" in out
    assert "--credentials-env" in out


def test_a_missing_extra_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = builtins.__import__

    def without_av(name: str, *rest: Any, **options: Any) -> Any:
        if name == "av":
            raise ImportError("no", name="av")
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without_av)
    assert cli.main(["run", "--source", "x.mp4"]) == cli.EXIT_USAGE
    assert "pip install 'facelane[bridge]'" in capsys.readouterr().err


# --- the way to the server ---


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"token_env": "NO_SUCH_VARIABLE"}, "NO_SUCH_VARIABLE is not set"),
        ({"token_file": "/none/token"}, "/none/token cannot be read"),
        ({"tls_ca": "/none/ca.pem"}, "/none/ca.pem cannot be read"),
    ],
)
def test_missing_secrets_are_told(settings: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        new_client(ServerSettings(**settings))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("key", "content", "message"),
    [
        ("token_file", b"\xff\xfe\x00", "given is no text"),
        ("token_file", b"\n", "given is empty"),
        ("token_file", b"s3cret and more", "the key alone"),
        ("tls_ca", b"no certificate", "is not PEM"),
    ],
)
def test_secrets_that_are_none_are_told(
    tmp_path: Path, key: str, content: bytes, message: str
) -> None:
    (tmp_path / "given").write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        new_client(ServerSettings(**{key: str(tmp_path / "given")}))  # type: ignore[arg-type]
    assert "s3cret" not in str(caught.value)


async def test_the_token_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "token").write_text("s3cret\n")
    monkeypatch.setenv("BRIDGE_TOKEN", "s3cret")
    with ScriptedServer(token="s3cret") as server:
        for given in ({"token_file": str(tmp_path / "token")}, {"token_env": "BRIDGE_TOKEN"}):
            settings = ServerSettings(target=server.target, **given)  # type: ignore[arg-type]
            async with new_client(settings) as client:
                assert (await client.server_info()).version == "1.2.3"


def test_tls_is_taken_from_the_settings(tmp_path: Path) -> None:
    roots = ssl.get_default_verify_paths().cafile
    pem = Path(roots).read_text() if roots and Path(roots).exists() else ""
    (tmp_path / "ca.pem").write_text(pem)
    client = new_client(ServerSettings(target="server.example:1", tls_ca=str(tmp_path / "ca.pem")))
    assert "tls=True" in repr(client._endpoint)


def test_a_short_wait_shortens_the_first_try() -> None:
    assert new_client(ServerSettings(wait=2)).timeout == 2
    assert new_client(ServerSettings(wait=0.1)).timeout == 1
    assert new_client(ServerSettings()).timeout == 10
    assert config.single("a.mp4", server={}).server.wait == 30
