"""What must not be there: names in logs, torch in the front, files in /dev/shm, processes."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import psutil
import pytest
from tests.e2e import wire
from tests.e2e.conftest import Start
from tests.forked import completed
from tests.running_server import RunningServer, toml
from tests.waiting import until
from typer.testing import CliRunner

import facelane
from facelane_server import cli

FRAMES = 600
SECRETS = ("zaphod-the-subject", "Zaphod B.", "president-of-the-label", "betelgeuse-key")


def test_no_personal_data_in_logs_and_errors_and_logs_are_json_lines(start: Start) -> None:
    server = start(edit=lambda text: f'{text}\n[log]\nlevel = "debug"\n')
    until(lambda: '"event": "serving"' in server.text())
    subject, display, label, key = SECRETS
    with server.client() as client:
        client.enroll(subject, wire.picture(), display_name=display, request_id=subject)
        client.update_subject(subject, display_name=display, labels={key: label})
        assert client.identify(wire.picture())[0].identity.subject_id == subject
        assert client.verify(subject, wire.picture()).verified
        list(client.analyze([wire.picture()] * 10, source_id="door"))
        told = []
        for call in (
            lambda: client.create_subject(subject),
            lambda: client.verify(subject, facelane.Picture.encoded(b"\xff\xd8\xff" + b"x" * 50)),
            lambda: client.delete_subject(subject + "-2"),
            lambda: client.enroll(subject, wire.picture(5), request_id=subject),
            lambda: client.update_subject(subject, etag="wrong", labels={key: label}),
            lambda: client.create_subject("a", labels={key: label * 200}),
        ):
            with pytest.raises(facelane.FacelaneError) as refused:
                call()
            told.append(f"{refused.value.message} {refused.value.metadata}")
        client.delete_subject(subject)
        client.restart_worker("liveness#0")
        client.analyze_image(wire.picture())
    server.stop()
    for text in (server.text(), *told):
        for secret in SECRETS:
            assert secret not in text
    # A message is constant: what differs stands in fields of its own.
    lines = [json.loads(line) for line in server.text().splitlines()]
    assert all({"event", "level", "timestamp"} <= line.keys() for line in lines)
    assert not [line for line in lines if line["level"] in ("error", "critical")]
    messages = {line["event"] for line in lines}
    assert {"listening", "serving", "worker ready", "draining", "ended"} <= messages
    assert not any(character.isdigit() for message in messages for character in message)


def test_the_front_has_no_torch_and_shares_nothing_by_name(server: RunningServer) -> None:
    with server.client() as client:
        list(client.analyze([wire.picture()] * 20))
    # By process: what else lies in /dev/shm is that of other programs on this machine.
    for process in (psutil.Process(server.process.pid), *server.children()):
        maps = Path(f"/proc/{process.pid}/maps").read_text()
        assert not [file for file in process.open_files() if file.path.startswith("/dev/shm/")]
        assert "libtorch" not in maps, process
        assert "/dev/shm" not in maps, process
        assert "libcuda" not in maps, process


def test_the_front_does_not_grow(start: Start) -> None:
    """600 frames again and again; after the first ones it has what it needs. How many are under
    way at one time, and so how much memory, is up to the machine: it may take some rounds more.
    What leaks, a kibibyte a frame, grows in every round."""
    server = start()
    process = psutil.Process(server.process.pid)
    leak = FRAMES << 10
    with server.client() as client:

        def frames() -> int:
            outcomes = client.analyze((wire.picture() for _ in range(FRAMES)), skip_liveness=True)
            return sum(outcome.result is not None for outcome in outcomes)

        assert frames() == FRAMES
        descriptors = process.num_fds()
        grown = []
        while len(grown) < 6 and min(grown, default=leak) >= leak:
            before = process.memory_info().rss
            assert frames() == FRAMES
            grown.append(process.memory_info().rss - before)
    assert grown[-1] < leak, grown
    assert process.num_fds() <= descriptors + 2


def test_state_is_private(server: RunningServer) -> None:
    state = server.folder / "state"
    assert state.stat().st_mode & 0o077 == 0
    database = state / "gallery.db"
    until(database.exists)
    assert database.stat().st_mode & 0o077 == 0


def test_without_folders_of_its_own_the_server_uses_the_standard_ones(tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    text = "\n".join(line for line in toml(tmp_path).splitlines() if "_dir" not in line)
    environment = {"XDG_STATE_HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path / "tmp")}
    server = RunningServer(tmp_path, text, env=environment)
    with server:
        server.wait_serving()
        assert (tmp_path / "home" / "facelane" / "gallery.db").exists()
        assert os.listdir(tmp_path / "tmp") == [], "workers of its own need no folder for sockets"


def server_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return completed(arguments, 60)


def called(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The same without a process of its own, for commands that run nothing."""
    result = CliRunner().invoke(cli.app, arguments)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return subprocess.CompletedProcess(arguments, result.exit_code, result.stdout, result.stderr)


