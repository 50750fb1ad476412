"""Numbers that are not finite: the update is left out, the cause is named, and nothing good is lost."""

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from rdm_rl import RDMTrainer
from rdm_rl.records import LossOutput
from rdm_rl.trainers.checkpointing import checkpoint_damage, checkpoints
from rdm_rl.trainers.optimization import RoleOptimizer
from tests.helpers import QUICK, brightness, quick_trainer, same, trained_weights

HEALTH = {"fake_score/fresh_loss", "fake_score/lag"}
RUN = {**QUICK, "num_inference_steps": 2, "max_steps": 3, "sampler": "renoise"}


class Faulty(RDMTrainer):
    """Something is not finite from the second update on, for so many updates."""

    fault, lasting = "", 1

    def training_step(self) -> dict[str, float]:
        before, metrics = trained_weights(self), super().training_step()
        if self.broken:
            self.kept = {name for name, value in trained_weights(self).items() if torch.equal(value, before[name])}
        return metrics

    @property
    def broken(self) -> bool:
        return 1 <= self.state.global_step < 1 + self.lasting

    def spoilt(self, fault: str, value: Any, number: float = math.nan) -> Any:
        return value + number if self.broken and fault == self.fault else value

    def generate_rollout(self, batch):
        rollout = super().generate_rollout(batch)
        return replace(rollout, x_0=self.spoilt("samples", rollout.x_0))

    def compute_fake_score_loss(self, *inputs: Any) -> LossOutput:
        return LossOutput(loss=self.spoilt("fake score", super().compute_fake_score_loss(*inputs).loss))

    def compute_advantages(self, *seen: Any) -> list[dict[str, Tensor]]:
        advantages = super().compute_advantages(*seen)
        return [{name: self.spoilt("advantages", value) for name, value in each.items()} for each in advantages]

    def compute_distribution_matching(self, x_0: Tensor, *seen: Any) -> Tensor:
        direction = super().compute_distribution_matching(x_0, *seen)
        return self.spoilt("one sample", direction, torch.tensor([0.0, math.inf, 0.0, 0.0]).view(4, 1, 1, 1))

    def compute_policy_loss(self, experience) -> LossOutput:
        loss = self.spoilt("policy", super().compute_policy_loss(experience).loss)
        loss = self.spoilt("value alone", loss, math.inf)
        if self.broken and self.fault == "gradient":
            loss = loss * 1e30
        return LossOutput(loss=loss)


def height(images: Tensor, prompts: list[str]) -> list[float]:
    """A black box."""
    return images[:, :, :8].mean((1, 2, 3)).tolist()


def faulty(base: Path, folder: Path, fault: str, lasting: int = 1, **settings: Any) -> Faulty:
    trainer = quick_trainer(base, folder, ["rdm", height], kind=Faulty, **{**RUN, **settings})
    trainer.fault, trainer.lasting = fault, lasting
    return trainer


