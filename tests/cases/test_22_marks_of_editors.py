"""Files of the client as editors of Windows save them: with a byte order mark, with CRLF, in
UTF-16."""

from __future__ import annotations

import codecs
import shutil
import subprocess
from pathlib import Path

import grpc
import pytest

import facelane
from facelane.transport import read_token
from tests.fakes import scripted_server as fake


@pytest.mark.parametrize(
    "content",
    [
        b"s3cret\n",
        codecs.BOM_UTF8 + b"s3cret",
        codecs.BOM_UTF8 + b"s3cret\r\n",
        "\ufeffs3cret\r\n".encode("utf-16-le"),
        codecs.BOM_UTF16_BE + "s3cret".encode("utf-16-be"),
    ],
)
def test_a_token_file(content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "token.txt"
    path.write_bytes(content)
    assert read_token(path) == "s3cret"
    monkeypatch.setenv("FACELANE_TOKEN_FILE", str(path))
    with fake.ScriptedServer(token="s3cret") as server, facelane.Client(server.target) as client:
        client.server_info()


@pytest.mark.parametrize("end", ["\r", "\r\n", " "])
def test_variables_of_an_env_file(
    end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a file of Windows has it, or a hand that typed on."""
    (tmp_path / "token").write_text("s3cret")
    with fake.ScriptedServer(token="s3cret", address=f"unix:{tmp_path}/s.sock") as server:
        monkeypatch.setenv("FACELANE_TARGET", server.target + end)
        monkeypatch.setenv("FACELANE_TOKEN_FILE", f"{tmp_path}/token{end}")
        with facelane.Client(timeout=30) as client:
            client.server_info()
    monkeypatch.setenv("FACELANE_TLS_CA", f"{tmp_path}/token{end}")
    with pytest.raises(facelane.ArgumentError, match="token is not PEM"):
        facelane.Client()


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl command here")
def test_certificates(tmp_path: Path) -> None:
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
         "-nodes", "-days", "2", "-subj", "/CN=door", "-addext", "subjectAltName=DNS:door",
         "-keyout", "key.pem", "-out", "cert.pem"],
        cwd=tmp_path, check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    pair = ((tmp_path / "key.pem").read_bytes(), (tmp_path / "cert.pem").read_bytes())
    credentials = grpc.ssl_server_credentials([pair], pair[1], require_client_auth=True)
    for name in ("key.pem", "cert.pem"):
        path = tmp_path / name
        path.write_bytes(codecs.BOM_UTF8 + path.read_bytes().replace(b"\n", b"\r\n"))
    tls = facelane.Tls(tmp_path / "cert.pem", tmp_path / "cert.pem", tmp_path / "key.pem", "door")
    with (
        fake.ScriptedServer(credentials=credentials) as server,
        facelane.Client(server.target, tls=tls, timeout=30) as client,
    ):
        assert client.health() == "SERVING"
