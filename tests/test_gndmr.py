"""Rewards joined with distribution matching, in whole runs on a real pipeline."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rdm_rl import RDMConfig, RDMTrainer
from rdm_rl.rdm import normalize_rewards
from rdm_rl.records import Direction, Experience, LossOutput, Rollout
from rdm_rl.rewards.protocol import RewardContext
from rdm_rl.trainers.checkpointing import read_checkpoint
from rdm_rl.trainers.methods import method_settings
from rdm_rl.weighting import DirectionStatistics, FixedWeighting, Weighting
from tests.helpers import (
    QUICK,
    WITHOUT_RDM,
    StepAway,
    StopAfter,
    brightness,
    changed,
    declare,
    log_numbers,
    one_rollout,
    quick_trainer,
    same,
    snapshot,
    trained_weights,
)


class Pushing(RDMTrainer):
    """Remembers what each reward's direction was multiplied with, and the result, in every update."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        self.pushes: list[dict[str, Tensor]] = []
        self.directions: list[dict[str, Direction]] = []
        self.lambdas: list[dict[str, float]] = []
        super().__init__(*arguments, **named)

    def compute_policy_loss(self, experience: Experience) -> LossOutput:
        directions = experience.directions
        self.directions.append(dict(directions))
        self.lambdas.append(dict(self.weighting.lambdas))
        self.pushes.append({name: self.lambdas[-1].get(name, 0) * one.values for name, one in directions.items()})
        return super().compute_policy_loss(experience)


def run(base: Path, folder: Path, reward_funcs: Any, **settings: Any) -> Any:
    trainer = quick_trainer(base, folder, reward_funcs, kind=Pushing, **{**QUICK, **settings})
    trainer.train()
    return trainer


# ----- units -----


@pytest.mark.parametrize(
    ("reference", "settings"),
    [
        ("cold_start", {"reward_start_step": 2, "reward_ramp_steps": 3, "reward_weights": [1.0, 4.0]}),
        ("online", {"reward_weights": [1.0, 0.8]}),
    ],
)
def test_units_and_origin_of_a_reward_do_not_matter(
    reference: str, settings: dict[str, Any], base: Path, tmp_path: Path
) -> None:
    """From the first update on, and over eight. A power of two is exact in fp32, so even the weights agree."""
    settings = {**settings, "adaptive_reference": reference, "max_steps": 8, "logging_steps": 100}
    plain = run(base, tmp_path, ["rdm", brightness()], **settings)
    moved = trained_weights(plain)
    assert max(push["brightness"].abs().max() for push in plain.pushes) > 0.01
    for scale, shift in ((2.0**-10, 0.0), (2.0**10, 5.0)):
        other = run(base, tmp_path, ["rdm", brightness(scale, shift)], **settings)
        for one, two in zip(plain.pushes, other.pushes, strict=True):
            difference, size = (one["brightness"] - two["brightness"]).norm(), one["brightness"].norm()
            assert difference <= 1e-5 * size
        assert not changed(moved, trained_weights(other)), (scale, shift)
        ratio = other.lambdas[-1]["brightness"] / plain.lambdas[-1]["brightness"]
        assert ratio == pytest.approx(1 / scale, rel=1e-6)


def test_the_push_of_a_reward_is_its_weight_times_the_reference_force(base: Path, tmp_path: Path) -> None:
    trainer = run(base, tmp_path, ["rdm", brightness()], reward_weights=[2.0, 0.5], max_steps=1)
    (push,), (row,) = trainer.pushes, trainer.state.log_history
    force = trainer.directions[0]["rdm"].values.square().mean().sqrt().item()
    assert push["brightness"].square().mean().sqrt().item() == pytest.approx(0.5 * force, rel=1e-5)
    assert torch.equal(push["rdm"], 2 * trainer.directions[0]["rdm"].values)
    assert row["rewards/rdm/lambda"] == 2
    assert row["rewards/brightness/lambda"] == pytest.approx(trainer.lambdas[0]["brightness"])
    assert row["rewards/rdm/direction_rms"] == pytest.approx(force, rel=1e-5)
    cosine = torch.nn.functional.cosine_similarity(push["brightness"].flatten(1), push["rdm"].flatten(1)).mean()
    assert row["rewards/brightness/cosine_to_rdm"] == pytest.approx(cosine.item(), abs=1e-5)
    combined = 0.5 * (push["rdm"] + push["brightness"]).square().mean()
    assert row["policy/loss"] == pytest.approx(combined.item(), rel=1e-3)


