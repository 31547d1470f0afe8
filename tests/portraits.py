"""Portraits that packages of the demo bring along, found without importing those."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path


def _beside(package: str) -> Path:
    spec = find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


HOPPER = _beside("matplotlib") / "mpl-data" / "sample_data" / "grace_hopper.jpg"
COLLINS = _beside("skimage") / "data" / "astronaut.png"
