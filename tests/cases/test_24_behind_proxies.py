"""Behind nginx and HAProxy: the examples of deploy/ carry streams of any size, and what a proxy's
own limits do to a stream is told in words that lead there."""

from __future__ import annotations

import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

import facelane
from tests.fakes import scripted_server as fake
from tests.running_server import free_port
from tests.waiting import until

ROOT = Path(__file__).resolve().parent.parent.parent
PICTURE = facelane.Picture.encoded(b"\xff\xd8\xff\xe0" + bytes(300_000))
PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
needs = {
    name: pytest.mark.skipif(
        shutil.which(name, path=PATH) is None, reason=f"no {name} here: apt-get install {name}"
    )
    for name in ("nginx", "haproxy", "openssl")
}


@pytest.fixture(scope="module")
def server() -> Iterator[fake.ScriptedServer]:
    with fake.ScriptedServer() as made:
        made.events_stay_open = True
        yield made


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tls")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
         "-nodes", "-days", "2", "-subj", "/CN=facelane.example", "-addext",
         "subjectAltName=DNS:facelane.example", "-keyout", "server.key", "-out", "server.pem"],
        cwd=folder, check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    both = (folder / "server.pem").read_bytes() + (folder / "server.key").read_bytes()
    (folder / "server-with-key.pem").write_bytes(both)
    return folder


def swap(text: str, swaps: dict[str, str]) -> str:
    for old, new in swaps.items():
        assert old in text, f"the example does not say {old!r} any more"
        text = text.replace(old, new)
    return text


@contextmanager
def running(words: list[str], port: int, folder: Path) -> Iterator[str]:
    """A proxy in the foreground, once it listens; its target."""
    with (folder / "log").open("w+") as log:
        process = subprocess.Popen(words, stdout=log, stderr=log, env={"PATH": PATH}, cwd=folder)

        def listens() -> bool:
            assert process.poll() is None, (folder / "log").read_text()
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", port)) == 0

        try:
            until(listens, what="the proxy listens")
            yield f"127.0.0.1:{port}"
        finally:
            process.kill()
            process.wait(30)


