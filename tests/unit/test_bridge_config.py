"""The bridge's configuration: strict, with messages that name the place and the way out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import facelane
from facelane_bridge import config
from facelane_bridge.config import ConfigError, Pace, SourceKind, Transport
from facelane_bridge.runner import CameraRunner

FULL = """
status_interval = 30

[server]
target = "unix:/run/facelane/grpc.sock"
token_file = "/etc/facelane/token"

[defaults]
max_fps = 10
gallery = "staff"

[[camera]]
name = "door"
source = "rtsp://10.0.0.5:554/stream1"
transport = "udp"
credentials_env = "DOOR_CREDENTIALS"

[[camera]]
name = "yard"
source = "http://10.0.0.6/mjpg/video.mjpg"
max_fps = 5
"""


def one(line: str) -> str:
    return f'[[camera]]\nname = "a"\nsource = "rtsp://host/x"\n{line}\n'


def test_a_whole_file() -> None:
    settings = config.parse(FULL)
    door, yard = settings.cameras
    assert settings.server.target == "unix:/run/facelane/grpc.sock"
    assert settings.status_interval == 30
    assert (door.transport, door.max_fps, door.gallery) == (Transport.UDP, 10, "staff")
    assert (yard.resolved_kind, yard.max_fps) == (SourceKind.MJPEG, 5)
    assert door.policy.open_timeout == 10


async def test_zones_lines_and_surer_names_of_a_camera() -> None:
    text = one("false_naming = 0.0001") + (
        '[[camera.zones]]\nname = "vault"\npolygon = [[0, 0], [1, 0], [1, 1]]\ndwell_s = 10\n'
        '[[camera.lines]]\nname = "door"\nstart = [0, 0.5]\nend = [1, 0.5]\n'
    )
    [camera] = config.parse(text).cameras
    unused: Any = None
    server = config.ServerSettings()
    runner = CameraRunner(camera, server, unused, unused, unused, unused)
    options = runner._stream_options()
    assert options["zones"] == [facelane.Zone("vault", ((0, 0), (1, 0), (1, 1)), 10.0)]
    assert options["lines"] == [facelane.Line("door", (0, 0.5), (1, 0.5))]
    assert (options["false_naming"], options["match_threshold"]) == (0.0001, None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (one('zones = [{name = "z", polygon = [[0, 0], [9, 9]]}]'), r"zones"),
        (one('zones = [{name = "z", polygon = [[0, 0], [9, 9], [1, 1]]}]'), r"<= 1"),
        (one('lines = [{name = "z", start = [0, 0]}]'), r"missing required field end"),
        (one("false_naming = 1.5"), r"false_naming"),
        (one("false_naming = 0.1\nmatch_threshold = 0.5"), r"one of false_naming and"),
        ("", r"no camera is configured"),
        ("[[camera", r"not valid TOML"),
        ("camera = 3", r"\[\[camera\]\] tables"),
        ("server = 3", r"\[server\]"),
        ('[sever]\ntarget = "x"', r"unknown key 'sever' at the top level; did you mean 'server'\?"),
        (
            one('transprt = "udp"'),
            r"'transprt' in \[\[camera\]\] number 1; did you mean 'transport'",
        ),
        (one("zzz = 1"), r"unknown key 'zzz' .*; known: .*credentials_env"),
        (FULL + "max_fp = 3", r"'max_fp' in \[\[camera\]\] number 2; did you mean 'max_fps'"),
        ('[defaults]\nname = "x"\n' + one(""), r"unknown key 'name' in \[defaults\]"),
        ('[server]\ntraget = "x"\n' + one(""), r"did you mean 'target'"),
        (one("jpeg_quality = 101"), r"number 1: jpeg_quality: expected int <= 100"),
        (one('max_fps = "ten"'), r"max_fps: expected float, got str"),
        (one("stall_after = 0"), r"stall_after: expected float > 0"),
        (one('transport = "sctp"'), r"transport: invalid enum value 'sctp'"),
        (one("backoff_initial = 60"), r"backoff_max must not be less"),
        (one("loop = true"), r"loop is for files"),
        (one('kind = "mjpeg"'), r"begins with http://"),
        (one('credentials_env = "A"\ncredentials_file = "b"'), r"exclude each other"),
        ('[[camera]]\nname = "a b"\nsource = "x"', r"name: .*letters, digits"),
        ('[[camera]]\nsource = "x"', r"missing required field name"),
        ('[[camera]]\nname = "a"', r"missing required field source"),
        ('[[camera]]\nname = "a"\nsource = "ftp://x/y"', r"ftp:// addresses are not supported"),
        ('[[camera]]\nname = "a"\nsource = "concat:a|b"\nkind = "rtsp"', r"begins with rtsp://"),
        (
            '[[camera]]\nname = "a"\nsource = "file:///x.mp4"',
            r"file:// addresses are not",
        ),
        ('[[camera]]\nname = "a"\nsource = "rtsp:///x"', r"names no host"),
        ('[[camera]]\nname = "a"\nsource = "rtsp://h:99999/x"', r"port below 65536"),
        ('[[camera]]\nname = "a"\nsource = "http://[::1/x"', r"no usable address"),
        (one("") + one(""), r"two cameras are called 'a'"),
        ('[server]\ntoken_env = "A"\ntoken_file = "b"\n' + one(""), r"exclude each other"),
        ('[server]\ntls_cert = "A"\ntls_ca = "b"\n' + one(""), r"go together"),
        ('[server]\ntls_server_name = "A"\n' + one(""), r"tls_ca is needed"),
        ("status_interval = 0\n" + one(""), r"status_interval: expected float > 0"),
        (one("") * 257, r"more than 256 cameras"),
    ],
)
def test_what_is_wrong_is_named_with_the_way_out(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config.parse(text)


@pytest.mark.parametrize(
    "source",
    [
        "rtsp://admin:hunter2@10.0.0.5/x",
        "http://admin:hunter2@cam/x",
        "rtsp://hunter2@h",
        # Not escaped: for a reader of addresses the password is a port.
        "rtsp://admin:hunter2/3@cam/x",
    ],
)
def test_credentials_in_an_address_are_refused_and_not_repeated(source: str) -> None:
    with pytest.raises(ConfigError, match=r"credentials_env|no usable address") as caught:
        config.parse(f'[[camera]]\nname = "a"\nsource = "{source}"')
    assert "hunter2" not in str(caught.value)


def test_an_at_sign_in_the_path_is_no_credential() -> None:
    assert config.parse('[[camera]]\nname = "a"\nsource = "rtsp://h/a@b"').cameras


def test_files_and_their_messages(tmp_path: Path) -> None:
    path = tmp_path / "bridge.toml"
    with pytest.raises(ConfigError, match="no such file"):
        config.load(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="UTF-8"):
        config.load(path)
    path.write_text(one("zzz = 1"))
    with pytest.raises(ConfigError, match=r"bridge\.toml: unknown key"):
        config.load(path)
    path.write_text(FULL)
    assert len(config.load(path).cameras) == 2
    with pytest.raises(ConfigError, match="cannot be read"):
        config.load(tmp_path)


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        ("rtsp://h/x", SourceKind.RTSP),
        ("RTSPS://h/x", SourceKind.RTSP),
        ("https://h/x", SourceKind.MJPEG),
        ("/dev/video0", SourceKind.DEVICE),
        ("/dev/v4l/by-id/usb-cam", SourceKind.DEVICE),
        ("clip.mp4", SourceKind.FILE),
        ("/dev/video0.mp4", SourceKind.FILE),
    ],
)
def test_the_kind_follows_from_the_address(source: str, kind: SourceKind) -> None:
    camera = config.single(source, server={}).cameras[0]
    assert camera.resolved_kind is kind
    assert camera.is_live == (kind is not SourceKind.FILE)


def test_a_folder_is_a_folder(tmp_path: Path) -> None:
    camera = config.single(str(tmp_path), server={}).cameras[0]
    assert camera.resolved_kind is SourceKind.FOLDER


@pytest.mark.parametrize(
    ("source", "options", "lossless"),
    [
        ("a.mp4", {}, False),
        ("a.mp4", {"pace": Pace.FAST}, True),
        ("a.mp4", {"pace": "fast", "overload": "latest_wins"}, False),
        ("rtsp://h/x", {"pace": "fast"}, False),
        ("rtsp://h/x", {"overload": "lossless"}, True),
    ],
)
def test_only_what_can_wait_waits(source: str, options: dict[str, str], lossless: bool) -> None:
    assert config.single(source, server={}, options=options).cameras[0].is_lossless is lossless


def test_a_file_cannot_stall() -> None:
    assert config.single("a.mp4", server={}).cameras[0].policy.stall_after == float("inf")
    assert config.single("rtsp://h/x", server={}).cameras[0].policy.stall_after == 5.0


# --- the documentation ---

DOCS = Path(__file__).parents[2] / "docs" / "bridge.md"


def test_the_documented_example_is_valid() -> None:
    text = DOCS.read_text(encoding="utf-8")
    example = text.split("```toml\n")[1].split("```")[0]
    settings = config.parse(example)
    assert [camera.name for camera in settings.cameras] == ["front-door", "yard"]
    assert settings.cameras[0].max_side == 1280


@pytest.mark.parametrize("section", [config.ServerSettings, config.CameraSettings])
def test_every_key_is_documented(section: type) -> None:
    rows = [line.split("|")[1] for line in DOCS.read_text().splitlines() if line.startswith("|")]
    missing = [
        key for key in section.__struct_fields__ if not any(f"`{key}`" in row for row in rows)
    ]
    assert missing == []


def test_every_line_is_documented() -> None:
    import json
    from typing import get_args

    import msgspec

    from facelane_bridge import output

    text = DOCS.read_text(encoding="utf-8")
    for kind in get_args(output.Line):
        assert f"**`{kind.__struct_config__.tag}`**" in text
    example = json.loads(text.split("```json\n")[1].split("```")[0])
    line = msgspec.convert(example, output.ResultLine)
    assert set(example) == set(msgspec.to_builtins(line)), "no field is left out"
    assert set(example["faces"][0]) == set(msgspec.to_builtins(line.faces[0]))
    for field in output.CameraTotals.__struct_fields__:
        assert f"`{field}`" in text
