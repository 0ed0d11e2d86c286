"""Plots as SVG: lines over time, and bars side by side, a panel each, one below the other."""

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT, LEFT, TOP, GAP = 640, 240, 80, 40, 60
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd")


class Panel(NamedTuple):
    """Values by series, one for each of `labels`; as `bars`, or as lines."""

    title: str
    labels: Sequence[str]
    series: Mapping[str, Sequence[float]]
    bars: bool = False


def svg(panels: Sequence[Panel]) -> str:
    """The panels as one SVG image."""
    height = len(panels) * (TOP + HEIGHT + GAP)
    width = LEFT + WIDTH + 20
    body = [line for i, panel in enumerate(panels) for line in _panel(panel, i)]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"'
    style = 'font-family="sans-serif" font-size="12"'
    return "\n".join((f'{head} width="{width}" height="{height}" {style}>', *body, "</svg>\n"))


def _panel(panel: Panel, number: int) -> Iterator[str]:
    top = number * (TOP + HEIGHT + GAP) + TOP
    most = max((value for values in panel.series.values() for value in values), default=0) or 1
    step = WIDTH / max(len(panel.labels), 1)

    def y(value: float) -> float:
        return round(top + HEIGHT * (1 - value / most), 1)

    # AXES, with a line at each quarter
    yield _text(LEFT, top - 20, panel.title, 'font-size="14" font-weight="bold"')
    for quarter in range(5):
        value = most * quarter / 4
        yield (
            f'<line x1="{LEFT}" x2="{LEFT + WIDTH}" y1="{y(value)}" y2="{y(value)}" stroke="#ccc"/>'
        )
        yield _text(LEFT - 6, y(value) + 4, f"{value:,.4g}", 'text-anchor="end"')
    every = -(-len(panel.labels) // 16)
    for i, label in enumerate(panel.labels):
        if i % every == 0:
            at = round(LEFT + (i + 0.5) * step, 1)
            yield _text(at, top + HEIGHT + 18, label, 'text-anchor="middle"')

    # THE VALUES
    for i, (name, values) in enumerate(panel.series.items()):
        colour = COLOURS[i % len(COLOURS)]
        if panel.bars:
            wide = step * 0.8 / len(panel.series)
            for j, value in enumerate(values):
                x = round(LEFT + j * step + step * 0.1 + i * wide, 1)
                tall = round(top + HEIGHT - y(value), 1)
                yield (
                    f'<rect x="{x}" y="{y(value)}" width="{wide:.1f}" height="{tall}" '
                    f'fill="{colour}"><title>{escape(name)}: {value:,.6g}</title></rect>'
                )
        else:
            points = " ".join(
                f"{round(LEFT + (j + 0.5) * step, 1)},{y(value)}" for j, value in enumerate(values)
            )
            yield f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>'
        yield _text(LEFT + i * WIDTH / 4, top + HEIGHT + 38, name, f'fill="{colour}"')


def _text(x: float, y: float, text: str, more: str) -> str:
    return f'<text x="{x:g}" y="{y:g}" {more}>{escape(text)}</text>'
