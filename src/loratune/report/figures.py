"""Figures as SVG of their own: no script, no font or file from elsewhere, light or dark as the reader's screen is."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

_WIDTH, _PANEL, _TOP, _ROW = 880, 168, 112, 262
_HEAT_X, _CURVE_X, _CURVE_WIDTH = 68, 340, 500
_MAX_CELLS = 32  # a side; above it every n-th rank is drawn: phi changes slowly with i and j
_MAX_POINTS = 64  # above it (experts one by one) the dots of a line would touch
_STYLE = """
.lt { --surface: #fcfcfb; --ink: #0b0b0b; --soft: #52514e; --grid: #e1e0d9; --one: #2a78d6; --two: #eb6834 }
@media (prefers-color-scheme: dark) {
  .lt { --surface: #1a1a19; --ink: #ffffff; --soft: #c3c2b7; --grid: #383835; --one: #3987e5; --two: #d95926 }
}
.lt text { font: 12px system-ui, sans-serif; fill: var(--soft) }
.lt .title { font-size: 16px; font-weight: 600; fill: var(--ink) }
.lt .name { font-size: 13px; font-weight: 600; fill: var(--ink) }
.lt .end { text-anchor: end } .lt .middle { text-anchor: middle }
.lt .surface { fill: var(--surface) } .lt .cell { fill: var(--one) }
.lt .frame { fill: none; stroke: var(--grid) } .lt .grid { stroke: var(--grid) }
.lt .chance { stroke: var(--soft); stroke-dasharray: 2 4 }
.lt .one { stroke: var(--one) } .lt .two { stroke: var(--two) }
.lt polyline { fill: none; stroke-width: 2; stroke-linejoin: round }
.lt circle.one { fill: var(--one) } .lt circle.two { fill: var(--two) }
"""
_CURVES = (("similarity_top", "one", "top direction, φ(1, 1)"), ("similarity_span", "two", "whole span, φ(r, r)"))


def similarity_figure(report: Mapping[str, Any]) -> str:
    """Returns the figure of `report.adapters.diff`: for each projection phi(i, j) as a heat map, mean of its layers,
    and phi(1, 1) and phi(r, r) over the layers, with the level of chance (Hu et al. 2021, figure 3)."""
    groups = report["groups"]
    height = _TOP + _ROW * len(groups)
    title = "Subspace similarity of two LoRA adapters"
    body = [
        tag("title", title),
        tag("style", raw=_STYLE),
        tag("rect", width=_WIDTH, height=height, class_="surface"),
        tag("text", title, x=24, y=34, class_="title"),
        tag("text", f"i: {report['one']}", x=24, y=56),
        tag("text", f"j: {report['other']}", x=24, y=74),
        *_legend(),
    ]
    for index, group in enumerate(groups):
        body.append(tag("g", raw="".join(_row(group)), transform=f"translate(0 {_TOP + index * _ROW})"))
    box = {"viewBox": f"0 0 {_WIDTH} {height}", "width": _WIDTH, "height": height}
    return tag("svg", raw="".join(body), xmlns="http://www.w3.org/2000/svg", class_="lt", role="img", **box) + "\n"


def _legend() -> Iterable[str]:
    """The scale of the heat maps, and the names of the lines."""
    for index in range(11):
        yield tag("rect", x=_HEAT_X + index * 15, y=88, width=15, height=10, class_="cell", fill_opacity=index / 10)
    yield tag("rect", x=_HEAT_X, y=88, width=165, height=10, class_="frame")
    yield tag("text", "φ = 0", x=_HEAT_X - 8, y=97, class_="end")
    yield tag("text", "1", x=_HEAT_X + 172, y=97)
    for index, (_, style, name) in enumerate(_CURVES):
        x = _CURVE_X + index * 180
        yield tag("line", x1=x, x2=x + 20, y1=93, y2=93, class_=style, stroke_width=2)
        yield tag("text", name, x=x + 26, y=97)
    yield tag("line", x1=_CURVE_X + 352, x2=_CURVE_X + 372, y1=93, y2=93, class_="chance")
    yield tag("text", "chance, for φ(r, r)", x=_CURVE_X + 378, y=97)


def _row(group: Mapping[str, Any]) -> Iterable[str]:
    count = len(group["layers"])
    caption = "one site" if count == 1 else f"heat map: mean of {count} sites"
    yield tag("text", f"{group['role']} · {group['name']}", x=24, y=30, class_="name")
    yield tag("text", caption, x=_CURVE_X + _CURVE_WIDTH, y=30, class_="end")
    panels = "".join([*_heat_map(group["similarity"]), *_curves(group)])
    yield tag("g", raw=panels, transform="translate(0 44)")


def _steps(count: int) -> list[int]:
    """Returns at most _MAX_CELLS indices of 0 to count - 1, the last one among them."""
    shown = min(count, _MAX_CELLS)
    return [round((index + 1) * count / shown) - 1 for index in range(shown)]


def _heat_map(grid: Sequence[Sequence[float]]) -> Iterable[str]:
    rows, columns = _steps(len(grid)), _steps(len(grid[0]))
    width, height = _PANEL / len(columns), _PANEL / len(rows)
    for y, i in enumerate(rows):
        for x, j in enumerate(columns):
            tip = tag("title", f"φ({i + 1}, {j + 1}) = {grid[i][j]:.3f}")
            place = {"x": _HEAT_X + x * width, "y": y * height, "width": width, "height": height}
            yield tag("rect", raw=tip, class_="cell", fill_opacity=min(grid[i][j], 1.0), **place)
    yield tag("rect", x=_HEAT_X, y=0, width=_PANEL, height=_PANEL, class_="frame")
    for label, at in (("1", height / 2), (str(len(grid)), _PANEL - height / 2)):
        yield tag("text", label, x=_HEAT_X - 8, y=at + 4, class_="end")
    for label, at in (("1", width / 2), (str(len(grid[0])), _PANEL - width / 2)):
        yield tag("text", label, x=_HEAT_X + at, y=_PANEL + 18, class_="middle")
    yield tag("text", "i", x=_HEAT_X - 30, y=_PANEL / 2 + 4, class_="middle")
    yield tag("text", "j", x=_HEAT_X + _PANEL / 2, y=_PANEL + 18, class_="middle")


def _curves(group: Mapping[str, Any]) -> Iterable[str]:
    layers = group["layers"]
    for value in (0, 0.5, 1):
        y = _y(value)
        yield tag("line", x1=_CURVE_X, x2=_CURVE_X + _CURVE_WIDTH, y1=y, y2=y, class_="grid")
        yield tag("text", f"{value:g}", x=_CURVE_X - 8, y=y + 4, class_="end")
    chance = _y(group["chance_span"])
    yield tag("line", x1=_CURVE_X, x2=_CURVE_X + _CURVE_WIDTH, y1=chance, y2=chance, class_="chance")
    for index in sorted({0, len(layers) // 2, len(layers) - 1}):
        label = f"layer {layers[index]}" if index == 0 and layers[index] else layers[index]
        yield tag("text", label, x=_x(index, len(layers)), y=_PANEL + 18, class_="middle")
    for measure, style, name in _CURVES:
        yield from _line(group[measure]["by_layer"], layers, style, name)


def _line(values: Sequence[float], layers: Sequence[str], style: str, name: str) -> Iterable[str]:
    points = [(_x(index, len(values)), _y(value)) for index, value in enumerate(values)]
    yield tag("polyline", points=" ".join(f"{x:.1f},{y:.1f}" for x, y in points), class_=style)
    if len(points) > _MAX_POINTS:
        return
    for (x, y), layer, value in zip(points, layers, values):
        tip = tag("title", f"{f'layer {layer}: ' if layer else ''}{name} = {value:.3f}")
        yield tag("circle", raw=tip, cx=x, cy=y, r=3, class_=style)


def _x(index: int, count: int) -> float:
    """The middle of a layer's share of the width."""
    return _CURVE_X + _CURVE_WIDTH * (index + 0.5) / count


def _y(value: float) -> float:
    return _PANEL * (1 - min(value, 1.0))


def tag(name: str, text: object = "", *, raw: str = "", **attributes: Any) -> str:
    """Returns one element; `text` and attributes are escaped, `raw` is markup already. class_ means class."""
    parts = [name]
    for key, value in attributes.items():
        shown = f"{round(value, 2):g}" if isinstance(value, float) else str(value)
        parts.append(f'{key.rstrip("_").replace("_", "-")}="{escape(shown)}"')
    return f"<{' '.join(parts)}>{escape(str(text))}{raw}</{name}>"