FAULTS = {
    "samples": ("policy", "the policy's samples are not finite for the prompt"),
    "fake score": ("fake_score", "its loss is nan for the prompt"),
    "advantages": ("policy", "the direction of the reward 'height' is not finite for the prompt"),
    "one sample": ("policy", "the direction of the reward 'rdm' is not finite for the prompt"),
    "policy": ("policy", "its loss is nan for the prompt"),
    "value alone": ("policy", "its loss is inf for the prompt"),
    "gradient": ("policy", "the norm of its gradient is inf"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_update_of_what_is_not_finite_is_left_out(
    fault: str, base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    role, cause = FAULTS[fault]
    trainer = faulty(base, tmp_path, fault, max_grad_norm=0, ema_decay=0.9)
    trainer.train()
    (record,) = [each for each in caplog.records if "is not updated" in each.message]
    assert f"The {role} is not updated in training, at update 2: {cause}" in record.message
    assert {name for name in trained_weights(trainer) if name.startswith(role)} <= trainer.kept
    everything = {**trained_weights(trainer), **trainer.average.tensors()}
    assert all(bool(value.isfinite().all()) for value in everything.values())
    assert trainer.average.updates == (3 if role == "fake_score" else 2)
    for row in trainer.state.log_history:  # The health of the fake score is asked for anew, and is what it is.
        assert all(math.isfinite(value) for name, value in row.items() if name not in HEALTH)
    state = trainer.whole_state()
    assert "nan" not in repr((state["weighting"], state["reward_spreads"])), "nor is a statistic poisoned"


@pytest.mark.parametrize("fault", ["samples", "fake score"])
def test_too_many_in_succession_end_the_run(fault: str, base: Path, tmp_path: Path) -> None:
    settings = {"max_steps": 9, "max_skipped_updates": 1, "save_strategy": "steps", "save_steps": 1}
    trainer = faulty(base, tmp_path, fault, lasting=9, **settings, save_total_limit=1)
    message = r"at update 3: .*makes 2 in succession.*Resume from .*learning_rate"
    with pytest.raises(FloatingPointError, match=message):
        trainer.train()
    assert not checkpoint_damage(tmp_path / "checkpoint-2")
    with pytest.raises(FloatingPointError, match=message):  # A run that is resumed has not forgotten the first.
        faulty(base, tmp_path, fault, lasting=9, **settings).train(True)


@pytest.mark.parametrize("fault", ["one sample", "policy"])
def test_the_updates_on_one_rollout_count_as_one(fault: str, base: Path, tmp_path: Path) -> None:
    trainer = faulty(base, tmp_path, fault, lasting=3, num_iterations=2, max_steps=6, max_skipped_updates=1)
    # Broken are the second update of the first rollout, and both of the next: three updates, but one rollout.
    if fault == "policy":
        with pytest.raises(FloatingPointError, match="at update 4"):
            trainer.train()
    else:
        trainer.train()
        assert trainer.state.global_step == 6


def test_weights_that_are_not_finite_end_the_run_at_once(base: Path, tmp_path: Path) -> None:
    trainer = quick_trainer(base, tmp_path, [brightness()], **RUN, on_reward_error="skip", learning_rate=1e38)
    with pytest.raises(FloatingPointError, match=r"at update 2: .*The weights of the policy are not finite .*lora"):
        trainer.train()


@pytest.mark.parametrize("broken", ["policy", "average"])
def test_a_student_whose_weights_are_not_finite_is_not_saved(broken: str, base: Path, tmp_path: Path) -> None:
    trainer = quick_trainer(base, tmp_path, ["rdm"], **{**RUN, "max_steps": 1, "ema_decay": 0.9})
    trainer.train()
    if broken == "policy":
        trainer.args.save_ema = False
        trainer.networks.parameters("policy")[0].data[0] = math.nan
    else:
        next(iter(trainer.average.tensors().values()))[0] = math.inf
    with pytest.raises(FloatingPointError, match=r"The weights of the policy are not finite .*not saved as a student"):
        trainer.save_model()
    assert not [*tmp_path.glob("*.safetensors")]


def test_a_reward_is_not_blamed_for_images_that_are_not_finite(base: Path, tmp_path: Path) -> None:
    trainer = quick_trainer(base, tmp_path, [brightness()], **RUN, on_reward_error="skip")
    decode = trainer.rewards["brightness"].context.decoder.decode
    trainer.rewards["brightness"].context.decoder.decode = lambda x_0: decode(x_0) * math.nan
    with pytest.raises(FloatingPointError, match=r"The images that the reward 'brightness' was asked about .*decoder"):
        trainer.train()


def test_an_overflow_of_half_precision_is_left_to_the_loss_scale() -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    role = RoleOptimizer(
        parameters=[weight], optimizer=optimizer, scheduler=schedule, scaler=scaler, max_grad_norm=1.0, reduce=list
    )
    for scale, falling in ((1.0, True), (0.5, False)):
        role.backward((weight * 1e38).sum() * 1e3, 1.0)
        assert math.isinf(role.step())
        assert (scaler.get_scale(), role.scale_is_falling) == (scale, falling)
    assert same(weight.detach(), torch.ones(2))
    role.backward(weight.sum(), 1.0)
    assert math.isfinite(role.step())
    assert not same(weight.detach(), torch.ones(2))


# ----- memory and disk -----


def test_what_memory_is_saved_with_is_said(base: Path, tmp_path: Path) -> None:
    class Greedy(RDMTrainer):
        def compute_policy_loss(self, experience) -> LossOutput:
            if self.state.global_step == 1:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return super().compute_policy_loss(experience)

    trainer = quick_trainer(base, tmp_path, ["rdm"], kind=Greedy, **RUN, save_strategy="steps", save_steps=1)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        trainer.train()
    (note,) = caught.value.__notes__
    assert "checkpoint-1. Set activation_checkpointing=True" in note
    assert "`rdm-rl plan`" in note


def test_a_folder_that_is_removed_is_made_again_and_said(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Remove(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 2:
                shutil.rmtree(tmp_path / "run")

    settings = {**RUN, "save_strategy": "steps", "save_steps": 1}
    quick_trainer(base, tmp_path / "run", ["rdm"], given={"callbacks": [Remove()]}, **settings).train()
    assert "checkpoint-1 is gone" in caplog.text
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-2", "checkpoint-3"]
