"""What is generated is current; what is written keeps the project's rules."""

from __future__ import annotations

import ast
import hashlib
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2
from grpc._cython import cygrpc

from facelane.v1 import (
    admin_service_pb2,
    analysis_service_pb2,
    error_reason_pb2,
    event_service_pb2,
    face_pb2,
    gallery_service_pb2,
    server_service_pb2,
    view_service_pb2,
)
from facelane_server import config
from facelane_server.domain import Reason
from facelane_server.running import GRPC_SWITCHES

ROOT = Path(__file__).resolve().parents[2]
CLIENTS, SERVER = ROOT / "clients", ROOT / "server"
MODULES = (
    admin_service_pb2, analysis_service_pb2, error_reason_pb2, event_service_pb2,
    face_pb2, gallery_service_pb2, server_service_pb2, view_service_pb2,
)  # fmt: skip


def sources(*folders: Path) -> Iterator[Path]:
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            if "v1" not in path.parts and "__pycache__" not in path.parts:
                yield path


# -- generated --------------------------------------------------------------------------------


def test_the_generated_protocol_is_current() -> None:
    texts = [path.read_bytes() for path in sorted((ROOT / "protos/facelane/v1").glob("*.proto"))]
    recorded = (CLIENTS / "facelane/v1/PROTO_SHA256").read_text().strip()
    assert hashlib.sha256(b"".join(texts)).hexdigest() == recorded, "run `make protos`"


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.DESCRIPTOR.name)
def test_the_generated_code_has_the_messages_and_fields_of_its_proto(module: object) -> None:
    """A record of a hash can be forged by hand; the names and numbers cannot."""
    described = descriptor_pb2.FileDescriptorProto()
    module.DESCRIPTOR.CopyToProto(described)  # type: ignore[attr-defined]
    text = (ROOT / "protos" / described.name).read_text()
    text = re.sub(r"//.*", "", text)
    found = {
        (kind, name) for kind, name in re.findall(r"\b(message|enum|service|rpc)\s+(\w+)", text)
    }
    there = {("message", m.name) for m in described.message_type}
    there |= {("enum", e.name) for e in described.enum_type}
    there |= {("service", s.name) for s in described.service}
    there |= {("rpc", m.name) for s in described.service for m in s.method}
    assert found == there
    numbers = sorted(
        (name, int(number)) for name, number in re.findall(r"(\w+)\s*=\s*(\d+);", text)
    )
    fields = [(f.name, f.number) for m in described.message_type for f in m.field]
    fields += [(v.name, v.number) for e in described.enum_type for v in e.value]
    assert numbers == sorted(fields)


def test_the_map_of_the_code_names_what_is_there() -> None:
    table = (ROOT / "docs/ARCHITECTURE.md").read_text().split("## Where do I change")[1]
    named = {name for name in re.findall(r"`([\w./]+)`", table) if "/" in name or ".py" in name}
    assert len(named) > 30
    bases = (ROOT, SERVER / "facelane_server", CLIENTS / "facelane")
    inside = {p.name for p in sources(SERVER)}
    missing = {n for n in named if n not in inside and not any((b / n).exists() for b in bases)}
    assert missing == set()


def test_grpc_knows_the_options_that_it_is_given() -> None:
    """gRPC passes over an option that is misspelt without a word."""
    library = next(Path(cygrpc.__file__).parent.glob("cygrpc*.so")).read_bytes()
    given = {
        name
        for path in sources(CLIENTS, SERVER)
        for name in re.findall(r'\("(grpc\.[a-z0-9_.]+)", ', path.read_text())
    }
    assert {"grpc.keepalive_time_ms", "grpc.service_config"} <= given
    assert {name for name in given if name.encode() + b"\0" not in library} == set()


