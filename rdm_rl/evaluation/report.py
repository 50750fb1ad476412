"""The report of an evaluation: ``report.html`` for people, ``report.md`` to be quoted, ``results.json`` for programs.

The page needs nothing but itself. What it shows is in the results but for the pictures.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import floor, isfinite, isnan, log10, nan
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rdm_rl.evaluation.curves import History, Point, points_figure
from rdm_rl.evaluation.page import data_uri, drawn_panels, render
from rdm_rl.evaluation.pictures import DARK, LIGHT, image_grid
from rdm_rl.evaluation.results import RESULTS_FILE, Result, Results
from rdm_rl.evaluation.tables import Better, Column, Row, format_table, markdown_table, table_cells
from rdm_rl.pixels import to_pil
from rdm_rl.rewards.preprocessing import resize

_LONGEST_SIDE = 320
# Titles of what two sets are compared by, and which values are better.
_SET_METRICS: dict[str, tuple[str, Better]] = {
    "frechet": ("Fréchet distance", "lower"),
    "kernel": ("kernel distance", "lower"),
    "precision": ("precision", "higher"),
    "recall": ("recall", "higher"),
    "density": ("density", "near 1"),
    "coverage": ("coverage", "higher"),
}


@dataclass(frozen=True, kw_only=True)
class Table:
    """One table of a report.

    Args:
        title: Its heading.
        note: How to read it.
        columns: Its columns.
        rows: Its rows.
    """

    title: str
    note: str
    columns: Sequence[Column]
    rows: Sequence[Row]


def write_report(
    folder: str | Path,
    results: Results,
    pictures: Mapping[str, Sequence[Tensor]] | None = None,
    *,
    histories: Mapping[str, History] | None = None,
    command: str = "",
) -> Path:
    """The path of ``report.html``, written with ``report.md``, ``results.json`` and, if there are any, ``samples.png``.

    Args:
        folder: Where to; made if needed.
        results: What was measured.
        pictures: The first images of each model by its name, shape (3, H, W).
        histories: Logs of the models' training, by name.
        command: The command that makes this report again.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    small = {name: [_thumbnail(image) for image in images] for name, images in (pictures or {}).items()}
    shapes = {image.shape for images in small.values() for image in images}
    if len(shapes) == 1:
        count = min(map(len, small.values()))
        grid = {name: torch.stack(list(images)[:count]) for name, images in small.items()}
        image_grid(grid, list(results.prompts[:count])).save(folder / "samples.png")
    (folder / RESULTS_FILE).write_text(results.to_json(), encoding="utf-8")
    (folder / "report.md").write_text(markdown_report(results, command, has_grid=len(shapes) == 1), encoding="utf-8")
    path = folder / "report.html"
    path.write_text(html_report(results, small, histories or {}, command), encoding="utf-8")
    return path


# --- Tables -----------------------------------------------------------------------------------------------------------


def tables(results: Results) -> list[Table]:
    """The tables of a report: rewards and cost, sets of images, pairs of images, and differences from the reference."""
    names = [*dict.fromkeys(name for row in results.rows for name in row.values)]
    rewards = [name for name in names if name.startswith("reward/")]
    made = [_table(results, "Cost and rewards", _rewards_note(results), _costs(), rewards)]
    groups = [*dict.fromkeys((parts[0], parts[2]) for name in names if len(parts := name.split("/", 2)) == 3)]
    for network, against in groups:
        floor_note = "The reference's row is a draw of it against another: the floor. " if _has_floor(results) else ""
        made.append(
            _table(
                results,
                f"The whole set against {against}, in features of {network}",
                f"{floor_note}Values depend on the number of images: compare rows of this table only.",
                (),
                [f"{network}/{metric}/{against}" for metric in _SET_METRICS],
            )
        )
    paired = [name for name in names if name.endswith(("/paired", "/diversity"))]
    if paired:
        note = (
            "Paired: how far each image is from the reference's for the same prompt and noise; for the reference "
            "itself, from its image for another noise. Pixels: root mean square, black 0 and white 1. Features: one "
            "minus the cosine. Diversity: one minus the cosine of two images of one prompt; near the reference is best."
        )
        made.append(_table(results, "Image by image", note, (), paired))
    if any(row.differences for row in results.rows):
        note = f"Each image's reward minus that of {results.reference} for the same prompt and noise, on average."
        made.append(_table(results, f"Rewards above {results.reference}", note, (), rewards, differences=True))
    return made


