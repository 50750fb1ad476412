"""Judged images, pictures, tables and reports say what was measured, and nothing else."""

import json
from html.parser import HTMLParser
from math import isnan, nan
from pathlib import Path

import matplotlib as mpl
import pytest
import torch
from PIL import Image

from rdm_rl.demo.report import Report, cautions, headlines, html_report, metrics_json, read_rows, write_report
from rdm_rl.digits.data import load_digits
from rdm_rl.digits.judge import judge
from rdm_rl.evaluation import image_grid, training_curves
from rdm_rl.evaluation.curves import PANELS, curve, curves_figure, present_panels
from rdm_rl.evaluation.pictures import DARK, LIGHT, _break_text, _font, tiled
from rdm_rl.evaluation.sampler_metrics import SamplerMetrics, format_rows, summarize

TRAIN, HELD_OUT = load_digits("train"), load_digits("held_out")
COUNT = 400
HISTORY = [
    {
        "step": step,
        "rewards/rdm/gap": 1 / step,
        "rewards/rdm/direction_rms": 0.5,
        "rewards/rdm/mean": -1 / step,
        "rewards/hpsv2/mean": 0.2,
        "policy/grad_norm": nan if step == 3 else 1.0,
        "fake_score/loss": 0.3,
        "some/other_metric": 1.0,
    }
    for step in range(1, 41)
]


def training_images(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    chosen = torch.randperm(len(TRAIN.labels), generator=torch.Generator().manual_seed(seed))[:COUNT]
    return TRAIN.images[chosen], TRAIN.labels[chosen]


def a_row(name: str = "student, 4 steps", **values: object) -> SamplerMetrics:
    defaults: dict[str, object] = {
        "num_images": 500,
        "num_inference_steps": 4,
        "network_evaluations": 4,
        "seconds_per_image": 0.0041,
        "distance_to_data": 6.54,
        "accuracy": 0.987,
    }
    return SamplerMetrics(name=name, **(defaults | values))  # type: ignore[arg-type]


def a_report(**values: object) -> Report:
    rows = [
        a_row("real digits", kind="data", num_inference_steps=None, network_evaluations=None, distance_to_data=5.81),
        a_row("teacher, 50 steps", kind="teacher", num_inference_steps=50, network_evaluations=100),
        a_row(),
    ]
    images = HELD_OUT.images[:20].reshape(2, 10, 3, 32, 32)
    defaults: dict[str, object] = {
        "rows": rows,
        "pictures": {"real digits": images, "student, 4 steps": images},
        "histories": {"4 steps": HISTORY, "1 step": HISTORY[:5]},
        "settings": {"RDMConfig": {"learning_rate": 1e-4, "output_dir": Path("out"), "limit": float("inf")}},
        "seeds": {"training": 7},
        "command": "rdm-rl demo --output_dir demo-output",
    }
    return Report(**(defaults | values))  # type: ignore[arg-type]


# Judging


def test_real_images_are_near_and_noise_is_far() -> None:
    images, labels = training_images()
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(0))
    references = {"data_images": HELD_OUT.images, "teacher_images": training_images(1)[0]}
    real = judge(images, labels, name="real", kind="data", **references)
    bad = judge(noise, labels, name="noise", **references)
    assert real.distance_to_data < 12
    assert real.distance_to_teacher < 12
    assert bad.distance_to_data > 20 * real.distance_to_data
    assert bad.distance_to_teacher > 20 * real.distance_to_teacher
    assert min(real.precision, real.recall, real.coverage) > 0.6
    assert max(bad.precision, bad.recall, bad.density, bad.coverage) < 0.1
    assert real.accuracy > 0.99
    assert bad.accuracy < 0.3
    assert real.num_images == COUNT


def test_wrong_prompts_lower_only_the_accuracy() -> None:
    images, labels = training_images()
    right = judge(images, labels, name="a", data_images=HELD_OUT.images)
    wrong = judge(images, (labels + 1) % 10, name="a", data_images=HELD_OUT.images)
    assert wrong.accuracy < 0.01
    assert wrong.distance_to_data == right.distance_to_data


def test_a_dropped_digit_lowers_recall() -> None:
    images, labels = TRAIN.images[TRAIN.labels != 3], TRAIN.labels[TRAIN.labels != 3]
    complete = judge(TRAIN.images[: len(labels)], TRAIN.labels[: len(labels)], name="a", data_images=HELD_OUT.images)
    dropped = judge(images, labels, name="b", data_images=HELD_OUT.images)
    assert dropped.recall < complete.recall
    assert dropped.distance_to_data > complete.distance_to_data


