"""The parts that a report is made of, before anybody decides between HTML and Markdown.

Decides that a report is a list of sections and a section a list of blocks, so that both forms are rendered from the same
content and cannot drift apart. Text is plain text everywhere; escaping is the renderer's work.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Cell:
    """One table cell: the figure, and beside it in small print its interval or remark."""

    text: str
    detail: str = ""
    mark: Literal["", "top", "good", "bad"] = ""
    """top: the highest of its column; good and bad: above or below what matters there."""


@dataclass(frozen=True)
class Row:
    """One table row; `paper` rows are somebody else's results and look so, `group` rows are headings over several rows."""

    cells: tuple[Cell, ...]
    kind: Literal["", "paper", "group", "strong"] = ""


@dataclass(frozen=True)
class Table:
    """A table whose rows have as many cells as `columns`."""

    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    caption: str = ""
    note: str = ""

    @property
    def numeric(self) -> tuple[bool, ...]:
        """Which columns hold figures only, and so are aligned to the right; never the first, which names the row."""
        body = [row for row in self.rows if row.kind != "group"]
        return tuple(
            i > 0 and bool(body) and all(_is_figure(row.cells[i].text) for row in body)
            for i in range(len(self.columns))
        )


@dataclass(frozen=True)
class Text:
    """One paragraph."""

    text: str
    tone: Literal["", "good", "bad", "muted"] = ""


@dataclass(frozen=True)
class Chart:
    """An inline SVG drawing and what it shows, in words."""

    svg: str
    title: str
    alt: str


@dataclass(frozen=True)
class Charts:
    """Drawings that belong together, laid out side by side where there is room; `keys` are (series class, label)."""

    charts: tuple[Chart, ...]
    caption: str = ""
    keys: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Sample:
    """One answer in pieces; an accepted piece was proposed by the draft, the others are the target's own tokens."""

    task: str
    about: str
    prompt: str
    pieces: tuple[tuple[str, bool], ...]


@dataclass(frozen=True)
class Details:
    """Long material that is folded away on a screen."""

    summary: str
    text: str = ""
    table: Table | None = None


Block = Table | Text | Charts | Sample | Details


@dataclass(frozen=True)
class Section:
    """One chapter; `anchor` is its address inside the page."""

    title: str
    anchor: str
    blocks: tuple[Block, ...]
    lead: str = ""


@dataclass(frozen=True)
class Tile:
    """One figure of the summary at the top."""

    label: str
    value: str
    detail: str = ""
    tone: Literal["", "good", "bad"] = ""


@dataclass(frozen=True)
class Report:
    """The whole report."""

    title: str
    subtitle: str
    verdict: str
    verdict_detail: str
    tone: Literal["good", "mixed", "bad", "none"]
    tiles: tuple[Tile, ...] = ()
    sections: tuple[Section, ...] = ()
    omitted: tuple[str, ...] = ()
    """One line for each thing that is not there, with the reason."""
    footer: str = ""
    facts: tuple[tuple[str, str], ...] = field(default=())
    """Name and value pairs under the title: target, draft, run."""


def row(*cells: str | Cell, kind: Literal["", "paper", "group", "strong"] = "") -> Row:
    """A row from strings and cells."""
    return Row(tuple(cell if isinstance(cell, Cell) else Cell(cell) for cell in cells), kind)


def _is_figure(text: str) -> bool:
    return not text or text in ("-", "–", "—", "n/a") or text.lstrip("+-−.~<>±")[:1].isdigit()
