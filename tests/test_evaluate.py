"""Models and folders side by side: every number is what it says, and no image is drawn twice."""

import json
from collections.abc import Callable
from dataclasses import replace
from math import isnan
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rdm_rl.evaluation.features import Features
from rdm_rl.evaluation.images import ImageFolder, Model, requests
from rdm_rl.evaluation.results import read_results
from rdm_rl.evaluation.run import Settings, evaluate
from rdm_rl.pixels import to_pil
from rdm_rl.student import SavedStudent
from tests.helpers import tiny_sd
from tests.tiny_pipelines import tiny_sd3

PROMPTS = [f"the digit {number}" for number in range(8)]
COLORS = Features("colours", lambda images: images.mean((2, 3)))
HALVES = Features("halves", lambda images: images.unflatten(2, (2, -1)).mean((3, 4)).flatten(1))


def brightness(images: Tensor, prompts: list[str]) -> Tensor:
    return images.mean((1, 2, 3))


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("pipelines")
    made = {name: tiny_sd(folder / name, seed=seed) for name, seed in (("teacher", 0), ("other", 1))}
    for pipeline in made.values():
        pipeline.set_progress_bar_config(disable=True)
    return made


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images each call of a model drew."""
    counts: list[int] = []
    draw = SavedStudent.draw

    def counting(self: SavedStudent, prompts: Any, **options: Any) -> list[Any]:
        counts.append(len(prompts))
        return draw(self, prompts, **options)

    monkeypatch.setattr(SavedStudent, "draw", counting)
    return counts


def model(name: str, pipeline: Any, steps: int = 2, guidance: float = 1.0, **facts: Any) -> Model:
    call = {"num_inference_steps": steps, "guidance_scale": guidance}
    return Model(name=name, load=lambda: SavedStudent(pipeline, call), **facts)


def quiet(folder: Path, **settings: Any) -> Settings:
    return Settings(cache_dir=folder, show_progress=False, **settings)


def test_a_copy_of_the_teacher_is_at_no_distance_and_another_model_is(
    pipelines: dict[str, Any], tmp_path: Path
) -> None:
    models = [
        model("teacher", pipelines["teacher"], 2, 3.0),
        model("copy", pipelines["teacher"], 2, 3.0, trained_on=("brightness",)),
        model("other", pipelines["other"], 1),
    ]
    results, shown = evaluate(
        models,
        PROMPTS,
        quiet(tmp_path),
        reference="teacher",
        features=[COLORS, HALVES],
        rewards={"brightness": brightness},
        seeds=(0, 1),
    )
    teacher, copy, other = results.rows
    assert (teacher.kind, copy.kind, copy.trained_on) == ("reference", "student", ("brightness",))
    assert [row.network_evaluations for row in results.rows] == [4, 4, 1], "guidance takes two in a step"
    assert all(row.seconds_per_image > 0 and row.num_images == 16 for row in results.rows)
    for name in ("pixels/paired", "colours/paired"):
        assert copy.values[name].value == pytest.approx(0, abs=1e-6)
        assert min(other.values[name].value, teacher.values[name].value) > 0
    assert copy.differences["reward/brightness"].value == 0
    assert other.differences["reward/brightness"].excludes_zero
    assert not teacher.differences
    for metric in ("frechet", "kernel", "precision", "recall", "density", "coverage"):
        name = f"halves/{metric}/teacher"
        assert copy.values[name] == teacher.values[name], "the floor"
    assert other.values["halves/frechet/teacher"].low > teacher.values["halves/frechet/teacher"].high
    assert teacher.values["halves/diversity"].value > 0
    images = torch.stack(shown["teacher"])
    assert images.shape == (8, 3, 16, 16)
    expected = pipelines["teacher"](
        PROMPTS[:1],
        num_inference_steps=2,
        guidance_scale=3.0,
        generator=[torch.Generator().manual_seed(requests(PROMPTS, (0, 1))[0][1])],
        output_type="pt",
    ).images
    assert torch.allclose(images[:1], expected, atol=1 / 255), "what plain diffusers draws"


def test_what_was_drawn_is_not_drawn_again_and_damage_is_mended(
    pipelines: dict[str, Any], tmp_path: Path, drawn: list[int]
) -> None:
    def measure(steps: int = 1, **settings: Any) -> Any:
        models = [model("teacher", pipelines["teacher"], steps)]
        results, _ = evaluate(
            models, PROMPTS, quiet(tmp_path, **settings), features=[COLORS], rewards={"brightness": brightness}
        )
        return replace(results, seconds=0)

    first = measure(batch_size=3)
    assert drawn == [3, 3, 2]
    drawn.clear()
    assert measure(batch_size=4).to_json() == first.to_json()
    assert drawn == []
    next(tmp_path.glob("*/drawn-image-*.png")).write_bytes(b"no picture")
    assert measure().to_json().split('"values"')[1] == first.to_json().split('"values"')[1]
    assert drawn == [1]
    measure(steps=2)
    assert drawn == [1, 8], "other settings, other images"


def test_a_run_that_was_stopped_goes_on(pipelines: dict[str, Any], tmp_path: Path, drawn: list[int]) -> None:
    def stop_at(number: int) -> Callable[[Tensor], Tensor]:
        def hook(module: Any, arguments: Any, output: Any) -> None:
            if len(drawn) == number:
                raise KeyboardInterrupt

        return hook

    handle = pipelines["teacher"].unet.register_forward_hook(stop_at(2))
    with pytest.raises(KeyboardInterrupt):
        evaluate([model("teacher", pipelines["teacher"], 1)], PROMPTS, quiet(tmp_path, batch_size=3))
    handle.remove()
    drawn.clear()
    results, _ = evaluate([model("teacher", pipelines["teacher"], 1)], PROMPTS, quiet(tmp_path, batch_size=3))
    assert drawn == [3, 2]
    assert results.rows[0].network_evaluations == 1


def test_noise_of_a_flow_s_steps_belongs_to_the_sample(tmp_path: Path, drawn: list[int]) -> None:
    pipeline = tiny_sd3(tmp_path / "sd3")
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = pipeline.scheduler.from_config(pipeline.scheduler.config, stochastic_sampling=True)
    before = torch.random.get_rng_state()
    drawn_twice = [
        evaluate([model("flow", pipeline)], chosen, quiet(tmp_path / name), features=[COLORS])[1]["flow"][0]
        for name, chosen in (("all", PROMPTS[:2]), ("first", PROMPTS[:1]))
    ]
    assert torch.equal(*drawn_twice)
    assert drawn == [1, 1, 1]
    assert torch.equal(torch.random.get_rng_state(), before)


def save_images(folder: Path, count: int, size: int = 16, seed: int = 0) -> ImageFolder:
    folder.mkdir()
    images = torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))
    for number, picture in enumerate(to_pil(images)):
        picture.save(folder / f"{number:03d}.png")
    return ImageFolder(name=folder.name, folder=folder)


def test_folders_are_paired_by_order_where_their_number_fits(tmp_path: Path) -> None:
    folders = [save_images(tmp_path / name, count, seed=count) for name, count in (("a", 8), ("b", 8), ("more", 20))]
    real = save_images(tmp_path / "real", 12, size=24).folder
    results, _ = evaluate(
        folders,
        PROMPTS,
        quiet(tmp_path / "cache"),
        reference="a",
        features=[COLORS],
        rewards={"brightness": brightness},
        real_images=real,
    )
    a, b, more = results.rows
    assert b.values["pixels/paired"].value == 0, "the same seed"
    assert "pixels/paired" not in a.values, "a folder has no second draw"
    assert not {"pixels/paired", "reward/brightness"} & set(more.values)
    assert "colours/frechet/a" not in a.values
    assert {"colours/frechet/a", "colours/frechet/real images"} <= set(more.values)
    assert isnan(a.network_evaluations)
    again = [save_images(tmp_path / "c", 8, seed=3), folders[0]]
    assert (
        evaluate(again, PROMPTS, quiet(tmp_path / "cache"), reference="a")[0].rows[0].values["pixels/paired"].value > 0
    )


def test_results_survive_their_file(pipelines: dict[str, Any], tmp_path: Path) -> None:
    models = [model("teacher", pipelines["teacher"], 1)]

    def sometimes(images: Tensor, prompts: list[str]) -> list[float | None]:
        return [None if "3" in prompt else 1.0 for prompt in prompts]

    results, _ = evaluate(models, PROMPTS, quiet(tmp_path), features=[COLORS], rewards={"sometimes": sometimes})
    (tmp_path / "results.json").write_text(results.to_json(), encoding="utf-8")
    read = read_results(tmp_path)
    assert read.to_json() == results.to_json()
    assert isnan(read.rows[0].by_image["reward/sometimes"][3][0])
    assert read.rows[0].values["reward/sometimes"].value == 1
    content = json.loads(results.to_json()) | {"schema_version": 99}
    (tmp_path / "results.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="schema_version 99"):
        read_results(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no results\.json"):
        read_results(tmp_path / "nowhere")


def wants_teacher(images: Tensor, prompts: list[str], teacher_images: Tensor) -> Tensor:
    return -(images - teacher_images).square().flatten(1).mean(1)


wants_teacher.wants_teacher_images = True  # type: ignore[attr-defined]


def reads_target(images: Tensor, prompts: list[str], target: list[float]) -> list[float]:
    return target


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": []}, "nothing to evaluate"),
        ({"seeds": (1, 1)}, "Two seeds are equal"),
        ({"names": ("a", "a")}, "Two models are equal"),
        ({"reference": "c"}, "none of a, b"),
        ({"features": [COLORS, COLORS]}, "Two features are equal"),
        ({"features": [Features("a/b", COLORS)]}, "without a slash"),
        ({"rewards": {"wants": wants_teacher}}, "set reference"),
        ({"rewards": {"reads": reads_target}}, "reads target"),
    ],
)
def test_what_cannot_be_measured_is_said_before_anything_is_drawn(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    def never() -> SavedStudent:
        raise AssertionError("nothing is loaded")

    options = {"prompts": PROMPTS, "names": ("a", "b")} | changes
    models = [Model(name=name, load=never) for name in options.pop("names")]
    with pytest.raises(ValueError, match=message):
        evaluate(models, options.pop("prompts"), quiet(tmp_path), **options)


def test_rewards_get_columns_and_the_reference_s_images(pipelines: dict[str, Any], tmp_path: Path) -> None:
    rows = [{"prompt": prompt, "target": number} for number, prompt in enumerate(PROMPTS)]
    models = [model("teacher", pipelines["teacher"], 1), model("copy", pipelines["teacher"], 1)]
    rewards = {"reads": reads_target, "wants": wants_teacher}
    teacher, copy = evaluate(models, rows, quiet(tmp_path), reference="teacher", rewards=rewards)[0].rows
    assert copy.values["reward/reads"].value == 3.5
    assert copy.values["reward/wants"].value == 0
    assert teacher.values["reward/wants"].value < 0, "its second draw is its partner"
