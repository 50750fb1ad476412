"""What the judged images of one sampler are worth, and the mean of repetitions."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from math import isfinite, nan
from statistics import fmean, stdev
from typing import Any, Literal

from rdm_rl.evaluation.tables import Column, Row, format_table

Kind = Literal["data", "teacher", "baseline", "student"]


@dataclass(frozen=True, kw_only=True)
class SamplerMetrics:
    """The measurements of one set of images that one sampler drew. NaN stands for "not measured".

    Args:
        name: What the sampler is called in tables, such as "student, 4 steps". Rows of the same name are repetitions
            with other seeds; tables show their mean and spread.
        kind: Who drew the images. ``data`` marks real images, the floor that no sampler is expected to beat;
            ``baseline`` a few-step sampler to compare with, which gets a row but no headline in the report.
        num_images: How many images were judged. Distances are only comparable between equal numbers.
        num_inference_steps: Steps for each image, or None for real images.
        network_evaluations: Forward passes of the denoiser for each image; guidance takes two in a step.
        seconds_per_image: Wall-clock time for each image.
        distance_to_data: Fréchet distance to held-out real images.
        distance_to_teacher: Fréchet distance to the teacher's images.
        precision: Share of images that look like real ones.
        recall: Share of real images that the sampler covers.
        density: How deep in the real images' neighbourhoods the samples lie; 1 for equal distributions.
        coverage: Share of real images with a sample nearby.
        accuracy: Share of images that show what was asked for.
    """

    name: str
    kind: Kind = "student"
    num_images: int
    num_inference_steps: int | None = None
    network_evaluations: int | None = None
    seconds_per_image: float = nan
    distance_to_data: float = nan
    distance_to_teacher: float = nan
    precision: float = nan
    recall: float = nan
    density: float = nan
    coverage: float = nan
    accuracy: float = nan


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A sampler's mean over its repetitions.

    Args:
        mean: The mean of every field. Numbers that no repetition measured are NaN, counts of steps stay None.
        spread: The sample standard deviation of each measured field by name; empty for a single repetition.
        repetitions: How many rows were averaged.
    """

    mean: SamplerMetrics
    spread: dict[str, float]
    repetitions: int


FLOAT_FIELDS = tuple(field.name for field in fields(SamplerMetrics) if field.type is float)


def summarize(rows: Iterable[SamplerMetrics]) -> list[Summary]:
    """The rows of each name averaged, in the order in which the names first appear.

    Raises:
        ValueError: If two rows share a name but not the sampler's settings or the number of images.

    Example:
        >>> rows = [SamplerMetrics(name="a", num_images=9, recall=value) for value in (0.2, 0.4)]
        >>> [(summary.mean.recall, summary.repetitions) for summary in summarize(rows)]
        [(0.30000000000000004, 2)]
    """
    groups: dict[str, list[SamplerMetrics]] = {}
    for row in rows:
        groups.setdefault(row.name, []).append(row)
    return [_summary(group) for group in groups.values()]


def _summary(rows: Sequence[SamplerMetrics]) -> Summary:
    """The mean and spread of repetitions."""
    settings = {(row.kind, row.num_images, row.num_inference_steps, row.network_evaluations) for row in rows}
    if len(settings) > 1:
        raise ValueError(
            f"Rows named {rows[0].name!r} differ in kind, number of images, steps or network evaluations: "
            f"{sorted(map(str, settings))}. Give different samplers different names."
        )
    measured = {
        name: [value for value in (getattr(row, name) for row in rows) if isfinite(value)] for name in FLOAT_FIELDS
    }
    means: dict[str, Any] = {name: fmean(values) if values else nan for name, values in measured.items()}
    return Summary(
        mean=replace(rows[0], **means),
        spread={name: stdev(values) for name, values in measured.items() if len(values) > 1},
        repetitions=len(rows),
    )


COLUMNS = (
    Column(key="num_inference_steps", title="steps", decimals=0),
    Column(key="network_evaluations", title="network calls", decimals=0),
    Column(key="seconds_per_image", title="ms per image", decimals=1, factor=1000.0),
    Column(key="distance_to_data", title="distance to data", better="lower"),
    Column(key="distance_to_teacher", title="distance to teacher", better="lower"),
    Column(key="precision", title="precision", better="higher"),
    Column(key="recall", title="recall", better="higher"),
    Column(key="density", title="density", better="near 1"),
    Column(key="coverage", title="coverage", better="higher"),
    Column(key="accuracy", title="as asked, %", better="higher", decimals=1, factor=100.0),
)


def table_rows(summaries: Sequence[Summary]) -> list[Row]:
    """The rows of a table, under :data:`COLUMNS`."""
    rows = []
    for summary in summaries:
        values = {column.key: getattr(summary.mean, column.key) for column in COLUMNS}
        present = {key: float(value) for key, value in values.items() if value is not None}
        rows.append(Row(name=summary.mean.name, kind=summary.mean.kind, values=present, spreads=summary.spread))
    return rows


def format_rows(rows: Iterable[SamplerMetrics], *, max_width: int = 120) -> str:
    """A plain-text table for the terminal; see :func:`~rdm_rl.evaluation.tables.format_table`.

    Where there are repetitions, a remark stands below.

    Args:
        rows: Measurements.
        max_width: Where the table would be wider, spreads and then density, the least telling column, are left out.

    Example:
        >>> rows = [SamplerMetrics(name=name, num_images=9, recall=value) for name, value in (("a", 0.25), ("b", 0.5))]
        >>> print(format_rows(rows))
          recall
          higher
        a   0.25
        b   0.50*
    """
    summaries = summarize(rows)
    lines = [format_table(COLUMNS, table_rows(summaries), max_width=max_width, least=("density",))]
    count = max(summary.repetitions for summary in summaries)
    if count > 1:
        shown = "± is their standard deviation." if "±" in lines[0] else "Their spread is in the report."
        lines.append(f"Means of up to {count} repetitions. {shown}")
    return "\n".join(lines)
