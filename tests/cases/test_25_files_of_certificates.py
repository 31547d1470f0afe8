"""Certificates that gRPC takes without a word, and then reaches nobody with, are told at once."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

import facelane
from facelane import Tls
from tests.cases.cameras import certificate

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl command here")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tls")
    certificate(folder, "door")
    certificate(folder, "other")
    subprocess.run(
        ["openssl", "pkey", "-in", "door.key", "-aes256", "-passout", "pass:x", "-out", "safe.key"],
        cwd=folder, check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    lines = (folder / "door.crt").read_text().splitlines()
    (folder / "cut.crt").write_text("\n".join([*lines[:3], lines[-1]]))
    (folder / "both.pem").write_bytes(
        (folder / "door.key").read_bytes() + (folder / "door.crt").read_bytes()
    )
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:1024", "-nodes", "-keyout", "weak.key", "-out",
         "weak.crt", "-days", "30", "-subj", "/CN=weak"],
        cwd=folder, check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    return folder


@pytest.mark.parametrize(
    ("ca", "cert", "key", "says"),
    [
        ("door.key", "", "", "door.key has no certificate"),
        ("cut.crt", "", "", "cut.crt holds no usable certificate"),
        ("", "door.key", "door.crt", "door.crt has no private key"),
        ("", "door.crt", "door.crt", "door.crt has no private key"),
        ("", "door.crt", "other.key", r"other.key is not the key of the certificate in .*door.crt"),
        ("door.crt", "door.crt", "safe.key", "safe.key is protected by a passphrase"),
        ("", "cut.crt", "door.key", r"door.key cannot be used with .*cut.crt"),
    ],
)
def test_what_is_wrong_is_told_before_anything_is_called(
    files: Path, ca: str, cert: str, key: str, says: str
) -> None:
    tls = Tls(*(files / name if name else None for name in (ca, cert, key)))
    with pytest.raises(facelane.ArgumentError, match=says):
        facelane.Client("door:443", tls=tls)


@pytest.mark.parametrize(
    ("cert", "key"), [("door.crt", "door.key"), ("both.pem", "both.pem"), ("weak.crt", "weak.key")]
)
def test_what_is_right_passes(files: Path, cert: str, key: str) -> None:
    """How strong a key has to be is not for this to say."""
    facelane.Client("door:443", tls=Tls(files / cert, files / cert, files / key)).close()
