"""Line charts as SVG of their own, for the pages of runs: axes, lines, points with intervals, a tip at every point."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from loratune.report.figures import tag

WIDE, NARROW = 620, 400  # of the drawing: letters keep their size where it is shown as wide as that
_HEIGHT = 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 14, 14, 34
_MAX_POINTS = 400  # of a line: beyond, neighbours share a pixel and their mean is drawn
STYLE = """
svg.chart { width: 100%; height: auto; display: block }
.chart text { font: 12px system-ui, sans-serif; fill: var(--soft) }
.chart .end { text-anchor: end } .chart .middle { text-anchor: middle }
.chart .grid { stroke: var(--grid) }
.chart polyline { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round }
.chart .whisker { stroke-width: 1.5; opacity: .6 }
.chart .s0 { stroke: var(--c0) } .chart circle.s0 { fill: var(--c0) }
.chart .s1 { stroke: var(--c1) } .chart circle.s1 { fill: var(--c1) }
.chart .s2 { stroke: var(--c2) } .chart circle.s2 { fill: var(--c2) }
.chart .s3 { stroke: var(--c3) } .chart circle.s3 { fill: var(--c3) }
.chart .s4 { stroke: var(--c4) } .chart circle.s4 { fill: var(--c4) }
"""
NUM_COLOURS = 5


@dataclass(frozen=True)
class Series:
    """One line: points (x, y), for points alone without a line `lined=False`; intervals (low, high) of each point."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: int = 0
    lined: bool = True
    intervals: Sequence[tuple[float, float]] = field(default=())


def line_chart(series: Sequence[Series], label: str, unit: str = "", width: int = WIDE) -> str:
    """Returns a chart of several series over one x axis; `label` says what a reader who cannot see it must know."""
    shown = [each for each in series if each.points]
    xs = [x for each in shown for x, _ in each.points]
    ys = [y for each in shown for _, y in each.points] + [
        end for each in shown for pair in each.intervals for end in pair
    ]
    if not xs:
        return ""
    frame = _Frame(width, min(xs), max(xs), *_range(ys))
    body = [tag("title", label), *frame.axes(unit)]
    for each in shown:
        body += frame.draw(each, unit)
    return tag("svg", raw="".join(body), viewBox=f"0 0 {width} {_HEIGHT}", class_="chart", role="img", aria_label=label)


def _range(ys: Sequence[float]) -> tuple[float, float]:
    low, high = min(ys), max(ys)
    room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    return (0.0 if 0 <= low < 0.35 * high else low - room), high + room


@dataclass(frozen=True)
class _Frame:
    """Where values stand on the drawing."""

    width: int
    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def x(self, value: float) -> float:
        span = self.x_high - self.x_low or 1.0
        return _LEFT + (value - self.x_low) / span * (self.width - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        return _HEIGHT - _BOTTOM - (value - self.y_low) / (self.y_high - self.y_low) * (_HEIGHT - _TOP - _BOTTOM)

    def axes(self, unit: str) -> Iterator[str]:
        for value in ticks(self.y_low, self.y_high, 5):
            y = self.y(value)
            yield tag("line", x1=_LEFT, x2=self.width - _RIGHT, y1=y, y2=y, class_="grid")
            yield tag("text", short(value), x=_LEFT - 8, y=y + 4, class_="end")
        end = self.width - _RIGHT - (8 * len(unit) + 14 if unit else 0)  # the unit stands there
        for value in ticks(self.x_low, self.x_high, self.width // 80):
            if self.x(value) <= end:
                yield tag("text", short(value), x=self.x(value), y=_HEIGHT - 12, class_="middle")
        if unit:
            yield tag("text", unit, x=self.width - _RIGHT, y=_HEIGHT - 12, class_="end")

    def draw(self, series: Series, unit: str) -> Iterator[str]:
        style = f"s{series.colour % NUM_COLOURS}"
        points = _thinned(series.points) if series.lined else list(series.points)
        places = [(self.x(x), self.y(y)) for x, y in points]
        if series.lined and len(points) > 1:
            yield tag("polyline", points=" ".join(f"{x:.1f},{y:.1f}" for x, y in places), class_=style)
        for (x, _), (low, high) in zip(points, series.intervals):
            yield tag("line", x1=self.x(x), x2=self.x(x), y1=self.y(low), y2=self.y(high), class_=f"{style} whisker")
        radius = 4 if not series.lined else 2.5 if len(points) <= 40 else 0
        for (x, y), (at_x, at_y) in zip(points, places) if radius or len(points) == 1 else ():
            tip = tag("title", f"{series.name}, {unit} {short(x)}: {y:.5g}")
            yield tag("circle", raw=tip, cx=at_x, cy=at_y, r=radius or 3, class_=style)


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Returns at most _MAX_POINTS points, each the mean of its neighbours."""
    size = math.ceil(len(points) / _MAX_POINTS)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(x for x, _ in each) / len(each), sum(y for _, y in each) / len(each)) for each in groups]


def ticks(low: float, high: float, most: int) -> list[float]:
    """Returns round numbers between two values, at most `most` and one: 1, 2 or 5 times a power of ten apart."""
    if high <= low:
        return [low]
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [round(index * step, 12) for index in range(first, math.floor(high / step + 1e-9) + 1)]


def short(value: float) -> str:
    """Returns a number as an axis has it: 1,200, 0.05, 5e-4, 3.2M."""
    size = abs(value)
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            scale = 1e3 if suffix == "k" else limit
            return f"{value / scale:.4g}{suffix}"
    if size and size < 1e-3:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:,.4g}" if size < 1000 else f"{value:,.0f}"
