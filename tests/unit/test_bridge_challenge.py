"""Authentication of cameras against the examples of RFC 7616 and RFC 7617."""

from __future__ import annotations

import hashlib
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from facelane_bridge.sources.challenge import Authenticator, Challenge, Credentials, challenges

REALM, NONCE = "http-auth@example.org", "7ypf/xlj9XXwfDPEoM4URrv/xwf94BcCAzFZH4GiTo0v"
CNONCE = "f2/wE4q74E6zIJEtWaHKaf5wv/H5QzzpXusqGemxURZJ"


@pytest.mark.parametrize(
    ("algorithm", "response"),
    [
        ("MD5", "8ca523f5e9506fed4657c9700eebdbec"),
        ("SHA-256", "753927fa0e85d155564e2e272a28d1802ca10daf4496794697cf8db5856cb6c1"),
    ],
)
def test_the_examples_of_the_standard(algorithm: str, response: str) -> None:
    challenge = Challenge(
        "digest", {"realm": REALM, "qop": "auth, auth-int", "algorithm": algorithm, "nonce": NONCE}
    )
    authenticator = Authenticator(Credentials("Mufasa", "Circle of Life"))
    assert authenticator.take([challenge])
    authenticator._count = 1
    answer = authenticator._digest(challenge, "GET", "/dir/index.html", CNONCE)
    assert f'response="{response}"' in answer
    assert "qop=auth" in answer
    assert "nc=00000001" in answer


def test_basic() -> None:
    authenticator = Authenticator(Credentials("Aladdin", "open sesame"))
    assert authenticator.answer("GET", "/") is None
    assert authenticator.take(challenges(['Basic realm="WallyWorld"']))
    assert authenticator.answer("GET", "/") == "Basic QWxhZGRpbjpvcGVuIHNlc2FtZQ=="


MD5 = 'Digest realm="cam", qop="auth", algorithm=MD5, nonce="n1"'
SHA = 'Digest realm="cam", qop="auth", algorithm=SHA-256, nonce="n2"'
OLD = 'Digest realm="cam", nonce="n3"'
BASIC = 'Basic realm="cam"'


@pytest.mark.parametrize(
    ("headers", "chosen"),
    [
        ([MD5, SHA], "SHA-256"),
        ([SHA, MD5], "SHA-256"),
        ([f"{BASIC}, {SHA}, {MD5}"], "SHA-256"),
        ([BASIC, OLD], ""),
        (["NTLM", 'Bearer realm="x"', BASIC], "basic"),
        (['Digest realm="c", nonce="n", algorithm=SHA-3', MD5], "MD5"),
        (['Digest realm="c", nonce="n", qop="auth-int"', BASIC], "basic"),
        (["NTLM abc==", "Negotiate"], None),
        (['Digest realm="c"'], None),
        ([], None),
    ],
)
def test_the_strongest_known_challenge_is_answered(headers: list[str], chosen: str | None) -> None:
    authenticator = Authenticator(Credentials("viewer", "pw"))
    assert authenticator.take(challenges(headers)) == (chosen is not None)
    answer = authenticator.answer("GET", "/v") or ""
    match chosen:
        case None:
            assert answer == ""
        case "basic":
            assert answer.startswith("Basic ")
        case _:
            assert answer.startswith("Digest ")
            assert ("algorithm=" + chosen in answer) == bool(chosen)


@given(st.text(min_size=1, max_size=60), st.text(max_size=200))
def test_any_user_and_password_can_be_sent(user: str, password: str) -> None:
    user = user.encode("utf-8", "replace").decode().replace("\r", "").replace("\n", "") or "u"
    password = password.encode("utf-8", "replace").decode()
    authenticator = Authenticator(Credentials(user, password))
    assert authenticator.take(challenges([OLD]))
    answer = authenticator.answer("DESCRIBE", "rtsp://h/x")
    assert answer is not None
    raw = answer.encode("latin-1").decode()
    found = re.search(r'username="((?:[^"\\]|\\.)*)"', raw, re.DOTALL)
    assert found is not None
    assert re.sub(r"\\(.)", r"\1", found.group(1), flags=re.DOTALL) == user

    def md5(text: str) -> str:
        return hashlib.md5(text.encode()).hexdigest()

    expected = md5(f"{md5(f'{user}:cam:{password}')}:n3:{md5('DESCRIBE:rtsp://h/x')}")
    assert f'response="{expected}"' in raw


@given(st.lists(st.text(max_size=300), max_size=4))
def test_whatever_a_camera_writes_there(headers: list[str]) -> None:
    authenticator = Authenticator(Credentials("u", "p"))
    if authenticator.take(challenges(headers)):
        assert authenticator.answer("GET", "/")
