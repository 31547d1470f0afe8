"""``make demo``: faces recognised from a synthetic camera, on this machine, in a minute.

Starts a real ``facelane-server`` in a folder of its own, enrols two public-domain people,
renders a clip that has what real cameras have (motion, blur, darkness, occlusion, a photo
held into the picture), streams it through the bridge, shows what is recognised, judges it
against the clip's script, and ends with one JSON line. Exit code 0 only when every frame
has its outcome, both people were named in the clear and nobody was named in the blur or
the dark; 130 when it is interrupted. The server is stopped whatever happens, also when
the demo is killed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from facelane_bridge.demo_verdict import Verdict
from facelane_bridge.tether import tethered

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_CANNOT = 2
EXIT_INTERRUPTED = 130
SERVING_TIMEOUT = 180.0
STOP_TIMEOUT = 20.0
COMMAND_TIMEOUT = 120.0
_SOCKET = "grpc.sock"
STAGES = ("detector", "recognizer", "liveness")
# What is imported where no starter model is shipped: recipe and files of each stage.
PUBLIC_MODELS = {
    "detector": ("yunet", ("yunet_n.pth",)),
    "recognizer": ("mobilefacenet-onnx", ("mbf_512_fp32.onnx",)),
    "liveness": (
        "minifasnet",
        ("2.7_80x80_MiniFASNetV2.pth", "4_0_0_80x80_MiniFASNetV1SE.pth"),
    ),
}


class DemoError(Exception):
    """The demo cannot go on; the message says why and what to do."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; gives the exit code. Takes SIGINT, SIGTERM and SIGHUP over for good."""
    parser = argparse.ArgumentParser(
        prog="python -m facelane_bridge.demo", description="Faces from a synthetic camera."
    )
    parser.add_argument("--keep", action="store_true", help="keep the demo's folder")
    parser.add_argument(
        "--web", action="store_true", help="beside it the web console, until Ctrl-C"
    )
    parser.add_argument("--folder", type=Path, help="use this folder (it is kept)")
    arguments = parser.parse_args(argv)
    interruption = _Interruption()
    try:
        from rich.console import Console

        import facelane
        from facelane_bridge import demo_clip
    except ImportError as error:
        print(f"the demo needs {error.name}: pip install 'facelane[demo]'", file=sys.stderr)
        return EXIT_CANNOT
    # Logs and pipes have no width of their own; the table needs this much.
    console = Console(
        markup=False, emoji=False, highlight=False, width=None if sys.stdout.isatty() else 120
    )
    with contextlib.ExitStack() as stack:
        try:
            folder = _folder(arguments.folder, keep=arguments.keep, stack=stack)
            demo = _Demo(console, folder, web=arguments.web)
            return asyncio.run(interruption.cancelling(demo.run()))
        except asyncio.CancelledError:
            return EXIT_INTERRUPTED
        except (DemoError, demo_clip.MissingPhotoError) as error:
            if interruption.happened:  # and failed for it: Ctrl-C goes to the commands too
                return EXIT_INTERRUPTED
            console.print(f"demo: {error}", soft_wrap=True)
            return EXIT_CANNOT
        except facelane.FacelaneError as error:
            if interruption.happened:
                return EXIT_INTERRUPTED
            console.print(f"demo: {error}", soft_wrap=True)
            return EXIT_FAILED
        finally:
            if arguments.keep or arguments.folder:
                console.print(f"kept: {folder}")