def test_the_networks_disagree_in_numbers_and_agree_in_order() -> None:
    images, labels = training_images()
    blurred = images.mean(0, keepdim=True) * 0.3 + images * 0.7
    for network in ("A", "B"):
        near, far = (
            judge(one, labels, name="a", data_images=HELD_OUT.images, network=network) for one in (images, blurred)
        )
        assert near.distance_to_data < far.distance_to_data


def test_images_in_half_precision_that_overshoot_a_little_are_clamped() -> None:
    images, labels = training_images()
    plain = judge(images, labels, name="a", data_images=HELD_OUT.images)
    half = judge((images * 1.02).bfloat16(), labels, name="a", data_images=HELD_OUT.images)
    assert half.distance_to_data == pytest.approx(plain.distance_to_data, rel=0.1)


def test_judge_leaves_out_what_it_cannot_measure() -> None:
    row = judge(*training_images(), name="a", data_images=HELD_OUT.images)
    assert isnan(row.distance_to_teacher)
    assert isnan(row.seconds_per_image)
    assert row.network_evaluations is None


def test_judge_refuses_images_that_it_would_misjudge() -> None:
    for images, message in (
        (torch.zeros(COUNT, 1, 32, 32), "must have shape"),
        (torch.full((COUNT, 3, 32, 32), nan), "not finite"),
        (torch.full((COUNT, 3, 32, 32), -1.0), r"must be in \[0, 1\]"),
        (torch.zeros(COUNT - 1, 3, 32, 32), "need labels of shape"),
    ):
        with pytest.raises(ValueError, match=message):
            judge(images, torch.zeros(COUNT, dtype=torch.int64), name="a", data_images=HELD_OUT.images)


def test_repetitions_are_averaged_over_what_was_measured() -> None:
    rows = [a_row(recall=0.2), a_row("other"), a_row(recall=0.4), a_row(recall=nan)]
    first, second = summarize(rows)
    assert (first.mean.name, first.repetitions, second.repetitions) == ("student, 4 steps", 3, 1)
    assert first.mean.recall == pytest.approx(0.3)
    assert first.spread["recall"] == pytest.approx(0.2 / 2**0.5)
    assert isnan(first.mean.density)
    assert second.spread == {}


def test_different_samplers_must_not_share_a_name() -> None:
    with pytest.raises(ValueError, match="different names"):
        summarize([a_row(), a_row(num_inference_steps=8)])


# Tables


def test_table_marks_the_best_and_lets_real_images_stand_aside() -> None:
    rows = [
        a_row("real", kind="data", distance_to_data=1.0, density=1.0),
        a_row("near", distance_to_data=2.0, density=1.3),
        a_row("far", distance_to_data=3.0, density=0.9),
    ]
    table = format_rows(rows)
    assert "2.00*" in table
    assert "0.90*" in table
    assert "1.00*" not in table
    assert "nan" not in table
    assert "distance to teacher" not in table  # nothing was measured there


def test_values_that_print_alike_share_the_mark_unless_all_do() -> None:
    rows = [a_row("a", recall=0.501, precision=0.7), a_row("b", recall=0.502, precision=0.7), a_row("c", recall=0.4)]
    table = format_rows(rows)
    assert table.count("0.50*") == 2
    assert "0.70*" not in table


def test_a_full_table_fits_a_terminal() -> None:
    full = {name: 0.123 for name in ("distance_to_teacher", "precision", "recall", "density", "coverage", "accuracy")}
    rows = [a_row(name, distance_to_data=123.45, **full) for name in ("real training digits", "b", "b", "b")]
    assert max(map(len, format_rows(rows).splitlines())) <= 120
    assert "Means of up to 3 repetitions" in format_rows(rows)
    assert "±" in format_rows(rows, max_width=300)


# Pictures