def _table(
    results: Results,
    title: str,
    note: str,
    first: Iterable[Column],
    names: Sequence[str],
    *,
    differences: bool = False,
) -> Table:
    """A table of what was measured under some names; its rows are those that have any of them."""
    rows = []
    for result in results.rows:
        measured = result.differences if differences else result.values
        known = {name: measured[name] for name in names if name in measured}
        values = {name: estimate.value for name, estimate in known.items()}
        if first:
            costs = {"steps": result.num_inference_steps, "calls": result.network_evaluations}
            values |= {name: nan if value is None else float(value) for name, value in costs.items()}
            values["seconds"] = result.seconds_per_image
        if values:
            rows.append(
                Row(
                    name=result.name,
                    # Its distances are a floor, and do not compete.
                    kind="student" if result.kind != "reference" else "teacher" if first else "data",
                    values=values,
                    spreads={name: estimate.half_width for name, estimate in known.items()},
                    marked=[f"reward/{name}" for name in result.trained_on],
                )
            )
    columns = [_column(name, [row.values.get(name, nan) for row in rows], ranked=not differences) for name in names]
    return Table(title=title, note=note, columns=[*first, *columns], rows=rows)


def _costs() -> list[Column]:
    return [
        Column(key="steps", title="steps", decimals=0),
        Column(key="calls", title="network calls", decimals=0),
        Column(key="seconds", title="seconds per image", decimals=3),
    ]


def _column(name: str, values: Sequence[float], *, ranked: bool) -> Column:
    """The column of a measured value, with three digits of its largest number."""
    parts = name.split("/", 2)
    if parts[0] == "reward":
        title, better = name.removeprefix("reward/"), "higher"
    elif parts[1] in _SET_METRICS:
        title, better = _SET_METRICS[parts[1]]
    else:
        title, better = f"{parts[0]} {parts[1]}", "lower" if parts[1] == "paired" else ""
    largest = max((abs(value) for value in values if isfinite(value)), default=1.0)
    decimals = min(6, max(0, 2 - floor(log10(largest)))) if largest > 0 else 2
    kind: Better = better if ranked else ""  # type: ignore[assignment]
    return Column(key=name, title=title, better=kind, decimals=decimals)


def _rewards_note(results: Results) -> str:
    note = "± is half of a 95 % interval over prompts. Network calls count samples: guidance takes two in a step."
    if any(f"reward/{name}" in row.values for row in results.rows for name in row.trained_on):
        note += (
            " † marks a reward that the model was trained on: it says how well that went, not how good the images are."
        )
    return note


def _has_floor(results: Results) -> bool:
    return any(row.kind == "reference" and row.num_inference_steps for row in results.rows)


def cautions(results: Results) -> list[str]:
    """What a reader must know before comparing the rows: sentences, often none."""
    found = []
    counts = {row.name: row.num_images for row in results.rows}
    if len({*counts.values()}) > 1:
        sizes = ", ".join(f"{name}: {count}" for name, count in counts.items())
        found.append(f"The rows judge different numbers of images ({sizes}), so their distances do not compare.")
    if any("/frechet/" in name for row in results.rows for name in row.values) and min(counts.values()) < 1000:
        found.append(
            f"With {min(counts.values())} images, distances between sets are rough: read them against the reference's "
            "own row, and never beside numbers of another report."
        )
    return found


def format_results(results: Results) -> str:
    """All tables as plain text."""
    return "\n\n".join(f"{table.title}\n{format_table(table.columns, table.rows)}" for table in tables(results))


def markdown_report(results: Results, command: str = "", *, has_grid: bool = False) -> str:
    """The report in Markdown."""
    parts = ["# Evaluation", _summary(results)]
    parts += ["![The first images of each model](samples.png)"] if has_grid else []
    parts += [f"**{caution}**" for caution in cautions(results)]
    for table in tables(results):
        parts += [f"## {table.title}", markdown_table(table.columns, table.rows), table.note]
    parts += [f"Made by:\n\n```console\n$ {command}\n```"] if command else []
    parts.append("Versions: " + ", ".join(f"{name} {number}" for name, number in results.versions.items()) + ".")
    return "\n\n".join(parts) + "\n"


def _summary(results: Results) -> str:
    images = "an image" if len(results.seeds) == 1 else f"{len(results.seeds)} images"
    against = f"; the others are compared with {results.reference}" if results.reference else ""
    return f"{len(results.rows)} rows, {len(results.prompts)} prompts, {images} of each{against}."


# --- HTML -------------------------------------------------------------------------------------------------------------


