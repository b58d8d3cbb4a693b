"""Turns a matplotlib figure into an inline SVG that follows the page's colours and fonts.

Decides the look shared by all charts: one column wide (so that a phone shows them at full size), thin grid, direct
labels instead of legends, no frame. Colours are placeholders that become CSS variables, so the same drawing is right on a
light screen, a dark one and on paper. The output is deterministic: fixed hash salt, no date, no random ids.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from xml.sax.saxutils import quoteattr

from fastdraft.run_folder import digest

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Points = list[tuple[float, float]]
WIDTH, HEIGHT = 254, 186
"""Size of one chart in CSS pixels."""

INK, MUTED, GRID, PAPER = "#010101", "#010102", "#010103", "#010104"
LADDER = {"pretrain": "#010111", "continue_pretrain": "#010112", "align": "#010113"}
HUES = ("#010121", "#010122", "#010123", "#010124", "#010125", "#010126")
_VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    GRID: "--grid",
    PAPER: "--surface",
    **{colour: f"--ladder-{i + 1}" for i, colour in enumerate(LADDER.values())},
    **{colour: f"--hue-{i + 1}" for i, colour in enumerate(HUES)},
}
_TASK_HUES = {"code": 0, "text": 1, "summarization": 2, "instructions": 3}
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fastdraft",
    "font.family": "DejaVu Sans",
    "font.size": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 10,
    "text.color": INK,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "xtick.major.size": 3,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "axes.unicode_minus": True,
}


@dataclass(frozen=True)
class Label:
    """A name to be written at the right end of a line that ends at (x, y) in data units."""

    text: str
    x: float
    y: float
    colour: str


@contextmanager
def drawing(
    width: int = WIDTH, height: int = HEIGHT, right: int = 56, left: int = 32
) -> Iterator[tuple[Figure, Axes]]:
    """A figure with one pair of axes in the house style; `right` pixels stay free for labels at the ends of lines."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width / 72, height / 72), dpi=72)
        FigureCanvasSVG(figure)
        bottom, top = 35, 12
        yield (
            figure,
            figure.add_axes(
                (
                    left / width,
                    bottom / height,
                    (width - left - right) / width,
                    (height - bottom - top) / height,
                )
            ),
        )


def draw_line(
    axes: Axes, points: Points, colour: str, *, markers: bool = False, width: float = 1.9, alpha: float = 1.0
) -> None:
    """One series."""
    axes.plot(
        [x for x, _ in points],
        [y for _, y in points],
        color=colour,
        linewidth=width,
        alpha=alpha,
        marker="o" if markers else "",
        markersize=4.5,
        markeredgecolor=PAPER,
        markeredgewidth=1.0,
    )


def draw_range(axes: Axes, x: float, around: tuple[float, float], colour: str, alpha: float = 0.5) -> None:
    """An upright bar from the lower to the higher value."""
    axes.plot([x, x], around, color=colour, linewidth=1.4, alpha=alpha, solid_capstyle="butt")


def draw_mark(axes: Axes, x: float, y: float, colour: str) -> None:
    """A point that stands out."""
    axes.plot(
        [x],
        [y],
        marker="o",
        markersize=8,
        color=colour,
        markeredgecolor=PAPER,
        markeredgewidth=1.6,
        zorder=5,
        clip_on=False,
    )


def label_ends(axes: Axes, labels: Sequence[Label], gap: float = 12.5) -> None:
    """Writes each label right of its line's end, none over another or below the axis. Call it after the limits are set."""
    axes.get_xlim(), axes.get_ylim()  # matplotlib settles its automatic limits only when they are asked for
    ordered = sorted(labels, key=lambda label: label.y)
    wanted = [float(axes.transData.transform((label.x, label.y))[1]) for label in ordered]
    lowest = float(axes.transAxes.transform((0, 0))[1]) + 4
    for label, y in zip(ordered, lifted(spread(wanted, gap), lowest, gap), strict=True):
        x = float(axes.transData.transform((label.x, label.y))[0]) + 6
        at = axes.transAxes.inverted().transform((x, y))
        axes.text(
            float(at[0]),
            float(at[1]),
            label.text,
            color=label.colour,
            va="center",
            ha="left",
            transform=axes.transAxes,
            clip_on=False,
            fontsize=10,
        )


