"""Who may call what, over TCP, with keys and TLS."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import warnings
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tests.e2e import wire
from tests.e2e.conftest import Start
from tests.running_server import THREAD_POOLS, RunningServer, free_port
from tests.waiting import until
from typer.testing import CliRunner

import facelane
from facelane_server import cli


def new_key(file: Path, name: str, *scopes: str) -> str:
    """A key made by the command that operators use."""
    arguments = ["keys", "new", name, "--file", str(file)]
    for scope in scopes:
        arguments += ["--scope", scope]
    made = CliRunner().invoke(cli.app, arguments)
    assert made.exit_code == 0, made.output
    assert file.stat().st_mode & 0o777 == 0o600
    secret = made.stdout.strip()
    assert secret.startswith("flk_")
    assert secret not in file.read_text()
    return secret


def wait_process(target: str, token: str, tls: facelane.Tls | None = None) -> None:
    def answers() -> bool:
        with facelane.Client(target, token=token, tls=tls, timeout=2) as client:
            try:
                return client.health() == "SERVING"
            except (facelane.UnavailableError, facelane.DeadlineExceededError):
                return False

    until(answers, what="the server to serve")


OPEN = '\n[auth]\nmode = "none"\n'


def with_keys(server_text: str, file: Path) -> str:
    return f'{server_text}\n[auth]\nmode = "keys"\nkeys_file = "{file}"\n'


def test_scopes_over_tcp(start: Start, tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    keys = {name: new_key(file, name, name) for name in ("analyze", "gallery", "admin")}
    target = f"127.0.0.1:{free_port()}"
    server = start(THREAD_POOLS, listen=target, edit=lambda text: with_keys(text, file), wait=False)
    wait_process(target, keys["analyze"])

    calls: dict[str, Callable[[facelane.Client], object]] = {
        "analyze": lambda c: c.analyze_image(wire.picture()),
        "gallery": lambda c: list(c.list_subjects()),
        "admin": lambda c: c.reload_model("detector"),
        "any": lambda c: c.server_info(),
    }
    allowed = {
        "analyze": {"analyze", "any"},
        "gallery": {"gallery", "any"},
        "admin": {"analyze", "gallery", "admin", "any"},
    }
    lacks = {"analyze": "analyze", "gallery": "gallery.read", "admin": "admin"}
    for name, key in keys.items():
        with facelane.Client(target, token=key, timeout=100) as client:
            for scope, call in calls.items():
                if scope in allowed[name]:
                    call(client)
                else:
                    with pytest.raises(facelane.PermissionDeniedError) as denied:
                        call(client)
                    assert denied.value.metadata["scope"] == lacks[scope]
    with facelane.Client(target, token=keys["gallery"]) as client:
        # Streams are refused as streams are: before a frame is read.
        with pytest.raises(facelane.PermissionDeniedError), client.analyze_stream():
            pass
        with pytest.raises(facelane.PermissionDeniedError), client.watch_events():
            pass
    for token in ("", "flk_wrong", keys["admin"][:-1], keys["admin"] + "x"):
        with facelane.Client(target, token=token) as client:
            for call in calls.values():
                with pytest.raises(facelane.AuthenticationError) as unknown:
                    call(client)
                assert unknown.value.reason == "UNAUTHENTICATED"
    # Health without a key is refused too, off the SDK.
    with wire.channel(target) as channel, pytest.raises(grpc.RpcError) as refused:
        health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
    assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
    log = server.text()
    assert "call refused" in log
    assert not any(key in log for key in keys.values())


def test_keys_are_reloaded_by_sighup_and_a_broken_file_changes_nothing(
    start: Start, tmp_path: Path
) -> None:
    file = tmp_path / "keys.toml"
    first = new_key(file, "first", "analyze")
    target = f"127.0.0.1:{free_port()}"
    server = start(THREAD_POOLS, listen=target, edit=lambda text: with_keys(text, file), wait=False)
    wait_process(target, first)

    def hup(says: str) -> None:
        before = server.text().count(says)
        server.process.send_signal(signal.SIGHUP)
        until(lambda: server.text().count(says) > before, what=says)

    def admitted(key: str) -> bool:
        with facelane.Client(target, token=key, timeout=100) as client:
            try:
                client.server_info()
            except facelane.AuthenticationError:
                return False
            return True

    file.unlink()
    second = new_key(file, "second", "analyze")
    assert not admitted(second)
    hup("config reloaded")
    assert admitted(second)
    assert not admitted(first)
    file.write_text("[[keys]]\nname = ")
    hup("config not reloaded")
    assert admitted(second)
    # A config that would need no keys somewhere else does not take them off here.
    text = server.config.read_text()
    server.config.write_text(
        text.replace('mode = "keys"', 'mode = "auto"')
        .replace(f'keys_file = "{file}"', "")
        .replace(target, "0.0.0.0:1")
    )
    hup("config not reloaded")
    assert admitted(second)
    assert not admitted(first)
    server.config.write_text("[server]\nlisten_on = 3\n")
    hup("config not reloaded")
    assert "did you mean `listen`?" in server.text()
    assert admitted(second)


def test_a_public_address_wants_keys_and_tls(start: Start, tmp_path: Path) -> None:
    server = start(listen="0.0.0.0:0", wait=False)
    assert server.process.wait(30) == 78
    assert "set auth.keys_file" in server.text()
    file = tmp_path / "keys.toml"
    new_key(file, "k")
    server = start(listen="0.0.0.0:0", edit=lambda text: with_keys(text, file), wait=False)
    assert server.process.wait(30) == 78
    assert "unencrypted" in server.text()
    # Knowingly, and told all the same.
    server = start(THREAD_POOLS, listen="0.0.0.0:0", extra='[auth]\nmode = "none"', wait=False)
    until(lambda: "need no key" in server.text(), what="a warning")


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority, and certificates of it for a server and a client."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl command here")
    folder = tmp_path_factory.mktemp("tls")

    def openssl(*arguments: str) -> None:
        subprocess.run(
            ["openssl", *arguments], cwd=folder, check=True, capture_output=True, timeout=60
        )

    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    for authority in ("ca", "stranger"):
        openssl("req", "-x509", *curve, "-keyout", f"{authority}.key", "-out", f"{authority}.pem",
                "-days", "2", "-subj", f"/CN={authority}",
                "-addext", "subjectAltName=DNS:localhost")  # fmt: skip
    (folder / "san").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1")
    for name in ("server", "client"):
        openssl(
            "req", *curve, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}"
        )
        signing = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-extfile", "san")
        openssl("x509", "-req", "-in", f"{name}.csr", "-out", f"{name}.pem", "-days", "2", *signing)
    return folder


def tls_text(text: str, folder: Path, *, mutual: bool) -> str:
    lines = f'[tls]\ncert_file = "{folder}/server.pem"\nkey_file = "{folder}/server.key"\n'
    if mutual:
        lines += f'client_ca_file = "{folder}/ca.pem"\n'
    return f"{text}\n{lines}"


def test_keys_over_tls(start: Start, certificates: Path, tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    key = new_key(file, "camera", "analyze")
    port = free_port()
    server = start(
        THREAD_POOLS,
        listen=f"0.0.0.0:{port}",
        edit=lambda text: with_keys(tls_text(text, certificates, mutual=False), file),
        wait=False,
        forked=False,  # gRPC's own lines are what it begins without
    )
    target = f"localhost:{port}"
    tls = facelane.Tls(ca_file=certificates / "ca.pem")
    wait_process(target, key, tls)
    with facelane.Client(target, token=key, tls=tls) as client:
        outcomes = list(client.analyze([wire.picture()] * 5))
        assert all(outcome.result is not None for outcome in outcomes)
    with (
        facelane.Client(target, token="flk_wrong", tls=tls) as client,
        pytest.raises(facelane.AuthenticationError),
    ):
        client.server_info()
    # Whoever cannot check the certificate, or speaks plain text, gets nowhere.
    wrong = facelane.Tls(ca_file=certificates / "stranger.pem")
    nowhere = (facelane.UnavailableError, facelane.DeadlineExceededError)
    with (
        facelane.Client(target, token=key, tls=wrong, timeout=3) as client,
        pytest.raises(nowhere),
    ):
        client.server_info()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", facelane.InsecureTokenWarning)
        with facelane.Client(target, token=key, timeout=3) as client, pytest.raises(nowhere):
            client.server_info()
    assert key not in server.text()
    # And leaves no line that is not one of the log's.
    assert all(line["event"] for line in server.lines())


def test_mutual_tls(start: Start, certificates: Path) -> None:
    port = free_port()
    start(
        THREAD_POOLS,
        listen=f"127.0.0.1:{port}",
        edit=lambda text: tls_text(text, certificates, mutual=True),
        wait=False,
    )
    ca = certificates / "ca.pem"
    own = facelane.Tls(
        ca_file=ca, cert_file=certificates / "client.pem", key_file=certificates / "client.key"
    )
    wait_process(f"localhost:{port}", "", own)
    with (
        facelane.Client(f"localhost:{port}", tls=facelane.Tls(ca_file=ca), timeout=3) as client,
        pytest.raises((facelane.UnavailableError, facelane.DeadlineExceededError)),
    ):
        client.server_info()


def test_a_client_certificate_is_an_identity(
    start: Start, certificates: Path, tmp_path: Path
) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(
        '[[roles]]\nname = "camera"\nverbs = ["analyze"]\n'
        '[[certificates]]\nname = "cameras"\nsan = "localhost"\nroles = ["camera"]\n'
    )
    port = free_port()
    server = start(
        THREAD_POOLS,
        listen=f"127.0.0.1:{port}",
        edit=lambda text: with_keys(tls_text(text, certificates, mutual=True), file),
        wait=False,
    )
    target = f"localhost:{port}"
    own = facelane.Tls(
        ca_file=certificates / "ca.pem",
        cert_file=certificates / "client.pem",
        key_file=certificates / "client.key",
    )
    wait_process(target, "", own)
    with facelane.Client(target, tls=own, timeout=100) as client:
        client.analyze_image(wire.picture())
        with pytest.raises(facelane.PermissionDeniedError):
            list(client.list_subjects())
        with client.analyze_stream() as stream:
            stream.send(wire.picture())
            # Whoever is denied loses what is open, without a reload.
            denied = file.with_name("keys.toml.denied")
            done = CliRunner().invoke(cli.app, ["keys", "deny", "localhost", str(denied)])
            assert done.exit_code == 0, done.output
            with pytest.raises(facelane.AuthenticationError):
                list(stream)
        with pytest.raises(facelane.AuthenticationError):
            client.server_info()
    assert "others are denied" in server.text()


def test_certificates_that_cannot_be_read(start: Start, tmp_path: Path) -> None:
    server = start(edit=lambda text: tls_text(text, tmp_path, mutual=False), wait=False)
    assert server.process.wait(30) == 78
    assert "tls.cert_file" in server.text()
    assert "Traceback" not in server.text()


def test_a_renewed_certificate_is_presented_after_a_reload(
    start: Start, certificates: Path, tmp_path: Path
) -> None:
    for name in ("server.pem", "server.key"):
        shutil.copy(certificates / name, tmp_path)
    port = free_port()
    server = start(
        THREAD_POOLS,
        listen=f"127.0.0.1:{port}",
        edit=lambda text: tls_text(text, tmp_path, mutual=False) + OPEN,
        wait=False,
    )
    target = f"localhost:{port}"
    ours = facelane.Tls(ca_file=certificates / "ca.pem")
    renewed = facelane.Tls(ca_file=certificates / "stranger.pem")
    nowhere = (facelane.UnavailableError, facelane.DeadlineExceededError)
    wait_process(target, "", ours)

    def reloads() -> list[tuple[list[str], list[str]]]:
        read = [line for line in server.lines() if line["event"] == "config reloaded"]
        return [(line["applied"], line["needs_restart"]) for line in read]

    def refused(tls: facelane.Tls) -> None:
        with facelane.Client(target, tls=tls, timeout=3) as client, pytest.raises(nowhere):
            client.server_info()

    with facelane.Client(target, tls=ours) as open_before:
        open_before.server_info()
        refused(renewed)
        server.process.send_signal(signal.SIGHUP)
        until(
            lambda: reloads() == [(["auth", "log", "liveness"], [])],
            what="a reload that changes nothing",
        )
        for name in ("pem", "key"):
            shutil.copy(certificates / f"stranger.{name}", tmp_path / f"server.{name}")
        server.process.send_signal(signal.SIGHUP)
        until(lambda: len(reloads()) == 2, what="the second reload")
        assert reloads()[-1] == (["auth", "log", "liveness", "tls"], [])
        wait_process(target, "", renewed)
        refused(ours)
        # A connection that was open is left alone.
        open_before.server_info()
    (tmp_path / "server.pem").write_text("garbage")
    server.process.send_signal(signal.SIGHUP)
    until(lambda: len(reloads()) == 3, what="the third reload")
    assert reloads()[-1] == (["auth", "log", "liveness"], [])
    assert "holds no certificate" in server.text()
    wait_process(target, "", renewed)


def test_a_taken_port_is_told(start: Start) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        server: RunningServer = start(
            listen=f"127.0.0.1:{taken.getsockname()[1]}",
            edit=lambda text: text + OPEN,
            wait=False,
        )
        assert server.process.wait(30) == 69  # it may be free later: systemd tries again
    assert "cannot listen" in server.text()
    assert "Traceback" not in server.text()


@pytest.mark.slow
def test_clients_of_several_servers_go_to_those_that_can_analyse(
    start: Start, certificates: Path, tmp_path: Path
) -> None:
    """Two servers over TLS with keys; the detector of one is gone for good. It answers, and a
    stream that it were given would bring errors."""
    file = tmp_path / "keys.toml"
    keys = {name: new_key(file, name, name) for name in ("analyze", "admin")}
    tls = facelane.Tls(ca_file=certificates / "ca.pem")
    addresses = [f"127.0.0.1:{free_port()}" for _ in range(2)]
    detector = 'model = "null-detector"'
    for address in addresses:
        start(
            listen=address,
            edit=lambda text: with_keys(tls_text(text, certificates, mutual=False), file).replace(
                detector, f"{detector}\nrestart_limit = 1\nquarantine_s = 3600"
            ),
            wait=False,
        )
        wait_process(address, keys["analyze"], tls)
    named = facelane.Tls(ca_file=certificates / "ca.pem", server_name="localhost")
    with (
        facelane.Client(f"ipv4:{','.join(addresses)}", token=keys["analyze"], tls=named) as both,
        facelane.Client(addresses[1], token=keys["admin"], tls=tls) as ill,
    ):

        def results() -> list[bool]:
            """Of eight streams, one after the other."""
            return [
                isinstance(outcome.body, facelane.FrameResult)
                for _ in range(8)
                for outcome in both.analyze([wire.picture()])
            ]

        until(lambda: both.server_info().open_streams == 0 and all(results()))
        pool = next(one for one in ill.pools() if one.pool == "detector")
        for _ in range(2):
            os.kill(pool.workers[0].pid, signal.SIGKILL)
            before = pool.workers[0].pid

            def gone(before: int = before) -> bool:
                worker = next(p for p in ill.pools() if p.pool == "detector").workers[0]
                return worker.pid != before or worker.state == "QUARANTINED"

            until(gone, what="the loss")
            pool = next(one for one in ill.pools() if one.pool == "detector")
            if pool.workers[0].state == "QUARANTINED":
                break
            until(lambda: ill.health() == "SERVING", what="the worker's return")
            pool = next(one for one in ill.pools() if one.pool == "detector")
        assert ill.health("facelane.v1.AnalysisService") == "NOT_SERVING"
        with ill.analyze_stream() as stream:
            stream.send(wire.picture())
            stream.close_send()
            assert not any(isinstance(one.body, facelane.FrameResult) for one in stream)
        until(lambda: all(results()), what="streams to go to the other alone")
        assert all(results())


def test_health_is_not_offered_to_strangers_who_choose_by_it(
    start: Start, certificates: Path, tmp_path: Path
) -> None:
    """gRPC's clients take UNIMPLEMENTED for "not offered"; any other status would end their use of
    a server to which their calls may well have a key."""
    file = tmp_path / "keys.toml"
    key = new_key(file, "analyze", "analyze")
    address = f"127.0.0.1:{free_port()}"
    start(THREAD_POOLS, listen=address, edit=lambda text: with_keys(text, file), wait=False)
    wait_process(address, key)
    with wire.channel(address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch
        with pytest.raises(grpc.RpcError) as error:
            next(watch(health_pb2.HealthCheckRequest(), timeout=30))
        assert error.value.code() is grpc.StatusCode.UNIMPLEMENTED
        assert wire.refusal(error.value)[1] == "UNAUTHENTICATED"
    # Over plain text the connection has no key of its own; calls, which have theirs, go through.
    with facelane.Client(f"ipv4:{address},{address}", token=key) as client:
        assert client.analyze_image(wire.picture()) is not None
