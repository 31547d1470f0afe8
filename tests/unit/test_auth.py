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
from facelane_server.edge.auth import (
    Authenticator,
    Certificate,
    Key,
    Peer,
    new_key,
    read_file,
    read_keys,
)
from facelane_server.edge.roles import ANYBODY, METHODS, SCOPE_VERBS, Role, Scope


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


@pytest.mark.parametrize("scope", ["analyze", "gallery", "admin"])
def test_scopes_of_before_stand_for_verbs(tmp_path: Path, scope: str) -> None:
    with capture_logs() as logs:
        made, secret = authenticator(tmp_path, scope)
    assert [line["keys"] for line in logs] == [["k"]]
    for method, rule in METHODS.items():
        allowed = rule.verb is None or rule.verb in SCOPE_VERBS[scope]  # type: ignore[index]
        answer = refused(made, method, f"Bearer {secret}")
        assert answer is (None if allowed else Reason.PERMISSION_DENIED), method


def test_a_method_that_nobody_thought_of_is_nobodys(tmp_path: Path) -> None:
    made, secret = authenticator(tmp_path, "admin")
    header = f"Bearer {secret}"
    for method in ("/facelane.v2.New/Call", "/facelane.v1.AdminService/Anything", "/", ""):
        assert refused(made, method, header) is Reason.PERMISSION_DENIED
    assert refused(made, "/grpc.health.v1.Health/Check", header) is None


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
        ("a = " + "1" * 5_000, "too many digits"),
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
    return next(name for name in METHODS if f".{service}/" in name)


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
            Authenticator(keys).recheck(call, key.caller())
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
    Authenticator(None).recheck(call, key.caller())
    with pytest.raises(FacelaneError):
        Authenticator((key,)).recheck(call, ANYBODY)


def test_what_a_bound_key_hears() -> None:
    def hears(source: str, gallery: str, sender: str = "other", **bound: tuple[str, ...]) -> bool:
        key = Key("k", "0" * 64, ("analyze",), **bound)  # type: ignore[arg-type]
        return key.caller().hears(source, gallery, sender)

    assert ANYBODY.hears("", "", "")
    assert hears("door-1", "staff", sources=("door-*",))
    assert not hears("vault", "staff", sources=("door-*",))
    assert not hears("vault", "staff", "k", sources=("door-*",)), "before it was bound"
    assert not hears("", "", sources=("door-*",)), "pools and devices"
    assert hears("door-1", "", sources=("door-*",), galleries=("staff",)), "a stream that opened"
    assert not hears("door-1", "board", sources=("door-*",), galleries=("staff",))
    assert not hears("", "", galleries=("staff",))


@pytest.mark.parametrize("scopes", [("analyze",), ("analyze", "gallery", "scores", "reassign")])
@pytest.mark.parametrize("galleries", [(), ("staff",)])
def test_a_camera_without_sources_hears_its_own_streams_alone(
    scopes: tuple[Scope, ...], galleries: tuple[str, ...]
) -> None:
    who = Key("k", "0" * 64, scopes, galleries=galleries).caller()
    assert who.hears("door", "staff", "k")
    assert who.hears("door", "", "k"), "its stream opened"
    assert not who.hears("door", "staff", "other")
    assert not who.hears("door", "", "other")
    assert not who.hears("door", "staff", ""), "of a time when nobody had a key"
    assert not who.hears("", "", ""), "pools and devices"
    assert who.hears("door", "board", "k") is (not galleries)
    admin = Key("k", "0" * 64, (*scopes, "admin")).caller()
    assert admin.hears("door", "staff", "other")
    assert not who.at_least(admin)
    wider = Key("k", "0" * 64, scopes, sources=("*",)).caller()
    assert wider.hears("door", "staff", "other"), "by an operator's word"


def test_a_role_hears_what_it_says() -> None:
    who = Key("k", "0" * 64, roles=("r",)).caller({"r": Role("r", ("events",))})
    assert who.hears("door", "staff", "other")
    assert who.hears("", "", "")


def test_liveness_is_waived_by_name_alone() -> None:
    def waives(*scopes: str) -> bool:
        return Key("k", "0" * 64, scopes).caller().may("waive-liveness")  # type: ignore[arg-type]

    assert waives("gallery", "waive-liveness")
    assert not waives("admin")
    assert not ANYBODY.may("waive-liveness")


