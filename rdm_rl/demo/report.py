"""The report of the demo: one folder that a stranger can open, and a program can read.

``report.html`` needs nothing but itself; ``report.md``, ``metrics.json``, ``samples.png`` and ``curves.png`` hold the
same for others.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import isfinite, isnan, nan
from pathlib import Path
from typing import Any

from torch import Tensor

from rdm_rl.evaluation.curves import History, training_curves
from rdm_rl.evaluation.page import data_uri, drawn_panels, library_versions, plain, render
from rdm_rl.evaluation.pictures import image_grid, tiled
from rdm_rl.evaluation.sampler_metrics import COLUMNS, FLOAT_FIELDS, SamplerMetrics, summarize, table_rows
from rdm_rl.evaluation.tables import markdown_table, table_cells
from rdm_rl.files import read_json

SCHEMA_VERSION = 1
DEFAULT_SUMMARY = (
    "A teacher, a tiny text-to-image diffusion model of two handwritten digits in colour, takes 50 denoising steps "
    "with guidance, 100 network calls, for an image. A warm start teaches a copy to do it in one call; from there, "
    "each update moves the student's images where the teacher finds them likelier than a network that tracks the "
    "student does (DMD and GNDM differ in the scale of that), and with GNDMR also where another recogniser sees more "
    "of what the prompt asks for. Then every sampler answered the same prompts from the same noise, and recognisers "
    "that took no part in training compared the images with real ones and with the teacher's."
)


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that a report shows.

    Args:
        rows: Measurements in the order of the table; rows of the same name are repetitions. Put real images first,
            then the teacher, then the students.
        pictures: For each caption, images of shape (M, 3, H, W) or (R, M, 3, H, W), in [0, 1], with the same M, H and
            W. The report says that nobody chose them: pass the first ones.
        picture_labels: A caption for each of the M columns.
        histories: The trainer's log history for each run.
        settings: The settings of the run, by group or directly; values that JSON lacks are written as text. Never
            pass a token.
        seeds: Every seed that was used, by its purpose.
        command: The command that makes this report again.
        title: The heading.
        summary: What was done, in about three sentences.
        network: The recogniser that gave the features.
        seconds: How long everything took, or NaN.

    Raises:
        ValueError: If there is no measurement.
    """

    rows: Sequence[SamplerMetrics]
    pictures: Mapping[str, Tensor] = field(default_factory=dict)
    picture_labels: Sequence[str] = tuple("0123456789")
    histories: Mapping[str, History] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    seeds: Mapping[str, Any] = field(default_factory=dict)
    command: str = ""
    title: str = "From 50 steps to one: distribution matching as a reward"
    summary: str = DEFAULT_SUMMARY
    network: str = "B"
    seconds: float = nan

    def __post_init__(self) -> None:
        """Check that there is something to report."""
        if not self.rows:
            raise ValueError("A report needs at least one row of measurements; pass what `judge` returns in `rows`.")


