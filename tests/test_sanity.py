"""What would fail after hours fails before the first update, and looking for it changes nothing."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.integrations import is_wandb_available

from rdm_rl import RDMTrainer
from rdm_rl.rewards.calling import RewardError
from rdm_rl.trainers import rdm_trainer
from rdm_rl.trainers.sanity import check_run
from tests.helpers import QUICK, brightness, log_numbers, quick_trainer, same, tiny_trainer, trained_weights

# The warm start of a run that begins wrongly would not come to its end.
LONG = {**QUICK, "warm_start": "ode", "warm_start_steps": 10**9, "sanity_check": True}


def broken(images: Tensor, prompts: list[str]) -> list[float]:
    raise ConnectionError("nobody is listening")


class Foreign(RDMTrainer):
    """Keeps what a checkpoint cannot give back."""

    def state_dict(self) -> dict[str, Any]:
        return {"mean": np.float64(0.5)}


class Undecodable(RDMTrainer):
    """Has a decoder that fails."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.family.decode = self.fail

    def fail(self, x_0: Tensor) -> Tensor:
        raise ValueError("this decoder takes 16 channels")


@pytest.mark.parametrize(
    ("kind", "reward_funcs", "error", "message"),
    [
        (RDMTrainer, ["rdm", broken], RewardError, "nobody is listening"),
        (Foreign, ["rdm"], ValueError, "numbers, strings, lists, dicts and tensors"),
        (Undecodable, ["rdm"], ValueError, "16 channels"),
    ],
)
def test_what_fails_late_fails_early(
    kind: type[RDMTrainer], reward_funcs: Any, error: type[Exception], message: str, base: Path, tmp_path: Path
) -> None:
    settings = {**LONG, "num_inference_steps": 2}
    trainer = tiny_trainer(base, tmp_path, kind=kind, given={"reward_funcs": reward_funcs}, **settings)
    with pytest.raises(error, match=message):
        trainer.train()
    assert not [*tmp_path.iterdir()], "nothing is left behind"


def test_a_folder_that_cannot_be_written_is_found_early(base: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OSError, match="file"):
        quick_trainer(base, tmp_path / "file" / "run", ["rdm"], **LONG).train()


@pytest.mark.skipif(is_wandb_available(), reason="needs a tracker that is not installed")
def test_a_tracker_that_is_missing_is_found_before_a_model_loads(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rdm_trainer, "load_networks", lambda *_, **__: pytest.fail("a model is being loaded"))
    with pytest.raises(ValueError, match=r"report_to=\['wandb'\] cannot be used"):
        quick_trainer(base, tmp_path, ["rdm"], report_to=["wandb"], **QUICK)


def test_trackers_begin_once_and_early(base: Path, tmp_path: Path) -> None:
    settings = {**QUICK, "max_steps": 1, "report_to": "tensorboard", "sanity_check": True}
    trainer = quick_trainer(base, tmp_path, ["rdm"], **settings)
    trainer.state.max_steps = 1
    check_run(trainer)
    begun = [*tmp_path.rglob("events*")]
    trainer.train()
    assert len(begun) == 1
    assert [*tmp_path.rglob("events*")] == begun


@pytest.mark.parametrize("reward_funcs", [["rdm"], ["rdm", brightness()]])
def test_the_check_changes_nothing(reward_funcs: Any, base: Path, tmp_path: Path) -> None:
    runs = []
    for check in (False, True):
        settings = {**QUICK, "max_steps": 2, "num_inference_steps": 2, "sanity_check": check}
        trainer = quick_trainer(base, tmp_path / str(check), reward_funcs, **settings)
        trainer.train()
        runs.append((trained_weights(trainer), log_numbers(trainer)))
    assert same(*runs)
    assert torch.is_grad_enabled()