ROLES = """
[[roles]]
name = "desk"
verbs = ["identify", "gallery.read"]
galleries = ["visitors", "guest-*"]
similarities = "withheld"
lookups_per_minute = 30

[[roles]]
name = "camera"
verbs = ["analyze", "events"]
galleries = ["staff"]
sources = ["door-*"]
"""


def keyed(tmp_path: Path, *entries: str, denied: str = "") -> Authenticator:
    file = tmp_path / "keys.toml"
    file.write_text(ROLES + "\n".join(entries))
    (tmp_path / "keys.toml.denied").write_text(denied)
    settings = msgspec.convert({"auth": {"mode": "keys", "keys_file": str(file)}}, config.Config)
    return Authenticator.of(settings)


def test_roles_count_where_they_are_meant_to(tmp_path: Path) -> None:
    _, key = new_key("k", (), roles=("desk", "camera"), galleries=("visitors", "staff"))
    file = tmp_path / "keys.toml"
    file.write_text(ROLES + key.entry())
    found = read_file(file)
    assert found.keys == (key,), "what is written is read again"
    who = key.caller(found.by_name)
    assert who.place("identify", gallery="visitors") == ("visitors", "")
    assert who.may("gallery.read", gallery="visitors")
    assert not who.may("gallery.read", gallery="guest-1"), "the key itself is not for it"
    assert not who.may("identify", gallery="staff")
    assert who.place("analyze", source="door-1") == ("staff", "door-1"), "its only gallery"
    for verb, gallery, source, field in (
        ("identify", "staff", None, "gallery_id"),
        ("analyze", "visitors", "door-1", "gallery_id"),
        ("analyze", "staff", "vault", "source_id"),
        ("analyze", "staff", "", "source_id"),
    ):
        with pytest.raises(FacelaneError) as told:
            who.place(verb, gallery=gallery, default="default", source=source)  # type: ignore[arg-type]
        assert told.value.reason is Reason.PERMISSION_DENIED
        assert told.value.metadata == {"field": field, "scope": verb}
        assert "staff" not in told.value.message
    assert who.similarities("identify", gallery="visitors") == "withheld"
    assert who.lookups_per_minute("identify", gallery="visitors") == 30
    assert who.lookups_per_minute("identify", gallery="staff") == 0
    assert who.hears("door-2", "staff", "")
    assert not who.hears("door-2", "visitors", "")


def test_roles_are_not_mixed() -> None:
    """Two roles of one key: neither lends the other its places."""
    roles = {
        "a": Role("a", ("analyze",), galleries=("staff",), sources=("door",)),
        "b": Role("b", ("analyze",), galleries=("visitors",), sources=("lobby",)),
    }
    who = Key("k", "0" * 64, roles=("a", "b")).caller(roles)
    assert who.place("analyze", gallery="staff", source="door") == ("staff", "door")
    assert who.place("analyze", source="lobby") == ("visitors", "lobby")
    with pytest.raises(FacelaneError):
        who.place("analyze", gallery="staff", source="lobby")
    assert who.at_least(Key("k", "0" * 64, roles=("a",)).caller(roles))
    assert not Key("k", "0" * 64, roles=("a",)).caller(roles).at_least(who)
    assert not ANYBODY.may("waive-liveness")
    assert ANYBODY.at_least(who)
    assert not who.at_least(ANYBODY)