@pytest.mark.parametrize("exponent", [-5, -10, -20])
def test_a_small_gradient_is_a_gradient(exponent: int, base: Path, tmp_path: Path) -> None:
    """With constant weights, a reward in other units has a gradient in other units, and nothing else changes."""
    norms = []
    for scale in (1.0, 2.0**exponent):
        settings = {**WITHOUT_RDM, "reward_weighting": "fixed", "max_steps": 1}
        trainer = quick_trainer(base, tmp_path, brightness(scale), **settings)
        trainer.train()
        norms.append(trainer.state.log_history[0]["policy/grad_norm"] / scale)
    assert norms[1] == pytest.approx(norms[0], rel=0.02)


# ----- what changes nothing -----


def ones(images: Tensor, prompts: list[str]) -> Tensor:
    return torch.ones(len(images))


def ones_with_graph(images: Tensor, prompts: list[str]) -> Tensor:
    return images.mean((1, 2, 3)) * 0 + 1


@pytest.mark.parametrize("weighting", ["adaptive", "fixed"])
def test_rewards_that_say_nothing_leave_distribution_matching_as_it_is(
    weighting: str, base: Path, tmp_path: Path
) -> None:
    """Bit for bit: rewards with the weight 0 of every kind, and rewards with one value everywhere."""
    declare(ones, differentiable=True)
    declare(ones_with_graph, differentiable=True)
    settings = {"reward_weighting": weighting, "num_inference_steps": 2, "pathwise_steps": "any", "max_steps": 2}
    alone = trained_weights(run(base, tmp_path, "rdm", **settings))
    black_box = declare(lambda images, prompts: images.mean((1, 2, 3)).tolist(), __name__="black box")
    cases: list[tuple[list[Any], list[float]]] = [
        (["rdm", black_box, brightness(), StepAway()], [1.0, 0.0, 0.0, 0.0]),
        ([brightness(), "rdm"], [0.0, 1.0]),
        (["rdm", ones], [1.0, 2.0]),
        (["rdm", ones_with_graph], [1.0, 2.0]),
    ]
    for rewards, weights in cases:
        trainer = run(base, tmp_path, rewards, reward_weights=weights, **settings)
        assert not changed(alone, trained_weights(trainer)), rewards
        assert any(not push["rdm"].eq(0).all() for push in trainer.pushes)
    control = run(base, tmp_path, ["rdm", brightness()], reward_weights=[1.0, 0.5], **settings)
    assert changed(alone, trained_weights(control))


# ----- masks -----


def often_silent(images: Tensor, prompts: list[str], digit: list[int]) -> list[Tensor | None]:
    """The brightness of even digits; of odd ones it has no opinion."""
    return [image.mean() if number % 2 == 0 else None for image, number in zip(images, digit, strict=True)]


class MaskedByHand:
    """The same as an object with a direction of its own, which holds nonsense where it does not apply."""

    name = "often_silent"

    def bind(self, context: RewardContext) -> None:
        self.context = context

    def direction(self, rollout: Rollout, step: int, *, generator: Any) -> Direction:
        even = torch.tensor([number % 2 == 0 for number in rollout.batch.columns["digit"]])
        leaf = rollout.x_0[step].clone().requires_grad_()
        with torch.enable_grad():
            values = self.context.decoder.decode(leaf).mean((1, 2, 3))
        (slope,) = torch.autograd.grad(values.sum(), leaf)
        slope *= slope[0].numel()
        slope[~even] = 100.0
        return Direction(values=slope, applicable=even, rewards=values.detach().masked_fill(~even, torch.nan))


