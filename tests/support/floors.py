"""Draws docs/floors.svg from the table "Who imports whom" of docs/architecture.md."""

from __future__ import annotations

import re
from html import escape
from pathlib import Path

DOCS = Path(__file__).resolve().parents[2] / "docs"
HEADING = "## Who imports whom"

_WIDTH, _HEIGHT, _GAP, _FLOOR = 142, 44, 14, 82
_FRONT_DOORS = {"huggingface", "serving", "training", "reft_kernels", "cli", "doctor", "functional"}


def read_rows(text: str) -> list[tuple[str, frozenset[str], frozenset[str], str]]:
    """(part, the parts that it imports, libraries, what it is), in the table's order."""
    lines = text.partition(HEADING)[2].partition("\n## ")[0].splitlines()
    rows = []
    for line in lines:
        if line.startswith("| `"):
            cells = line.split("|")[1:5]
            (part,), parts, libraries = (re.findall(r"`([^`]+)`", cell) for cell in cells[:3])
            rows.append((part, frozenset(parts), frozenset(libraries), cells[3].strip()))
    return rows


def floors(rows: list[tuple[str, frozenset[str], frozenset[str], str]]) -> dict[str, int]:
    """Part → its floor: 0 at the bottom, else one above the highest part that it imports."""
    found: dict[str, int] = {}
    for part, parts, _, _ in rows:
        found[part] = max((found[other] + 1 for other in parts), default=0)
    return found


def draw(text: str) -> str:
    """The picture, as SVG."""
    rows = read_rows(text)
    floor = floors(rows)
    levels: dict[int, list[str]] = {}
    for part, *_ in rows:
        levels.setdefault(floor[part], []).append(part)
    widest = max(map(len, levels.values()))
    width = widest * (_WIDTH + _GAP) + _GAP
    height = len(levels) * _FLOOR + _GAP
    at: dict[str, tuple[float, float]] = {}
    for level, parts in levels.items():
        left = (width - len(parts) * (_WIDTH + _GAP) + _GAP) / 2
        for place, part in enumerate(parts):
            at[part] = (left + place * (_WIDTH + _GAP), (len(levels) - 1 - level) * _FLOOR + _GAP)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="13">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
    ]
    for part, parts, _, _ in rows:
        x, y = at[part]
        for other in sorted(parts):
            to_x, to_y = at[other]
            ends = f'x1="{x + _WIDTH / 2:g}" y1="{y + _HEIGHT:g}" x2="{to_x + _WIDTH / 2:g}" y2="{to_y:g}"'
            lines.append(f'<line {ends} stroke="#b8c0cc" stroke-width="1"/>')
    for part, _, _, what in rows:
        x, y = at[part]
        fill = "#dce9f9" if part in _FRONT_DOORS else "#f1f3f6"
        lines += [
            f"<g><title>{escape(part)}: {escape(what)}</title>",
            f'<rect x="{x:g}" y="{y:g}" width="{_WIDTH}" height="{_HEIGHT}" rx="6" fill="{fill}" '
            'stroke="#5b6b80"/>',
            f'<text x="{x + _WIDTH / 2:g}" y="{y + _HEIGHT / 2 + 5:g}" text-anchor="middle" '
            f'fill="#1c2733">{escape(part)}</text></g>',
        ]
    return "\n".join([*lines, "</svg>"]) + "\n"


if __name__ == "__main__":
    (DOCS / "floors.svg").write_text(
        draw((DOCS / "architecture.md").read_text(encoding="utf-8")), encoding="utf-8"
    )
