"""A rollout that serves several policy updates: what is done once, what each time, and the right gradient."""

from collections import Counter
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback

from rdm_rl import RDMTrainer
from rdm_rl.ratio import RecordedDistributionMatching, RecordedPolicyGradient
from rdm_rl.rdm import policy_loss
from rdm_rl.statistics import measure_directions, measure_rewards
from rdm_rl.trainers.checkpointing import read_checkpoint
from tests.helpers import (
    QUICK,
    WITHOUT_RDM,
    StopAfter,
    brightness,
    changed,
    declare,
    log_numbers,
    quick_trainer,
    same,
    trained_weights,
)

# Eight samples of four channels: a scale for each sample must not be taken for one of each channel.
REUSE = {**QUICK, "num_inference_steps": 2, "num_iterations": 2, "per_device_train_batch_size": 8, "max_steps": 4}


def black_box(name: str = "box") -> Any:
    def reward(latents: Tensor, prompts: list[str]) -> list[float]:
        return latents.mean((1, 2, 3)).tolist()

    return declare(reward, __name__=name, inputs="latents")


class Counting(RDMTrainer):
    """Counts what a run does, and in which update."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        self.counts: list[Counter[str]] = []
        super().__init__(*arguments, **named)
        predict = self.networks.predict

        def counted(role: str, *inputs: Any, **more: Any) -> Tensor:
            graph = "" if torch.is_grad_enabled() else " without a graph"
            self._count(f"{role}{graph}")
            return predict(role, *inputs, **more)

        self.networks.predict = counted

    def _count(self, name: str) -> None:
        if self.counts:
            self.counts[-1][name] += 1

    def training_step(self) -> dict[str, float]:
        self.counts.append(Counter())
        return super().training_step()

    def generate_rollout(self, batch: Any) -> Any:
        self._count("rollouts")
        return super().generate_rollout(batch)

    def compute_rewards(self, rollout: Any, step: int) -> Any:
        self._count("rewards")
        return super().compute_rewards(rollout, step)


class Plain(RDMTrainer):
    """An update as it was before rollouts could be used again, from the hooks alone."""

    def training_step(self) -> dict[str, float]:
        number = self.state.global_step
        rollouts = [self.generate_rollout(batch) for batch in self.prompt_batches(number)]
        metrics = self._update_fake_score_on(rollouts, number)
        step = self.draw_steps(rollouts[0], number)[0]
        judged = [self.compute_rewards(one, step) for one in rollouts]
        found = [{name: said.direction for name, said in one.items()} for one in judged]
        statistics = measure_rewards(judged, [one.batch.group_ids for one in rollouts])
        self.weighting.update(measure_directions(statistics, found), number)
        for one, directions in zip(rollouts, found, strict=True):
            loss = policy_loss(self.replay_step(one, step), self.weighting.combine(directions)).loss
            metrics["policy/loss"] = metrics.get("policy/loss", 0.0) + loss.item() / len(rollouts)
            self.optimizers["policy"].backward(loss, 1 / len(rollouts))
        metrics["policy/grad_norm"] = self.optimizers["policy"].step()
        return metrics


@pytest.mark.parametrize("rewards", [["rdm"], ["rdm", brightness()]], ids=["rdm", "rdm-pathwise"])
def test_a_rollout_used_once_is_as_if_it_could_not_be_used_again(rewards: list, base: Path, tmp_path: Path) -> None:
    settings = {**QUICK, "num_inference_steps": 2, "gradient_accumulation_steps": 2, "max_steps": 3}
    runs = []
    for kind in (RDMTrainer, Plain):
        trainer = quick_trainer(base, tmp_path / kind.__name__, rewards, kind=kind, **settings)
        trainer.train()
        runs.append(trainer)
    assert same(trained_weights(runs[0]), trained_weights(runs[1]))
    for one, other in zip(log_numbers(runs[0]), log_numbers(runs[1]), strict=True):
        common = one.keys() & other.keys()
        assert {"policy/loss", "policy/grad_norm", "fake_score/loss", "epoch"} <= common
        assert {name: one[name] for name in common} == {name: other[name] for name in common}
        assert not any("log_ratio" in name for name in one), "no likelihood is asked for"


def gradients_of(trainer: RDMTrainer, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, trainer.networks.parameters("policy")))


@pytest.mark.parametrize("level", ["dimension", "sample"])
def test_the_second_update_is_the_weighted_old_direction_at_the_moved_weights(
    level: str, base: Path, tmp_path: Path
) -> None:
    trainer = quick_trainer(
        base,
        tmp_path,
        ["rdm"],
        **{**REUSE, "max_steps": 1, "importance_sampling_level": level, "learning_rate": 3e-3},
    )
    trainer.train()
    (one,) = trainer.experiences
    old = one.directions["rdm"].recorded
    assert isinstance(old, RecordedDistributionMatching)
    assert old.values.shape == (8, 4, 8, 8)
    assert not trainer._is_fresh
    output = trainer.compute_policy_loss(one)
    got = gradients_of(trainer, output.loss)

    x_0 = trainer.replay_step(one.rollout, one.step)
    now, before = x_0.detach().double(), one.rollout.x_0[one.step].double()
    weighted, plain, logs = torch.zeros_like(now), torch.zeros_like(now), []
    for i in range(8):
        a, s = old.transition.x_0_scale[i].double(), old.transition.std[i].double()
        far = [((old.action[i].double() - a * each[i]) / s).square() / 2 for each in (before, now)]
        log_rho = (far[0] - far[1]).mean() if level == "dimension" else (far[0] - far[1]).sum()
        weighted[i] = log_rho.exp().clamp(0.8, 1.2) * old.values[i]
        plain[i] = old.values[i].double()
        logs.append(log_rho)
    logs = torch.stack(logs)
    assert logs.abs().max() > 1e-3
    assert output.metrics["rewards/rdm/log_ratio_mean"] == pytest.approx(logs.mean().item(), rel=0.05, abs=1e-4)

    def by_hand(target: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(x_0, trainer.networks.parameters("policy"), target, retain_graph=True))

    def distance(first: list[Tensor], second: list[Tensor]) -> float:
        error = sum((one - other).double().square().sum() for one, other in zip(first, second, strict=True))
        return float((error / sum(other.double().square().sum() for other in second)).sqrt())

    scale = -1 / now.numel()
    near = distance(got, by_hand((scale * weighted).float()))
    assert near < 1e-3
    far_off = distance(got, by_hand((scale * plain).float()))
    assert far_off > max(1e-5, 10 * near), "not the direction without its weight"
    unmoved = before + plain - now  # Towards a target that stayed where the old policy was.
    assert distance(got, by_hand((scale * unmoved).float())) > max(1e-4, 10 * near)


def test_a_clip_of_0_leaves_the_ratio_out(base: Path, tmp_path: Path) -> None:
    settings = {**REUSE, "max_steps": 1, "importance_weight_clip": 0.0, "learning_rate": 3e-3}
    trainer = quick_trainer(base, tmp_path, ["rdm"], **settings)
    trainer.train()
    (one,) = trainer.experiences
    got = gradients_of(trainer, trainer.compute_policy_loss(one).loss)
    x_0 = trainer.replay_step(one.rollout, one.step)
    target = -one.directions["rdm"].values / x_0.numel()
    expected = torch.autograd.grad(x_0, trainer.networks.parameters("policy"), target)
    for mine, other in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4 * other.abs().max().item())


@pytest.mark.parametrize("iterations", [1, 2, 3])
def test_what_is_done_once_for_a_rollout(iterations: int, base: Path, tmp_path: Path) -> None:
    settings = {**REUSE, "num_iterations": iterations, "max_steps": 6, "logging_strategy": "no"}
    settings |= {"fake_score_updates_per_policy_update": 2, "gradient_accumulation_steps": 2}
    trainer = quick_trainer(base, tmp_path, ["rdm"], kind=Counting, **settings)
    trainer.train()
    for update, counts in enumerate(trainer.counts):
        expected = {"policy": 2}
        if update % iterations == 0:
            expected |= {
                "rollouts": 2,
                "rewards": 2,
                "policy without a graph": 2 * 2,
                "fake_score": 2 * 2,
                "teacher without a graph": 2,
                "fake_score without a graph": 2,
            }
        assert dict(counts) == expected
    assert trainer.state.epoch == pytest.approx(6 / iterations * trainer.prompts_per_step / 10)
    fake_score = trainer.optimizers["fake_score"].optimizer
    assert max(int(one["step"]) for one in fake_score.state.values()) == 6 // iterations * 2


def test_the_rate_of_the_fake_score_ends_with_the_run(base: Path, tmp_path: Path) -> None:
    settings = {**REUSE, "lr_scheduler_type": "linear", "max_steps": 5, "fake_score_updates_per_policy_update": 3}
    trainer = quick_trainer(base, tmp_path, ["rdm"], **{**settings, "fake_score_warmup_steps": 2})
    trainer.train()
    assert trainer.optimizers["fake_score"].learning_rate == pytest.approx(0, abs=1e-12)
    assert trainer.optimizers["policy"].learning_rate == pytest.approx(0, abs=1e-12)
    rows = [row for row in trainer.state.log_history if "fake_score/learning_rate" in row]
    assert len(rows) == 3
    # Of 2 + 3 * 3 updates, the last one of each rollout.
    assert [row["fake_score/learning_rate"] for row in rows] == pytest.approx(
        [1e-3 * (11 - n) / 11 for n in (4, 7, 10)]
    )


def test_an_epoch_is_every_prompt_rolled_out_once(base: Path, tmp_path: Path) -> None:
    settings = {**REUSE, "max_steps": -1, "num_train_epochs": 2}
    trainer = quick_trainer(base, tmp_path, ["rdm"], **settings)
    # 10 prompts, 4 of them in each rollout: 5 rollouts, two updates each.
    assert trainer.count_steps() == 10


# ----- saving and stopping -----


class AllSaves(TrainerCallback):
    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.steps.append(state.global_step)


@pytest.mark.parametrize("save_steps, expected", [(1, [2, 4, 5]), (3, [4]), (2, [2, 4])])
def test_a_checkpoint_waits_for_the_end_of_a_rollout(
    save_steps: int, expected: list[int], base: Path, tmp_path: Path
) -> None:
    saves = AllSaves()
    settings = {**REUSE, "max_steps": 5, "save_strategy": "steps", "save_steps": save_steps}
    trainer = quick_trainer(base, tmp_path, ["rdm"], given={"callbacks": [saves]}, **settings)
    trainer.train()
    last = saves.steps[len(expected) :]
    assert saves.steps[: len(expected)] == expected
    assert last in ([], [5]), "the last update may be saved in the middle of a rollout"
    assert {one.name for one in tmp_path.glob("checkpoint-*")} == {f"checkpoint-{step}" for step in saves.steps}


@pytest.mark.parametrize(
    "rewards, settings",
    [
        (["rdm"], {}),
        (["rdm", black_box()], {"beta": 0.5, "num_replayed_steps": 2, "fake_score_warmup_steps": 1}),
        ([black_box(), brightness()], {"beta": 0.5, "sampler": "ddim", "scale_rewards": "batch", "ema_decay": 0.9}),
    ],
    ids=["rdm", "hybrid-beta", "ddim-beta"],
)
def test_a_resumed_run_is_the_uninterrupted_run(rewards: list, settings: dict, base: Path, tmp_path: Path) -> None:
    basis = REUSE if "rdm" in rewards else {**REUSE, **WITHOUT_RDM, "num_inference_steps": 2}
    basis = {**basis, "max_steps": 6, "save_strategy": "steps", "save_steps": 1, **settings}

    def run(folder: str, resume: Any = None, stop: int | None = None) -> RDMTrainer:
        given = {"callbacks": [] if stop is None else [StopAfter(stop)]}
        trainer = quick_trainer(base, tmp_path / folder, rewards, given=given, **basis)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run("whole")
    stopped = run("parts", stop=3)  # In the middle of the second rollout.
    assert stopped.state.global_step == 4, "a rollout is used up first"
    resumed = run("parts", resume=True)
    assert resumed.state.global_step == 6
    assert same(trained_weights(whole), trained_weights(resumed))
    assert same(log_numbers(whole), log_numbers(resumed))
    ends = [read_checkpoint(tmp_path / name / "checkpoint-6")[:2] for name in ("whole", "parts")]
    assert same(*ends)
    assert ("reference" in ends[0][0]) == bool(settings.get("beta"))
    again = run("again", resume=tmp_path / "whole" / "checkpoint-2")
    assert same(trained_weights(whole), trained_weights(again))
    assert same(log_numbers(whole), log_numbers(again))


def test_a_run_does_not_go_on_inside_a_rollout(base: Path, tmp_path: Path) -> None:
    def trainer(steps: int, **settings: Any) -> RDMTrainer:
        settings = {**REUSE, "max_steps": steps, "save_strategy": "steps", "save_steps": 1, **settings}
        return quick_trainer(base, tmp_path, ["rdm"], **settings)

    trainer(3).train()
    trainer(3).train(True)  # It is finished.
    with pytest.raises(ValueError, match=r"of update 3, inside a rollout of num_iterations=2.*a multiple of 2"):
        trainer(4).train(True)
    changed = trainer(4, allow_config_change=True)
    changed.train(True)
    assert changed.state.global_step == 4


def test_the_policy_moves_in_every_update(base: Path, tmp_path: Path) -> None:
    seen: list[Mapping[str, Tensor]] = []

    class Watching(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            seen.append({name: value.clone() for name, value in trained_weights(trainer).items()})

    trainer = quick_trainer(base, tmp_path, ["rdm"], given={"callbacks": [Watching()]}, **REUSE)
    trainer.train()
    moved = [{name.split("/")[0] for name in changed(one, other)} for one, other in pairwise(seen)]
    assert moved == [{"policy"}, {"policy", "fake_score"}, {"policy"}]
    rows = trainer.state.log_history
    for update, row in enumerate(rows):
        assert ("fake_score/loss" in row) == (update % 2 == 0)
        still = row["rewards/rdm/log_ratio_min"] == row["rewards/rdm/log_ratio_max"] == 0
        assert still == (update % 2 == 0)
        assert 0 < row["rewards/rdm/effective_sample_size"] <= 1 + 1e-9
        assert 0 <= row["rewards/rdm/clip_fraction"] <= 1


# ----- one step, and black boxes -----


def test_one_step_students_reuse_rollouts(base: Path, tmp_path: Path) -> None:
    settings = {**REUSE, "num_inference_steps": 1, "max_steps": 4}
    trainer = quick_trainer(base, tmp_path, ["rdm", brightness()], **settings)
    before = trained_weights(trainer)
    trainer.train()
    assert changed(before, trained_weights(trainer))
    for update, row in enumerate(trainer.state.log_history):
        assert (row["rewards/rdm/log_ratio_max"] == 0) == (update % 2 == 0)
    with pytest.raises(ValueError, match=r"'box' is a black box: .* leave no random step"):
        quick_trainer(base, tmp_path, ["rdm", black_box()], **settings)


@pytest.mark.parametrize("level, epsilon", [("dimension", 1e-6), ("sample", 1e-4)])
def test_a_second_update_of_a_black_box_is_clipped(level: str, epsilon: float, base: Path, tmp_path: Path) -> None:
    settings = {**REUSE, **WITHOUT_RDM, "num_inference_steps": 2, "max_steps": 1, "reward_weighting": "fixed"}
    settings |= {"importance_sampling_level": level, "epsilon": epsilon, "learning_rate": 3e-3}
    trainer = quick_trainer(base, tmp_path, [black_box()], **settings)
    trainer.train()
    (one,) = trainer.experiences
    signal = one.directions["box"].recorded
    assert isinstance(signal, RecordedPolicyGradient)
    output = trainer.compute_policy_loss(one)
    got = gradients_of(trainer, output.loss)

    x_0, step, states = (
        trainer.replay_step(one.rollout, one.step),
        one.rollout.transitions[one.step],
        one.rollout.states,
    )
    far = [
        ((states[one.step + 1] - step.x_0_scale * each) / step.std).square().flatten(1) / 2
        for each in (one.rollout.x_0[one.step], x_0)
    ]
    log_rho = (far[0] - far[1]).mean(1) if level == "dimension" else (far[0] - far[1]).sum(1)
    rho, advantage = log_rho.exp(), signal.advantages
    loss = -torch.minimum(rho * advantage, rho.clamp(1 - epsilon, 1 + epsilon) * advantage).mean()
    stopped = ((advantage > 0) & (rho > 1 + epsilon)) | ((advantage < 0) & (rho < 1 - epsilon))
    assert stopped.any()
    assert output.metrics["rewards/box/clip_fraction"] == stopped.float().mean().item()
    expected = gradients_of(trainer, loss)
    largest = max(one.abs().max().item() for one in expected)
    for mine, other in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-3 * largest)
