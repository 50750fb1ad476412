"""The numbers of an evaluation in training are those of images drawn otherwise, and the run does not notice it."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from rdm_rl import RDMTrainer
from rdm_rl.policy import ode_solution
from rdm_rl.randomness import seeded_generator
from rdm_rl.rewards import teacher_images
from rdm_rl.trainers.evaluation import EVALUATION_SEED, _batches, load_eval_features
from tests.helpers import PROMPTS, QUICK, WITHOUT_RDM, brightness, declare, quick_trainer, same, trained_weights
from tests.tiny_rewards import COLOUR

STEPS = {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True, "teacher_num_inference_steps": 3}
STEPS["per_device_eval_batch_size"] = 2


def upper(images: Tensor, prompts: list[str], digit: list[int]) -> list[float | None]:
    """A black box that has nothing to say of the digit 6."""
    return [None if number == 6 else image[:, :8].mean().item() for image, number in zip(images, digit, strict=True)]


def images_by_hand(trainer: RDMTrainer, prompts: list[str]) -> tuple[Tensor, Tensor]:
    """The student's one step, and the teacher's three, from the noises of the evaluation."""
    family, conditioning = trainer.family, trainer.family.encode(prompts)
    generators = [seeded_generator(EVALUATION_SEED + index, "initial_noise") for index in range(len(prompts))]
    noise = torch.cat([torch.randn(1, *family.latent_shape, generator=generator) for generator in generators])
    start = float(trainer.times[0])
    with torch.no_grad():
        with trainer.averaged_policy():
            student = trainer.networks.predict("policy", noise, torch.full((len(noise),), start), conditioning, 1.0)
        teacher = trainer.networks.predictor("teacher", 1.0)
        solution = ode_solution(teacher, noise, start, conditioning, family.schedule, 3)
        return family.decode(student), family.decode(solution).mul(255).round() / 255


def test_the_numbers_are_those_of_images_drawn_otherwise(base: Path, tmp_path: Path) -> None:
    comparing = declare(lambda images, prompts: 1 / 0, whole_groups=True, __name__="comparing")  # One has no partner.
    rewards = ["rdm", brightness(), upper, comparing]
    settings = {"eval_features": ["tests.tiny_rewards:COLOUR"], "reward_weights": [1.0, 1.0, 0.0, 0.0], **STEPS}
    given = {"eval_dataset": PROMPTS[5:]}
    trainer = quick_trainer(base, tmp_path, rewards, given=given, **settings, **QUICK)
    for parameter in trainer.networks.parameters("policy"):
        parameter.data.add_(0.05)
    numbers = trainer.evaluate()
    student, teacher = images_by_hand(trainer, [row["prompt"] for row in PROMPTS[5:]])
    features = COLOUR(student).double(), COLOUR(teacher).double()
    cosine = torch.cosine_similarity(*features)
    (m, n), (s, r) = ([each.mean(0) for each in features], [torch.cov(each.T) for each in features])
    trace = torch.linalg.eigvals(s @ r).real.clamp_min(0).sqrt().sum()
    assert numbers == pytest.approx(
        {
            "eval_pixels/paired": (student - teacher).square().mean((1, 2, 3)).sqrt().mean().item(),
            "eval_rewards/brightness/mean": student.mean().item(),
            "eval_rewards/upper/mean": student[[0, 2, 3, 4], :, :8].mean().item(),
            "eval_colour/paired": (1 - cosine).mean().item(),
            "eval_colour/frechet": ((m - n).square().sum() + s.trace() + r.trace() - 2 * trace).item(),
        },
        rel=1e-3,
        abs=1e-6,
    )
    assert numbers["eval_pixels/paired"] > 1e-3


def test_a_run_is_the_same_with_and_without_evaluations(base: Path, tmp_path: Path) -> None:
    def noisy(images: Tensor, prompts: list[str]) -> Tensor:
        return images.mean((1, 2, 3)) + torch.rand(len(images))  # Of the generator that all share.

    runs = []
    for name, settings in (("blind", {}), ("watched", STEPS)):
        torch.manual_seed(1)
        rewards = ["rdm", declare(noisy, differentiable=True)]
        trainer = quick_trainer(base, tmp_path / name, rewards, **settings, **{**QUICK, "ema_decay": 0.5})
        trainer.train()
        runs.append(trainer)
    blind, watched = runs
    assert same(trained_weights(blind), trained_weights(watched))
    rows = [row for row in watched.state.log_history if "eval_rewards/noisy/mean" in row]
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert len({row["eval_pixels/paired"] for row in rows}) == 3
    assert "policy/loss" not in rows[1]
    # It is the average that is measured, as it is what is saved.
    numbers = watched.evaluate()
    assert numbers["eval_pixels/paired"] == rows[-1]["eval_pixels/paired"]
    watched.args.save_ema = False
    assert watched.evaluate() != numbers


def test_grids_are_of_the_first_prompts(base: Path, tmp_path: Path) -> None:
    settings = {**STEPS, **WITHOUT_RDM, "eval_steps": 2, "max_steps": 4}
    given = {"eval_dataset": PROMPTS[5:]}
    quick_trainer(base, tmp_path, [brightness()], given=given, **settings).train()
    grids = sorted((tmp_path / "samples").iterdir())
    assert [path.name for path in grids] == ["step-000000.png", "step-000002.png", "step-000004.png"]
    pictures = [np.asarray(Image.open(path)) for path in grids]
    assert pictures[0].shape == pictures[2].shape
    assert not np.array_equal(pictures[0], pictures[2])


@pytest.mark.parametrize("where", ["by default", "with others"])
def test_the_teacher_draws_each_image_once(
    where: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []

    def counted(teacher: Any, noise: Tensor, *others: Any) -> Tensor:
        drawn.append(len(noise))
        return ode_solution(teacher, noise, *others)

    monkeypatch.setattr(teacher_images, "ode_solution", counted)
    folder = tmp_path / "kept" if where == "with others" else None
    for _ in range(2):  # The second stands for a run that is resumed.
        settings = {"teacher_cache_dir": folder, **STEPS, **WITHOUT_RDM}
        trainer = quick_trainer(base, tmp_path / "run", [brightness()], **settings)
        assert trainer.evaluate() == trainer.evaluate()
    assert drawn == [2]
    assert len([*(folder or tmp_path / "run" / "teacher-images").glob("*/*.png")]) == 2


@pytest.mark.parametrize(("count", "size", "processes"), [(5, 2, 2), (1, 8, 2), (8, 8, 1), (7, 2, 3)])
def test_processes_share_the_prompts_and_make_as_many_passes(count: int, size: int, processes: int) -> None:
    shares = []
    for rank in range(processes):
        process = SimpleNamespace(process_index=rank, num_processes=processes)
        args = SimpleNamespace(per_device_eval_batch_size=size)
        shares.append(_batches(SimpleNamespace(args=args, accelerator=process, eval_prompts=[""] * count)))
    assert len({len(share) for share in shares}) == 1
    assert sorted(number for share in shares for numbers in share for number in numbers) == [*range(count)]
    assert 0 in shares[0][0]


def test_prompts_without_what_a_reward_reads_are_refused(tmp_path: Path) -> None:
    given = {"eval_dataset": [{"prompt": "a"}, {"prompt": "b"}]}
    with pytest.raises(ValueError, match=r"'upper' reads the column\(s\) digit, but eval_dataset has nothing there"):
        quick_trainer(tmp_path / "no-such-model", tmp_path, [upper], given=given)


def test_features_that_cannot_be_told_apart_or_had_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="are called colour, colour in the log"):
        load_eval_features(["tests.tiny_rewards:COLOUR"] * 2, torch.device("cpu"))
    with pytest.raises(OSError, match="features="):
        load_eval_features([str(tmp_path / "nothing")], torch.device("cpu"))
