"""All checks, in order. Each looks at one thing, never raises, and says what to do where
something is wrong."""

from __future__ import annotations

import asyncio
from pathlib import Path

from facelane_server.doctor.installation import (
    check_config,
    check_gallery,
    check_inference,
    check_keys,
    check_listen,
    check_master_key,
    check_memory,
    check_metrics,
    check_models,
    check_tls,
    check_tracing,
)
from facelane_server.doctor.machine import (
    check_cgroup,
    check_driver,
    check_mps,
    check_nvjpeg,
    check_python,
    check_torch,
    check_ulimits,
)
from facelane_server.doctor.report import Report


async def examine(path: Path | None, *, infer: bool = True) -> Report:
    """``path``: the config file. ``infer``: with a real inference of every stage."""
    settings, read = check_config(path)
    found = [
        check_python(),
        read,
        *check_driver(settings),
        await check_torch(settings),
        check_mps(settings),
        check_nvjpeg(settings),
        check_cgroup(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")),
        *check_ulimits(),
        check_listen(settings),
        check_metrics(settings),
        check_keys(settings),
        check_tls(settings),
        check_tracing(settings),
        await asyncio.to_thread(check_gallery, settings),
        await asyncio.to_thread(check_master_key, settings),
    ]
    models, told = check_models(settings)
    found += told
    if models is not None:
        found.append(await asyncio.to_thread(check_memory, settings, models))
    if infer and models is not None:
        found += [await check_inference(settings, models, stage) for stage in models.packages]
    return Report(tuple(found))