@pytest.mark.parametrize("command", ["run", "check"])
def test_a_typo_in_the_config_is_named_with_the_nearest_key(command: str, tmp_path: Path) -> None:
    path = tmp_path / "server.toml"
    path.write_text("[limits]\nmax_stream = 3\n")
    ask = server_command if command == "run" else called
    done = ask(command, "--config", str(path))
    assert done.returncode == 78
    assert "unknown key `max_stream` in [limits]; did you mean `max_streams`?" in done.stderr
    assert str(path) in done.stderr
    assert "Traceback" not in done.stderr


UNUSABLE = [
    ("[pools.detector]\nmodel = 'null-detektor'", "did you mean null-detector?"),
    ("[auth]\nkeys_file = '/no/such/keys.toml'", "/no/such/keys.toml: cannot be read"),
    ("[tls]\ncert_file = '/no/such'\nkey_file = '/no/key'", "tls.cert_file /no/such"),
    ("[pools.detector]\nmodel = 'null-liveness'", "is a liveness, not a detector"),
    ("[pools.detector]\nmodel = '/no/such/folder'", "model.toml cannot be read"),
    ("[limits", "not valid TOML"),
    ("[metrics]\nlisten = '9151'", "is not host:port"),
]
LOCKED_OUT = [
    ("[store]\nmaster_key = 'file:/no/such/key'", "/no/such/key: No such file"),
    ("[store]\nmaster_key = 'vault:x'", "write file:PATH"),
]
"""A server of these would look at this user's own store first."""


@pytest.mark.parametrize(("text", "says"), UNUSABLE + LOCKED_OUT)
def test_configs_that_cannot_be_used_are_told_by_check(
    tmp_path: Path, text: str, says: str
) -> None:
    path = tmp_path / "server.toml"
    path.write_text(text)
    done = called("check", "--config", str(path))
    assert done.returncode == 78, done
    assert says in done.stderr


def refused(folder: Path, text: str) -> str:
    """What a server says that ends at its start, for good."""
    server = RunningServer(folder, text)
    assert server.process.wait(60) == 78, server.text()
    server.stop()
    said = server.text()
    assert "Traceback" not in said
    return said


# Of all of them ``check`` says the same in this process: one that can be read, one that cannot.
@pytest.mark.parametrize(
    ("text", "says"),
    [
        pytest.param(*each, marks=[pytest.mark.slow] * (each not in (UNUSABLE[3], UNUSABLE[5])))
        for each in UNUSABLE
    ],
)
def test_configs_that_cannot_be_used_start_nothing(tmp_path: Path, text: str, says: str) -> None:
    said = refused(tmp_path, text)
    assert says in said
    assert '"worker"' not in said


