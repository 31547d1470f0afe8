"""Keys, scopes and refusals."""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec
import pytest
from structlog.testing import capture_logs

from facelane_server import config
from facelane_server.config import ConfigError
from facelane_server.domain import FacelaneError, Reason
from facelane_server.edge.auth import Authenticator, new_key, read_keys
from facelane_server.edge.health import SERVICES


def authenticator(tmp_path: Path, *scopes: str) -> tuple[Authenticator, str]:
    secret, entry = new_key("k", scopes)  # type: ignore[arg-type]
    file = tmp_path / "keys.toml"
    file.write_text(entry)
    settings = msgspec.convert({"auth": {"mode": "keys", "keys_file": str(file)}}, config.Config)
    return Authenticator.of(settings), secret


def refused(made: Authenticator, method: str, header: str | None) -> Reason | None:
    try:
        made.check(method, {} if header is None else {"authorization": header})
    except FacelaneError as error:
        return error.reason
    return None


def test_a_key_file_holds_the_hash_alone(tmp_path: Path) -> None:
    made, secret = authenticator(tmp_path, "analyze")
    (key,) = read_keys(tmp_path / "keys.toml")
    assert key.sha256 == hashlib.sha256(secret.encode()).hexdigest()
    assert made.required
    assert new_key("a", ())[0] != new_key("a", ())[0]
    assert len(secret) > 40


@pytest.mark.parametrize("name", ["", "front door", 'a"b', "a\nb", "x" * 65, "größe"])
def test_a_name_that_the_file_could_not_hold(name: str) -> None:
    with pytest.raises(ValueError, match="A-Z a-z 0-9"):
        new_key(name, ("analyze",))


def test_who_administers_is_logged(tmp_path: Path) -> None:
    made, secret = authenticator(tmp_path, "admin")
    with capture_logs() as logs:
        made.check("/facelane.v1.AdminService/Drain", {"authorization": f"Bearer {secret}"})
        made.check(
            "/facelane.v1.GalleryService/ListSubjects", {"authorization": f"Bearer {secret}"}
        )
    [line] = logs
    assert (line["event"], line["key"]) == ("administered", "k")
    assert line["method"] == "/facelane.v1.AdminService/Drain"
    assert secret not in str(logs)


def test_what_counts_as_a_key(tmp_path: Path) -> None:
    made, secret = authenticator(tmp_path, "analyze")
    method = "/facelane.v1.AnalysisService/AnalyzeImage"
    assert refused(made, method, f"Bearer {secret}") is None
    assert refused(made, method, f"bearer {secret}") is None
    for header in (None, "", "Bearer", "Bearer ", secret, f"Basic {secret}", f"Bearer  {secret}",
                   f"Bearer {secret} ", "Bearer é"):  # fmt: skip
        assert refused(made, method, header) is Reason.UNAUTHENTICATED, header


@pytest.mark.parametrize("service", SERVICES)
@pytest.mark.parametrize("scope", ["analyze", "gallery", "admin"])
def test_scopes(tmp_path: Path, service: str, scope: str) -> None:
    made, secret = authenticator(tmp_path, scope)
    needs = {
        "facelane.v1.AnalysisService": "analyze",
        "facelane.v1.EventService": "analyze",
        "facelane.v1.GalleryService": "gallery",
        "facelane.v1.AdminService": "admin",
        "facelane.v1.ServerService": None,
    }[service]
    allowed = needs is None or scope in (needs, "admin")
    answer = refused(made, f"/{service}/Anything", f"Bearer {secret}")
    assert answer is (None if allowed else Reason.PERMISSION_DENIED)


def test_a_service_that_nobody_thought_of_is_the_administrators(tmp_path: Path) -> None:
    made, secret = authenticator(tmp_path, "analyze", "gallery")
    header = f"Bearer {secret}"
    assert refused(made, "/facelane.v2.New/Call", header) is Reason.PERMISSION_DENIED
    assert refused(made, "/grpc.health.v1.Health/Check", header) is None
    assert refused(made, "/grpc.reflection.v1alpha.ServerReflection/X", header) is None


def test_without_keys_everybody_may() -> None:
    made = Authenticator.of(config.Config())
    assert not made.required
    assert refused(made, "/facelane.v1.AdminService/Drain", None) is None


def test_keys_on_loopback_count_when_a_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(new_key("k", ("admin",))[1])
    text = f'[auth]\nkeys_file = "{file}"'
    assert Authenticator.of(config.parse(text)).required
    assert not Authenticator.of(config.parse(text + '\nmode = "none"')).required


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "holds no keys"),
        ("[[keys]", "Expected"),
        ('[[keys]]\nname = "a"\nsha256 = "00"\nscopes = []', "regex"),
        ('[[keys]]\nname = "a b"\nsha256 = "' + "0" * 64 + '"\nscopes = []', "regex"),
        ('[[keys]]\nname = "a"\nsha256 = "' + "0" * 64 + '"\nscopes = ["root"]', "root"),
        ('[[keys]]\nname = "a"\nsha256 = "' + "0" * 64 + '"\nscope = []', "scope"),
        ("[[key]]\n", "key"),
    ],
)
def test_key_files_that_cannot_be_used(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=says) as wrong:
        read_keys(file)
    assert str(file) in str(wrong.value)


def test_a_key_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_keys(tmp_path / "absent.toml")
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError):
        read_keys(binary)