class _Interruption:
    """Signals that end the demo, as one cancelled task instead of an exception.

    An exception raised by a signal handler comes up wherever the main thread is at that
    moment. Where that is grpc.aio's first initialisation, the half-made state it leaves is
    taken for a whole one by its own clean-up, and the process dies of SIGSEGV with the
    server running. So the handlers raise nothing, from here to the end of the process;
    what comes after the first signal is ignored, for the demo is stopping in bounded time.
    """

    def __init__(self) -> None:
        self.happened = False
        self._cancel: Callable[[], object] | None = None
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup, and sh with &
                signal.signal(number, self._note)

    async def cancelling(self, work: Coroutine[Any, Any, int]) -> int:
        """What ``work`` gives. Raises ``CancelledError`` when it was interrupted."""
        loop = asyncio.get_running_loop()
        task = loop.create_task(work)
        self._cancel = lambda: loop.call_soon_threadsafe(task.cancel)
        if self.happened:  # while modules were imported
            task.cancel()
        try:
            return await task
        finally:
            self._cancel = None

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        if not self.happened:
            self.happened = True
            if self._cancel is not None:
                self._cancel()


def _fits(folder: Path) -> bool:
    """Whether the server's socket in it has an address that a Unix socket can have."""
    return len(os.fsencode(folder.absolute() / _SOCKET)) <= 107


def _folder(given: Path | None, *, keep: bool, stack: contextlib.ExitStack) -> Path:
    """Raises DemoError."""
    if given is not None:
        if not _fits(given):
            raise DemoError(f"{given.absolute()} is too long for the address of a socket (Unix "
                            "takes 107 characters): choose a shorter --folder")  # fmt: skip
        given.mkdir(parents=True, exist_ok=True)
        return given.absolute()
    path = Path(tempfile.mkdtemp(prefix="facelane-demo-"))
    if not _fits(path):
        path.rmdir()
        path = Path(tempfile.mkdtemp(prefix="facelane-demo-", dir="/tmp"))
    if not keep:
        stack.callback(shutil.rmtree, path, ignore_errors=True)
    return path


