"""Bar panels as SVG, written by hand: no plotting package, one look on light and dark pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final
from xml.sax.saxutils import escape

WIDTH: Final = 860
_LEFT: Final = 150
_RIGHT: Final = 130
_BAR: Final = 16
_STEP: Final = 26
_HEAD: Final = 34
_GAP: Final = 18
_OPENING: Final = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
    'width="{width}" height="{height}" role="img" font-family="system-ui, sans-serif">'
)
_STYLE: Final = (
    "<style>text{fill:#24292f;font-size:13px}.h{font-weight:600}.t{font-size:16px;"
    "font-weight:600}.n{font-variant-numeric:tabular-nums}.a{fill:#0969da}"
    ".b{fill:#0969da;opacity:.3}@media(prefers-color-scheme:dark){text{fill:#e6edf3}"
    ".a,.b{fill:#4493f8}}</style>"
)


@dataclass(frozen=True, slots=True)
class Bar:
    """Two figures of one line: the solid part ends at ``p50``, the pale one at ``p99``."""

    label: str
    p50: float
    p99: float


@dataclass(frozen=True, slots=True)
class Panel:
    """Bars that share a scale."""

    title: str
    bars: Sequence[Bar]


def bars(title: str, panels: Sequence[Panel]) -> str:
    """The drawing. Panels without bars are left out; each panel has its own scale."""
    shown = [panel for panel in panels if panel.bars]
    height = 48 + sum(_HEAD + len(panel.bars) * _STEP + _GAP for panel in shown)
    lines = [_OPENING.format(width=WIDTH, height=height), f"<title>{escape(title)}</title>", _STYLE]
    lines.append(f'<text class="t" x="12" y="28">{escape(title)}</text>')
    top = 48.0
    for panel in shown:
        lines.append(f'<text class="h" x="12" y="{top + 18:g}">{escape(panel.title)}</text>')
        top += _HEAD
        longest = max(max(bar.p50, bar.p99) for bar in panel.bars)
        scale = (WIDTH - _LEFT - _RIGHT) / longest if longest > 0 else 0.0
        for bar in panel.bars:
            middle = top + _BAR / 2 + 5
            lines.append(
                f'<text x="{_LEFT - 10}" y="{middle:g}" text-anchor="end">'
                f"{escape(bar.label)}</text>"
            )
            for kind, value in (("b", bar.p99), ("a", bar.p50)):
                lines.append(
                    f'<rect class="{kind}" x="{_LEFT}" y="{top:g}" '
                    f'width="{max(1.0, value * scale):.1f}" height="{_BAR}" rx="2"/>'
                )
            end = _LEFT + max(bar.p50, bar.p99) * scale + 8
            lines.append(
                f'<text class="n" x="{end:.1f}" y="{middle:g}">'
                f"{bar.p50:.2f} / {bar.p99:.2f} ms</text>"
            )
            top += _STEP
        top += _GAP
    lines.append("</svg>")
    return "\n".join(lines) + "\n"
