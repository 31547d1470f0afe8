"""Keys, scopes and refusals."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pytest
from structlog.testing import capture_logs

from facelane_server import config
from facelane_server.config import ConfigError
from facelane_server.domain import FacelaneError, Reason
from facelane_server.edge.auth import ANYBODY, Authenticator, Caller, Key, new_key, read_keys
from facelane_server.edge.health import SERVICES


def authenticator(tmp_path: Path, *scopes: str) -> tuple[Authenticator, str]:
    secret, key = new_key("k", scopes)  # type: ignore[arg-type]
    file = tmp_path / "keys.toml"
    file.write_text(key.entry())
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
    file.write_text(new_key("k", ("admin",))[1].entry())
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
        ("a = " + "[" * 9_999, "nested too deeply"),
        (
            '[[keys]]\nname = "a"\nsha256 = "' + "0" * 64 + '"\nscopes = []\nexpires = 2030-01-01',
            "expires",
        ),
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


def method(service: str) -> str:
    return f"/facelane.v1.{service}/Anything"


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    until = datetime(2031, 5, 1, tzinfo=UTC)
    _, key = new_key("k", ("analyze",), sources=("door-*",), galleries=("staff",), expires=until)
    full = msgspec.structs.replace(key, weight=30, streams=200)
    file = tmp_path / "keys.toml"
    file.write_text(full.entry())
    assert read_keys(file) == (full,)
    for wrong in ('a"b', "a\nb", "", "x" * 129):
        with pytest.raises(ValueError, match="1-128"):
            new_key("k", (), sources=(wrong,))


def test_a_key_that_has_expired_is_no_key() -> None:
    past = datetime.now(UTC) - timedelta(seconds=1)
    secret, key = new_key("k", ("analyze",), expires=past)
    made = Authenticator((key,))
    assert refused(made, method("AnalysisService"), f"Bearer {secret}") is Reason.UNAUTHENTICATED
    assert key.expired
    assert not new_key("k", (), expires=past + timedelta(hours=1))[1].expired


def test_what_ends_a_call_that_was_let_in(tmp_path: Path) -> None:
    _, key = new_key("k", ("analyze", "gallery"))
    call = method("AnalysisService")

    def after(*keys: Key) -> Reason | None:
        try:
            Authenticator(keys).recheck(call, Caller(key))
        except FacelaneError as error:
            return error.reason
        return None

    changed = msgspec.structs.replace
    assert after(key) is None
    assert after(changed(key, scopes=("analyze", "gallery", "scores"))) is None, "it may more"
    assert after(changed(key, scopes=("admin",))) is None
    assert after(changed(key, name="renamed")) is None
    assert after() is Reason.UNAUTHENTICATED
    assert after(changed(key, expires=datetime(2020, 1, 1, tzinfo=UTC))) is Reason.UNAUTHENTICATED
    assert after(changed(key, scopes=("gallery",))) is Reason.PERMISSION_DENIED
    assert after(changed(key, scopes=("analyze",))) is Reason.PERMISSION_DENIED, "it may less"
    assert after(changed(key, sources=("door",))) is Reason.PERMISSION_DENIED
    Authenticator(None).recheck(call, Caller(key))
    with pytest.raises(FacelaneError):
        Authenticator((key,)).recheck(call, ANYBODY)


def test_what_a_bound_key_hears() -> None:
    def hears(source: str, gallery: str, **bound: tuple[str, ...]) -> bool:
        return Caller(Key("k", "0" * 64, ("analyze",), **bound)).may_hear(source, gallery)  # type: ignore[arg-type]

    assert hears("", "")
    assert ANYBODY.may_hear("", "")
    assert hears("door-1", "staff", sources=("door-*",))
    assert not hears("vault", "staff", sources=("door-*",))
    assert not hears("", "", sources=("door-*",)), "pools and devices"
    assert hears("door-1", "", sources=("door-*",), galleries=("staff",)), "a stream that opened"
    assert not hears("door-1", "board", sources=("door-*",), galleries=("staff",))
    assert not hears("", "", galleries=("staff",))


def test_liveness_is_waived_by_name_alone() -> None:
    def waives(*scopes: str) -> bool:
        return Caller(Key("k", "0" * 64, scopes)).waives_liveness  # type: ignore[arg-type]

    assert waives("gallery", "waive-liveness")
    assert not waives("admin")
    assert not ANYBODY.waives_liveness
