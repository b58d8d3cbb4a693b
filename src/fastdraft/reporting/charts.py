"""The charts, each one small matplotlib drawing as an SVG image: `ladder(results)` and so on give `Chart`s.

Charts of one call share their vertical scale. They are drawn for a light ground; in the dark the page lays
one under them.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastdraft.benchmark.rows import BenchmarkResults
from fastdraft.evaluation.results import CHECKPOINT_LABELS, SPEEDUPS, TASK_ORDER, EvaluationResults
from fastdraft.reporting.definitions import PAPER_RATES, TEMPLATES, at_temperature, count, label

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# What is varied alone at the best K: the row's `part` and the field of its value.
SWEEPS = {
    "prompt_tokens": "Prompt length, tokens",
    "max_new_tokens": "Output length, tokens",
    "concurrency": "Requests at the same time",
}
GREY = "#8a909a"
CHECKPOINT_COLOURS = dict(zip(CHECKPOINT_LABELS, (GREY, "#7f97ba", "#3f7fd0", "#0f2f6e"), strict=True))
COLOURS = ("#b4531a", "#6f4aa8", "#2c7a4b", "#a87400", "#0f7c8a", "#b03a6e")
Point = tuple[float, float, tuple[float, float] | None]  # place, value, and its interval or range


@dataclass(frozen=True)
class Line:
    """One series."""

    name: str
    colour: str
    points: Sequence[Point]
    look: str = "o-"
    best: bool = False  # whether the highest point is marked


@dataclass
class Chart:
    """A drawing and what it shows, in words."""

    title: str
    alt: str
    lines: Sequence[Line] = ()
    x_label: str = ""
    ticks: Mapping[float, str] | None = None
    log: str = ""  # logarithmic axis: `x` or `y`
    draw: Callable[[Axes], None] | None = None
    height: float = 2.9

    @property
    def source(self) -> str:
        """A data address for an `<img>`."""
        import matplotlib
        from matplotlib.figure import Figure

        buffer = io.BytesIO()
        with matplotlib.rc_context(fname=str(TEMPLATES / "chart.mplstyle")):
            figure = Figure(figsize=(4.4, self.height), dpi=72)
            left = 0.1 if self.lines else 0.22  # names of bars
            axes = figure.add_axes((left, 0.52 / self.height, 0.97 - left, 1 - 0.85 / self.height))
            if self.draw:
                self.draw(axes)
            if len(axes.get_legend_handles_labels()[1]) > 1:
                figure.legend(loc="upper center", ncols=4)
            figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def drawn(charts: Iterable[Chart], *, even: bool = False) -> list[Chart]:
    """Charts of lines on one vertical scale, those without a line left out; `even` draws a line at 1."""
    charts = [chart for chart in charts if any(line.points for line in chart.lines)]
    points = [point for chart in charts for line in chart.lines for point in line.points]
    values = [value for _, y, around in points for value in (y, *(around or ()))] + [1.0] * even
    room = 0.08 * (max(values) - min(values)) if values else 0.0
    for chart in charts:

        def draw(axes: Axes, chart: Chart = chart) -> None:
            axes.set_ylim(max(0.0, min(values) - room), max(values) + 1.8 * room + 0.01)
            _draw(axes, chart)
            if even:
                axes.axhline(1, color=GREY, linewidth=1, linestyle=":")

        chart.draw = draw
    return charts


def _draw(axes: Axes, chart: Chart) -> None:
    lines = [line for line in chart.lines if line.points]
    places = [x for line in lines for x, _, _ in line.points]
    for number, line in enumerate(lines):
        x, y, ranges = zip(*line.points, strict=True)
        axes.plot(x, y, line.look, color=line.colour, label=line.name or None, linewidth=1.6, markersize=4)
        for at, around in zip(x, ranges, strict=True):
            if around:  # moved a little, so that ranges of several lines stay apart
                step = 0.0 if chart.log else 0.008 * (max(places) - min(places))
                moved = at + step * (number - (len(lines) - 1) / 2)
                axes.plot([moved, moved], around, color=line.colour, linewidth=1.4, alpha=0.5)
        if line.best:
            at, top, _ = max(line.points, key=lambda point: (point[1], -point[0]))
            axes.plot([at], [top], "o", color=line.colour, markersize=8, markeredgecolor="white")
            if not any(later.best for later in lines[number + 1 :]):
                ground = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}
                told: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "bbox": ground}
                axes.annotate(f"{top:.2f}", (at, top), (0, 8), **told)
    axes.set_xlabel(chart.x_label)
    if chart.log:
        (axes.set_xscale if chart.log == "x" else axes.set_yscale)("log")
    if chart.log == "y":
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
    if chart.ticks is None:
        axes.xaxis.set_major_formatter(lambda value, _: count(value))
        axes.locator_params(axis="x", nbins=5)
    else:
        axes.set_xticks(list(chart.ticks), list(chart.ticks.values()))
        axes.set_xticks([], minor=True)


def _points(rows: Iterable[Any], key: str, at: str = "num_speculative_tokens") -> list[Point]:
    """Those of rows that hold the figure."""
    known = [row for row in rows if getattr(row, key) is not None]
    return [(float(getattr(row, at)), getattr(row, key), row.interval(key)) for row in known]


def _ticks(lines: Iterable[Line]) -> dict[float, str]:
    return {x: count(x) for line in lines for x, _, _ in line.points}


def colour(name: str, names: Iterable[str] = ()) -> str:
    """Shipped tasks have a fixed colour, other names take the next."""
    order = [*TASK_ORDER, *(other for other in names if other not in TASK_ORDER)]
    return COLOURS[order.index(name) % len(COLOURS)]


def ladder(results: EvaluationResults) -> list[Chart]:
    """Acceptance rate of every task after each checkpoint at two temperatures, then the paper's pairs."""
    key, charts = "acceptance_rate", []
    for temperature in results.temperatures[:2]:
        lines = []
        for task in results.tasks:
            rows = [results.row(name, task, temperature) for name in results.checkpoints]
            points = [(float(i), getattr(row, key), row.interval(key)) for i, row in enumerate(rows) if row]
            lines.append(Line(task, colour(task, results.tasks), points))
        ticks = {float(i): label(name) for i, name in enumerate(results.checkpoints)}
        name = at_temperature(temperature).capitalize()
        charts.append(Chart(name, f"Acceptance rate by checkpoint: {name}", lines, ticks=ticks))
    for pair, rates in PAPER_RATES.items():
        lines = [
            Line(task, colour(task), [(float(i), y, None) for i, y in enumerate(found)])
            for task, found in rates.items()
        ]
        ticks = {0.0: "PT", 1.0: "CP", 2.0: "FT"}
        charts.append(Chart(f"Paper: {pair}", f"The paper's acceptance rates of {pair}", lines, ticks=ticks))
    return drawn(charts)


