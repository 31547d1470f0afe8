"""What a worker is told when it is begun."""

from __future__ import annotations

from typing import Any

import pytest
from tests.real_pool import PACKAGES

from facelane_server import config
from facelane_server.domain import Stage
from facelane_server.pools.briefing import Briefing


@pytest.mark.parametrize(
    ("stage", "decode", "places"),
    [(Stage.DETECTOR, "cpu", 2), (Stage.DETECTOR, "cuda", 3), (Stage.LIVENESS, "cpu", 2)],
)
def test_a_detector_whose_card_decodes_has_a_third_job_in_flight(
    stage: Stage, decode: Any, places: int
) -> None:
    briefing = Briefing(stage, config.Pool(decode=decode), crops=(), max_pixels=1, resolve=None)
    assert briefing.load(PACKAGES[stage], "worker#0", "cuda:0").slots == places
