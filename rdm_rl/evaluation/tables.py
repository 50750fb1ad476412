"""Tables of measurements, as plain text and Markdown, and the cells of any other: one list of columns behind all.

``rows`` are measurements; those of the same name are averaged.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isnan, nan
from typing import Literal

Better = Literal["lower", "higher", "near 1", ""]


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column of a table.

    Args:
        key: Under which name rows have it.
        title: What stands above it; short enough to wrap into two lines.
        better: Which values are better; empty if it is a description, or, as a time, too noisy to be ranked.
        decimals: Digits after the point.
        factor: What values are multiplied with, to get the unit of the title.
    """

    key: str
    title: str
    better: Better = ""
    decimals: int = 2
    factor: float = 1.0


ARROWS = {"lower": "↓", "higher": "↑", "near 1": "→ 1", "": ""}


@dataclass(frozen=True, kw_only=True)
class Row:
    """What was measured of one sampler.

    Args:
        name: What stands before the row.
        kind: What it is: a row of the kind ``data``, real images, does not compete for the best value.
        values: Numbers by the keys of columns; NaN for what was not measured, as for a missing one.
        spreads: How uncertain they are, shown after ±; NaN is not shown.
        marked: Keys of values that get a dagger and do not compete for the best either.
    """

    name: str
    kind: str = "student"
    values: Mapping[str, float]
    spreads: Mapping[str, float] = field(default_factory=dict)
    marked: Collection[str] = ()


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One number of a table, as text.

    Args:
        text: The number; empty if it was not measured.
        spread: How uncertain it is; empty if that is not known.
        best: Whether it is the best of its column. Equal numbers, as printed, share the title. Real images do not
            compete.
    """

    text: str
    spread: str
    best: bool


def table_cells(columns: Iterable[Column], rows: Sequence[Row]) -> list[tuple[Column, list[Cell]]]:
    """The columns in which anything was measured, with one cell for each row.

    Example:
        >>> rows = [Row(name=name, values={"recall": value}) for name, value in (("a", 0.25), ("b", 0.5))]
        >>> columns = [Column(key="recall", title="recall", better="higher"), Column(key="time", title="time")]
        >>> [(column.key, [cell.best for cell in cells]) for column, cells in table_cells(columns, rows)]
        [('recall', [False, True])]
    """
    measured = [(column, [row.values.get(column.key, nan) * column.factor for row in rows]) for column in columns]
    return [(column, _column_cells(column, values, rows)) for column, values in measured if not all(map(isnan, values))]


def _column_cells(column: Column, values: Sequence[float], rows: Sequence[Row]) -> list[Cell]:
    """The cells of one column. Values are compared as they are printed: no digit decides that nobody sees."""
    orders: dict[str, Callable[[float], float]] = {
        "lower": lambda value: value,
        "higher": lambda value: -value,
        "near 1": lambda value: abs(value - 1),
    }
    order = orders.get(column.better)
    texts = ["" if isnan(value) else f"{value:.{column.decimals}f}" for value in values]
    competes = [
        bool(text) and row.kind != "data" and column.key not in row.marked
        for text, row in zip(texts, rows, strict=True)
    ]
    competing = {text for text, does in zip(texts, competes, strict=True) if does}
    best = min(map(float, competing), key=order) if order and len(competing) > 1 else None
    cells = []
    for text, row, does in zip(texts, rows, competes, strict=True):
        spread = row.spreads.get(column.key, nan) * column.factor
        cells.append(
            Cell(
                text=text + "†" * (bool(text) and column.key in row.marked),
                spread="" if isnan(spread) else f"{spread:.{column.decimals}f}",
                best=does and best is not None and float(text) == best,
            )
        )
    return cells


def format_table(
    columns: Iterable[Column], rows: Sequence[Row], *, max_width: int = 120, least: Collection[str] = ()
) -> str:
    """A plain-text table for the terminal; a star marks the best value of a column.

    Args:
        columns: The columns.
        rows: The rows.
        max_width: Where the table would be wider than this, spreads are left out, and then the ``least`` columns. Long
            names may still make it wider.
        least: Keys of the least telling columns.

    Example:
        >>> rows = [Row(name=name, values={"recall": value}) for name, value in (("a", 0.25), ("b", 0.5))]
        >>> print(format_table([Column(key="recall", title="recall", better="higher")], rows))
          recall
          higher
        a   0.25
        b   0.50*
    """
    cells = table_cells(columns, rows)
    without = [(column, entries) for column, entries in cells if column.key not in least]
    for with_spread, chosen in ((True, cells), (False, cells), (False, without)):
        lines = _text_lines(
            [row.name for row in rows], [_text_column(column, entries, with_spread) for column, entries in chosen]
        )
        if max(map(len, lines)) <= max_width:
            break
    return "\n".join(line for line in lines if line)


def _text_lines(names: Sequence[str], columns: Sequence[Sequence[str]]) -> list[str]:
    """The columns side by side, right-justified, beside the names of the rows."""
    blocks = [["", "", "", *names], *columns]
    widths = [max(map(len, block)) for block in blocks]
    return [
        " ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip()
        for line in zip(*blocks, strict=True)
    ]


def _text_column(column: Column, cells: Sequence[Cell], with_spread: bool) -> list[str]:
    """Three lines of heading, then the values with their decimal points in one line."""
    words = column.title.split(" ", 1) if " " in column.title else [column.title]
    spreads = max((len(cell.spread) for cell in cells), default=0) if with_spread else 0
    values = []
    for cell in cells:
        spread = (f" ±{cell.spread:>{spreads}}" if cell.spread else " " * (spreads + 2)) if spreads else ""
        values.append(f"{cell.text or '-'}{'*' if cell.best else ' '}{spread}")
    # Headings keep clear of the column of stars.
    return [f"{text} " if text else "" for text in [*[""] * (2 - len(words)), *words, column.better]] + values


def markdown_table(columns: Iterable[Column], rows: Sequence[Row]) -> str:
    """A Markdown table; the best value of a column is bold.

    Example:
        >>> columns = [Column(key="recall", title="recall", better="higher")]
        >>> print(markdown_table(columns, [Row(name="a", values={"recall": 0.25})]))
        | sampler | recall ↑ |
        |---|---:|
        | a | 0.25 |
    """
    cells = table_cells(columns, rows)
    titles = [f"{column.title} {ARROWS[column.better]}".strip() for column, _ in cells]
    lines = [["sampler", *titles], ["---", *["---:"] * len(titles)]]
    for index, row in enumerate(rows):
        lines.append([row.name.replace("|", "\\|"), *(_markdown_cell(entries[index]) for _, entries in cells)])
    # No spaces in the rule: the usual compact form.
    return "\n".join(f"|{'|'.join(line)}|" if line[0] == "---" else f"| {' | '.join(line)} |" for line in lines)


def _markdown_cell(cell: Cell) -> str:
    """One number in Markdown."""
    text = f"**{cell.text}**" if cell.best else cell.text or "-"
    return f"{text} ± {cell.spread}" if cell.spread else text