def _by_checkpoint(
    results: EvaluationResults, points: Callable[[str, str], list[Point]], x_label: str, *, best: bool = False
) -> list[Chart]:
    """A chart for each task, in it a line for each checkpoint."""
    charts = []
    for task in results.tasks:
        found = [(name, CHECKPOINT_COLOURS.get(name, GREY)) for name in results.checkpoints]
        lines = [Line(label(name), hue, points(name, task), best=best) for name, hue in found]
        charts.append(Chart(task, f"{task}, against {x_label}", lines, x_label, _ticks(lines)))
    return drawn(charts, even=best)


def against_k(results: EvaluationResults, key: str) -> list[Chart]:
    """Block efficiency or a speed-up of every checkpoint against K."""

    def points(checkpoint: str, task: str) -> list[Point]:
        return _points(results.against_k(checkpoint, task, results.temperatures[0]), key)

    return _by_checkpoint(results, points, "K, draft tokens per round", best=key in SPEEDUPS)


def positions(results: EvaluationResults) -> list[Chart]:
    """Share of rounds in which the proposal at each position was accepted, from the largest K."""

    def points(checkpoint: str, task: str) -> list[Point]:
        rows = results.against_k(checkpoint, task, results.temperatures[0])
        shares = rows[-1].accepted_per_position if rows else []
        return [(i + 1.0, share, None) for i, share in enumerate(shares)]

    return _by_checkpoint(results, points, "position in the round")


