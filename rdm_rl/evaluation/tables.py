"""Tables of measurements, as plain text and Markdown, and the cells of any other: one list of columns behind all.

``rows`` are measurements; those of the same name are averaged.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import isnan
from typing import Literal

from rdm_rl.evaluation.metrics import SamplerMetrics, Summary, summarize

Better = Literal["lower", "higher", "near 1", ""]


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column of a table.

    Args:
        field: The field of :class:`SamplerMetrics`.
        title: What stands above it; short enough to wrap into two lines.
        better: Which values are better; empty if it is a description, or, as a time, too noisy to be ranked.
        decimals: Digits after the point.
        factor: What values are multiplied with, to get the unit of the title.
    """

    field: str
    title: str
    better: Better = ""
    decimals: int = 2
    factor: float = 1.0


COLUMNS = (
    Column(field="num_inference_steps", title="steps", decimals=0),
    Column(field="network_evaluations", title="network calls", decimals=0),
    Column(field="seconds_per_image", title="ms per image", decimals=1, factor=1000.0),
    Column(field="distance_to_data", title="distance to data", better="lower"),
    Column(field="distance_to_teacher", title="distance to teacher", better="lower"),
    Column(field="precision", title="precision", better="higher"),
    Column(field="recall", title="recall", better="higher"),
    Column(field="density", title="density", better="near 1"),
    Column(field="coverage", title="coverage", better="higher"),
    Column(field="accuracy", title="right digit, %", better="higher", decimals=1, factor=100.0),
)
ARROWS = {"lower": "↓", "higher": "↑", "near 1": "→ 1", "": ""}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One number of a table, as text.

    Args:
        text: The mean; empty if it was not measured.
        spread: The standard deviation over repetitions; empty if there is one repetition.
        best: Whether it is the best of its column. Equal numbers, as printed, share the title. Real images do not
            compete.
    """

    text: str
    spread: str
    best: bool


def table_cells(summaries: Sequence[Summary]) -> list[tuple[Column, list[Cell]]]:
    """The columns in which anything was measured, with one cell for each sampler.

    Example:
        >>> rows = [SamplerMetrics(name=name, num_images=9, recall=value) for name, value in (("a", 0.25), ("b", 0.5))]
        >>> [(column.field, [cell.best for cell in cells]) for column, cells in table_cells(summarize(rows))]
        [('recall', [False, True])]
    """
    columns = [(column, [_number(summary.mean, column) for summary in summaries]) for column in COLUMNS]
    return [
        (column, _column_cells(column, values, summaries))
        for column, values in columns
        if not all(isnan(value) for value in values)
    ]


def _number(row: SamplerMetrics, column: Column) -> float:
    """One value in the unit of its column, NaN for what was not measured."""
    value = getattr(row, column.field)
    return float("nan") if value is None else value * column.factor


def _column_cells(column: Column, values: Sequence[float], summaries: Sequence[Summary]) -> list[Cell]:
    """The cells of one column. Values are compared as they are printed: no digit decides that nobody sees."""
    orders: dict[str, Callable[[float], float]] = {
        "lower": lambda value: value,
        "higher": lambda value: -value,
        "near 1": lambda value: abs(value - 1),
    }
    order = orders.get(column.better)
    texts = ["" if isnan(value) else f"{value:.{column.decimals}f}" for value in values]
    competing = {text for text, summary in zip(texts, summaries, strict=True) if text and summary.mean.kind != "data"}
    best = min(map(float, competing), key=order) if order and len(competing) > 1 else None
    cells = []
    for text, summary in zip(texts, summaries, strict=True):
        spread = summary.spread.get(column.field)
        cells.append(
            Cell(
                text=text,
                spread="" if spread is None else f"{spread * column.factor:.{column.decimals}f}",
                best=bool(text) and summary.mean.kind != "data" and best is not None and float(text) == best,
            )
        )
    return cells


def format_table(rows: Iterable[SamplerMetrics], *, max_width: int = 120) -> str:
    """A plain-text table for the terminal; a star marks the best value of a column. A remark stands below where needed.

    Args:
        rows: Measurements.
        max_width: Where the table would be wider than this, the standard deviations over repetitions are left out, and
            then density, the least telling column. Long names may still make it wider.

    Example:
        >>> rows = [SamplerMetrics(name=name, num_images=9, recall=value) for name, value in (("a", 0.25), ("b", 0.5))]
        >>> print(format_table(rows))
          recall
          higher
        a   0.25
        b   0.50*
    """
    summaries = summarize(rows)
    columns = table_cells(summaries)
    names = [summary.mean.name for summary in summaries]
    repeated = any(summary.spread for summary in summaries)
    without_density = [(column, cells) for column, cells in columns if column.field != "density"]
    for with_spread, chosen in ((repeated, columns), (False, columns), (False, without_density)):
        lines = _text_lines(names, [_text_column(column, cells, with_spread) for column, cells in chosen])
        if max(map(len, lines)) <= max_width:
            break
    if repeated:
        count = max(summary.repetitions for summary in summaries)
        shown = "± is their standard deviation." if with_spread else "Their spread is in the report."
        lines.append(f"Means of up to {count} repetitions. {shown}")
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


def markdown_table(rows: Iterable[SamplerMetrics]) -> str:
    """A Markdown table; the best value of a column is bold.

    Example:
        >>> print(markdown_table([SamplerMetrics(name="a", num_images=9, recall=0.25)]))
        | sampler | recall ↑ |
        |---|---:|
        | a | 0.25 |
    """
    summaries = summarize(rows)
    columns = table_cells(summaries)
    titles = [f"{column.title} {ARROWS[column.better]}".strip() for column, _ in columns]
    lines = [["sampler", *titles], ["---", *["---:"] * len(titles)]]
    for index, summary in enumerate(summaries):
        lines.append([summary.mean.name.replace("|", "\\|"), *(_markdown_cell(cells[index]) for _, cells in columns)])
    # No spaces in the rule: the usual compact form.
    return "\n".join(f"|{'|'.join(line)}|" if line[0] == "---" else f"| {' | '.join(line)} |" for line in lines)


def _markdown_cell(cell: Cell) -> str:
    """One number in Markdown."""
    text = f"**{cell.text}**" if cell.best else cell.text or "-"
    return f"{text} ± {cell.spread}" if cell.spread else text