class _Demo:
    def __init__(self, console: Any, folder: Path, *, web: bool = False) -> None:
        self._console = console
        self._folder = folder
        self._web = web

    async def run(self) -> int:
        from facelane_bridge import demo_clip

        begun = time.monotonic()
        demo_clip.photos()  # before anything is started
        models = await self._models()
        with _Server(self._folder, models, pictures=self._web) as server:
            # The clip is rendered while the models load.
            clip = await self._with_server(server)
            self._say(f"ready after {time.monotonic() - begun:.1f} s: server, gallery and camera")
            if self._web:
                return await self._with_console(server, clip)
            verdict, report = await self._stream(server, clip)
            code = server.stop()
        return self._tell(verdict, report, code, server)

    async def _with_console(self, server: _Server, clip: Path) -> int:
        """The clip judged once, as ever, then over and over until somebody ends it."""
        from facelane_bridge.demo_web import NoConsoleError, WebConsole

        try:
            async with WebConsole(server.target, self._folder) as web:
                self._say(f"console: {web.address} (log in without a key)")
                web.open()
                verdict, report = await self._stream(server, clip)
                code = self._tell(verdict, report, 0, server)
                self._say(f"The camera goes on: {web.address} (Ctrl-C ends it)")
                with contextlib.suppress(asyncio.CancelledError):
                    await self._loop(server, clip)
                return code
        except NoConsoleError as error:
            raise DemoError(str(error)) from None

    def _tell(self, verdict: Verdict, report: Any, code: int, server: _Server) -> int:
        problems = verdict.problems(report)
        if code != 0:
            problems.append(f"the server ended with code {code}: see {server.log.name}")
        verdict.tell(self._console)
        self._say(
            "(The people of the clip are photos, cut out and moved: a liveness model that "
            "doubts them has a point.)"
        )
        for problem in problems:
            self._say(f"FAILED: {problem}")
        print(json.dumps(verdict.line(report)), flush=True)
        return EXIT_FAILED if problems else EXIT_OK

    def _say(self, text: str) -> None:
        self._console.print(text, soft_wrap=True)

    # --- models and server ---

    async def _models(self) -> dict[str, str]:
        """Package folder of each stage: the starter models, else imported public ones."""
        listed = json.loads(await _server_command("models", "list", "--json"))
        shipped = {
            package["task"]: package["folder"]
            for package in listed["packages"]
            if Path(package["folder"]).parent.name == "starter" and not package["random_weights"]
        }
        missing = [stage for stage in STAGES if stage not in shipped]
        if not missing:
            self._say("models: the starter models that facelane ships")
            return {stage: shipped[stage] for stage in STAGES}
        shared = _public_models()
        if shared is None:
            raise DemoError(
                f"no starter model is shipped for {', '.join(missing)}, and there is no folder "
                "with public models: name one in FACELANE_SHARED (its models/ holds "
                + ", ".join(file for stage in missing for file in PUBLIC_MODELS[stage][1])
                + ")"
            )
        self._say(
            f"models: no starter model is shipped yet for {', '.join(missing)}; importing the "
            f"public models from {shared}"
        )
        packages = self._folder / "models"

        async def fetch(stage: str) -> None:
            recipe, files = PUBLIC_MODELS[stage]
            await _server_command(
                "models", "import", "--recipe", recipe, "--name", f"public-{stage}",
                "--into", str(packages), "--replace", *(str(shared / file) for file in files),
            )  # fmt: skip

        await asyncio.gather(*map(fetch, missing))
        return {stage: shipped.get(stage, str(packages / f"public-{stage}")) for stage in STAGES}

    async def _with_server(self, server: _Server) -> Path:
        """The rendered clip, with the server SERVING and both people enrolled."""
        import facelane
        from facelane_bridge import demo_clip

        cancelled = threading.Event()
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._status("loading the models, rendering the camera"))
            stack.callback(cancelled.set)  # a thread cannot be interrupted otherwise
            rendering = asyncio.create_task(
                asyncio.to_thread(demo_clip.render, self._folder, cancelled)
            )
            async with facelane.aio.Client(server.target) as client:
                serving = asyncio.create_task(client.wait_until_serving(SERVING_TIMEOUT))
                ended = asyncio.create_task(asyncio.to_thread(server.wait_for_end))
                try:
                    await asyncio.wait({serving, ended}, return_when=asyncio.FIRST_COMPLETED)
                    if not serving.done():
                        raise DemoError(f"the server ended at its start:\n{server.tail()}")
                    try:
                        serving.result()
                    except facelane.FacelaneError as error:
                        raise DemoError(f"{error.message}\n{server.tail()}") from None
                finally:
                    serving.cancel()
                    server.stop_waiting()
                    await asyncio.gather(serving, ended, return_exceptions=True)
                for subject, photo in demo_clip.photos().items():
                    # Photos are enrolled, not people: there is nothing live about them. They
                    # are portraits: the largest face is the one that is meant.
                    await client.enroll(
                        subject,
                        facelane.Picture.from_file(photo.path),
                        skip_liveness=True,
                        allow_multiple_faces=True,
                    )
            return await rendering

    @contextlib.contextmanager
    def _status(self, text: str) -> Iterator[None]:
        if self._console.is_terminal:
            from rich.text import Text

            with self._console.status(Text(text)):
                yield
        else:
            self._say(text + " ...")
            yield

    # --- the stream ---

    async def _loop(self, server: _Server, clip: Path) -> None:
        """Until it is cancelled."""
        from facelane_bridge import config
        from facelane_bridge.bridge import Bridge

        _quiet_logs()
        options = {"name": "demo-camera", "pace": "realtime", "loop": True}
        settings = config.single(str(clip), server={"target": server.target}, options=options)
        await Bridge(settings, _Nothing()).run()

    async def _stream(self, server: _Server, clip: Path) -> tuple[Verdict, Any]:
        from facelane_bridge import config
        from facelane_bridge.bridge import Bridge

        _quiet_logs()
        settings = config.single(
            str(clip),
            server={"target": server.target},
            options={"name": "demo-camera", "pace": "realtime"},
        )
        output = _Show(self._console)
        bridge = Bridge(settings, output)
        report = await bridge.run()
        return output.verdict, report


def _quiet_logs() -> None:
    import logging

    import structlog

    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))


