"""A release: ``make release``. Checks first, then wheel, sdist, SBOM and sums in dist/.

usage: python deploy/release.py [--out dist] [--allow-dirty]

The version is that of ``facelane_server.__version__``; CHANGELOG.md must have its section, with a
date, above all others but an empty "Unreleased". The SBOM (CycloneDX 1.6, JSON) lists what the
extras bring, at the versions of constraints.txt as they are installed here. Tagging is left to you.
"""

from __future__ import annotations

import argparse
import datetime as dt
import hashlib
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Final

from cyclonedx.contrib.this.builders import this_component
from cyclonedx.model import XsUri
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.model.contact import OrganizationalEntity
from cyclonedx.model.license import DisjunctiveLicense
from cyclonedx.output.json import JsonV1Dot6
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packageurl import PackageURL
from packaging.requirements import Requirement

ROOT: Final = Path(__file__).resolve().parents[1]
EXTRAS: Final = ("cli", "bridge", "server", "events", "onnx", "postgres", "nvidia")


class ReleaseError(Exception):
    """Not to be released; the message says what to do."""


def version(root: Path) -> str:
    text = (root / "server/facelane_server/__init__.py").read_text()
    found = re.search(r'^__version__ = "(\d+\.\d+\.\d+(?:rc\d+)?)"$', text, re.MULTILINE)
    if found is None:
        raise ReleaseError("server/facelane_server/__init__.py has no version of the form 1.2.3")
    return found[1]


def check_changelog(text: str, wanted: str) -> None:
    """The first section with something in it is that of the version, and has a day."""
    for part in re.split(r"(?m)^## ", text)[1:]:
        title, _, body = part.partition("\n")
        if title.strip() == "Unreleased":
            if body.strip():
                raise ReleaseError(
                    f'CHANGELOG.md: name the section "Unreleased" "{wanted} - '
                    f'{dt.datetime.now(dt.UTC).date()}"'
                )
            continue
        if not re.fullmatch(rf"{re.escape(wanted)} - \d{{4}}-\d\d-\d\d", title.strip()):
            raise ReleaseError(
                f'CHANGELOG.md: the newest section is "{title.strip()}", the version {wanted}'
            )
        return
    raise ReleaseError("CHANGELOG.md has no section")


def check_tree(root: Path, wanted: str) -> None:
    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, text=True, check=True, timeout=60
        )
        return done.stdout.strip()

    if git("status", "--porcelain"):
        raise ReleaseError("what is not committed is not released: commit, or stash")
    if f"v{wanted}" in git("tag").splitlines():
        raise ReleaseError(f"v{wanted} is there: raise the version")


def requirements(name: str, extras: tuple[str, ...]) -> Iterator[Requirement]:
    for line in metadata.requires(name) or ():
        one = Requirement(line)
        environments = [{"extra": extra} for extra in (*extras, "")]
        if one.marker is None or any(one.marker.evaluate(each) for each in environments):
            yield one


def closure(name: str, extras: tuple[str, ...]) -> tuple[list[str], dict[str, set[str]]]:
    """Every distribution below ``name`` that is installed, and who needs whom."""
    needs: dict[str, set[str]] = {}
    left = [(name, extras)]
    while left:
        one, wanted = left.pop()
        key = canonical(one)
        known = needs.setdefault(key, set())
        for found in requirements(one, wanted):
            try:
                metadata.distribution(found.name)
            except metadata.PackageNotFoundError:
                continue
            below = canonical(found.name)
            if below == canonical(name):
                continue
            fresh = below not in needs
            known.add(below)
            if fresh or found.extras:
                needs.setdefault(below, set())
                left.append((found.name, tuple(found.extras)))
            if len(needs) > 2000:
                raise ReleaseError("the dependencies have no end")
    return sorted(needs), needs


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def bom(wanted: str) -> str:
    """CycloneDX JSON. Raises ReleaseError where it is none."""
    names, needs = closure("facelane", EXTRAS)
    made = Bom()
    made.metadata.tools.components.add(this_component())
    parts: dict[str, Component] = {}
    for name in names:
        about = metadata.metadata(name)
        number = wanted if name == "facelane" else metadata.version(name).partition("+")[0]
        licence = (about.get("License-Expression") or about.get("License") or "").strip()
        part = Component(
            name=about["Name"],
            version=number,
            type=ComponentType.APPLICATION if name == "facelane" else ComponentType.LIBRARY,
            purl=PackageURL("pypi", None, name, number),
            bom_ref=f"pkg:pypi/{name}@{number}",
        )
        if licence and "\n" not in licence and len(licence) < 80:
            part.licenses.add(DisjunctiveLicense(name=licence))
        parts[name] = part
        if name == "facelane":
            made.metadata.component = part
            part.supplier = OrganizationalEntity(name="facelane", urls=[XsUri("urn:facelane")])
        else:
            made.components.add(part)
    for name, below in needs.items():
        made.register_dependency(parts[name], [parts[one] for one in sorted(below)])
    text = JsonV1Dot6(made).output_as_string(indent=2)
    wrong = JsonStrictValidator(SchemaVersion.V1_6).validate_str(text)
    if wrong is not None:
        raise ReleaseError(f"the SBOM is none: {wrong}")
    return text


def sums(folder: Path) -> str:
    """As ``sha256sum --check`` reads them."""
    files = sorted(path for path in folder.iterdir() if path.name != "SHA256SUMS")
    return "".join(
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    parser.add_argument("--allow-dirty", action="store_true", help="for a trial")
    arguments = parser.parse_args()
    root, out = arguments.root, arguments.out
    try:
        wanted = version(root)
        if not arguments.allow_dirty:
            check_tree(root, wanted)
        check_changelog((root / "CHANGELOG.md").read_text(), wanted)
        if out.exists() and any(out.iterdir()):
            raise ReleaseError(f"{out} is not empty: what lies there would be summed up too")
        out.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            [sys.executable, "-m", "hatchling", "build", "-d", str(out)],
            cwd=root, check=True, timeout=600,
        )  # fmt: skip
        (out / f"facelane-{wanted}.cdx.json").write_text(bom(wanted))
        (out / "SHA256SUMS").write_text(sums(out))
    except ReleaseError as error:
        print(f"release: {error}", file=sys.stderr)
        return 1
    print(f"release: {wanted} in {out}. Next: git tag v{wanted}, and sign SHA256SUMS")
    return 0


if __name__ == "__main__":
    sys.exit(main())
