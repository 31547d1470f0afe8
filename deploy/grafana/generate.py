"""Writes the dashboards beside it: ``python deploy/grafana/generate.py [--check]``.

Queries are what matters here; where a panel stands and how it looks follows from them.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

FOLDER: Final = Path(__file__).with_name("dashboards")
SCHEMA: Final = 39
"""Grafana's version of the format: 10.4 and later."""
HERE: Final = 'instance=~"$instance"'


@dataclass(frozen=True)
class Panel:
    """``queries``: expression and legend. ``unit``: of Grafana's."""

    title: str
    queries: tuple[tuple[str, str], ...]
    unit: str = "short"
    kind: str = "timeseries"
    about: str = ""
    width: int = 12
    high: float | None = None
    """Red from here on."""
    maximum: float | None = None


def quantile(metric: str, share: float, by: str = "", where: str = HERE) -> str:
    labels = f"le, {by}" if by else "le"
    return f"histogram_quantile({share}, sum by ({labels}) (rate({metric}_bucket{{{where}}}[$__rate_interval])))"


def rate(metric: str, by: str = "", where: str = HERE) -> str:
    of = f" by ({by})" if by else ""
    return f"sum{of} (rate({metric}{{{where}}}[$__rate_interval]))"


LIVE: Final = f'{HERE}, overload="latest_wins"'
OVERVIEW: Final = (
    Panel(
        "Pools that cannot infer",
        ((f"sum(1 - facelane_pool_serving{{{HERE}}})", ""),),
        kind="stat",
        width=4,
        high=1,
    ),
    Panel("Open streams", ((f"sum(facelane_streams_open{{{HERE}}})", ""),), kind="stat", width=4),
    Panel(
        "Room for streams",
        ((f"sum(facelane_load_headroom_streams{{{HERE}}})", ""),),
        kind="stat",
        width=4,
    ),
    Panel(
        "Load",
        ((f"max(facelane_load_ratio{{{HERE}}})", ""),),
        "percentunit",
        "gauge",
        width=4,
        high=1,
        maximum=2,
    ),
    Panel(
        "Age of live results, p99",
        ((quantile("facelane_frame_age_seconds", 0.99, where=LIVE), ""),),
        "s",
        "stat",
        width=4,
        high=0.5,
    ),
    Panel(
        "Templates searched",
        ((f"max(facelane_gallery_templates{{{HERE}}})", ""),),
        kind="stat",
        width=4,
    ),
    Panel(
        "Frames by outcome", ((rate("facelane_frames_total", "outcome"), "{{outcome}}"),), "reqps"
    ),
    Panel(
        "Why frames have no result",
        (
            (
                rate("facelane_frames_total", "outcome, reason", f'{HERE}, outcome!="result"'),
                "{{outcome}} {{reason}}",
            ),
        ),
        "reqps",
    ),
    Panel(
        "Age of live results",
        tuple(
            (quantile("facelane_frame_age_seconds", q, where=LIVE), f"p{q * 100:g}")
            for q in (0.5, 0.95, 0.99)
        ),
        "s",
        about="From the receipt of a frame to its result, of LATEST_WINS streams.",
        high=0.5,
    ),
    Panel(
        "Load of each server",
        ((f"facelane_load_ratio{{{HERE}}}", "{{instance}}"),),
        "percentunit",
        about="Frames that streams send, over those that can be served in time; over 1 they are thinned.",
        high=1,
    ),
    Panel(
        "Faces by decision", ((rate("facelane_faces_total", "decision"), "{{decision}}"),), "reqps"
    ),
    Panel(
        "Faces by liveness", ((rate("facelane_liveness_total", "verdict"), "{{verdict}}"),), "reqps"
    ),
    Panel(
        "Calls that were refused",
        ((rate("facelane_calls_refused_total", "reason"), "{{reason}}"),),
        "reqps",
    ),
    Panel(
        "Event loop lag",
        ((f"facelane_event_loop_lag_seconds{{{HERE}}}", "{{instance}}"),),
        "s",
        high=0.1,
    ),
)
CAMERAS: Final = (
    Panel(
        "Cameras that stream",
        ((f'sum(facelane_bridge_camera_state{{{HERE}, state="STREAMING"}})', ""),),
        kind="stat",
        width=6,
    ),
    Panel(
        "Cameras that do not",
        ((f'sum(facelane_bridge_camera_state{{{HERE}, state!="STREAMING"}})', ""),),
        kind="stat",
        width=6,
        high=1,
    ),
    Panel(
        "Oldest picture",
        ((f"max(facelane_bridge_camera_frame_age_seconds{{{HERE}}})", ""),),
        "s",
        "stat",
        width=6,
        high=10,
    ),
    Panel(
        "Streams that are thinned",
        ((f"sum(facelane_load_thinned_streams{{{HERE}}})", ""),),
        kind="stat",
        width=6,
        high=1,
    ),
    Panel(
        "State of each camera",
        ((f"facelane_bridge_camera_state{{{HERE}}} == 1", "{{camera}} {{state}}"),),
        kind="table",
        width=24,
    ),
    Panel(
        "Since the newest picture",
        ((f"facelane_bridge_camera_frame_age_seconds{{{HERE}}}", "{{camera}}"),),
        "s",
        width=24,
        high=10,
    ),
    Panel(
        "Frames without a result",
        (
            (rate("facelane_bridge_camera_drops_total", "camera, reason"), "{{camera}} {{reason}}"),
            (
                rate("facelane_bridge_camera_errors_total", "camera, reason"),
                "{{camera}} {{reason}}",
            ),
        ),
        "reqps",
    ),
    Panel(
        "Cameras opened again",
        (
            (
                f"sum by (camera) (increase(facelane_bridge_camera_openings_total{{{HERE}}}[$__rate_interval]))",
                "{{camera}}",
            ),
        ),
    ),
)
POOLS: Final = (
    Panel("Tasks that wait", ((f"facelane_pool_queued{{{HERE}}}", "{{instance}} {{pool}}"),)),
    Panel("Tasks answered", ((rate("facelane_pool_completed_total", "pool"), "{{pool}}"),), "reqps"),
    Panel("Waiting for a worker, p95", ((quantile("facelane_stage_queue_seconds", 0.95, "stage"), "{{stage}}"),), "s"),
    Panel("From dispatch to the answer, p95", ((quantile("facelane_stage_service_seconds", 0.95, "stage"), "{{stage}}"),), "s"),
    Panel("Tasks failed and tried again", ((rate("facelane_pool_failed_total", "pool"), "{{pool}} failed"), (rate("facelane_pool_retried_total", "pool"), "{{pool}} again")), "reqps"),
    Panel("Workers lost and begun anew", ((f"sum by (pool) (increase(facelane_pool_worker_losses_total{{{HERE}}}[$__rate_interval]))", "{{pool}} lost"), (f"sum by (pool) (increase(facelane_worker_restarts_total{{{HERE}}}[$__rate_interval]))", "{{pool}} anew")), high=1),
    Panel("Memory of workers", ((f"facelane_worker_memory_bytes{{{HERE}}}", "{{instance}} {{worker}}"),), "bytes"),
    Panel("Streams of video that workers decode", ((f"facelane_worker_video_decoders{{{HERE}}}", "{{instance}} {{worker}}"),)),
    Panel("Memory of cards", ((f"facelane_device_memory_used_bytes{{{HERE}}} / facelane_device_memory_total_bytes{{{HERE}}}", "{{instance}} {{device}}"),), "percentunit", high=0.9, maximum=1),
    Panel("Cards at work", ((f"facelane_device_utilization_ratio{{{HERE}}}", "{{instance}} {{device}} kernels"), (f"facelane_device_memory_utilization_ratio{{{HERE}}}", "{{instance}} {{device}} memory")), "percentunit", maximum=1),
    Panel("Power", ((f"facelane_device_power_watts{{{HERE}}}", "{{instance}} {{device}}"),), "watt"),
    Panel("Temperature", ((f"facelane_device_temperature_celsius{{{HERE}}}", "{{instance}} {{device}}"),), "celsius", high=85),
    Panel("Clocks held down", ((f"facelane_device_throttled{{{HERE}}}", "{{instance}} {{device}} {{reason}}"),)),
    Panel("Uncorrected memory errors", ((f"facelane_device_ecc_errors_total{{{HERE}}}", "{{instance}} {{device}}"),), high=1),
)  # fmt: skip
DASHBOARDS: Final = {
    "facelane-overview": ("facelane: overview", OVERVIEW, "facelane_build_info"),
    "facelane-cameras": ("facelane: cameras", CAMERAS, "facelane_bridge_camera_state"),
    "facelane-pools": ("facelane: pools and cards", POOLS, "facelane_build_info"),
}


