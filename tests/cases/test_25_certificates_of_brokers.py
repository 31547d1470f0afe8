"""A broker's own certificate, made out to any name, can be trusted; another one is not."""

from __future__ import annotations

import hashlib
import shutil
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from facelane_events import config, sinks
from facelane_events.delivery import UnavailableError
from tests.cases.cameras import certificate
from tests.fakes import receivers
from tests.running_server import free_port

KINDS = {"mqtt": "mosquitto", "nats": "nats-server"}


@pytest.fixture(params=KINDS)
def broker(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, int, Path]]:
    """Its kind, its port, and its certificate, which names no address."""
    kind: str = request.param
    program = receivers.found(KINDS[kind])
    if program is None or shutil.which("openssl") is None:
        pytest.skip(f"no {KINDS[kind]}, or no openssl command here")
    chain, key = certificate(tmp_path, "broker")
    port = free_port()
    if kind == "mqtt":
        made = receivers.mosquitto(program, port, tmp_path / "kept")
        told = tmp_path / "kept" / "mosquitto.conf"
        told.write_text(told.read_text() + f"certfile {chain}\nkeyfile {key}\n")
    else:
        options = ["--tls", f"--tlscert={chain}", f"--tlskey={key}"]
        command = [program, "-a", "127.0.0.1", "-p", str(port), "-js", "-sd", str(tmp_path)]
        made = receivers.Broker([*command, *options], port)
    made.start()
    yield kind, port, chain
    made.kill()


def sink(kind: str, port: int, **tls: Any) -> Any:
    where: dict[str, Any] = {"servers": [f"tls://127.0.0.1:{port}"]}
    if kind == "mqtt":
        where = {"host": "127.0.0.1", "port": port, "tls": True}
    lines = [f"{name} = {str(value).lower() if value is True else repr(value)}" for name, value in
             {"name": "s", "type": kind, **where, **tls}.items()]  # fmt: skip
    return sinks.make(config.parse("[[sink]]\n" + "\n".join(lines)).sink[0])


async def opens(made: Any) -> bool:
    try:
        await made.open()
    except UnavailableError:
        return False
    finally:
        await made.close()
    return True


async def test_by_its_fingerprint_alone(broker: tuple[str, int, Path]) -> None:
    kind, port, chain = broker
    digest = hashlib.sha256(ssl.PEM_cert_to_DER_cert(chain.read_text())).hexdigest()
    colons = ":".join(digest[at : at + 2] for at in range(0, 64, 2)).upper()
    assert await opens(sink(kind, port, tls_fingerprint=digest))
    assert await opens(sink(kind, port, tls_fingerprint=colons))
    assert not await opens(sink(kind, port, tls_fingerprint="0f" * 32))
    # Its name is none of this machine's: as an authority it is not enough.
    assert not await opens(sink(kind, port, tls_ca=str(chain)))
    assert not await opens(sink(kind, port))


async def test_an_authority_that_is_not_there_is_told(
    broker: tuple[str, int, Path], tmp_path: Path
) -> None:
    kind, port, _ = broker
    with pytest.raises(config.ConfigError):
        sink(kind, port, tls_fingerprint="0f")
    assert not await opens(sink(kind, port, tls_ca=str(tmp_path / "nowhere.pem")))