def test_pixels_survive_into_the_grid() -> None:
    images = torch.rand(3, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    grid = image_grid({"a caption": images}, list("0123"), scale=3)
    tile = grid.crop((grid.width - 12 - 24, grid.height - 12 - 24, grid.width - 12, grid.height - 12))
    expected = tiled(images[2:, 3:]).resize((24, 24), Image.Resampling.NEAREST)
    assert tile.tobytes() == expected.tobytes()


def test_grid_grows_by_whole_cells() -> None:
    images = torch.zeros(10, 3, 32, 32)
    one = image_grid({"teacher": images}, scale=2)
    assert image_grid({"teacher": images, "b": images}, scale=2).height - one.height == 64 + 10
    assert image_grid({"teacher": torch.stack([images] * 3)}, scale=2).height - one.height == 2 * (64 + 2)
    assert image_grid({"teacher": images[:4]}, scale=2).width == one.width - 6 * (64 + 2)
    assert image_grid({"teacher": images}, theme=DARK).getpixel((0, 0)) == (27, 30, 36)


def test_strip_has_transparent_gaps() -> None:
    strip = tiled(torch.ones(2, 5, 3, 8, 8), gap=1)
    assert (strip.size, strip.mode) == ((44, 17), "RGBA")
    assert strip.getpixel((8, 0)) == (0, 0, 0, 0)
    assert strip.getpixel((9, 0)) == (255, 255, 255, 255)


def test_grid_refuses_rows_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="A grid needs rows"):
        image_grid({"a": torch.zeros(2, 3, 8, 8), "b": torch.zeros(3, 3, 8, 8)})
    with pytest.raises(ValueError, match="A grid needs rows"):
        image_grid({})
    with pytest.raises(ValueError, match="column captions"):
        image_grid({"a": torch.zeros(2, 3, 8, 8)}, ["0"])


def test_curves_show_what_was_logged(tmp_path: Path) -> None:
    titles = [panel.title for panel in present_panels(HISTORY)]
    assert "Gap between teacher and fake score" in titles
    assert "Warm start: loss" not in titles
    (rewards,) = (panel for panel in present_panels(HISTORY) if panel.title == "Other rewards")
    assert rewards.metrics == {"rewards/hpsv2/mean": "hpsv2"}
    before = dict(mpl.rcParams)
    path = training_curves(HISTORY, tmp_path / "curves.png")
    assert path is not None
    assert dict(mpl.rcParams) == before, "drawing changes no global setting"
    with Image.open(path) as picture:
        assert min(picture.size) > 400


def test_curves_of_several_runs_lie_over_each_other() -> None:
    panels = present_panels({"a": HISTORY, "b": HISTORY})
    (axes,) = curves_figure(panels[:1], {"a": HISTORY, "b": HISTORY}, theme=LIGHT).axes
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["a", "b"]


def test_a_log_without_known_metrics_draws_nothing(tmp_path: Path) -> None:
    assert training_curves([{"step": 1, "unknown": 1.0}], tmp_path / "curves.png") is None
    assert training_curves([], tmp_path / "curves.png") is None
    assert not (tmp_path / "curves.png").exists()


def test_curve_skips_gaps_and_counts_each_phase_by_itself() -> None:
    assert 3.0 not in curve(HISTORY, "policy/grad_norm")[0]
    warm = [{"step": 0, "phase_step": step, "warm_start/loss": 1.0} for step in (1, 2)]
    assert curve(warm, "warm_start/loss")[0] == [1.0, 2.0]


def test_every_panel_can_be_drawn_and_read(tmp_path: Path) -> None:
    log = [{"step": step} | dict.fromkeys((key for panel in PANELS for key in panel.metrics), 1.0) for step in (1, 2)]
    assert len(present_panels(log)) == len(PANELS)
    assert all(panel.reading.endswith(".") for panel in PANELS)
    assert training_curves(log, tmp_path / "curves.png") is not None


# Reports


class Page(HTMLParser):
    """What a page loads and links, its text, and whether its elements are closed in order."""

    VOID = ("meta", "img", "source", "line", "rect", "br")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.resources: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.resources += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def read_page(text: str) -> Page:
    page = Page()
    page.feed(text)
    page.close()
    return page


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, Path]:
    """A report, and its page; its figures take seconds to draw."""
    report = a_report()
    report.rows.extend(a_row(name, recall=recall, kind="baseline") for name, recall in (("a", 0.3), ("b | c", 0.6)))
    return report, write_report(tmp_path_factory.mktemp("report") / "new" / "folder", report)


def test_report_writes_all_its_files(written: tuple[Report, Path]) -> None:
    folder = written[1].parent
    names = {"report.html", "report.md", "metrics.json", "samples.png", "curves.png"}
    assert {one.name for one in folder.iterdir()} == names
    rows = read_rows(folder / "metrics.json")
    assert [repr(row) for row in rows] == [repr(row) for row in written[0].rows]  # NaN is not equal to itself
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert "](samples.png)" in text
    assert "](curves.png)" in text
    assert "**0.60**" in text, "the best is bold"
    assert "b \\| c" in text