def dashboard(name: str) -> dict[str, Any]:
    title, panels, marker = DASHBOARDS[name]
    source = {"type": "prometheus", "uid": "${datasource}"}
    shown: list[dict[str, Any]] = []
    x = y = tallest = 0
    for number, panel in enumerate(panels, 1):
        height = 4 if panel.kind in ("stat", "gauge") else 8
        if x + panel.width > 24:
            x, y, tallest = 0, y + tallest, 0
        tallest = max(tallest, height)
        shown.append(_panel(panel, number, source, {"h": height, "w": panel.width, "x": x, "y": y}))
        x += panel.width
    return {
        "uid": name, "title": title, "tags": ["facelane"], "timezone": "", "editable": True,
        "schemaVersion": SCHEMA, "version": 1, "refresh": "30s",
        "time": {"from": "now-3h", "to": "now"},
        "links": [{"type": "dashboards", "tags": ["facelane"], "title": "facelane", "asDropdown": True}],
        "templating": {"list": [
            {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"},
            {"name": "instance", "label": "Server", "type": "query", "datasource": source,
             "query": f"label_values({marker}, instance)", "refresh": 2, "multi": True,
             "includeAll": True, "current": {"text": "All", "value": "$__all"}},
        ]},
        "panels": shown,
    }  # fmt: skip


def _panel(panel: Panel, number: int, source: Any, place: Any) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [{"color": "green", "value": None}]
    if panel.high is not None:
        steps.append({"color": "red", "value": panel.high})
    defaults: dict[str, Any] = {
        "unit": panel.unit, "min": 0, "thresholds": {"mode": "absolute", "steps": steps},
    }  # fmt: skip
    if panel.maximum is not None:
        defaults["max"] = panel.maximum
    table = panel.kind == "table"
    return {
        "id": number, "type": panel.kind, "title": panel.title, "description": panel.about,
        "datasource": source, "gridPos": place,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "targets": [
            {"refId": chr(65 + n), "datasource": source, "expr": expr, "legendFormat": legend,
             "instant": table, "format": "table" if table else "time_series"}
            for n, (expr, legend) in enumerate(panel.queries)
        ],
    }  # fmt: skip


def text(name: str) -> str:
    return json.dumps(dashboard(name), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    for name in DASHBOARDS:
        path = FOLDER / f"{name}.json"
        if "--check" in sys.argv and path.read_text() != text(name):
            sys.exit(f"{path.name} is stale: python deploy/grafana/generate.py")
        if "--check" not in sys.argv:
            path.write_text(text(name))
