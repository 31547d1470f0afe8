"""Where model packages are found, and by which name."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from facelane_server import limits
from facelane_server.domain import FacelaneError, Reason
from facelane_server.models.package import MANIFEST, Package, read_package
from facelane_server.naming import hint

_HERE: Final = Path(__file__).resolve().parent
SHIPPED: Final = (_HERE / "starter", _HERE / "builtin")
"""``starter``: the models trained for this project. ``builtin``: null models, and
networks with random weights for benchmarks."""


@dataclass(frozen=True, slots=True)
class Broken:
    """A folder with a manifest that does not hold together."""

    folder: Path
    error: FacelaneError


class Catalog:
    """The shipped packages, then those in ``directories``, in this order.

    A package is a sub-folder with a ``model.toml``. Reading is done at every call, so
    a package that was added is seen without a restart.
    """

    def __init__(self, directories: Sequence[Path] = ()) -> None:
        self._directories = (*SHIPPED, *map(Path, directories))

    def scan(self) -> tuple[list[Package], list[Broken]]:
        """All packages, in order of the search path; and the folders that cannot be read."""
        packages: list[Package] = []
        broken: list[Broken] = []
        for folder in self._folders():
            try:
                packages.append(read_package(folder))
            except FacelaneError as error:
                broken.append(Broken(folder, error))
        return packages, broken

    def resolve(self, reference: str) -> Package:
        """The package that ``reference`` means: a path to its folder (it has a path
        separator), a name, or ``name@version``; the first of the search path wins.

        Raises FacelaneError(MODEL_INVALID) when there is none, or it does not hold together.
        """
        if os.sep in reference or reference in (".", ".."):
            return read_package(Path(reference).expanduser())
        packages, broken = self.scan()
        for package in packages:
            if reference in (package.name, f"{package.name}@{package.manifest.version}"):
                return package
        for item in broken:
            if item.folder.name == reference.partition("@")[0]:
                raise item.error
        names = sorted({package.name for package in packages})
        raise FacelaneError(
            Reason.MODEL_INVALID,
            f"no model package is called {reference}; "
            f"{hint(reference, names, label='there are')} "
            "(add its directory to the configuration, or import it)",
            metadata={"model": reference},
        )

    def _folders(self) -> list[Path]:
        found: list[Path] = []
        for directory in self._directories:
            if not directory.is_dir():
                continue
            children = sorted(directory.iterdir())[: limits.MAX_PACKAGES]
            found += [child for child in children if (child / MANIFEST).is_file()]
        return found
