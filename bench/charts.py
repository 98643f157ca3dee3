"""Lines -> an SVG file: images/s on the left and a high percentile of latency on the right over a
parameter, or anything over time."""

from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

from training.charts import Axis, axis_over

WIDTH, HEIGHT = 300, 200  # of a panel
LEFT, TOP, GAP, BOTTOM = 60, 44, 80, 44
COLOURS = {  # a server has its own in every plot
    "ours": "#0b6e99",
    "ours-cpu": "#5ab0d0",
    "ours-pair": "#c4554d",
    "litserve": "#d9730d",
    "ray": "#6940a5",
    "bentoml": "#448361",
    "engine": "#9f6b53",
}
OTHER = "#333"
NOTHING = (1.0,)  # what an axis spans that has nothing on it

Point = tuple[float, float, float | None]  # parameter, images/s, latency in ms


def lines(
    title: str, parameter: str, series: Mapping[str, Sequence[Point]], latency: str = "p99"
) -> str:
    """Both panels over one logarithmic parameter; a colour and a name for each series, also for one
    without points. `latency` says what that of the points is."""
    xs = np.array([point[0] for points in series.values() for point in points] or NOTHING)
    x = Axis(float(xs.min()) / 1.1, float(xs.max()) * 1.1, log=True)
    width, height = 2 * (LEFT + WIDTH) + GAP, TOP + HEIGHT + BOTTOM + 18
    panels = "".join(
        _panel(LEFT + number * (WIDTH + GAP + LEFT // 2), number + 1, label, parameter, x, series)
        for number, label in enumerate(("images/s", f"{latency}, ms"))
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'font-family="sans-serif" font-size="11" fill="#333">\n'
        f'<rect width="{width}" height="{height}" fill="white"/>\n'
        f'<text x="{LEFT}" y="16" font-size="13">{escape(title)}</text>\n'
        f"{panels}{_legend(series, height - 8)}</svg>\n"
    )


def _panel(
    left: int,
    column: int,
    label: str,
    parameter: str,
    x: Axis,
    series: Mapping[str, Sequence[Point]],
) -> str:
    found = {
        name: [
            (point[0], value) for point in sorted(points) if (value := point[column]) is not None
        ]
        for name, points in series.items()
    }
    values = np.array([value for points in found.values() for _, value in points] or NOTHING)
    y = axis_over(values)
    if not y.log:  # from nothing on, so that heights compare
        y = Axis(0.0, float(values.max()) * 1.05)
    drawn = [
        f'<text x="{left}" y="{TOP - 6}">{label}</text>',
        f'<text x="{left + WIDTH}" y="{TOP + HEIGHT + 32}" text-anchor="end">{parameter}</text>',
    ]
    for place, text in y.ticks():
        height = TOP + HEIGHT * (1 - place)
        drawn.append(f'<path d="M{left} {height:.1f}h{WIDTH}" stroke="#ddd"/>')
        drawn.append(f'<text x="{left - 6}" y="{height + 4:.1f}" text-anchor="end">{text}</text>')
    for value in sorted({point[0] for points in series.values() for point in points}):
        place = left + WIDTH * float(x.at(value))
        drawn.append(
            f'<text x="{place:.1f}" y="{TOP + HEIGHT + 16}" text-anchor="middle">{value:g}</text>'
        )
    for name, points in found.items():
        colour = COLOURS.get(name, OTHER)
        places = [
            (left + WIDTH * float(x.at(place)), TOP + HEIGHT * (1 - float(y.at(value))))
            for place, value in points
        ]
        joined = " ".join(f"{px:.1f},{py:.1f}" for px, py in places)
        drawn.append(
            f'<polyline points="{joined}" fill="none" stroke="{colour}" stroke-width="2"/>'
        )
        drawn += [
            f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3" fill="{colour}"/>' for px, py in places
        ]
    return "\n".join(drawn) + "\n"


def _legend(series: Mapping[str, Sequence[Point]], y: int) -> str:
    drawn, x = [], LEFT
    for name in series:
        colour = COLOURS.get(name, OTHER)
        drawn.append(f'<rect x="{x}" y="{y - 8}" width="10" height="8" fill="{colour}"/>')
        drawn.append(f'<text x="{x + 14}" y="{y}">{escape(name)}</text>')
        x += 30 + 7 * len(name)
    return "\n".join(drawn) + "\n"


def over_time(title: str, panels: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """A panel for each of the series of (minute, value), side by side, from nothing on."""
    count = len(panels)
    width, height = count * (LEFT + WIDTH) + GAP, TOP + HEIGHT + BOTTOM
    drawn = "".join(
        _over_time(LEFT + number * (WIDTH + LEFT), label, points)
        for number, (label, points) in enumerate(panels.items())
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'font-family="sans-serif" font-size="11" fill="#333">\n'
        f'<rect width="{width}" height="{height}" fill="white"/>\n'
        f'<text x="{LEFT}" y="16" font-size="13">{escape(title)}</text>\n{drawn}</svg>\n'
    )


def _over_time(left: int, label: str, points: Sequence[tuple[float, float]]) -> str:
    minutes, values = np.array(points or [(0.0, 1.0)], float).T
    x, y = (
        Axis(0.0, max(float(minutes.max()), 1e-9)),
        Axis(0.0, max(float(values.max()) * 1.1, 1e-9)),
    )
    drawn = [f'<text x="{left}" y="{TOP - 6}">{escape(label)}</text>']
    for place, text in y.ticks():
        height = TOP + HEIGHT * (1 - place)
        drawn.append(f'<path d="M{left} {height:.1f}h{WIDTH}" stroke="#ddd"/>')
        drawn.append(f'<text x="{left - 6}" y="{height + 4:.1f}" text-anchor="end">{text}</text>')
    for place, text in x.ticks():
        drawn.append(
            f'<text x="{left + WIDTH * place:.1f}" y="{TOP + HEIGHT + 16}" '
            f'text-anchor="middle">{text}</text>'
        )
    drawn.append(
        f'<text x="{left + WIDTH}" y="{TOP + HEIGHT + 32}" text-anchor="end">minutes</text>'
    )
    places = zip(left + WIDTH * x.at(minutes), TOP + HEIGHT * (1 - y.at(values)), strict=True)
    joined = " ".join(f"{px:.1f},{py:.1f}" for px, py in places)
    drawn.append(
        f'<polyline points="{joined}" fill="none" stroke="{COLOURS["ours"]}" stroke-width="1.5"/>'
    )
    return "\n".join(drawn) + "\n"