@pytest.mark.parametrize("folder", ["state_dir", "runtime_dir"])
def test_folders_that_cannot_be_made(tmp_path: Path, folder: str) -> None:
    other = "" if folder == "state_dir" else f"state_dir = '{tmp_path}'\n"
    text = f"{folder} = '/dev/null/x'\n{other}[metrics]\nlisten = ''"
    assert "/dev/null/x cannot be made" in refused(tmp_path, text)
    asked = called("check", "--config", str(tmp_path / "server.toml"))
    assert "Traceback" not in asked.stdout + asked.stderr


def test_a_config_that_is_not_there(tmp_path: Path) -> None:
    assert called("check", "--config", str(tmp_path / "absent.toml")).returncode == 78


def test_a_model_with_a_wrong_hash_is_refused(start: Start, tmp_path: Path) -> None:
    """Its weights are not what the manifest says: nothing is ever inferred with them."""
    package = tmp_path / "forged"
    package.mkdir()
    (package / "weights.safetensors").write_bytes(b"not what was signed")
    (package / "model.toml").write_text(
        'schema = 1\nname = "forged"\nversion = "1.0.0"\ntask = "recognizer"\n'
        'runtime = "torch"\narchitecture = "mobilefacenet"\nlicense = "MIT"\n'
        'description = "x"\n'
        f'[[weights]]\nfile = "weights.safetensors"\nsha256 = "{"0" * 64}"\n'
        '[input]\nwidth = 112\nheight = 112\n[[input.crops]]\nkind = "aligned"\nsize = 112\n'
        "[output]\nembedding_dim = 512\n[thresholds]\nmatch = 0.3\nmargin = 0.05\nood = 0.4\n"
        '[ood]\nsource = "none"\n'
    )
    done = server_command("models", "verify", str(package))
    assert done.returncode == 1, done
    told = " ".join((done.stdout + done.stderr).split())
    assert "weights.safetensors" in told
    server = start(edit=lambda text: text.replace('"null-recognizer"', f'"{package}"'), wait=False)
    until(lambda: "weights.safetensors has SHA-256" in server.text(), what="the refusal in the log")
    with server.client() as client:
        assert client.health() == "NOT_SERVING"
        assert client.health("facelane.pool.recognizer") == "NOT_SERVING"
        # The other stages go on, and what is missing is told.
        server.wait_serving(service="facelane.v1.AnalysisService")
        assert client.analyze_image(wire.picture()).missing_stages == ("recognizer",)


def test_what_would_run(tmp_path: Path) -> None:
    path = tmp_path / "server.toml"
    path.write_text(toml(tmp_path))
    done = called("check", "--config", str(path))
    assert done.returncode == 0, done
    for name in ("null-detector@1.0.0", "null-recognizer@1.0.0", "null-liveness@1.0.0"):
        assert name in done.stdout
    assert f"listens on unix:{tmp_path}/grpc.sock, no TLS, no keys; metrics on none" in done.stdout
    assert called("version").stdout.strip()
    assert called("--version").stdout == called("version").stdout
    path.write_text(f'{toml(tmp_path)}\n[auth]\nkeys_file = "/run/credentials/no.service/keys"')
    done = called("check", "--config", str(path))
    assert done.returncode == 0, done
    assert "not looked at: /run/credentials/no.service/keys" in done.stdout
    assert "no TLS, keys;" in done.stdout


def test_a_gallery_that_cannot_be_used_is_not_tried_again(tmp_path: Path) -> None:
    """Nor does a box that reboots after a crash loop reboot for it."""
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "gallery.db").write_bytes(b"nonsense" * 1000)
    assert "restore a backup" in refused(tmp_path, toml(tmp_path))


def test_a_gallery_whose_master_key_is_elsewhere_is_not_served(
    server: RunningServer, tmp_path: Path
) -> None:
    """Several servers may share one, which then have its key in common."""
    held = server.folder / "state" / "gallery.db"
    said = refused(tmp_path, f'{toml(tmp_path)}\n[gallery]\npath = "{held}"')
    assert "set store.master_key" in said
    assert not (tmp_path / "state" / "master.key").exists(), "another key was made for it"


