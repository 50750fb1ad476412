"""A resumed run is the uninterrupted run, bit for bit, and checkpoints are complete or absent."""

from pathlib import Path

import pytest
import torch
from transformers.trainer_callback import TrainerState

from rdm_rl import RDMTrainer
from rdm_rl.records import Direction
from rdm_rl.trainers.checkpointing import (
    check_settings,
    checkpoints,
    find_checkpoint,
    read_checkpoint,
    rotate_checkpoints,
    write_checkpoint,
)
from rdm_rl.weighting import Weighting
from tests.helpers import CHECKPOINTING, StopAfter, changed, log_numbers, same, tiny_trainer

RUN = {
    "max_steps": 4,
    "save_strategy": "steps",
    "save_steps": 2,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 1,
    "fake_score_updates_per_policy_update": 1,
}


class CountingWeighting(Weighting):
    """A weighting with a running statistic that matters."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def combine(self, directions: dict) -> Direction:
        self.calls += 1
        return Direction(values=self.calls * directions["rdm"].values, applicable=directions["rdm"].applicable)

    def state_dict(self) -> dict:
        return {"calls": self.calls}

    def load_state_dict(self, state: dict) -> None:
        self.calls = state["calls"]


def run(base: Path, folder: Path, *, lora: bool = True, resume=None, stop: int | None = None, **settings) -> RDMTrainer:
    given = {"weighting": CountingWeighting(), "callbacks": [] if stop is None else [StopAfter(stop)]}
    trainer = tiny_trainer(base, folder, lora=lora, given=given, **{**RUN, **settings})
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def everything(trainer: RDMTrainer, folder: Path) -> tuple:
    """All that a run ends with."""
    tensors, state, _ = read_checkpoint(checkpoints(folder)[-1])
    return tensors, state, log_numbers(trainer), trainer.state.global_step, trainer.state.epoch


@pytest.fixture(scope="module")
def whole(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RDMTrainer, Path]:
    """An uninterrupted run with adapters, which saves after each update and keeps three checkpoints."""
    folder = tmp_path_factory.mktemp("whole")
    return run(base, folder, save_steps=1, save_total_limit=3), folder


def test_interrupted_and_resumed_equals_uninterrupted(
    whole: tuple[RDMTrainer, Path], base: Path, tmp_path: Path
) -> None:
    stopped = run(base, tmp_path, stop=2)
    assert stopped.state.global_step == 2
    resumed = run(base, tmp_path, resume=True)
    trainer, folder = whole
    expected, got = everything(trainer, folder), everything(resumed, tmp_path)
    assert expected[0].keys() == {"policy", "fake_score", "ema", "last_samples"}
    for one, two in zip(expected, got, strict=True):
        assert same(one, two)
    at_two = read_checkpoint(folder / "checkpoint-2")[0]
    for name in ("policy", "fake_score", "ema"):
        assert changed(at_two[name], expected[0][name]), "the second half must have done something"
    images = [one.generate(["a", "b"], generator=torch.Generator().manual_seed(1)) for one in (trainer, resumed)]
    assert torch.equal(*images)


def test_full_fine_tuning_resumes_too(base: Path, tmp_path: Path) -> None:
    """By the setting, and without a second warm start."""
    whole = run(base, tmp_path / "whole", lora=False)
    setting = str(tmp_path / "whole" / "checkpoint-2")
    resumed = run(base, tmp_path / "parts", lora=False, resume_from_checkpoint=setting)
    assert same(everything(whole, tmp_path / "whole"), everything(resumed, tmp_path / "parts"))
    assert (tmp_path / "whole" / "warm_start").exists()
    assert not (tmp_path / "parts" / "warm_start").exists(), "a resumed run does not start again"


def test_resuming_with_everything_switched_on(base: Path, tmp_path: Path) -> None:
    settings = {
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2,
        CHECKPOINTING: True,
        "num_renoise": 2,
        "renoise_distribution": "annealed_beta",
        "renoise_anneal_steps": 2,
        "max_steps": 2,
        "save_steps": 1,
        "warm_start": "none",
        "fake_score_warmup_steps": 0,
        "fake_score_updates_per_policy_update": 2,
    }
    whole = run(base, tmp_path / "whole", **settings)
    resumed = run(base, tmp_path / "parts", resume=tmp_path / "whole" / "checkpoint-1", **settings)
    assert same(everything(whole, tmp_path / "whole"), everything(resumed, tmp_path / "parts"))


def test_resuming_at_the_end_does_nothing(whole: tuple[RDMTrainer, Path], base: Path, tmp_path: Path) -> None:
    trainer, folder = whole
    again = run(base, tmp_path, resume=folder / "checkpoint-4")
    assert again.state.global_step == 4
    assert log_numbers(again) == log_numbers(trainer)
    assert same(again.networks.state_dict("policy"), trainer.networks.state_dict("policy"))


def test_files_of_a_checkpoint(whole: tuple[RDMTrainer, Path]) -> None:
    trainer, folder = whole
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-2", "checkpoint-3", "checkpoint-4"]
    assert {path.name for path in (folder / "checkpoint-4").iterdir()} == {
        "policy.safetensors",
        "fake_score.safetensors",
        "ema.safetensors",
        "last_samples.safetensors",
        "optimizers.pt",
        "rdm_config.json",
        "trainer_state.json",
    }
    assert TrainerState.load_from_json(str(folder / "checkpoint-4" / "trainer_state.json")).global_step == 4
    tensors = read_checkpoint(folder / "checkpoint-4")[0]
    assert same(tensors["policy"], trainer.networks.state_dict("policy"))
    assert len(tensors["policy"]) == len(trainer.networks.parameters("policy"))


def test_a_checkpoint_that_cannot_be_continued_is_refused(
    whole: tuple[RDMTrainer, Path], base: Path, tmp_path: Path
) -> None:
    trainer, folder = whole[0], whole[1] / "checkpoint-2"
    for settings, message in (
        ({"lora": False}, "The saved policy does not fit"),
        ({"num_inference_steps": 3}, "num_inference_steps=2, but this run has 3"),
    ):
        with pytest.raises(ValueError, match=message):
            run(base, tmp_path, resume=folder, **settings)
    own = trainer.args.to_dict()
    check_settings(folder, own)
    for name, value, message in (
        ("num_generations", 4, "num_generations=2, but this run has 4"),
        ("per_device_train_batch_size", 2, "per_device_train_batch_size=4, but this run has 2"),
        ("ema_decay", 0.0, r"ema_decay=0\.999, but this run has 0"),
    ):
        with pytest.raises(ValueError, match=message):
            check_settings(folder, {**own, name: value})


def write(folder: Path) -> None:
    write_checkpoint(folder, {"policy": {"a": torch.ones(2)}}, {"x": [1, torch.ones(1)]}, "{}", TrainerState())


def test_write_and_read_agree(tmp_path: Path) -> None:
    write(tmp_path / "checkpoint-1")
    tensors, state, _ = read_checkpoint(tmp_path / "checkpoint-1")
    assert same(tensors, {"policy": {"a": torch.ones(2)}})
    assert same(state, {"x": [1, torch.ones(1)]})


def test_what_is_found(tmp_path: Path) -> None:
    assert checkpoints(tmp_path / "nowhere") == []
    for step in (10, 9, 100):
        write(tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-200").mkdir()  # Interrupted while it was written.
    write(tmp_path / "checkpoint-best")
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10", "checkpoint-100"]
    assert find_checkpoint(tmp_path, True) == tmp_path / "checkpoint-100"
    assert find_checkpoint(tmp_path / "nowhere", tmp_path / "checkpoint-9") == tmp_path / "checkpoint-9"
    assert find_checkpoint(tmp_path, "checkpoint-9") == tmp_path / "checkpoint-9"
    for limit in (None, 0):
        rotate_checkpoints(tmp_path / "checkpoint-100", limit)
    assert len(checkpoints(tmp_path)) == 3
    # The one just written stays, whatever numbers an earlier run left in the folder.
    rotate_checkpoints(tmp_path / "checkpoint-9", 1)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-9"]


def test_what_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no complete checkpoint"):
        find_checkpoint(tmp_path, True)
    (tmp_path / "checkpoint-3").mkdir()
    with pytest.raises(FileNotFoundError, match="is no complete checkpoint"):
        find_checkpoint(tmp_path, tmp_path / "checkpoint-3")
    write(tmp_path / "checkpoint-2")
    with pytest.raises(FileNotFoundError, match=r"Complete ones in .*: checkpoint-2\."):
        find_checkpoint(tmp_path, "checkpoint-1")


@pytest.mark.parametrize("damage", [0.0, 0.5])
@pytest.mark.parametrize("name", ["policy.safetensors", "optimizers.pt", "trainer_state.json", "rdm_config.json"])
def test_a_damaged_file_is_named(name: str, damage: float, tmp_path: Path) -> None:
    write(tmp_path / "checkpoint-2")
    file = tmp_path / "checkpoint-2" / name
    file.write_bytes(file.read_bytes()[: int(damage * file.stat().st_size)])
    with pytest.raises(ValueError, match=rf"{name}.*cannot be read, {file.stat().st_size} bytes") as raised:
        if name == "rdm_config.json":
            check_settings(tmp_path / "checkpoint-2", {})
        read_checkpoint(tmp_path / "checkpoint-2")
    assert "\n" not in str(raised.value)


def test_whoever_may_read_one_file_may_read_all(tmp_path: Path) -> None:
    write(tmp_path / "checkpoint-2")
    assert len({file.stat().st_mode for file in (tmp_path / "checkpoint-2").iterdir()}) == 1