@pytest.mark.parametrize("weighting", ["adaptive", "fixed"])
def test_silence_about_a_sample_is_the_same_as_a_mask(weighting: str, base: Path, tmp_path: Path) -> None:
    settings = {
        "reward_weighting": weighting,
        "reward_weights": [1.0, 0.5 if weighting == "adaptive" else 1e4 / 256],
        "max_steps": 4,
        "per_device_train_batch_size": 8,
        "decode_batch_size": 8,
    }
    declare(often_silent, differentiable=True)
    trainers = [run(base, tmp_path, ["rdm", reward], **settings) for reward in (often_silent, MaskedByHand())]
    weights = [trained_weights(trainer) for trainer in trainers]
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], rtol=0, atol=1e-6)
    rows = [trainer.state.log_history for trainer in trainers]
    for one, two in zip(*rows, strict=True):
        for key in ("applicable", "mean", "std", "direction_rms", "cosine_to_rdm", "lambda", "frac_zero_std"):
            name = f"rewards/often_silent/{key}"
            assert one[name] == pytest.approx(two[name], rel=1e-4), name
        assert one["rewards/often_silent/faults"] == 0
    shares = [row["rewards/often_silent/applicable"] for row in rows[0]]
    assert 0 < sum(shares) / len(shares) < 1
    # The average force is that of the samples that it applies to, not half of it.
    one = trainers[0].directions[0]["often_silent"]
    force = one.values[one.applicable].square().mean().sqrt().item()
    assert rows[0][0]["rewards/often_silent/direction_rms"] == pytest.approx(force, rel=1e-5)
    assert changed(weights[0], trained_weights(run(base, tmp_path, "rdm", **{**settings, "reward_weights": None})))


# ----- cold start -----


def test_until_rewards_begin_distribution_matching_is_alone(base: Path, tmp_path: Path) -> None:
    settings = {"reward_weights": [1.0, 0.5], "max_steps": 3}
    alone = run(base, tmp_path, "rdm", max_steps=3)
    late = run(base, tmp_path, ["rdm", brightness()], reward_start_step=3, **settings)
    assert not changed(trained_weights(alone), trained_weights(late))
    assert [one["brightness"] for one in late.lambdas] == [0, 0, 0]
    begun = run(base, tmp_path, ["rdm", brightness()], reward_start_step=2, **settings)
    assert changed(trained_weights(alone), trained_weights(begun))
    # The reference is the average of the two updates before, with the average's own decay.
    forces = [one["rdm"].values.square().mean().sqrt().item() for one in begun.directions]
    reference = (0.95 * forces[0] + forces[1]) / 1.95
    own = [one["brightness"].values.square().mean().sqrt().item() for one in begun.directions]
    average = (0.95**2 * own[0] + 0.95 * own[1] + own[2]) / (0.95**2 + 0.95 + 1)
    assert begun.lambdas[2]["brightness"] == pytest.approx(0.5 * reference / average, rel=1e-5)


def test_the_reference_stays_or_follows(base: Path, tmp_path: Path) -> None:
    """The force of distribution matching is made to fall; the reward's follows it only if asked to."""
    pushes = {}
    for reference in ("cold_start", "online"):
        trainer = run(
            base,
            tmp_path,
            [Fading(), brightness()],
            reward_weights=[1.0, 0.5],
            adaptive_reference=reference,
            max_steps=6,
        )
        pushes[reference] = [one["brightness"].square().mean().sqrt().item() for one in trainer.pushes]
    assert pushes["cold_start"][0] == pytest.approx(pushes["online"][0], rel=1e-5)
    assert pushes["cold_start"][-1] == pytest.approx(pushes["cold_start"][0], rel=0.2)
    assert pushes["online"][-1] < 0.6 * pushes["online"][0]


class Fading:
    """Stands for distribution matching, under its name: a force that halves with every update, and a gap that grows."""

    name = "rdm"

    def __init__(self, gap: Sequence[float] = (0.1,)) -> None:
        self.gap = gap

    def direction(self, rollout: Rollout, step: int, *, generator: Any) -> Direction:
        x_0, update = rollout.x_0[step], rollout.batch.update
        return Direction(
            values=torch.full_like(x_0, 0.5**update),
            applicable=torch.ones(len(x_0), dtype=torch.bool),
            metrics={"gap": self.gap[min(update, len(self.gap) - 1)]},
        )


# ----- conflict and budget -----