def test_keys_on_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    new = ("keys", "new", "door", "--file", str(file))
    made = server_command(*new)
    assert made.returncode == 0, made
    assert made.stdout.startswith("flk_")
    assert file.stat().st_mode & 0o777 == 0o600
    again = called(*new, "--scope", "gallery")
    assert "door has 2 keys now" in again.stderr
    listed = called("keys", "list", str(file))
    lines = [line.split() for line in listed.stdout.splitlines()]
    assert [(line[0], line[4]) for line in lines] == [("door", "analyze"), ("door", "gallery")]
    assert made.stdout.strip() not in file.read_text() + listed.stdout
    guest = ("keys", "new", "guest", "--source", "door-*", "--expires", "2020-01-01")
    assert called(*guest, "--file", str(file)).returncode == 0
    assert "sources door-*" in (line := called("keys", "list", str(file)).stdout)
    assert "expired 2020-01-01" in line
    file.write_text("# who works here\n" + file.read_text())
    assert called("keys", "remove", "guest", str(file)).returncode == 0
    left = file.read_text()
    assert left.startswith("# who works here")
    assert left.count("[[keys]]") == 2
    assert "guest" not in left
    assert file.stat().st_mode & 0o777 == 0o600
    assert called("keys", "remove", "guest", str(file)).returncode == 78
    # An entry is never added where it would take the others along.
    kept = file.read_text()
    for arguments, code in (
        (("keys", "new", "front door", "--file", str(file)), 2),
        (("keys", "new", "x", "--scope", "root", "--file", str(file)), 2),
        (("keys", "new", "x", "--file", str(tmp_path)), 78),
        (("keys", "new", "x", "--file", "/no/such/keys.toml"), 78),
        (("keys", "list", "/no/such/keys.toml"), 78),
    ):
        done = called(*arguments)
        assert done.returncode == code, done
        assert not done.stdout
    assert file.read_text() == kept
    file.write_text("name = 1\n")
    assert called("keys", "new", "x", "--file", str(file)).returncode == 78
    assert file.read_text() == "name = 1\n"
    file.write_text("# keys of the front door\n")
    assert called("keys", "new", "x", "--file", str(file)).returncode == 0


def test_a_stream_that_searches_an_empty_gallery_is_told_of(server: RunningServer) -> None:
    """A gallery that was mistyped at the camera, most often."""
    with server.client() as client:
        client.create_subject("ada", gallery="staff")
        client.enroll("ada", wire.picture(), gallery="staff", allow_multiple_faces=True)
        for options in ({"gallery": "stuff"}, {"gallery": "staff"}, {"skip_recognition": True}):
            assert len(list(client.analyze([wire.picture()], **options))) == 1
    lines = [line for line in server.text().splitlines() if "searches an empty gallery" in line]
    assert sum('"gallery": "stuff"' in line for line in lines) == 1
    assert not any('"staff"' in line or "ada" in line for line in lines)


@pytest.mark.slow
def test_nothing_is_left_in_the_temporary_folder(tmp_path: Path) -> None:
    """Not even by a server that is killed, once the next has started."""
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    # A pool that needs a folder for its socket; nobody attaches to it.
    lines = toml(tmp_path, wire.pools(liveness='isolation = "external"')).splitlines()
    config = "\n".join(line for line in lines if not line.startswith("runtime_dir"))

    def begin() -> RunningServer:
        return RunningServer(tmp_path, config, env={"TMPDIR": str(temporary)})

    with begin() as killed:
        killed.wait_serving(service="facelane.v1.AnalysisService")
        [left] = temporary.iterdir()
        killed.process.kill()
        killed.process.wait(30)
        assert left.exists()
    with begin() as server:
        server.wait_serving(service="facelane.v1.AnalysisService")
        [own] = temporary.iterdir()
        assert own != left
    assert not list(temporary.iterdir())
    assert not list((tmp_path / "run").iterdir())
