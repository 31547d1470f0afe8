"""The memory plan: what is added up, what is refused, what is only remarked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
import pytest

from facelane_server import config, plan
from facelane_server.domain import Stage
from facelane_server.models.catalog import Catalog
from facelane_server.models.package import Memory, Package
from facelane_server.monitor import DeviceReading
from facelane_server.plan import DeviceMemory, make_plan, visible

CARD = DeviceMemory("cuda:0", "a card", 8_000, 300)
SECOND = DeviceMemory("cuda:1", "a card", 8_000, 0)


def packages(weights: float = 200.0, item: float = 10.0) -> dict[Stage, Package]:
    """Torch packages as far as the planner looks: nothing of them is loaded."""
    found = {}
    for stage in Stage:
        package = Catalog().resolve(f"null-{stage}")
        manifest = msgspec.structs.replace(
            package.manifest, runtime="torch", memory=Memory(weights, item)
        )
        found[stage] = Package(package.folder, manifest)
    return found


def settings(**pools: Mapping[str, object]) -> config.Config:
    made = {
        str(stage): config.Pool(**{"devices": ("cuda:0",), **pools.get(str(stage), {})})  # type: ignore[arg-type]
        for stage in Stage
    }
    return config.Config(pools=config.Pools(**made))


def problems(
    chosen: config.Config, devices: Sequence[DeviceMemory] | None = (CARD,)
) -> tuple[str, ...]:
    return make_plan(chosen, packages(), devices).problems


def test_three_processes_have_a_context_each() -> None:
    made = make_plan(settings(), packages(), [CARD])
    [device] = made.devices
    assert [share.need_mib for share in device.shares] == [640 + 200 + 80] * 3
    assert device.reserved_mib == 3 * 920
    assert (made.problems, made.remarks) == ((), ())
    assert any("cuda:0 a card: 2760 MiB of 8000 MiB" in line for line in made.lines())


def test_threads_of_a_group_share_one_context() -> None:
    thread = {"isolation": "thread"}
    made = make_plan(
        settings(detector=thread, recognizer=thread, liveness=thread), packages(), [CARD]
    )
    assert made.devices[0].reserved_mib == 640 + 3 * 280


def test_workers_and_spares_are_spread_over_the_devices() -> None:
    chosen = settings(detector={"devices": ("cuda:0", "cuda:1"), "workers": 2, "spares": 1})
    made = make_plan(chosen, packages(), [CARD, SECOND])
    counts = {
        (device.device, share.pool): share.workers
        for device in made.devices
        for share in device.shares
    }
    assert counts["cuda:0", "detector"] == 2
    assert counts["cuda:1", "detector"] == 1


def test_a_budget_that_does_not_hold_its_model_is_refused() -> None:
    [problem] = problems(settings(recognizer={"memory_mib": 900}))
    assert "pools.recognizer: a worker needs about 920 MiB" in problem
    assert "memory_mib is 900" in problem
    assert not problems(settings(recognizer={"memory_mib": 920}))


def test_budgets_beyond_the_card_are_refused() -> None:
    fits = {"memory_mib": 2_600}
    assert not problems(settings(detector=fits, recognizer=fits, liveness=fits))
    [problem] = problems(settings(detector=fits, recognizer=fits, liveness={"memory_mib": 2_801}))
    assert "cuda:0 has 8000 MiB" in problem
    assert "8001 MiB" in problem


def test_estimates_beyond_the_card_are_refused_without_budgets() -> None:
    [problem] = problems(settings(detector={"workers": 8}))
    assert "lower memory_mib, workers or batch_max" in problem


def test_a_device_that_is_not_there_is_refused() -> None:
    [problem] = problems(settings(liveness={"devices": ("cuda:3",)}))
    assert problem == "pools.liveness.devices: cuda:3 does not exist; there are: cuda:0"


def test_memory_of_others_is_remarked_and_not_refused() -> None:
    full = DeviceMemory("cuda:0", "a card", 8_000, 6_000)
    made = make_plan(settings(), packages(), [full])
    assert not made.problems
    assert "6000 MiB are in use by others" in made.remarks[0]


def test_a_dry_run_counts_more_than_the_estimate() -> None:
    chosen = settings(recognizer={"memory_mib": 1_000})
    made = make_plan(chosen, packages(), [CARD], {"recognizer": 1_100, "detector": 700})
    assert "needs about 1100 MiB" in made.problems[0]
    assert made.devices[0].reserved_mib == 700 + 1_000 + 920


def test_auto_is_the_card_where_there_is_one() -> None:
    auto = {"devices": ("auto",)}
    chosen = settings(detector=auto, recognizer=auto, liveness=auto)
    assert make_plan(chosen, packages(), [CARD]).devices[0].reserved_mib == 3 * 920
    assert make_plan(chosen, packages(), None).devices == ()
    assert make_plan(chosen, packages(), None).lines() == ["no pool uses a CUDA device"]


def test_without_nvml_nothing_is_refused_and_that_is_said() -> None:
    made = make_plan(settings(), packages(), None)
    assert not made.problems
    assert made.remarks == ("cuda:0: NVML cannot be asked, so its memory is not compared",)


def test_null_models_take_nothing() -> None:
    null = {stage: Catalog().resolve(f"null-{stage}") for stage in Stage}
    assert make_plan(settings(), null, [CARD]).devices == ()


@pytest.mark.parametrize(
    ("chosen", "names"),
    [
        (None, ["a", "b", "c"]),
        ("", []),
        ("2,0", ["c", "a"]),
        ("GPU-b", ["b"]),
        ("1,7,0", ["b"]),
        ("-1", []),
    ],
)
def test_visible_devices_are_those_that_cuda_shows(chosen: str | None, names: list[str]) -> None:
    devices = [(f"GPU-{n}-1", DeviceMemory(f"cuda:{i}", n, 1, 0)) for i, n in enumerate("abc")]
    found = visible(devices, chosen)
    assert [memory.name for memory in found] == names
    assert [memory.device for memory in found] == [f"cuda:{i}" for i in range(len(names))]


def test_a_group_budget_is_the_sum_over_its_threads() -> None:
    thread = {"isolation": "thread", "memory_mib": 500}
    chosen = settings(detector={**thread, "workers": 2}, recognizer=thread, liveness={})
    assert plan.process_budget_mib(chosen, "detector") == 1_500
    assert plan.process_budget_mib(chosen, "recognizer") == 1_500
    assert plan.process_budget_mib(chosen, "liveness") == 0
    unbounded = settings(detector=thread, recognizer={"isolation": "thread"})
    assert plan.process_budget_mib(unbounded, "detector") == 0


async def test_a_refused_plan_stops_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "read_devices", lambda: [CARD])
    with pytest.raises(config.ConfigError, match="does not exist"):
        await plan.check(settings(liveness={"devices": ("cuda:3",)}), packages())


def test_an_instance_of_a_card_is_not_taken_for_no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    class Cards:
        """One card, which is divided."""

        errors = OSError

        def read(self) -> tuple[DeviceReading, ...]:
            return (DeviceReading("0", "H100", "GPU-1", 0, 80 << 30),)

        def close(self) -> None:
            """Nothing is open."""

    monkeypatch.setattr(plan.Nvml, "load", Cards)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-1")
    assert [device.device for device in plan.read_devices() or ()] == ["cuda:0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-7f3b2c1d-0000-5000-8000-000000000000")
    assert plan.read_devices() is None
    # Its memory is not compared, and the configuration not refused.
    assert problems(settings(), plan.read_devices()) == ()
