"""Images that are not square, and several resolutions in one run."""

from pathlib import Path
from typing import Any

import pytest
import torch

from rdm_rl import RDMConfig
from rdm_rl.families import load_family
from rdm_rl.families.resolution import Resolution, read_resolution, read_resolutions
from rdm_rl.student import load_student
from rdm_rl.trainers.setup import teacher_fingerprint, teacher_key
from tests.helpers import QUICK, StopAfter, log_numbers, quick_trainer, randomize, same, trained_weights
from tests.tiny_pipelines import align_weights, tiny_flux, tiny_klein, tiny_sd, tiny_sd3, tiny_sdxl, tiny_zimage

BUCKETS = ["16", "16x24", "24x16"]


@pytest.mark.parametrize(
    ("written", "expected"),
    [(1024, (1024, 1024)), ("1024", (1024, 1024)), ("832x1216", (1216, 832)), (Resolution(1216, 832), (1216, 832))],
)
def test_a_resolution_is_written_width_first(written: Any, expected: tuple[int, int]) -> None:
    assert read_resolution(written) == expected
    assert read_resolution(str(read_resolution(written))) == expected


@pytest.mark.parametrize("written", ["0", "-16", "16x0", "16x16x16", "large", "16.5"])
def test_what_is_no_resolution(written: str) -> None:
    with pytest.raises(ValueError, match=r"is no size in pixels, .* or 832x1216 for width and height"):
        RDMConfig(output_dir="out", use_cpu=True, resolution=written)


def test_one_or_several_in_any_spelling() -> None:
    for value in (16, "16", [16], ["16", "16x16"]):
        args = RDMConfig(output_dir="out", use_cpu=True, resolution=value)
        assert read_resolutions(args.resolution) == [(16, 16)]
    assert read_resolutions(None) == []


@pytest.mark.parametrize("kind", [tiny_sd, tiny_sdxl, tiny_sd3, tiny_flux, tiny_klein, tiny_zimage])
def test_a_student_that_is_not_square_is_the_stock_pipeline_s(kind: Any, tmp_path: Path) -> None:
    """Its latents, the sizes that SDXL is told, positions of tokens, and times that depend on the size."""
    kind(tmp_path / "source").save_pretrained(tmp_path / "base")
    settings = {**QUICK, "num_inference_steps": 2, "resolution": "24x16"}
    trainer = quick_trainer(tmp_path / "base", tmp_path / "run", "rdm", **settings)
    randomize(trainer.networks)
    trainer.save_model()
    student = load_student(tmp_path / "run", tmp_path / "base")
    assert (student.call["height"], student.call["width"]) == (16, 24)
    align_weights(trainer.family.pipeline, student.pipeline)
    torch.manual_seed(3)
    ours = trainer.generate(["a cat"], generator=torch.default_generator)
    torch.manual_seed(3)
    stock = torch.as_tensor(student.draw(["a cat"], generator=torch.default_generator, output_type="np"))
    assert ours.shape == (1, 3, 16, 24)
    torch.testing.assert_close(ours, stock.permute(0, 3, 1, 2), rtol=0, atol=0)


@pytest.mark.parametrize("kind", [tiny_sd, tiny_flux, tiny_klein])
def test_a_family_at_another_resolution_is_one_loaded_for_it(kind: Any, tmp_path: Path) -> None:
    pipeline = kind(tmp_path)
    family, loaded = (
        load_family(pipeline, resolution=16).at(Resolution(16, 24)),
        load_family(pipeline, resolution="24x16"),
    )
    assert family.latent_shape == loaded.latent_shape
    assert family.student_call(4) == loaded.student_call(4)
    assert torch.equal(family.schedule.descent(1.0, 4), loaded.schedule.descent(1.0, 4))
    with pytest.raises(ValueError, match=r"resolution=16x25, .* multiples of \d\. Set it to 16x24"):
        family.at(Resolution(25, 16))


def trainer_of(folder: Path, output_dir: Path, reward: str = "rdm", **settings: Any) -> Any:
    usual = {**QUICK, "resolution": BUCKETS, "max_steps": 6, "num_inference_steps": 2}
    return quick_trainer(folder, output_dir, reward, **{**usual, **settings})


def test_a_resolution_is_drawn_for_each_update(base: Path, tmp_path: Path) -> None:
    trainer = trainer_of(base, tmp_path)
    drawn = []
    for update in range(8):
        batches = [*trainer.prompt_batches(update)]
        rollout = trainer.generate_rollout(batches[0])
        drawn.append(tuple(rollout.states.shape[-2:]))
        assert drawn[-1] == trainer.family_at(batches[0]).latent_shape[1:]
    assert set(drawn) == {(8, 8), (12, 8), (8, 12)}
    assert trainer.generate(["a cat"], generator=torch.Generator()).shape == (1, 3, 16, 16)
    trainer.save_model()
    call = load_student(tmp_path, base).call
    assert (call["height"], call["width"]) == (16, 16)
    assert "| resolution | ['16', '16x24', '24x16'] |" in (tmp_path / "README.md").read_text()


def test_a_run_with_several_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    """With FLUX, whose times depend on the size, after a warm start at each."""
    tiny_flux(tmp_path / "source").save_pretrained(tmp_path / "base")
    settings = {"warm_start": "ode", "warm_start_steps": 3, "warm_start_num_states": 4, "max_steps": 3, "save_steps": 1}
    settings |= {"warm_start_cache_dir": str(tmp_path / "warm"), "save_strategy": "steps"}
    whole = trainer_of(tmp_path / "base", tmp_path / "whole", **settings)
    whole.train()
    assert len([*(tmp_path / "warm").iterdir()]) == len(BUCKETS)
    stopped = trainer_of(tmp_path / "base", tmp_path / "stopped", **settings)
    stopped.callback_handler.add_callback(StopAfter(1))
    stopped.train()
    resumed = trainer_of(tmp_path / "base", tmp_path / "stopped", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert same(trained_weights(resumed), trained_weights(whole))
    assert log_numbers(resumed) == log_numbers(whole)


def test_teacher_images_are_kept_for_each_size(base: Path, tmp_path: Path) -> None:
    settings = {"teacher_cache_dir": str(tmp_path / "images"), "noise_pool": 1, "teacher_num_inference_steps": 2}
    settings |= {"fake_score_updates_per_policy_update": 0}
    trainer = trainer_of(base, tmp_path / "run", "teacher_mse", **settings)
    give = trainer.rewards["teacher_mse"].context.teacher_images
    for _ in range(2):  # The second time from the cache.
        for update in range(6):
            rollout = trainer.generate_rollout(next(trainer.prompt_batches(update)))
            assert give(rollout).shape[-2:] == tuple(2 * side for side in rollout.states.shape[-2:])
    teacher = teacher_fingerprint(trainer.networks, trainer.args)
    keys = {teacher_key(teacher, trainer.networks, size.resolution) for size in trainer.sizes}
    assert len(keys) == len(BUCKETS)
    alone = trainer_of(base, tmp_path / "run", "teacher_mse", resolution="16x24", **settings)
    assert teacher_fingerprint(alone.networks, alone.args) == teacher
    assert teacher_key(teacher, alone.networks, alone.family.resolution) in keys
