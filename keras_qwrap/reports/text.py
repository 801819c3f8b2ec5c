"""Tables and lists for people: text no wider than the terminal, and HTML for notebooks."""

import html
import re
import shutil
import textwrap
from collections.abc import Iterable, Sequence

Row = Sequence[str]

_GAP = 2
_PIECES = re.compile(r"(?:(?<=[/_ ])|(?<=\.\.)|(?<=[a-z0-9])(?=[A-Z]))(?![^(]*\))")
"""Where a cell may be broken: behind `/`, `_`, a space or `..`, and between words in CamelCase.

Not between brackets.
"""


def terminal_width() -> int:
    """The columns of the terminal; 80 where there is none, as in a file."""
    return shutil.get_terminal_size().columns


def text_table(
    rows: Sequence[Row], stacks: Sequence[Sequence[int]], width: int | None = None
) -> list[str]:
    """The lines of a table, whose first row is its header.

    Args:
        rows: cells, as many in each row.
        stacks: the columns that are put into one, one above the other, if there is not enough
            room for all beside each other. Where that is too wide as well, cells are broken.
        width: of the lines; by default the terminal's.
    """
    width = terminal_width() if width is None else width
    if sum(_widths(rows)) + _GAP * (len(rows[0]) - 1) > width:
        rows = [
            ["\n".join(filter(None, (row[i] for i in stack))) for stack in stacks] for row in rows
        ]
    widths = _fitted(rows, width - _GAP * (len(rows[0]) - 1))
    lines = []
    for row in rows:
        cells = [_broken(cell, each) for cell, each in zip(row, widths, strict=True)]
        for number in range(max(map(len, cells))):
            parts = [cell[number] if number < len(cell) else "" for cell in cells]
            padded = [part.ljust(each) for part, each in zip(parts, widths, strict=True)]
            lines.append((" " * _GAP).join(padded).rstrip())
    return lines


def _widths(rows: Sequence[Row]) -> list[int]:
    return [
        max(len(line) for cell in column for line in cell.split("\n"))
        for column in zip(*rows, strict=True)
    ]


def _fitted(rows: Sequence[Row], room: int) -> list[int]:
    """Widths of columns that share `room`; words are broken where there is no other way."""
    widths = _widths(rows)
    words = [
        max(
            len(piece.rstrip())
            for cell in column
            for piece in re.split(f"{_PIECES.pattern}|\n", cell)
        )
        for column in zip(*rows, strict=True)
    ]
    while sum(widths) > room and max(widths) > 1:
        loose = [i for i, each in enumerate(widths) if each > words[i]] or range(len(widths))
        widths[max(loose, key=lambda i: widths[i])] -= 1
    return widths


def _broken(cell: str, width: int) -> list[str]:
    """The lines of a cell."""
    lines = []
    for line in cell.split("\n"):
        lines.append("")
        for piece in _PIECES.split(line):
            if len((lines[-1] + piece).rstrip()) > width and lines[-1]:
                lines.append("")
            lines[-1] += piece
            while len(lines[-1].rstrip()) > width:
                lines[-1:] = [lines[-1][:width], lines[-1][width:]]
    return [line.rstrip() for line in lines]


def paragraph(text: str, indent: str = "", hanging: str = "  ") -> list[str]:
    """The lines of a text, indented, the later ones by `hanging` more."""
    wrapper = textwrap.TextWrapper(terminal_width(), indent, indent + hanging)
    wrapper.break_on_hyphens = False
    return wrapper.wrap(text)


def html_table(rows: Sequence[Row]) -> str:
    """A table, whose first row is its header, in HTML."""
    lines = []
    for number, row in enumerate(rows):
        kind = "td" if number else "th"
        cells = "".join(f"<{kind}>{html.escape(cell)}</{kind}>" for cell in row)
        lines.append(f"<tr>{cells}</tr>")
    return f"<table>{''.join(lines)}</table>"


def html_list(entries: Iterable[str]) -> str:
    """A list, in HTML."""
    return f"<ul>{''.join(f'<li>{html.escape(entry)}</li>' for entry in entries)}</ul>"
