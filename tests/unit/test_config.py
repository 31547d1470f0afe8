"""What the configuration refuses, and the words in which it does."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import facelane
from facelane import transport
from facelane_server import addresses, config
from facelane_server.config import ConfigError


def refusal(text: str) -> str:
    with pytest.raises(ConfigError) as refused:
        config.parse(text, source="s.toml")
    message = str(refused.value)
    assert message.startswith("s.toml: ")
    return message.removeprefix("s.toml: ")


def test_nothing_is_a_working_config() -> None:
    made = config.parse("")
    assert made == config.Config() == config.load(None)
    assert list(made.stages) == ["detector", "recognizer", "liveness"]
    assert made.listen.startswith("unix:")


def test_a_stage_can_be_left_out() -> None:
    made = config.parse("[pools]\nliveness = false\nrecognizer = false")
    assert list(made.stages) == ["detector"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "[limits]\nmax_stream = 1",
            "unknown key `max_stream` in [limits]; did you mean `max_streams`?",
        ),
        ("[limit]\nwindow = 1", "unknown key `limit` in the top level; did you mean `limits`?"),
        (
            "[pools.detector]\ndevice = ['cpu']",
            "unknown key `device` in [pools.detector]; did you mean `devices`?",
        ),
        (
            "[pools.liveness]\nworker = 1",
            "unknown key `worker` in [pools.liveness]; did you mean `workers`?",
        ),
        ("[pools.recogniser]", "unknown key `recogniser` in [pools]; did you mean `recognizer`?"),
        (
            "[models]\nzzzzzz = 1",
            "unknown key `zzzzzz` in [models]; known keys: path",
        ),
        ("[limits]\nwindow = 0", "Expected `int` >= 1 - at `limits.window`"),
        ("[limits]\nwindow = 257", "Expected `int` <= 256 - at `limits.window`"),
        ("[limits]\nwindow = 'x'", "Expected `int`, got `str` - at `limits.window`"),
        ("[log]\nlevel = 'loud'", "Invalid enum value 'loud' - at `log.level`"),
        (
            "[identity]\nmatch_threshold = 1.5",
            "Expected `float` <= 1.0 - at `identity.match_threshold`",
        ),
        (
            "[server]\nlisten = 'localhost'",
            "server.listen: `localhost` is neither host:port nor unix:/path",
        ),
        ("[server]\nlisten = ':1'", "server.listen: `:1` is neither host:port nor unix:/path"),
        (
            "[server]\nlisten = 'a:99999'",
            "server.listen: `a:99999` is neither host:port nor unix:/path",
        ),
        ("[tls]\ncert_file = 'a'", "tls: cert_file and key_file go together"),
        ("[tls]\nclient_ca_file = 'a'", "tls.client_ca_file needs cert_file and key_file"),
        (
            "[auth]\nmode = 'keys'",
            "auth.keys_file is missing; create one with `facelane-server keys new`",
        ),
        (
            "[server]\nlisten = '0.0.0.0:1'",
            (
                "server.listen `0.0.0.0:1` can be reached by other machines, so clients need keys: "
                "set auth.keys_file (create one with `facelane-server keys new`), listen on a Unix "
                "socket, or switch authentication off knowingly with auth.mode = 'none'"
            ),
        ),
        (
            "[server]\nlisten = '[::]:1'\n[auth]\nkeys_file = 'k'",
            (
                "keys would cross the network unencrypted to `[::]:1`: set tls.cert_file and "
                "tls.key_file, or accept it knowingly with auth.allow_plaintext = true"
            ),
        ),
        (
            "[monitor]\nmemory_warning = 0.5",
            "monitor.memory_warning_clear must not exceed monitor.memory_warning",
        ),
        (
            "[identity]\nlive_threshold = 0.2\nspoof_threshold = 0.3",
            "identity.spoof_threshold must not exceed identity.live_threshold",
        ),
        ("[pools.detector]\ndevices = []", "pools.detector.devices is empty"),
        (
            "[pools.liveness]\ndevices = ['gpu0']",
            "pools.liveness.devices: `gpu0` is none of auto, cpu, cuda:N",
        ),
        (
            "[pools.detector]\nisolation = 'thread'\nspares = 1",
            "pools.detector: spares need isolation = 'process', 'mps' or 'external'",
        ),
        (
            "[pools.detector]\nisolation = 'mps'\ndevices = ['cpu']",
            "pools.detector: isolation = 'mps' needs CUDA devices",
        ),
        (
            "[pools.detector]\nbackoff_initial_s = 20",
            "pools.detector.backoff_initial_s must not exceed backoff_max_s",
        ),
    ],
)
def test_refusals_in_full(text: str, says: str) -> None:
    assert refusal(text) == says


def test_not_toml() -> None:
    assert refusal("[a").startswith("not valid TOML: ")
    assert refusal("a = 1\na = 2").startswith("not valid TOML: ")


@pytest.mark.parametrize(
    "text", ["pools = 3", "pools.detector = false", "server = []", "models.path = 'x'"]
)
def test_values_of_another_kind_name_their_place(text: str) -> None:
    assert text.split(maxsplit=1)[0].split(" ", maxsplit=1)[0] in refusal(text)


@pytest.mark.parametrize(
    ("listen", "local"),
    [
        ("unix:/run/x.sock", True),
        ("127.0.0.1:1", True),
        ("127.8.9.1:1", True),
        ("localhost:1", True),
        ("[::1]:1", True),
        ("0.0.0.0:1", False),
        ("[::]:1", False),
        ("192.168.1.4:1", False),
        ("example.com:1", False),
        ("localhost.example.com:1", False),
    ],
)
def test_what_is_local(listen: str, local: bool) -> None:
    assert addresses.is_local(listen) is local


def test_a_public_server_with_keys_and_tls() -> None:
    head = "[server]\nlisten = '0.0.0.0:1'\n[auth]\nkeys_file = 'k'\n"
    config.parse(head + "[tls]\ncert_file = 'c'\nkey_file = 'k'")
    config.parse(head + "allow_plaintext = true")
    config.parse("[server]\nlisten = '0.0.0.0:1'\n[auth]\nmode = 'none'")


@pytest.mark.parametrize("wrong", ["9151", "localhost:http", "127.0.0.1:99999", "127.0.0.1"])
def test_where_metrics_cannot_listen(wrong: str) -> None:
    with pytest.raises(ConfigError, match=r"metrics\.listen: .* is not host:port"):
        config.parse(f'[metrics]\nlisten = "{wrong}"')
    assert config.parse('[metrics]\nlisten = ""').metrics.listen == ""


def test_what_systemd_lends_is_not_missing_elsewhere(tmp_path: Path) -> None:
    lent = "/run/credentials/no-such.service/keys.toml"
    text = f"""[auth]
