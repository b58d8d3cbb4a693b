"""Renders a report: one HTML file that needs nothing else, and the same in Markdown.

Decides that HTML comes from the template beside this file with everything escaped but our own drawings, and how each
kind of block reads in Markdown (accepted tokens in [brackets]).
"""

from __future__ import annotations

import re
from importlib import resources

from fastdraft.reporting.document import (
    Block,
    Cell,
    Charts,
    Details,
    Report,
    Row,
    Sample,
    Section,
    Table,
    Text,
)

_MARKDOWN_SPECIAL = re.compile(r"([\\`*_\[\]<>|#~])")


def render_html(report: Report) -> str:
    """The whole page: style sheet and drawings inside, no script, no network."""
    import jinja2
    from markupsafe import Markup

    source = resources.files("fastdraft.reporting").joinpath("report.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.tests["kind_of"] = lambda block, name: type(block).__name__ == name
    environment.filters["drawing"] = Markup
    return environment.from_string(source).render(report=report)


def render_markdown(report: Report) -> str:
    """The same content as Markdown tables; drawings are left out, their figures stand in the tables."""
    parts = [
        f"# {escape_markdown(report.title)}",
        escape_markdown(report.subtitle),
        f"**{escape_markdown(report.verdict)}**",
        escape_markdown(report.verdict_detail),
    ]
    parts.append(
        "\n".join(f"- {escape_markdown(name)}: {escape_markdown(value)}" for name, value in report.facts)
    )
    if report.tiles:
        parts.append(
            "\n".join(
                f"- {escape_markdown(tile.label)}: **{escape_markdown(tile.value)}**"
                + (f" ({escape_markdown(tile.detail)})" if tile.detail else "")
                for tile in report.tiles
            )
        )
    parts += [_section(section) for section in report.sections]
    if report.omitted:
        parts.append(
            "## Not in this report\n\n" + "\n".join(f"- {escape_markdown(line)}" for line in report.omitted)
        )
    parts.append(escape_markdown(report.footer))
    return "\n\n".join(part for part in parts if part) + "\n"


def markdown_table(table: Table) -> str:
    """A table in pipe syntax; the caption above, the note below."""
    lines = ["| " + " | ".join(_cell(column) for column in table.columns) + " |"]
    lines.append("| " + " | ".join("---:" if numeric else "---" for numeric in table.numeric) + " |")
    lines += [_row(row) for row in table.rows]
    parts = [
        f"**{escape_markdown(table.caption)}**" if table.caption else "",
        "\n".join(lines),
        escape_markdown(table.note),
    ]
    return "\n\n".join(part for part in parts if part)


def _section(section: Section) -> str:
    parts = [
        f"## {escape_markdown(section.title)}",
        escape_markdown(section.lead),
        *(_block(block) for block in section.blocks),
    ]
    return "\n\n".join(part for part in parts if part)


def _block(block: Block) -> str:
    if isinstance(block, Table):
        return markdown_table(block)
    if isinstance(block, Text):
        return escape_markdown(block.text)
    if isinstance(block, Sample):
        text = "".join(f"[{piece}]" if accepted else piece for piece, accepted in block.pieces)
        return (
            f"**{escape_markdown(block.task)}** "
            f"({escape_markdown(block.about)})\n\nPrompt:\n\n{_fence(block.prompt)}\n\nAnswer, accepted tokens in "
            f"brackets:\n\n{_fence(text)}"
        )
    if isinstance(block, Details):
        inside = _fence(block.text) if block.text else markdown_table(block.table) if block.table else ""
        return f"<details><summary>{escape_markdown(block.summary)}</summary>\n\n{inside}\n\n</details>"
    assert isinstance(block, Charts)
    return ""


def _row(row: Row) -> str:
    cells = [_figure(cell) for cell in row.cells]
    if row.kind in ("group", "strong"):
        cells = [f"**{cell}**" if cell else "" for cell in cells]
    return "| " + " | ".join(cells) + " |"


def _figure(cell: Cell) -> str:
    text = _cell(cell.text)
    text = f"**{text}**" if cell.mark and text else text
    return f"{text} ({_cell(cell.detail)})" if cell.detail else text


def _cell(text: str) -> str:
    return " ".join(escape_markdown(text).split())


def escape_markdown(text: str) -> str:
    """Text in which no character is markup."""
    return _MARKDOWN_SPECIAL.sub(r"\\\1", text)


def _fence(text: str) -> str:
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text.rstrip()}\n{fence}"