def test_a_reward_that_opposes_is_projected(base: Path, tmp_path: Path) -> None:
    """The opponent has two parts: one against the other reward, and one across."""

    class Opponent:
        name = "opponent"

        def direction(self, rollout: Rollout, step: int, *, generator: Any) -> Direction:
            values = torch.full_like(rollout.x_0[step], -3.0)
            values[:, 0] += 1
            values[:, 1] -= 1
            values[0] *= -1  # With the first sample it agrees.
            return Direction(values=values, applicable=torch.ones(len(values), dtype=torch.bool))

    combined: dict[str, Tensor] = {}

    class Watching(RDMTrainer):
        def compute_policy_loss(self, experience: Experience) -> LossOutput:
            combined[self.args.reward_conflict] = self.weighting.combine(experience.directions).values
            return super().compute_policy_loss(experience)

    for conflict in ("keep", "project"):
        settings = {**QUICK, "max_steps": 1, "reward_weighting": "fixed", "reward_weights": [1.0, 0.5]}
        quick_trainer(
            base, tmp_path, [Fading(), Opponent()], kind=Watching, reward_conflict=conflict, **settings
        ).train()
    across = torch.zeros(4, 4, 8, 8)
    across[:, 0], across[:, 1] = 0.5, -0.5
    keep = 1 - 1.5 + across
    keep[0] = 1 + 1.5 - across[0]
    torch.testing.assert_close(combined["keep"], keep)
    torch.testing.assert_close(combined["project"][1:], (1 + across)[1:])
    torch.testing.assert_close(combined["project"][0], keep[0])


def test_the_budget_raises_and_lowers_the_rewards(base: Path, tmp_path: Path) -> None:
    gaps = [0.1, 0.1, 0.1, 0.1, 9.0, 9.0, 9.0]
    settings = {"reward_weighting": "budget", "reward_start_step": 2, "fidelity_budget": 1.5, "max_steps": len(gaps)}
    trainer = run(base, tmp_path, [Fading(gaps), StepAway()], reward_weights=[1.0, 0.5], **settings)
    found = [row["rewards/away/lambda"] for row in trainer.state.log_history]
    assert found[:2] == [0, 0]
    reference = (0.95 * 1.0 + 0.5) / 1.95
    factors = [one / (0.5 * reference) for one in found[2:]]
    up = math.exp(0.05)
    assert factors == pytest.approx([up, up**2, up, 1, 1 / up], rel=1e-5)


# ----- weighting of one's own -----


def test_own_weighting_sees_what_was_measured_and_decides(base: Path, tmp_path: Path) -> None:
    class Own(Weighting):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[tuple[int, DirectionStatistics]] = []

        def update(self, statistics: DirectionStatistics, step: int) -> None:
            self.seen.append((step, statistics))
            self.lambdas = {"away": 7.0}

        def combine(self, directions: Mapping[str, Direction]) -> Direction:
            one = directions["away"]
            return Direction(values=self.lambdas["away"] * one.values, applicable=one.applicable)

        def state_dict(self) -> dict[str, Any]:
            return {"steps": [step for step, _ in self.seen]}

        def load_state_dict(self, state: Mapping[str, Any]) -> None:
            self.seen = [(step, DirectionStatistics(rewards={})) for step in state["steps"]]

    own = Own()
    trainer = run(
        base,
        tmp_path,
        [StepAway(3.0), "rdm"],
        given={"weighting": own},
        gradient_accumulation_steps=2,
        save_strategy="steps",
        save_steps=2,
    )
    assert [step for step, _ in own.seen] == [0, 1], "once for each update, not for each micro-batch"
    assert own.seen[0][1].rms("away") == 3.0
    for row in trainer.state.log_history:
        assert row["policy/loss"] == pytest.approx(0.5 * 21**2)
        assert row["rewards/away/lambda"] == 7
    resumed = quick_trainer(
        base,
        tmp_path,
        [StepAway(3.0), "rdm"],
        given={"weighting": Own()},
        **{**QUICK, "max_steps": 3},
        gradient_accumulation_steps=2,
    )
    resumed.train(resume_from_checkpoint=True)
    assert [step for step, _ in resumed.weighting.seen] == [0, 1, 2]


def test_a_weighting_may_be_empty(base: Path, tmp_path: Path) -> None:
    class Counting(FixedWeighting):
        def __len__(self) -> int:
            return 0

    weighting = Counting({"away": 1.0})
    trainer = quick_trainer(base, tmp_path, StepAway(), given={"weighting": weighting}, **WITHOUT_RDM)
    assert trainer.weighting is weighting