def test_whoever_may_look_up_less_than_before_may_less() -> None:
    """An open stream names as many faces a minute as when it was opened: it has to end."""
    bounds = (0, 10, 600, None)
    who = [
        Key("k", "0" * 64, roles=("r",)).caller(
            {"r": Role("r", ("analyze", "identify"), lookups_per_minute=bound)}
        )
        for bound in bounds
    ]
    for n, now in enumerate(who):
        assert [now.at_least(before) for before in who] == [k <= n for k in range(len(who))]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('[[keys]]\nname = "a"\nsha256 = "' + "0" * 64 + '"\nroles = ["dsk"]', "mean desk"),
        ('[[roles]]\nname = "desk"\nverbs = []', "two roles"),
        ('[[roles]]\nname = "x"\nverbs = ["everything"]', "everything"),
        ('[[certificates]]\nname = "a"\nsan = "x"\nroles = ["desk"]', "client_ca_file"),
    ],
)
def test_roles_that_cannot_be_used(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        keyed(tmp_path, text)


def test_certificates_are_identities() -> None:
    roles = (Role("camera", ("analyze",)), Role("ops", ("admin",)))
    certificates = (
        Certificate("ops", "ops.example.com", ("ops",)),
        Certificate("cameras", "*.cameras.example.com", ("camera",), streams=3),
    )
    secret, key = new_key("k", (), roles=("ops",))
    made = Authenticator((key,), roles=roles, certificates=certificates)
    until = datetime.now(UTC) + timedelta(hours=1)
    camera = Peer(("10.0.0.7", "door.cameras.example.com"), until)
    image, drain = method("AnalysisService"), "/facelane.v1.AdminService/Drain"
    who = made.check(image, {}, camera)
    assert (who.name, who.streams, who.expires) == ("cameras", 3, until)
    made.recheck(image, who, camera)
    with pytest.raises(FacelaneError) as told:
        made.check(drain, {}, camera)
    assert told.value.reason is Reason.PERMISSION_DENIED
    # A key that is sent counts, a wrong one too.
    assert made.check(drain, {"authorization": f"Bearer {secret}"}, camera).name == "k"
    for sent in ("Bearer wrong", "Basic x", "Bearer"):
        with pytest.raises(FacelaneError) as told:
            made.check(image, {"authorization": sent}, camera)
        assert told.value.reason is Reason.UNAUTHENTICATED, sent
    for stranger in (Peer(), Peer(("cameras.example.com",)), Peer(("ops.example.com.evil",))):
        with pytest.raises(FacelaneError) as told:
            made.check(image, {}, stranger)
        assert told.value.reason is Reason.UNAUTHENTICATED
    past = Peer(camera.names, datetime.now(UTC) - timedelta(seconds=1))
    with pytest.raises(FacelaneError, match="expired"):
        made.check(image, {}, past)
    assert made.counts["cameras", "analyze", True] == 1
    assert made.counts["cameras", "admin", False] == 1


def test_who_is_denied_is_denied_whatever_the_keys_file_says(tmp_path: Path) -> None:
    names = ("front", "back", "side", "rest")
    made_keys = {name: new_key(name, (), roles=("camera",)) for name in names}
    made = keyed(tmp_path, *(key.entry() for _, key in made_keys.values()))
    list_of = tmp_path / "keys.toml.denied"
    call = method("AnalysisService")

    def let_in() -> set[str]:
        return {
            name
            for name, (secret, _) in made_keys.items()
            if refused(made, call, f"Bearer {secret}") is None
        }

    assert let_in() == set(names)
    hashes = {name: key.sha256 for name, (_, key) in made_keys.items()}
    (tmp_path / "keys.toml").write_text("[[keys")
    list_of.write_bytes(
        b"\xff\xfe\0 = [[[\n"
        + f'  FRONT  # lost\r\n"{hashes["back"]}",\n{hashes["side"][:12]}\n'.encode()
    )
    assert made.reload_denied()
    assert not made.reload_denied(), "nothing new"
    assert let_in() == {"rest"}
    with pytest.raises(FacelaneError, match="is denied"):
        made.recheck(call, made_keys["front"][1].caller({"camera": Role("camera", ("analyze",))}))
    list_of.write_bytes(b"front\rback\rside")  # of an editor that ends lines so
    assert made.reload_denied()
    assert let_in() == {"rest"}
    # What cannot be read takes nobody off the list.
    list_of.unlink()
    list_of.mkdir()
    made.reload_denied()
    assert let_in() == {"rest"}
    list_of.rmdir()
    list_of.write_text(hashes["rest"][:11])
    assert made.reload_denied()
    assert let_in() == set(names), "eleven digits name nobody"
    list_of.unlink()
    made.reload_denied()
    assert let_in() == set(names)


def test_a_name_in_a_certificate_can_be_denied(tmp_path: Path) -> None:
    listed = tmp_path / "denied"
    listed.write_text("door.example.com\n")
    made = Authenticator(
        (),
        roles=(Role("camera", ("analyze",)),),
        certificates=(Certificate("cameras", "*", ("camera",)),),
        denied=listed,
    )
    call = method("AnalysisService")
    assert made.check(call, {}, Peer(("lobby.example.com",))).name == "cameras"
    with pytest.raises(FacelaneError, match="denied"):
        made.check(call, {}, Peer(("10.0.0.7", "door.example.com")))
