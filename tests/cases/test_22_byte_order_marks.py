"""Files of people that begin with a byte order mark are read as if it was not there."""

from __future__ import annotations

import codecs
import shutil
import ssl
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from facelane_bridge import config as bridge_config
from facelane_events import config as events_config
from facelane_server import config
from facelane_server.edge.auth import new_key, read_keys
from facelane_server.edge.tls import Certificates, Presented
from facelane_server.models.catalog import Catalog
from facelane_server.models.package import read_package
from facelane_server.store.masterkey import Source
from tests.cases.cameras import certificate


def marked(path: Path, text: str) -> Path:
    path.write_bytes(codecs.BOM_UTF8 + text.encode())
    return path


def test_the_servers_configuration(tmp_path: Path) -> None:
    path = marked(tmp_path / "server.toml", '[server]\nlisten = "unix:/run/x.sock"\n')
    assert config.load(path).server.listen == "unix:/run/x.sock"


def test_keys(tmp_path: Path) -> None:
    _, made = new_key("door", ("analyze",))
    [key] = read_keys(marked(tmp_path / "keys.toml", made.entry()))
    assert key.name == "door"


def test_a_model_package(tmp_path: Path) -> None:
    folder = tmp_path / "null-recognizer"
    shutil.copytree(Catalog().resolve("null-recognizer").folder, folder)
    manifest = folder / "model.toml"
    marked(manifest, manifest.read_text())
    assert read_package(folder).name == "null-recognizer"


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl command here")
@pytest.mark.parametrize("name", ["localhost.crt", "localhost.key"])
def test_the_servers_certificate(name: str, tmp_path: Path) -> None:
    chain, key = certificate(tmp_path, "localhost", "-addext", "subjectAltName=DNS:localhost")
    original = chain.read_bytes()
    marked(tmp_path / name, (tmp_path / name).read_text())
    read = Certificates.read(config.Tls(cert_file=str(chain), key_file=str(key)))
    assert read is not None
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_secure_port("localhost:0", Presented(read).credentials())
    server.start()
    try:
        shown = ssl.get_server_certificate(("localhost", port), timeout=60)
        assert ssl.PEM_cert_to_DER_cert(shown) == ssl.PEM_cert_to_DER_cert(original.decode())
    finally:
        server.stop(None)


def test_the_master_key(tmp_path: Path) -> None:
    path = marked(tmp_path / "master.key", "0f" * 32 + "\r\n")
    path.chmod(0o600)
    [marks] = Source(f"file:{path}", tmp_path).read()
    path.write_text("0f" * 32)
    [plain] = Source(f"file:{path}", tmp_path).read()
    assert marks.name == plain.name


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_secrets_of_those_who_are_told_of_events(encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "secret.txt"
    path.write_bytes("pass wörd\r\n".encode(encoding))
    assert events_config.secret(str(path)) == "pass wörd"


def test_the_bridges_configuration(tmp_path: Path) -> None:
    path = marked(tmp_path / "bridge.toml", '[[camera]]\nname = "a"\nsource = "rtsp://c/1"\n')
    assert bridge_config.load(path).cameras[0].name == "a"


def test_another_encoding_is_told_and_not_guessed(tmp_path: Path) -> None:
    path = tmp_path / "server.toml"
    path.write_bytes("[server]\n".encode("utf-16"))
    with pytest.raises(config.ConfigError, match="not UTF-8"):
        config.load(path)