def spread(positions: Sequence[float], gap: float) -> list[float]:
    """Ascending positions moved as little as needed so that neighbours are at least `gap` apart, groups keeping their centre."""
    groups: list[list[float]] = []
    for position in positions:
        groups.append([position])
        while len(groups) > 1 and _low(groups[-1], gap) - _high(groups[-2], gap) < gap:
            last = groups.pop()
            groups[-1] = groups[-1] + last
    return [_low(group, gap) + i * gap for group in groups for i in range(len(group))]


def lifted(positions: Sequence[float], lowest: float, gap: float) -> list[float]:
    """Ascending positions with those below `lowest` moved up to it, and their neighbours as far as that asks for."""
    found: list[float] = []
    for position in positions:
        found.append(max(position, found[-1] + gap if found else lowest))
    return found


def to_svg(figure: Figure, key: str, alt: str) -> str:
    """The figure as an `<svg>` element without size, script, style sheet or network reference.

    Args:
        figure: What `drawing` gave.
        key: Unique within the page; it is put before every id.
        alt: What the chart shows, for readers who cannot see it.
    """
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        figure.savefig(
            buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
        )
    return _clean(buffer.getvalue(), key, alt)


def task_colour(task: str, tasks: Sequence[str]) -> str:
    """Shipped tasks and corpora have a fixed hue, others take the next free one."""
    if task in _TASK_HUES:
        return HUES[_TASK_HUES[task]]
    others = [name for name in tasks if name not in _TASK_HUES]
    return HUES[(4 + others.index(task)) % len(HUES)] if task in others else HUES[-1]


def slug(text: str) -> str:
    """Letters and digits that name a drawing, different for different texts."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") + f"-{digest(text)[:4]}"


def plain_ticks(axis: Any, form: str = "{:g}") -> None:
    """Ticks written as plain figures, on logarithmic axes too."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: form.format(value)))
    axis.set_minor_formatter(NullFormatter())


def _low(group: Sequence[float], gap: float) -> float:
    return sum(group) / len(group) - (len(group) - 1) * gap / 2


def _high(group: Sequence[float], gap: float) -> float:
    return sum(group) / len(group) + (len(group) - 1) * gap / 2


def _clean(svg: str, key: str, alt: str) -> str:
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|<style[^>]*>.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<defs>\s*</defs>", "", svg)
    view = re.search(r'viewBox="([^"]+)"', svg)
    head = f'<svg class="chart" role="img" aria-label={quoteattr(alt)} viewBox="{view[1] if view else ""}" xmlns="http://www.w3.org/2000/svg">'
    svg = head + svg[svg.index(">") + 1 :]
    svg = svg.replace("xlink:href=", "href=")
    used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', svg))
    svg = re.sub(r' id="([^"]+)"', lambda m: f' id="{key}-{m[1]}"' if m[1] in used else "", svg)
    svg = re.sub(r'(url\(#|href="#)', lambda m: f"{m[1]}{key}-", svg)
    svg = re.sub(r"font:([^;\"]*?)'DejaVu Sans'[^;\"]*", lambda m: f"font:{m[1]}var(--sans)", svg)
    svg = re.sub(r"font-family:[^;\"]*", "font-family: var(--sans)", svg)
    return _colours(re.sub(r"\n\s*", "\n", svg), _VARIABLES)


def _colours(svg: str, variables: Mapping[str, str]) -> str:
    return re.sub(
        r"#0101[0-9a-f]{2}", lambda m: f"var({variables[m[0]]})" if m[0] in variables else m[0], svg
    )