# ----- cut and resumed runs -----


@pytest.mark.parametrize("weighting", ["adaptive", "budget"])
def test_a_resumed_run_is_the_uninterrupted_run(weighting: str, base: Path, tmp_path: Path) -> None:
    settings = {
        **QUICK,
        "reward_weighting": weighting,
        "reward_weights": [1.0, 0.5, 0.0, 0.3],
        "reward_start_step": 1,
        "reward_ramp_steps": 2,
        "reward_conflict": "project",
        "num_inference_steps": 2,
        "ema_decay": 0.9,
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "scale_rewards": "batch",
    }

    def make(folder: str, **given: Any) -> Any:
        declare(often_silent, differentiable=True)
        watched = declare(lambda images, prompts: images.amax((1, 2, 3)).tolist(), __name__="peak")
        rewards = ["rdm", often_silent, watched, brightness()]
        return quick_trainer(base, tmp_path / folder, rewards, kind=Pushing, given=given, **settings)

    whole, first, second = make("whole"), make("cut", callbacks=[StopAfter(2)]), make("cut")
    whole.train()
    first.train()
    assert first.state.global_step == 2
    second.train(resume_from_checkpoint=True)
    assert not changed(trained_weights(whole), trained_weights(second))
    assert changed(trained_weights(first), trained_weights(second))
    assert log_numbers(whole) == log_numbers(second)
    assert whole.lambdas[2:] == second.lambdas
    assert whole.weighting.state_dict() == second.weighting.state_dict() != first.weighting.state_dict()
    assert whole.reward_spreads == second.reward_spreads
    for one, two in zip(whole.directions[2:], second.directions, strict=True):
        for name in one:
            assert same(one[name].values, two[name].values)
    saved = [read_checkpoint(tmp_path / folder / "checkpoint-4")[:2] for folder in ("whole", "cut")]
    assert same(*saved)


def test_micro_batches_are_one_batch(base: Path, tmp_path: Path) -> None:
    declare(often_silent, differentiable=True)
    watched = declare(lambda images, prompts: images.amax((1, 2, 3)).tolist(), __name__="peak")
    settings = {"max_steps": 3, "reward_weights": [1.0, 0.5, 0.0], "ema_decay": 0, "optim": "sgd"}
    settings |= {"fake_score_learning_rate": 1.0}  # Else it is the teacher, and their difference is rounding.
    rewards = ["rdm", often_silent, watched]
    whole = run(base, tmp_path, rewards, per_device_train_batch_size=8, **settings)
    parts = run(base, tmp_path, rewards, per_device_train_batch_size=4, gradient_accumulation_steps=2, **settings)
    uneven = [one["often_silent"].applicable.float().mean() for one in parts.directions]
    assert len(set(map(float, uneven))) > 1, "the reward applies to more samples of one part than of the other"
    for one, two in zip(whole.lambdas, parts.lambdas[::2], strict=True):
        assert one == pytest.approx(two, rel=1e-5)
    assert parts.lambdas[::2] == parts.lambdas[1::2]
    for one, two in zip(whole.state.log_history, parts.state.log_history, strict=True):
        for name in one:
            if name.startswith("rewards/") and name != "rewards/rdm/gap":  # Which is a mean of the parts' ratios.
                assert one[name] == pytest.approx(two[name], rel=1e-4, abs=1e-5), name
    start = trained_weights(quick_trainer(base, tmp_path, rewards, **{**QUICK, **settings}))
    end, other = trained_weights(whole), trained_weights(parts)
    moved = changed(start, end)
    assert moved
    for name in moved:
        way = (end[name] - start[name]).norm()
        assert (other[name] - end[name]).norm() <= 1e-4 * way + 1e-9, name


