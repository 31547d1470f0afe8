"""How the commands reach a server that asks who they are, and that is called otherwise."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from tests.fakes import scripted_server as fake
from typer.testing import CliRunner

import facelane
from facelane.cli.app import app

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl command here")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority (ca), and under it ``server``, for door.example, and ``client``."""
    folder = tmp_path_factory.mktemp("tls")

    def openssl(*arguments: str) -> None:
        subprocess.run(
            ["openssl", *arguments], cwd=folder, check=True, capture_output=True, timeout=60
        )

    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    openssl("req", "-x509", *curve, "-keyout", "ca.key", "-out", "ca.pem", "-days", "2",
            "-subj", "/CN=authority")  # fmt: skip
    (folder / "names").write_text("subjectAltName=DNS:door.example\n")
    for name in ("server", "client"):
        openssl("req", "-new", *curve, "-keyout", f"{name}.key", "-out", f"{name}.csr",
                "-subj", f"/CN={name}")  # fmt: skip
        openssl("x509", "-req", "-in", f"{name}.csr", "-out", f"{name}.pem", "-days", "2",
                "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial",
                "-extfile", "names")  # fmt: skip
    return folder


@pytest.fixture
def server(made: Path) -> Iterator[fake.ScriptedServer]:
    pair = ((made / "server.key").read_bytes(), (made / "server.pem").read_bytes())
    credentials = grpc.ssl_server_credentials(
        [pair], root_certificates=(made / "ca.pem").read_bytes(), require_client_auth=True
    )
    with fake.ScriptedServer(credentials=credentials) as running:
        yield running


def run(server: fake.ScriptedServer, *words: object) -> Any:
    start = ["--target", server.target, "--timeout", "20", *map(str, words)]
    return CliRunner().invoke(app, [*start, "server", "health"], prog_name="facelane")


def test_a_certificate_of_the_client_and_the_server_s_name(
    server: fake.ScriptedServer, made: Path
) -> None:
    who = ("--client-cert", made / "client.pem", "--client-key", made / "client.key")
    authority = ("--tls-ca", made / "ca.pem")
    named = ("--server-name", "door.example")
    assert run(server, *authority, *who, *named).stdout == "SERVING\n"
    # The server's own certificate in place of an authority: that one, and no other.
    assert run(server, "--tls-ca", made / "server.pem", *who, *named).stdout == "SERVING\n"
    other = made / "client.pem"
    for wrong in ((*authority, *who), (*authority, *named), ("--tls-ca", other, *who, *named)):
        refused = run(server, "--timeout", "2", *wrong)
        assert refused.exit_code == 4, refused.stderr
        assert "UNREACHABLE" in refused.stderr or "DEADLINE_EXCEEDED" in refused.stderr
    assert run(server, *authority, *who[:2]).exit_code == 2
    assert run(server, "--tls").exit_code == 4


def test_what_the_environment_says_holds_for_library_and_command(
    server: fake.ScriptedServer, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (
        ("CA", made / "ca.pem"),
        ("CERT", made / "client.pem"),
        ("KEY", made / "client.key"),
        ("SERVER_NAME", "door.example"),
    ):
        monkeypatch.setenv(f"FACELANE_TLS_{name}", str(value))
    assert run(server).stdout == "SERVING\n"
    with facelane.Client(server.target, timeout=20) as client:
        assert client.health() == "SERVING"