keys_file = "{lent}"
[tls]
cert_file = "{tmp_path}/tls.crt"
key_file = "{tmp_path}/tls.key"
"""
    assert config.parse(text).lent_by_systemd == (lent,)
    assert config.Config().lent_by_systemd == ()
    assert "LoadCredential=keys.toml:" in addresses.lent_hint(lent)
    assert addresses.lent_hint("/etc/facelane/keys.toml") == ""


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        config.load(tmp_path / "absent.toml")
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not UTF-8"):
        config.load(binary)
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        config.load(tmp_path)
    good = tmp_path / "good.toml"
    good.write_text("[limits]\nwindow = 3")
    assert config.load(good).limits.window == 3


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        config.Config().limits.window = 3  # type: ignore[misc]


def test_a_hostile_file_is_refused_in_a_line() -> None:
    for text in ("a = " + "[" * 9_999, "a = " + "{b = " * 9_999, "a = " + "1" * 5_000):
        with pytest.raises(ConfigError, match="not valid TOML"):
            config.parse(text)


def test_loopback_is_no_password() -> None:
    listen = "[server]\nlisten = '127.0.0.1:1'\n"
    with pytest.raises(ConfigError, match="every user of this machine"):
        config.parse(listen)
    assert not config.parse(listen + "[auth]\nmode = 'none'").wants_keys
    assert config.parse(listen + "[auth]\nkeys_file = 'k'").wants_keys
    tls = "[tls]\ncert_file = 'c'\nkey_file = 'k'\nclient_ca_file = 'a'"
    assert not config.parse(listen + tls).wants_keys, "clients show certificates"
    with pytest.raises(ConfigError, match="socket_group is for Unix sockets"):
        config.parse(listen + "socket_group = 'g'\n[auth]\nmode = 'none'")


def test_a_service_that_is_not_for_this_user_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it looks as if none ran, right after it was installed and started."""
    installed = tmp_path / "grpc.sock"
    monkeypatch.setattr(transport, "INSTALLED", installed)
    monkeypatch.setattr(os, "access", lambda *_: False)  # as of another user, which root is not
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "own"))
    monkeypatch.delenv("FACELANE_TARGET", raising=False)

    def said(target: str | None = None) -> str:
        client = facelane.Client(target, timeout=50)
        with client, pytest.raises(facelane.UnavailableError) as told:
            client.server_info()
        return told.value.message

    assert "sudo" not in said()
    installed.touch()
    assert "facelane-clients" in said()
    assert "sudo" not in said(f"unix:{tmp_path}/nobody.sock")


def test_the_default_socket_is_where_clients_look() -> None:
    for environ in ({"XDG_RUNTIME_DIR": "/run/user/7"}, {}):
        found = f"unix:{addresses.default_socket(environ)}"
        assert transport.default_target(environ) == found
    # So say the bridge and the delivery of events too, whose files need not name a server.
    assert transport.default_target({"FACELANE_TARGET": "edge:50151"}) == "edge:50151"
    assert str(addresses.default_socket({"RUNTIME_DIRECTORY": "/run/facelane:/x"})) == (
        "/run/facelane/grpc.sock"
    )
    assert not config.Config().wants_keys