async def _server_command(*arguments: str) -> str:
    """Output of a ``facelane-server`` command. Raises ``DemoError``."""
    process = await asyncio.create_subprocess_exec(
        *tethered(sys.executable, "-m", "facelane_server", *arguments),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(COMMAND_TIMEOUT):
            out, err = await process.communicate()
    except TimeoutError:
        raise DemoError(f"`facelane-server {' '.join(arguments[:2])}` does not answer") from None
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    if process.returncode != 0:
        said = err.decode(errors="replace").strip()[-2000:]
        raise DemoError(f"`facelane-server {' '.join(arguments[:2])}` failed: {said}")
    return out.decode()


def _public_models() -> Path | None:
    """The folder with public weights: ``$FACELANE_SHARED/models``, or beside the repository."""
    given = os.environ.get("FACELANE_SHARED")
    candidates = [Path(given)] if given else []
    candidates.append(Path(__file__).resolve().parents[3] / "shared")
    return next((c / "models" for c in candidates if (c / "models").is_dir()), None)


class _Server:
    """``facelane-server run`` in the demo's folder. Leaving the context stops it."""

    def __init__(self, folder: Path, models: dict[str, str], *, pictures: bool = False) -> None:
        """``pictures``: of whom is seen, for the console."""
        self.target = f"unix:{folder / _SOCKET}"
        self.log = folder / "server.log"
        for name in ("state", "run"):
            (folder / name).mkdir(mode=0o700, exist_ok=True)
        config = [
            f"state_dir = {json.dumps(str(folder / 'state'))}",
            f"runtime_dir = {json.dumps(str(folder / 'run'))}",
            "[server]",
            f"listen = {json.dumps(self.target)}",
            "[metrics]",
            'listen = ""',
            *(["[events]", 'pictures = "all"'] if pictures else []),
        ]
        for stage, model in models.items():
            config += [f"[pools.{stage}]", f"model = {json.dumps(model)}"]
        self._config = folder / "server.toml"
        self._config.write_text("\n".join(config) + "\n")
        self._process: subprocess.Popen[bytes] | None = None
        self._forget = threading.Event()

    def __enter__(self) -> Self:
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                tethered(
                    sys.executable, "-m", "facelane_server", "run", "--config", str(self._config)
                ),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # Ctrl-C is for the demo, which stops the server in order.
                start_new_session=True,
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop_waiting()
        self.stop()

    def wait_for_end(self) -> None:
        """Until the process has ended or ``stop_waiting`` is called. Blocks."""
        process = self._process
        assert process is not None
        while process.poll() is None and not self._forget.wait(0.1):
            pass

    def stop_waiting(self) -> None:
        self._forget.set()

    def stop(self) -> int:
        """SIGTERM, then SIGKILL when it does not end in time. The exit code."""
        process = self._process
        assert process is not None
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(STOP_TIMEOUT)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(STOP_TIMEOUT)
        return process.returncode

    def tail(self, lines: int = 15) -> str:
        """The end of the server's log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])


class _Nothing:
    """Shows nothing: the console does."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_error: object) -> None:
        pass

    async def emit(self, line: Any) -> None:
        pass


class _Show:
    """The bridge's live table, with the stretches announced, and the verdict fed."""

    def __init__(self, console: Any) -> None:
        from facelane_bridge.output import Table

        self._console = console
        self._table = Table(console)
        self._stretch = -1
        self.verdict = Verdict()

    async def __aenter__(self) -> Self:
        await self._table.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._table.__aexit__(kind, error, trace)

    async def emit(self, line: Any) -> None:
        from facelane_bridge.demo_clip import SCRIPT
        from facelane_bridge.output import ResultLine

        if isinstance(line, ResultLine):
            number = self.verdict.take(line.offset_s, line.faces)
            if number != self._stretch:
                self._stretch = number
                stretch = SCRIPT[number]
                who = " and ".join(stretch.subjects) or "nobody"
                self._console.print(
                    f"-- {stretch.start:4.1f} s  {stretch.kind.value}: {who} in view"
                )
        await self._table.emit(line)


if __name__ == "__main__":
    sys.exit(main())