def write_report(folder: Path | str, report: Report) -> Path:
    """The path of ``report.html``, written with ``report.md``, ``metrics.json``, ``samples.png`` and ``curves.png``.

    The folder is made if it does not exist, and files of an earlier report are overwritten. The two pictures are only
    written if there is something to show.

    Example:
        >>> from tempfile import mkdtemp
        >>> row = SamplerMetrics(name="student, 4 steps", num_images=500, distance_to_data=6.5)
        >>> write_report(mkdtemp(), Report(rows=[row])).name
        'report.html'
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if report.pictures:
        image_grid(report.pictures, report.picture_labels).save(folder / "samples.png")
    curves = training_curves(report.histories, folder / "curves.png")
    (folder / "metrics.json").write_text(metrics_json(report), encoding="utf-8")
    (folder / "report.md").write_text(markdown_report(report, has_curves=curves is not None), encoding="utf-8")
    path = folder / "report.html"
    path.write_text(html_report(report), encoding="utf-8")
    return path


# --- JSON -------------------------------------------------------------------------------------------------------------


def metrics_json(report: Report) -> str:
    """The numbers of a report as strict JSON: what is not finite becomes null.

    Example:
        >>> row = SamplerMetrics(name="a", num_images=9, recall=0.5)
        >>> json.loads(metrics_json(Report(rows=[row])))["rows"][0]["precision"] is None
        True
    """
    content = {
        "schema_version": SCHEMA_VERSION,
        "title": report.title,
        "network": report.network,
        "rows": [asdict(row) for row in report.rows],
        "settings": report.settings,
        "seeds": report.seeds,
        "versions": library_versions(),
        "command": report.command,
        "seconds": report.seconds,
    }
    return json.dumps(plain(content), indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def read_rows(file: Path | str) -> list[SamplerMetrics]:
    """The measurements in a ``metrics.json``, to compare reports or to put several into one table; null becomes NaN.

    Raises:
        ValueError: If the file was written for another version of the format.

    Example:
        >>> from tempfile import mkdtemp
        >>> row = SamplerMetrics(name="a", num_images=9, recall=0.5)
        >>> path = write_report(mkdtemp(), Report(rows=[row]))
        >>> read_rows(path.with_name("metrics.json"))[0].recall
        0.5
    """
    content = read_json(Path(file))
    if content.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(
            f"{file} has schema_version {content.get('schema_version')!r}; this version of rdm_rl reads "
            f"{SCHEMA_VERSION}. Write the report again, or read it with the version named in the file."
        )
    rows: list[dict[str, Any]] = [
        {key: nan if value is None and key in FLOAT_FIELDS else value for key, value in row.items()}
        for row in content["rows"]
    ]
    return [SamplerMetrics(**row) for row in rows]


# --- What HTML and Markdown both say ----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Headline:
    """The result for one student in three figures: pairs of a figure and what it is."""

    name: str
    figures: Sequence[tuple[str, str]]


def headlines(rows: Sequence[SamplerMetrics]) -> list[Headline]:
    """For each student what changed against the teacher with the most steps; none is left out. Empty without a teacher.

    Example:
        >>> teacher = SamplerMetrics(name="t", kind="teacher", num_images=9, num_inference_steps=50, accuracy=0.5)
        >>> headlines([teacher, SamplerMetrics(name="s", num_images=9, accuracy=1.0)])[0].figures
        [('100.0 %', 'show all that was asked for (teacher: 50.0 %)')]
    """
    means = [summary.mean for summary in summarize(rows)]
    teachers = [mean for mean in means if mean.kind == "teacher"]
    if not teachers:
        return []
    teacher = max(teachers, key=lambda mean: mean.num_inference_steps or 0)
    return [Headline(name=mean.name, figures=_figures(mean, teacher)) for mean in means if mean.kind == "student"]


def _figures(student: SamplerMetrics, teacher: SamplerMetrics) -> list[tuple[str, str]]:
    """The figures of one student, as far as they were measured."""
    figures = []
    few, many = student.network_evaluations, teacher.network_evaluations
    if few and many and many > few:
        figures.append((f"{many / few:.3g}× fewer", f"network calls for an image: {few} instead of {many}"))
    if not isnan(student.distance_to_teacher):
        text = f"distance to the teacher, lower is better (two of its own draws: {teacher.distance_to_teacher:.2f})"
        figures.append((f"{student.distance_to_teacher:.2f}", text))
    if not isnan(student.accuracy):
        text = f"show all that was asked for (teacher: {teacher.accuracy:.1%})".replace("%", " %")
        figures.append((f"{student.accuracy:.1%}".replace("%", " %"), text))
    return figures


def table_note(rows: Sequence[SamplerMetrics]) -> str:
    """The sentences under the table.

    Example:
        >>> table_note([SamplerMetrics(name="a", num_images=500)])[:25]
        'Each row judges 500 image'
    """
    counts = sorted({row.num_images for row in rows})
    repeated = max(summary.repetitions for summary in summarize(rows))
    sentences = [
        f"Each row judges {' or '.join(map(str, counts))} images.",
        "Arrows point to better values; the best of each column is highlighted, where real images do not compete.",
    ]
    if repeated > 1:
        sentences.append(f"Values are means over up to {repeated} repetitions, with ± their standard deviation.")
    return " ".join(sentences)


def cautions(rows: Sequence[SamplerMetrics]) -> list[str]:
    """What a reader must know before comparing the rows: sentences, often none.

    Example:
        >>> len(cautions([SamplerMetrics(name="a", num_images=9), SamplerMetrics(name="b", num_images=8)]))
        1
    """
    if len({row.num_images for row in rows}) > 1:
        sizes = ", ".join(f"{summary.mean.name}: {summary.mean.num_images}" for summary in summarize(rows))
        return [f"The rows judge different numbers of images ({sizes}), so their distances are not comparable."]
    return []


# --- Markdown ---------------------------------------------------------------------------------------------------------


def markdown_report(report: Report, *, has_curves: bool = True) -> str:
    """A short report in Markdown, with links to the pictures beside it; to ``curves.png`` if it exists.

    Example:
        >>> markdown_report(Report(rows=[SamplerMetrics(name="a", num_images=9)], title="A title")).splitlines()[0]
        '# A title'
    """
    parts = [f"# {report.title}", report.summary]
    lines = [
        f"- **{headline.name}**: " + "; ".join(f"**{figure}** {text}" for figure, text in headline.figures)
        for headline in headlines(report.rows)
    ]
    if lines:
        parts.append("\n".join(lines))
    if report.pictures:
        parts.append("![Images of every sampler for the same prompts](samples.png)")
    parts += [f"**{text}**" for text in cautions(report.rows)]
    parts += [markdown_table(COLUMNS, table_rows(summarize(report.rows))), table_note(report.rows)]
    parts.append(
        "Distances are Fréchet distances in the features of a small network that knows only such images: compare rows "
        "of this table, never with an Inception FID. `report.html` explains every number and curve."
    )
    if has_curves:
        parts.append("![Training curves](curves.png)")
    if report.command:
        parts.append(f"Made by:\n\n```console\n$ {report.command}\n```")
    versions = ", ".join(f"{name} {number}" for name, number in library_versions().items())
    parts.append(f"Versions: {versions}. Settings and seeds are in `metrics.json`.")
    return "\n\n".join(parts) + "\n"


# --- HTML -------------------------------------------------------------------------------------------------------------


def html_report(report: Report) -> str:
    """The report as one HTML document that loads nothing from anywhere. All text of the report is escaped.

    Example:
        >>> row = SamplerMetrics(name="<script>", num_images=9, recall=0.5)
        >>> "<script>" in html_report(Report(rows=[row]))
        False
    """
    rows = table_rows(summarize(report.rows))
    return render(
        "rdm_rl.demo",
        "report.html",
        title=report.title,
        report=report,
        headlines=headlines(report.rows),
        # At their own size: the browser enlarges them.
        pictures={
            name: data_uri(tiled(images[None] if images.ndim == 4 else images, gap=1))
            for name, images in report.pictures.items()
        },
        cautions=cautions(report.rows),
        rows=rows,
        columns=table_cells(COLUMNS, rows),
        table_note=table_note(report.rows),
        panels=drawn_panels(report.histories),
        timed=isfinite(report.seconds),
    )