@contextmanager
def nginx(block: str, port: int, folder: Path) -> Iterator[str]:
    """``block`` is what stands in ``http``."""
    paths = "\n".join(
        f"{kind}_temp_path {folder}/{kind};"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (folder / "nginx.conf").write_text(
        f"daemon off; master_process off; pid {folder}/pid; error_log stderr;\n"
        f"events {{}}\nhttp {{ access_log off; {paths}\n{block}\n}}\n"
    )
    words = [shutil.which("nginx", path=PATH) or "", "-e", "stderr", "-p", str(folder)]
    with running([*words, "-c", str(folder / "nginx.conf")], port, folder) as target:
        yield target


@contextmanager
def haproxy(text: str, port: int, folder: Path) -> Iterator[str]:
    (folder / "haproxy.cfg").write_text(text)
    words = [shutil.which("haproxy", path=PATH) or "", "-db", "-f", str(folder / "haproxy.cfg")]
    with running(words, port, folder) as target:
        yield target


@contextmanager
def nginx_example(server: fake.ScriptedServer, tls: Path, folder: Path) -> Iterator[str]:
    port = free_port()
    text = swap(
        (ROOT / "deploy/nginx/facelane.conf").read_text(),
        {
            "listen 443": f"listen 127.0.0.1:{port}",
            "unix:/run/facelane/grpc.sock": server.target,
            "/etc/facelane/tls": str(tls),
        },
    )
    with nginx(text, port, folder) as target:
        yield target


@contextmanager
def haproxy_example(server: fake.ScriptedServer, tls: Path, folder: Path) -> Iterator[str]:
    port = free_port()
    text = swap(
        (ROOT / "deploy/haproxy/haproxy.cfg").read_text(),
        {
            "bind :443": f"bind 127.0.0.1:{port}",
            "unix@/run/facelane/grpc.sock": server.target,
            "/etc/facelane/tls": str(tls),
        },
    )
    with haproxy(text, port, folder) as target:
        yield target


@needs["openssl"]
@pytest.mark.parametrize(
    "example",
    [
        pytest.param(nginx_example, marks=needs["nginx"]),
        pytest.param(haproxy_example, marks=needs["haproxy"]),
    ],
)
def test_the_examples_carry_everything(
    example: Callable[..., AbstractContextManager[str]],
    server: fake.ScriptedServer,
    tls: Path,
    tmp_path: Path,
) -> None:
    trust = facelane.Tls(ca_file=tls / "server.pem", server_name="facelane.example")
    with (
        example(server, tls, tmp_path) as target,
        facelane.Client(target, tls=trust, timeout=30) as client,
    ):
        assert client.health() == "SERVING"
        assert client.analyze_image(PICTURE).faces
        # More than any limit on one request's body.
        outcomes = list(client.analyze([PICTURE] * 40))
        assert [o.frame_id for o in outcomes if o.result] == list(range(1, 41))
        with client.watch_events() as events:
            kept = [next(events) for _ in range(server.event_burst)]
            assert kept[-1].resume_token
            # And on the same connection while the subscription is open.
            for _ in range(50):
                assert client.server_info().version
        with pytest.raises(facelane.NotFoundError) as caught:
            client.get_subject("nobody")
        assert caught.value.reason == "SUBJECT_NOT_FOUND"


def plain(port: int, server: fake.ScriptedServer, more: str = "") -> str:
    return (
        f"server {{ listen 127.0.0.1:{port} http2; {more} "
        f"location / {{ grpc_pass grpc://{server.target}; }} }}"
    )


@needs["nginx"]
def test_nginx_as_it_comes_breaks_streams_and_it_is_said(
    server: fake.ScriptedServer, tmp_path: Path
) -> None:
    port = free_port()
    with (
        nginx(plain(port, server), port, tmp_path) as target,
        facelane.Client(target, timeout=30) as client,
        pytest.raises(facelane.FacelaneError) as caught,
    ):
        for _ in client.analyze([PICTURE] * 40):
            pass
    assert isinstance(caught.value, facelane.ConnectionLostError)
    assert "a proxy on the way" in caught.value.message
    # gRPC's own words, and where to look.
    assert caught.value.metadata["grpc_message"] in caught.value.message
    assert len(caught.value.metadata["grpc_message"]) > 10


@needs["nginx"]
def test_a_stream_that_nginx_breaks_again_and_again_comes_back(
    server: fake.ScriptedServer, tmp_path: Path
) -> None:
    """Its waits grow all the same, see the stream's own tests."""
    port = free_port()
    policy = facelane.Reconnect(initial_delay=0.01, max_delay=0.1)
    with (
        nginx(plain(port, server), port, tmp_path) as target,
        facelane.Client(target, timeout=30) as client,
        client.analyze_stream(overload="lossless", reconnect=policy) as stream,
    ):
        while stream.summary.connections < 4:
            stream.send(PICTURE, timeout=60)
            assert stream.recv(30) is not None
        summary = stream.summary
    assert summary.results > 0
    assert summary.received == summary.results + summary.errors
    assert summary.errors == summary.lost


@needs["nginx"]
def test_a_server_that_nginx_does_not_reach(tmp_path: Path) -> None:
    port, nobody = free_port(), free_port()
    passing = f"location / {{ grpc_pass grpc://127.0.0.1:{nobody}; }}"
    block = f"server {{ listen 127.0.0.1:{port} http2; {passing} }}"
    with (
        nginx(block, port, tmp_path) as target,
        facelane.Client(target, timeout=5) as client,
        pytest.raises(facelane.UnavailableError, match="502"),
    ):
        client.server_info()


@needs["haproxy"]
def test_silence_that_haproxy_does_not_allow_is_said(
    server: fake.ScriptedServer, tmp_path: Path
) -> None:
    port = free_port()
    text = (
        "defaults\n mode http\n timeout connect 5s\n timeout client 1s\n timeout server 1s\n"
        f"frontend f\n bind 127.0.0.1:{port} proto h2\n default_backend b\n"
        f"backend b\n server s {server.target} proto h2\n"
    )
    with (
        haproxy(text, port, tmp_path) as target,
        facelane.Client(target, timeout=30) as client,
        client.watch_events() as events,
    ):
        for _ in range(server.event_burst):
            next(events)
        with pytest.raises(facelane.ConnectionLostError, match="a proxy on the way"):
            next(events)
