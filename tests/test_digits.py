"""The first embedded problem: its data, prompts and teacher."""

import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rdm_rl.digits.data import (
    TEACHER_FOLDER,
    balanced_prompts,
    digit_prompts,
    load_digits,
    mixed_prompts,
)
from rdm_rl.digits.recognisers import digit_accuracy, digit_features
from rdm_rl.digits.students import (
    DigitsEvaluation,
    digits_config,
    training_prompts,
)
from rdm_rl.evaluation import frechet_distance
from rdm_rl.evaluation.samplers import Draw, stock_schedulers


def test_the_split_keeps_the_held_out_images_apart() -> None:
    train, held_out = load_digits("train"), load_digits("held_out")
    assert len(train.labels) + len(held_out.labels) == 1797
    assert torch.bincount(held_out.labels).tolist() == [50] * 10
    known = {image.numpy().tobytes() for image in train.images}
    assert not any(image.numpy().tobytes() in known for image in held_out.images)


def test_the_data_are_scikit_learns() -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    original = datasets.load_digits()
    ours = torch.cat([load_digits("train").labels, load_digits("held_out").labels])
    assert torch.bincount(ours).tolist() == torch.bincount(torch.from_numpy(original.target)).tolist()


def test_prompts_name_the_digits_that_answer_them() -> None:
    prompts, wanted = mixed_prompts(40)
    assert prompts[0] == digit_prompts(0)[0]
    assert wanted[0].nonzero().flatten().tolist() == [0]
    assert set(prompts[1::2]) == {""}
    assert bool(wanted[1::2].all())
    assert [row["prompt"] == "" for row in training_prompts()].count(True) == 120


def test_the_teacher_is_a_small_plain_pipeline() -> None:
    files = [file for file in TEACHER_FOLDER.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 8_000_000
    assert {file.suffix for file in files} <= {".json", ".md", ".txt", ".safetensors"}
    assert (TEACHER_FOLDER / "tokenizer" / "vocab.json").is_file()
    assert (TEACHER_FOLDER / "tokenizer" / "merges.txt").is_file()
    teacher = DigitsEvaluation.load_teacher()
    # The oldest supported transformers initialises weights without this prefix at random, and only warns.
    weights = load_file(TEACHER_FOLDER / "text_encoder" / "model.safetensors")
    assert all(name.startswith("text_model.") for name in weights)
    assert type(teacher).__name__ == "StableDiffusionPipeline"
    assert teacher.scheduler.config.prediction_type == "v_prediction"
    assert teacher.scheduler.config.clip_sample is False
    assert teacher.unet.config.sample_size == 8


@pytest.mark.usefixtures("onednn")
def test_the_teachers_quality() -> None:
    """10 DDIM steps, no guidance, and as many real images as the floor of the distance."""
    held_out, train, teacher = load_digits("held_out"), load_digits("train"), DigitsEvaluation.load_teacher()
    count = 200
    prompts, labels = balanced_prompts(count)
    generator = torch.Generator().manual_seed(0)
    images = teacher(prompts, num_inference_steps=10, guidance_scale=1.0, generator=generator, output_type="pt").images
    chosen = torch.randperm(len(train.labels), generator=torch.Generator().manual_seed(0))[:count]
    for name in ("A", "B"):
        reference = digit_features(name, held_out.images)
        floor = frechet_distance(digit_features(name, train.images[chosen]), reference)
        distance = frechet_distance(digit_features(name, images), reference)
        assert distance <= 2.5 * floor, (distance, floor)
    assert digit_accuracy(images, labels) >= digit_accuracy(held_out.images, held_out.labels) - 0.01


def test_judged_and_reference_images_have_other_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DigitsEvaluation, "num_images", 20)
    monkeypatch.setattr(DigitsEvaluation, "teacher_steps", 2)
    first, again, other = DigitsEvaluation(0), DigitsEvaluation(0), DigitsEvaluation(1)
    assert torch.equal(first.reference, again.reference)
    assert len({first.judged_seed, first.reference_seed, other.judged_seed, other.reference_seed}) == 4


def test_the_time_of_an_image_is_what_it_takes_undisturbed() -> None:
    evaluation, teacher, threads = DigitsEvaluation(0), DigitsEvaluation.load_teacher(), list[int]()

    def disturb(*_: object) -> None:
        threads.append(torch.get_num_threads())
        time.sleep(1.0 if len(threads) == 2 else 0.0)

    teacher.unet.register_forward_hook(disturb)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    drawn = evaluation.timed(Draw(images=torch.empty(0), steps=1), teacher)
    assert {*threads} == {1} and torch.get_num_threads() == 2
    torch.set_num_threads(before)
    assert 0 < drawn.seconds_per_image < 1 / 20


def test_the_stock_schedulers_start_from_noise() -> None:
    teacher = DigitsEvaluation.load_teacher()
    for scheduler in stock_schedulers(teacher).values():
        scheduler.set_timesteps(4)
        assert scheduler.timesteps[0] == 999


def test_other_numbers_of_steps_have_settings_too(tmp_path: Path) -> None:
    assert digits_config(2, tmp_path).num_inference_steps == 2
