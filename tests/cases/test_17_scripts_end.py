"""A script that keeps a stream unfinished ends all the same, however it ends.

At the end the interpreter stops every thread where it is; what closes itself afterwards must
not wait for one of them. Each script runs several times: the race has to be lost to show.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.fakes import scripted_server as fake

# A call that is left for the interpreter to destroy waits for its lock, which a thread of gRPC may
# have held when it was stopped: that takes luck, a call that is left does not.
PRELUDE = """
import atexit, gc, os, time
def no_call_is_left():
    from grpc._channel import _Rendezvous
    deadline = time.monotonic() + 20
    while any(isinstance(thing, _Rendezvous) for thing in gc.get_objects()):
        if time.monotonic() > deadline:
            os._exit(99)
        time.sleep(0.01)  # a thread may be about to let go of it
gc.disable()
atexit.register(no_call_is_left)
import asyncio, contextlib, itertools, sys, threading, time
import facelane
from facelane import aio
picture = facelane.Picture.encoded(b"\\xff\\xd8\\xff\\xe0" + bytes(60_000))
endless = itertools.repeat(picture)
"""

# Name: what the script does, its exit code.
SCRIPTS = {
    "a generator kept": (
        """
client = facelane.Client()
outcomes = client.analyze(endless)
next(outcomes)
""",
        0,
    ),
    "a generator in a cycle, the client in another": (
        """
client = facelane.Client()
client.itself = client
box = [client.analyze(endless)]
box.append(box)
next(box[0])
""",
        0,
    ),
    "a generator whose frames come from a camera that gives nothing": (
        """
def camera():
    yield picture
    threading.Event().wait()
outcomes = facelane.Client().analyze(camera())
next(outcomes)
""",
        0,
    ),
    "a stream entered, threads that send and read": (
        """
client = facelane.Client()
stream = client.analyze_stream(overload="lossless").__enter__()
read = threading.Event()
def send():
    while True:
        stream.send(picture)
def receive():
    for _ in stream:
        read.set()
for work in (send, receive):
    threading.Thread(target=work, daemon=True).start()
assert read.wait(20)
""",
        0,
    ),
    "a stream that comes back by itself, with nobody there": (
        """
client = facelane.Client("127.0.0.1:1", timeout=0.5)
stream = client.analyze_stream(reconnect=facelane.Reconnect(initial_delay=0.01)).__enter__()
""",
        0,
    ),
    "events in a generator of the script's own": (
        """
client = facelane.Client()
def seen():
    with client.watch_events(reconnect=facelane.Reconnect()) as events:
        yield from events
kept = seen()
next(kept)
""",
        0,
    ),
    "events read by a thread": (
        """
client = facelane.Client()
events = client.watch_events().__enter__()
got = threading.Event()
def read():
    for _ in events:
        got.set()
threading.Thread(target=read, daemon=True).start()
assert got.wait(20)
""",
        0,
    ),
    "events that were taken by the script itself": (
        """
events = facelane.Client().watch_events().__enter__()
next(events)
""",
        0,
    ),
    "a look at a stream in a generator that is kept": (
        """
pictures = facelane.Client().watch_stream("door")
next(pictures)
""",
        0,
    ),
    "an exception": (
        """
client = facelane.Client()
outcomes = client.analyze(endless)
next(outcomes)
raise SystemExit("the script gives up")
""",
        1,
    ),
    "sys.exit inside of a thread's sibling": (
        """
client = facelane.Client()
streams = [client.analyze(endless) for _ in range(3)]
threading.Thread(target=lambda: [next(s) for s in streams]).start()
def deep():
    next(client.analyze(endless))
    sys.exit(3)
deep()
""",
        3,
    ),
    "an asynchronous generator kept, with asyncio.run": (
        """
async def main():
    global kept
    kept = aio.Client().analyze(endless)
    await anext(kept)
asyncio.run(main())
""",
        0,
    ),
    "an asynchronous stream and its events kept, in a loop that is never closed": (
        """
async def main():
    global client, stream, events
    client = aio.Client()
    stream = await client.analyze_stream().__aenter__()
    await stream.send(picture)
    events = await client.watch_events().__aenter__()
    await anext(events)
loop = asyncio.new_event_loop()
loop.run_until_complete(main())
""",
        0,
    ),
    "an asynchronous client in a thread that goes on": (
        """
begun = threading.Event()
async def main():
    async for _ in aio.Client().analyze(endless):
        begun.set()
threading.Thread(target=lambda: asyncio.run(main()), daemon=True).start()
assert begun.wait(20)
""",
        0,
    ),
}


AT_ONCE = frozenset(
    {
        "a stream entered, threads that send and read",
        "events read by a thread",
        "an exception",
        "an asynchronous stream and its events kept, in a loop that is never closed",
    }
)
"""One of each way; the others in the slow tier."""


@pytest.fixture(scope="module")
def server() -> Iterator[fake.ScriptedServer]:
    with fake.ScriptedServer() as made:
        made.event_burst, made.events_stay_open = 1, True
        yield made


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name not in AT_ONCE)) for name in SCRIPTS],
)
def test_the_process_ends(server: fake.ScriptedServer, name: str) -> None:
    script, code = SCRIPTS[name]
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", PRELUDE + script],
            env={"FACELANE_TARGET": server.target},
            capture_output=True, text=True, timeout=30, check=False,
        )  # fmt: skip
        assert done.returncode == code, done.stderr[-2000:]
        assert "Fatal" not in done.stderr
        assert "Exception in thread" not in done.stderr
