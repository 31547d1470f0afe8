"""Properties by hypothesis are asked twice: with some of their examples among the quick tests, with
all of them among the slow ones. The first are those that hypothesis tries first.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest
from hypothesis import settings

HOW_MANY = "how_many"
"""A parameter that no test has to take."""
_SETTINGS = "_hypothesis_internal_use_settings"


def some(chosen: settings) -> settings:
    """A third of the examples, and no fewer than twenty."""
    most = chosen.max_examples
    return settings(chosen, max_examples=min(most, max(20, most // 3)))


class Properties:
    """A plugin; where examples were asked for by their number, it does nothing."""

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        asked = settings.get_current_profile_name() == "repeatable"
        if asked and getattr(metafunc.function, "is_hypothesis_test", False):
            metafunc.fixturenames.append(HOW_MANY)
            everything = pytest.param("all", marks=pytest.mark.slow)
            metafunc.parametrize(HOW_MANY, ["some", everything])

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, Any, Any]:
        callspec = getattr(item, "callspec", None)
        if callspec is None or callspec.params.get(HOW_MANY) != "some":
            return (yield)
        test = getattr(item.obj, "__func__", item.obj)  # type: ignore[attr-defined]
        chosen = getattr(test, _SETTINGS)
        setattr(test, _SETTINGS, some(chosen))
        try:
            return (yield)
        finally:
            setattr(test, _SETTINGS, chosen)