def html_report(
    results: Results, pictures: Mapping[str, Sequence[Tensor]], histories: Mapping[str, History], command: str = ""
) -> str:
    """The report as one HTML document that loads nothing from anywhere. All text in it is escaped."""
    return render(
        "rdm_rl.evaluation",
        "report.html",
        title="Evaluation",
        summary=_summary(results),
        headlines=_headlines(results),
        prompts=_picture_rows(results, pictures),
        cautions=cautions(results),
        tables=[
            {
                "title": table.title,
                "note": table.note,
                "rows": table.rows,
                "columns": table_cells(table.columns, table.rows),
            }
            for table in tables(results)
        ],
        plots=_plots(results),
        panels=drawn_panels(histories),
        command=command,
        results=results,
        minutes=f"{results.seconds / 60:.1f}",
    )


def _headlines(results: Results) -> list[dict[str, Any]]:
    """For each model that is no reference: what became of cost, distance and rewards."""
    teacher = next((row for row in results.rows if row.kind == "reference"), None)
    if teacher is None:
        return []
    return [
        {"name": row.name, "figures": figures}
        for row in results.rows
        if row is not teacher and (figures := _figures(row, teacher))
    ]


def _figures(row: Result, teacher: Result) -> list[tuple[str, str]]:
    figures = []
    many, few = teacher.network_evaluations, row.network_evaluations
    if many > few:
        figures.append((f"{many / few:.3g}× fewer", f"network calls for an image: {few:g} instead of {many:g}"))
    name = next((name for name in row.values if "/frechet/" in name and name in teacher.values), None)
    if name is not None:
        network, _, against = name.split("/", 2)
        text = f"Fréchet distance to {against} in {network}, lower is better ({teacher.name} itself: "
        figures.append((f"{row.values[name].value:.3g}", f"{text}{teacher.values[name].value:.3g})"))
    for name, difference in row.differences.items():
        if name.removeprefix("reward/") not in row.trained_on and difference.excludes_zero:
            text = (
                f"{name.removeprefix('reward/')} above {teacher.name}, ±\N{NO-BREAK SPACE}{difference.half_width:.2g}"
            )
            figures.append((f"{difference.value:+.3g}", text))
    return figures[:4]


def _plots(results: Results) -> list[dict[str, str]]:
    """Each reward against the first distance between sets, in both colour schemes."""
    names = [*dict.fromkeys(name for row in results.rows for name in row.values)]
    distance = next((name for name in names if "/frechet/" in name), None)
    plots = []
    for reward in (name for name in names if name.startswith("reward/")):
        rows = [row for row in results.rows if distance in row.values and reward in row.values]
        points = [_point(row, str(distance), reward) for row in rows]
        points = [point for point in points if not isnan(point.x + point.y)]
        if len(points) < 2:
            continue
        network, _, against = str(distance).split("/", 2)
        labels = {"x_label": f"Fréchet distance to {against} in {network}", "y_label": reward.removeprefix("reward/")}
        light, dark = (data_uri(points_figure(points, **labels, theme=theme)) for theme in (LIGHT, DARK))
        reading = "Up is a higher reward, left is more faithful. A ring: the model was trained on this reward."
        plots.append(
            {"title": f"{labels['y_label']} against fidelity", "reading": reading, "light": light, "dark": dark}
        )
    return plots


def _point(row: Result, x: str, y: str) -> Point:
    return Point(
        name=row.name,
        x=row.values[x].value,
        y=row.values[y].value,
        x_error=row.values[x].half_width,
        y_error=row.values[y].half_width,
        hollow=y.removeprefix("reward/") in row.trained_on,
    )


def _thumbnail(image: Tensor) -> Tensor:
    """An image no larger than a report needs."""
    scale = _LONGEST_SIDE / max(image.shape[1:])
    if scale >= 1:
        return image
    height, width = (max(1, round(side * scale)) for side in image.shape[1:])
    return resize(image[None], (height, width))[0]


def _picture_rows(results: Results, pictures: Mapping[str, Sequence[Tensor]]) -> list[dict[str, Any]]:
    """For each of the first prompts, every model's image."""
    rows = []
    for number in range(max(map(len, pictures.values()), default=0)):
        shown = {name: _source(images[number]) for name, images in pictures.items() if number < len(images)}
        rows.append({"prompt": results.prompts[number], "images": shown})
    return rows


def _source(image: Tensor) -> str:
    """A picture for the page; small ones stay exact, for the browser enlarges their pixels."""
    return data_uri(to_pil(image[None])[0], "png" if max(image.shape[1:]) <= 64 else "jpeg")