def losses(metrics: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Chart]:
    """Of every stage against trained tokens: losses, and tokens per target pass in alignment."""
    charts = []
    for stage, logged in metrics.items():
        train: list[Point] = [(line["tokens"], line["loss"], None) for line in logged if "loss" in line]
        held: dict[str, list[Point]] = {}
        kept: list[Point] = []
        for line in logged:
            for name, loss in (line.get("validation_loss") or {}).items():
                held.setdefault(name, []).append((line["tokens"], loss, None))
            if line.get("validation_block_efficiency") is not None:
                kept.append((line["tokens"], line["validation_block_efficiency"], None))
        lines = [Line("", "#c3c7cd", train, "-"), Line("train", GREY, smooth(train), "-")]
        lines += [Line(name, colour(name, held), points) for name, points in held.items()]
        words = f"{label(stage)}: loss"
        charts += drawn([Chart(words, words, lines, "tokens trained", log="y")])
        words = f"{label(stage)}: tokens per target pass, held out"
        best = Line("", CHECKPOINT_COLOURS["align"], kept, best=True)
        charts += drawn([Chart(words, words, [best], "tokens trained")])
    return charts


def smooth(points: Sequence[Point], share: float = 0.04) -> list[Point]:
    """A running mean over the latest `share` of all points, so that the trend of a noisy loss can be read."""
    window, means = max(1, round(len(points) * share)), list[Point]()
    for i, (x, _, _) in enumerate(points):
        latest = [y for _, y, _ in points[max(0, i + 1 - window) : i + 1]]
        means.append((x, sum(latest) / len(latest), None))
    return means


def wall_clock(benchmark: BenchmarkResults) -> list[Chart]:
    """Measured speed-up, with ranges, and the predicted one against K, a chart for each task."""
    rows, charts = benchmark.judged(), []
    for task in dict.fromkeys(row.task for row in rows):
        mine, hue = [row for row in rows if row.task == task], colour(task, (row.task for row in rows))
        lines = [Line("measured", hue, _points(mine, "speedup"), best=True)]
        lines += [Line("predicted", hue, _points(mine, "predicted_speedup"), "--")]
        alt = f"Speed-up against K on {task}"
        charts.append(Chart(task, alt, lines, "K, draft tokens per round", _ticks(lines)))
    return drawn(charts, even=True)


def sweeps(benchmark: BenchmarkResults) -> list[Chart]:
    """Measured speed-up when one thing changes, a line for each task."""
    charts = []
    for part, words in SWEEPS.items():
        rows = sorted((row for row in benchmark.rows if row.part == part), key=lambda row: getattr(row, part))
        tasks = dict.fromkeys(row.task for row in rows)
        points = {task: _points((row for row in rows if row.task == task), "speedup", part) for task in tasks}
        lines = [Line(task, colour(task, tasks), points[task]) for task in tasks]
        alt = f"Measured speed-up against: {words}"
        charts.append(Chart(words, alt, lines, ticks=_ticks(lines), log="x"))
    return drawn(charts, even=True)


def breakdown(benchmark: BenchmarkResults) -> list[Chart]:
    """Shares of a speculative run's time, one lying bar for each pair of weights."""
    rows = benchmark.breakdown
    places = [-at for at in range(len(rows))]

    def draw(axes: Axes) -> None:
        for i, words in enumerate(("target", "draft", "runtime around them")):
            left, width = [sum(row.shares[:i]) for row in rows], [row.shares[i] for row in rows]
            shade = ("#0f2f6e", "#3f7fd0", "#b9c4d6")[i]
            axes.barh(places, width, left=left, height=0.5, color=shade, label=words)
        axes.set_yticks(places, [row.pair for row in rows])
        axes.set_xticks([0, 0.5, 1], ["0", "50", "100 %"])

    words = "Where the time of a speculative run goes"
    return [Chart("", words, draw=draw, height=0.9 + 0.4 * len(rows))] if rows else []