def test_page_is_well_formed_self_contained_and_holds_the_numbers(written: tuple[Report, Path]) -> None:
    text = written[1].read_text(encoding="utf-8")
    page = read_page(text)
    assert page.open == []
    assert page.resources
    assert all(source.startswith("data:image/png;base64,") for source in page.resources)
    assert page.tags.isdisjoint({"script", "link", "iframe", "object"})
    assert "url(" not in text
    assert "@import" not in text
    for number in ("6.54", "98.7", "25× fewer", "4.1", "500 images", "rdm-rl demo --output_dir demo-output", "0.0001"):
        assert number in page.text
    assert "nan" not in page.text.lower().split()
    assert "$" not in page.text


def test_page_explains_only_the_columns_that_it_has() -> None:
    overlaps = {name: 0.5 for name in ("precision", "recall", "density", "coverage")}
    plain, full = (html_report(Report(rows=[a_row(**values)])) for values in ({}, overlaps))
    assert "<b>As asked</b>" in plain
    assert "<b>Distance to teacher</b>" not in plain
    assert "<b>Precision</b>" not in plain and "<b>coverage</b>" not in plain
    assert "<b>Precision</b>" in full and "<b>coverage</b>" in full


def test_page_escapes_what_users_write() -> None:
    evil = '<script>alert("x")</script> & $title'
    report = a_report(
        rows=[a_row(evil, kind="teacher"), a_row(evil + "2")],
        pictures={evil: torch.zeros(10, 3, 32, 32)},
        histories={evil: [{"step": step, "rdm/gap": 1 / step} for step in (1, 2)]},
        settings={evil: {evil: evil}},
        seeds={evil: evil},
        command=evil,
        title=evil,
        summary=evil,
        network=evil,
    )
    page = read_page(html_report(report))
    assert "script" not in page.tags
    assert page.text.count(evil) >= 10


def test_page_works_with_nothing_but_one_row(tmp_path: Path) -> None:
    path = write_report(tmp_path, Report(rows=[SamplerMetrics(name="a", num_images=9)]))
    assert read_page(path.read_text(encoding="utf-8")).open == []
    assert {one.name for one in tmp_path.iterdir()} == {"report.html", "report.md", "metrics.json"}


def test_json_is_strict_and_complete() -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    content = json.loads(metrics_json(a_report()), parse_constant=refuse)
    assert content["schema_version"] == 1
    assert content["rows"][0]["network_evaluations"] is None
    assert content["rows"][0]["recall"] is None
    assert content["settings"]["RDMConfig"] == {"learning_rate": 1e-4, "output_dir": "out", "limit": None}
    assert content["seeds"] == {"training": 7}
    assert {"python", "rdm_rl", "torch", "diffusers"} <= set(content["versions"])


def test_another_schema_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "metrics.json"
    file.write_text('{"schema_version": 99, "rows": []}')
    with pytest.raises(ValueError, match="schema_version 99"):
        read_rows(file)


def test_headlines_compare_with_the_slowest_teacher_and_hide_no_student() -> None:
    rows = [
        a_row("teacher, 4 steps", kind="teacher", network_evaluations=8),
        a_row("teacher, 50 steps", kind="teacher", num_inference_steps=50, network_evaluations=100),
        a_row("warm start", kind="baseline"),
        a_row("bad student", distance_to_teacher=99.0),
        a_row("good student", network_evaluations=1),
    ]
    bad, good = headlines(rows)
    assert bad.figures[0][0] == "25× fewer"
    assert bad.figures[1][0] == "99.00"
    assert good.figures[0][0] == "100× fewer"


def test_unequal_numbers_of_images_are_pointed_out() -> None:
    rows = [a_row("a", num_images=500), a_row("b", num_images=100)]
    assert "not comparable" in cautions(rows)[0]
    assert "not comparable" in read_page(html_report(Report(rows=rows))).text
    assert cautions(rows[:1]) == []


def test_a_report_without_measurements_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one row"):
        Report(rows=[])


def test_long_captions_keep_to_their_column() -> None:
    font = _font(11)
    lines = _break_text("a handwritten incomprehensibilities of the digit seven on old paper", font, 64)
    assert len(lines) == 4
    assert lines[-1].endswith("…")
    assert all(font.getlength(line) <= 64 for line in lines)
    assert _break_text("7", font, 64) == ["7"]
    assert _break_text("", font, 64) == []


def test_large_images_are_not_enlarged() -> None:
    images = torch.zeros(2, 3, 128, 128)
    assert image_grid({"a": images}).height == image_grid({"a": images}, scale=1).height