def test_the_configuration_page_is_current() -> None:
    done = subprocess.run(
        [sys.executable, "docs/generate_configuration.py", "--check"],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_every_key_of_the_configuration_is_explained() -> None:
    page = (ROOT / "docs/configuration.md").read_text()
    bare = [line for line in page.splitlines() if line.startswith("| `") and line.endswith("|  |")]
    sections = {
        name
        for name, default in zip(
            config.Config.__struct_fields__, config.Config.__struct_defaults__, strict=True
        )
        if isinstance(default, config.Section)
    }
    assert len(sections) > 10
    assert sections <= set(re.findall(r"\[(\w+)", page))
    assert [line for line in bare if line.split("`")[1] not in sections] == []


def test_client_and_server_know_the_reasons_of_the_protocol() -> None:
    import facelane

    listed = {
        name.removeprefix("ERROR_REASON_")
        for name, number in error_reason_pb2.ErrorReason.items()
        if number
    }
    assert {reason.value for reason in Reason} == listed
    assert listed <= {reason.value for reason in facelane.Reason}


def test_every_reason_is_given_somewhere() -> None:
    text = "".join(
        path.read_text() for path in sources(SERVER) if path.name not in ("domain.py", "errors.py")
    )
    assert [r.name for r in Reason if not re.search(rf"\bReason\.{r.name}\b", text)] == []


# -- imports ----------------------------------------------------------------------------------


def run(program: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd="/", capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


HEAVY = ("torch", "numpy", "cv2", "onnxruntime", "scipy", "sqlalchemy", "av", "rich", "typer")
WORKERS_DO_WITHOUT = ("torch", "grpc", "sqlalchemy", "google.protobuf", "asyncio", "ssl")


@pytest.mark.parametrize(
    ("module", "without"),
    [
        ("facelane", HEAVY),
        ("facelane.aio", HEAVY),
        ("facelane_server.app", ("torch", "onnxruntime", "av", "cv2", "scipy")),
        ("facelane_server.cli", ("torch", "onnxruntime", "av", "cv2")),
        ("facelane_server.worker.__main__", WORKERS_DO_WITHOUT),
        ("facelane_server.worker.loop", WORKERS_DO_WITHOUT),
        ("facelane_server.worker.networks.null", WORKERS_DO_WITHOUT),
        ("facelane_server.config", ("numpy", "grpc", "torch")),
    ],
)
def test_what_an_import_does_not_bring(module: str, without: tuple[str, ...]) -> None:
    names = ", ".join(map(repr, without))
    out = run(f"import sys, {module}; print([m for m in ({names},) if m in sys.modules])")
    assert out == "[]"


def test_grpc_still_knows_what_is_switched_off_in_it(tmp_path: Path) -> None:
    """It says of each switch that it does not know that it does not."""
    program = (
        "import asyncio, grpc\n"
        "async def serve():\n"
        "    server = grpc.aio.server()\n"
        f"    server.add_insecure_port('unix:{tmp_path}/socket')\n"
        "    await server.start()\n"
        "    await server.stop(None)\n"
        "asyncio.run(serve())\n"
    )
    said = [
        subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"GRPC_VERBOSITY": "ERROR", "GRPC_EXPERIMENTS": switches},
            capture_output=True, text=True, timeout=60, check=True,
        ).stderr
        for switches in (GRPC_SWITCHES, "-no_such_switch")
    ]  # fmt: skip
    assert "nknown experiment" not in said[0]
    assert "nknown experiment" in said[1], "what the first one is looked through for"


# -- rules ------------------------------------------------------------------------------------


def test_no_module_is_called_by_what_it_is_not() -> None:
    vague = {"utils", "util", "common", "helpers", "helper", "manager", "misc"}
    named = sources(CLIENTS, SERVER, ROOT / "tests", ROOT / "bench")
    assert [path for path in named if path.stem in vague or path.parent.name in vague] == []


def test_the_bounds_of_the_server_are_in_one_file() -> None:
    """The tools for people (``modeltools``) bound their own work."""
    named = re.compile(r"^\s*_?(MAX_\w+|\w*BACKLOG)(?:: \w+)? = [\d_]", re.MULTILINE)
    inside = [p for p in sources(SERVER) if p.name != "limits.py" and "modeltools" not in p.parts]
    found = {(path.stem, name) for path in inside for name in named.findall(path.read_text())}
    # Of how faces move and how a network is built, not of what is kept.
    assert found == {("linking", "MAX_WIDTH_RATIO"), ("mobilefacenet", "MAX_SIDE")}


