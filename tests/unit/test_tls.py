"""Certificates are judged before gRPC sees them, in words that say what is wrong."""

from __future__ import annotations

import shutil
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from facelane_server import config
from facelane_server.config import ConfigError, Tls
from facelane_server.doctor import installation
from facelane_server.doctor.report import Finding, Status
from facelane_server.edge.tls import Certificates, Presented

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl command here")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate (own.pem) with its key, one that expired, another's key, a locked key."""
    folder = tmp_path_factory.mktemp("tls")

    def openssl(*arguments: str) -> None:
        subprocess.run(
            ["openssl", *arguments], cwd=folder, check=True, capture_output=True, timeout=60
        )

    curve = ("-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:prime256v1")
    for name in ("own", "other"):
        openssl("genpkey", *curve, "-out", f"{name}.key")
    openssl("pkey", "-in", "own.key", "-aes128", "-passout", "pass:door", "-out", "locked.key")
    openssl("req", "-new", "-key", "own.key", "-subj", "/CN=door", "-out", "own.csr")
    for name, days in (("own", "90"), ("soon", "2"), ("expired", "-1")):
        openssl("x509", "-req", "-in", "own.csr", "-signkey", "own.key", "-days", days,
                "-out", f"{name}.pem")  # fmt: skip
    (folder / "names").write_text(
        "subjectAltName = DNS:door.example, DNS:*.cameras.example, IP:10.0.0.7, IP:::1\n"
    )
    openssl("x509", "-req", "-in", "own.csr", "-signkey", "own.key", "-days", "90",
            "-extfile", "names", "-out", "named.pem")  # fmt: skip
    (folder / "garbage.pem").write_text("garbage")
    (folder / "broken.pem").write_text(
        "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"
    )
    return folder


def section(folder: Path, chain: str = "own.pem", key: str = "own.key", ca: str = "") -> Tls:
    return Tls(
        cert_file=str(folder / chain),
        key_file=str(folder / key),
        client_ca_file=str(folder / ca) if ca else "",
    )


def test_what_is_in_order(made: Path) -> None:
    assert Certificates.read(Tls()) is None
    read = Certificates.read(section(made, ca="own.pem"))
    assert read is not None
    assert read.client_ca == read.chain == (made / "own.pem").read_bytes()
    assert read == Certificates.read(section(made, ca="own.pem"))
    assert read != Certificates.read(section(made, chain="soon.pem", ca="own.pem"))
    assert Presented(read).credentials() is not None
    facts = read.facts()
    assert not facts.problem
    assert timedelta(days=89) < facts.ends - datetime.now(UTC) < timedelta(days=91)
    assert facts.names == ()
    named = Certificates.read(section(made, chain="named.pem"))
    assert named is not None
    assert named.facts().names == ("door.example", "*.cameras.example", "10.0.0.7", "::1")


@pytest.mark.parametrize(
    ("chain", "key", "ca", "says"),
    [
        ("absent.pem", "own.key", "", r"tls\.cert_file .*absent\.pem: cannot be read: No such"),
        ("own.pem", "absent.key", "", r"tls\.key_file .*absent\.key: cannot be read: No such"),
        ("garbage.pem", "own.key", "", r"tls\.cert_file .* holds no certificate in PEM"),
        ("own.pem", "garbage.pem", "", r"tls\.key_file .* holds no private key in PEM"),
        ("own.key", "own.pem", "", r"tls\.cert_file .* holds no certificate in PEM"),
        ("broken.pem", "own.key", "", r"tls\.cert_file .*no usable certificate"),
        ("own.pem", "other.key", "", r"is not the key of the certificate"),
        ("own.pem", "locked.key", "", r"passphrase.*openssl pkey"),
        ("own.pem", "own.key", "absent.pem", r"tls\.client_ca_file .*cannot be read"),
        ("own.pem", "own.key", "garbage.pem", r"tls\.client_ca_file .*no certificate in PEM"),
        ("own.pem", "own.key", "broken.pem", r"tls\.client_ca_file .*no usable certificate"),
    ],
)
def test_what_cannot_be_used(made: Path, chain: str, key: str, ca: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Certificates.read(section(made, chain, key, ca))


def test_an_expired_certificate_can_be_read_and_is_told(made: Path) -> None:
    read = Certificates.read(section(made, chain="expired.pem"))
    assert read is not None
    assert "has expired" in read.facts().problem


@pytest.mark.parametrize(
    ("host", "covered"),
    [
        ("door.example", True),
        ("DOOR.example.", True),
        ("hall.cameras.example", True),
        ("a.hall.cameras.example", False),
        ("cameras.example", False),
        ("10.0.0.7", True),
        ("0:0::1", True),
        ("10.0.0.8", False),
        ("example", False),
    ],
)
def test_whom_a_certificate_is_for(made: Path, host: str, covered: bool) -> None:
    read = Certificates.read(section(made, chain="named.pem"))
    assert read is not None
    assert read.facts().covers(host) is covered


def test_the_doctor_looks_at_certificates(made: Path) -> None:
    def check(chain: str, key: str = "own.key", listen: str = "door.example:50151") -> Finding:
        server = config.Server(listen=listen)
        return installation.check_tls(config.Config(server=server, tls=section(made, chain, key)))

    (made / "own.key").chmod(0o600)
    good = check("named.pem")
    assert (good.status, good.advice) == (Status.OK, "")
    assert "valid until" in good.detail
    for listen in ("10.0.0.7:1", "[::1]:1", "hall.cameras.example:1"):
        assert check("named.pem", listen=listen).status is Status.OK, listen
    elsewhere = check("named.pem", listen="10.0.0.8:1")
    assert elsewhere.status is Status.WARN
    assert "not for 10.0.0.8" in elsewhere.detail
    assert "door.example" in elsewhere.advice
    assert check("named.pem", listen="0.0.0.0:1").status is Status.WARN
    nameless = check("own.pem")
    assert "no alternative names" in nameless.detail
    assert check("expired.pem").status is Status.FAIL
    assert check("soon.pem").status is Status.WARN
    assert check("named.pem", "other.key").status is Status.FAIL
    (made / "own.key").chmod(0o644)
    assert check("named.pem").advice == f"chmod 600 {made / 'own.key'}"