def test_advantages_follow_scale_rewards(base: Path, tmp_path: Path) -> None:
    box = declare(lambda images, prompts: images.mean((1, 2, 3)).tolist(), __name__="box")
    for scale in ("group", "batch", "none"):
        seen: list[tuple[Tensor, Tensor]] = []

        class Watching(RDMTrainer):
            def compute_advantages(self, rollouts: Any, judgements: Any, statistics: Any, seen: Any = seen) -> Any:
                made = super().compute_advantages(rollouts, judgements, statistics)
                seen.append((judgements[0]["box"].rewards, made[0]["box"]))
                return made

        settings = {**QUICK, "num_inference_steps": 2, "num_replayed_steps": 2, "max_steps": 2, "scale_rewards": scale}
        trainer = quick_trainer(base, tmp_path, ["rdm", box], kind=Watching, **settings)
        trainer.train()
        rows = trainer.state.log_history
        spread = (0.95 * rows[0]["rewards/box/std"] + rows[1]["rewards/box/std"]) / 1.95
        rewards, advantages = seen[-1]
        expected = normalize_rewards(rewards, torch.tensor([0, 0, 1, 1]), scale, spread=spread)
        torch.testing.assert_close(advantages, expected, rtol=1e-5, atol=1e-6)
        assert advantages.abs().sum() > 0
        torch.testing.assert_close(advantages.view(2, 2).mean(1), torch.zeros(2), rtol=0, atol=1e-4)


# ----- methods -----


def test_methods_with_rewards() -> None:
    chosen = {name: RDMConfig.from_method(name, output_dir="out", use_cpu=True) for name in ("dmdr", "gndmr", "refl")}
    settings = {
        name: (one.dm_normalization, one.reward_weighting, one.fake_score_updates_per_policy_update)
        for name, one in chosen.items()
    }
    assert settings["dmdr"][:2] == ("sample", "fixed")
    assert settings["gndmr"][:2] == ("group_rms", "adaptive")
    assert settings["refl"][1:] == ("fixed", 0)
    own = RDMConfig.from_method("gndmr", output_dir="out", use_cpu=True, reward_weighting="budget")
    assert own.reward_weighting == "budget"


@pytest.mark.parametrize("method", ["dmdr", "gndmr"])
def test_a_method_is_its_settings(method: str, base: Path, tmp_path: Path) -> None:
    settings = {**method_settings(method), "reward_weights": [1.0, 0.5]}
    trainer = run(base, tmp_path, ["rdm", brightness()], max_steps=2, **settings)
    for lambdas, directions in zip(trainer.lambdas, trainer.directions, strict=True):
        if method == "dmdr":
            assert lambdas == {"rdm": 1.0, "brightness": 0.5}
        else:
            assert lambdas["brightness"] != 0.5
        assert directions["brightness"].applicable.all()


def test_refl_does_without_distribution_matching(base: Path, tmp_path: Path) -> None:
    settings = {**QUICK, **method_settings("refl"), "optim": "sgd", "learning_rate": 5e4, "max_grad_norm": 0}
    trainer = quick_trainer(base, tmp_path, brightness(), **settings, max_steps=5)
    assert trainer.args.fake_score_updates_per_policy_update == 0
    before, teacher = trained_weights(trainer), snapshot(trainer.networks.module("teacher"))
    trainer.train()
    moved = changed(before, trained_weights(trainer))
    assert moved
    assert all(name.startswith("policy/") for name in moved), "the fake score has not been trained"
    after = snapshot(trainer.networks.module("teacher"))
    assert all("lora_" in name for name in changed(teacher, after))
    rows = trainer.state.log_history
    assert not any(name.startswith(("fake_score/", "rdm/", "rewards/rdm")) for row in rows for name in row)
    assert all(row["rewards/brightness/lambda"] == 1 for row in rows)
    rollout = one_rollout(trainer)
    fresh = quick_trainer(base, tmp_path, brightness(), **WITHOUT_RDM)
    grey = [one.family.decode(one.generate_rollout(rollout.batch).sample).mean() for one in (fresh, trainer)]
    assert grey[1] > grey[0] + 1e-4, "the images became brighter"
    trainer.save_checkpoint()
    again = quick_trainer(base, tmp_path, brightness(), **{**settings, "max_steps": 6})
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 6


def test_refl_with_distribution_matching_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"fake_score_updates_per_policy_update=0\. Set it to 5"):
        quick_trainer(base, tmp_path, ["rdm", brightness()], **{**QUICK, **method_settings("refl")})
    with pytest.raises(ValueError, match="fake_score_warmup_steps"):
        RDMConfig.from_method("refl", output_dir="out", use_cpu=True, fake_score_warmup_steps=3)