def tracked() -> list[Path]:
    done = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, timeout=30, check=False
    )
    if done.returncode != 0:
        pytest.skip("no git checkout")
    paths = [ROOT / name.decode() for name in done.stdout.split(b"\0") if name]
    return [path for path in paths if path.is_file()]


def test_no_path_of_a_developers_machine_and_nothing_put_off() -> None:
    homes = "|".join(("wor" + "k", "ro" + "ot", "home/[a-z]"))
    machine = re.compile(rf"(?<![\w.])/(?:{homes})/")
    put_off = re.compile(r"\b(?:TO" + r"DO|FIX" + r"ME|X" + r"XX)\b")
    for path in tracked():
        if path.suffix in (".py", ".md", ".toml", ".sh", ".service", ".proto", ".yaml", ".conf"):
            text = path.read_text()
            assert not machine.search(text), path
            assert not put_off.search(text), path


def test_every_module_says_what_it_is_and_annotates_lazily() -> None:
    for path in sources(SERVER, CLIENTS):
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree), path
        if len(tree.body) > 1:
            assert "from __future__ import annotations" in path.read_text(), path


def test_what_users_call_is_documented() -> None:
    import facelane

    bare = []
    for name in facelane.__all__:
        thing = getattr(facelane, name)
        if isinstance(thing, type):
            if not thing.__doc__ or thing.__doc__.startswith(f"{name}("):
                bare.append(name)
            for key, member in vars(thing).items():
                code = getattr(member, "fget", member)
                if not key.startswith("_") and callable(code) and not code.__doc__:
                    bare.append(f"{name}.{key}")
    for name in ("Client", "AnalyzeStream"):
        for key, member in vars(getattr(facelane.aio, name)).items():
            code = getattr(member, "fget", member)
            if not key.startswith("_") and callable(code) and not code.__doc__:
                bare.append(f"aio.{name}.{key}")
    assert bare == []


# -- documents --------------------------------------------------------------------------------

PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not re.match(r"[a-z]+:|#", target):
            assert (page.parent / target.split("#")[0]).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_configs_in_documents_are_configs(page: Path) -> None:
    known = set(config.Config.__struct_fields__)
    for block in re.findall(r"^```toml\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
        raw = tomllib.loads(block)
        if raw.keys() <= known:
            config.parse(block, source=page.name)


def test_commands_in_documents_exist() -> None:
    mains = {
        "facelane": "facelane.cli",
        "facelane-server": "facelane_server.cli",
        "facelane-bridge": "facelane_bridge.cli",
        "facelane-console": "facelane_console.cli",
        "facelane-events": "facelane_events.cli",
        "facelane-fleet": "facelane_fleet.cli",
    }

    @cache
    def helped(program: str) -> str:
        code = f"import sys; sys.argv[0] = 'x'; from {mains[program]} import main; main()"
        done = subprocess.run(
            [sys.executable, "-c", code, "--help"],
            capture_output=True, text=True, timeout=60, check=False,
            env={"COLUMNS": "200", "TERM": "dumb", "PATH": "/usr/bin"},
        )  # fmt: skip
        assert done.returncode == 0, (program, done.stderr)
        return done.stdout

    seen = 0
    shell = r"sh|bash|console| *\{[^\n}]*\.sh\b[^\n]*\} *"
    fence = re.compile(rf"^```(?:{shell})?\n(.*?)^```", re.MULTILINE | re.DOTALL)
    for page in [*PAGES, *(ROOT / "docs/guides").glob("*.md")]:
        for line in "\n".join(fence.findall(page.read_text())).splitlines():
            program, _, rest = re.sub(r"^\$ |^sudo ", "", line.strip()).partition(" ")
            command = re.match(r"[a-z][a-z-]*\b", rest)
            if program in mains and command:
                assert re.search(rf"\b{command[0]}\b", helped(program)), line
                seen += 1
    assert seen >= 30
