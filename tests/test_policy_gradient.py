"""Black-box rewards through the policy's likelihood, in the trainer: ratios, groups, the hybrid, refusals."""

import asyncio
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rdm_rl import RDMConfig, RDMTrainer
from rdm_rl.noise_schedule import FlowMatching
from rdm_rl.policy import make_sampler, student_times
from rdm_rl.records import Direction, Rollout
from rdm_rl.rewards.calling import RewardError
from rdm_rl.rewards.kinds import PathwiseReward, PolicyGradientReward, WatchedReward
from rdm_rl.trainers.methods import METHODS
from tests.helpers import (
    CHECKPOINTING,
    QUICK,
    WITHOUT_RDM,
    brightness,
    changed,
    declare,
    log_numbers,
    prompt_batch,
    quick_trainer,
    randomize,
    same,
    trained_weights,
)

PPO = {**WITHOUT_RDM, "num_inference_steps": 3, "reward_weighting": "fixed", "per_device_train_batch_size": 4}
HYBRID = {**QUICK, "num_inference_steps": 3}


def black_box(scale: float = 1.0, shift: float = 0.0, name: str = "box", **declarations: Any) -> Any:
    """A reward without a graph: the mean grey level, in other units."""

    def reward(images: Tensor, prompts: list[str]) -> list[float]:
        return (scale * images.detach().mean((1, 2, 3)) + shift).tolist()

    return declare(reward, __name__=name, **declarations)


def collected(trainer: RDMTrainer, number: int = 0) -> list[Any]:
    """The experiences of one rollout."""
    trainer._make_experiences([trainer.generate_rollout(one) for one in trainer.prompt_batches(number)], number)
    return trainer.experiences


# ----- the ratio on unchanged weights -----


@pytest.mark.parametrize(
    "settings",
    [
        {"importance_sampling_level": "sample"},
        {"sampler": "ddim", "eta": 0.6, "num_inference_steps": 4, "guidance_scale": 3.0},
        {"guidance_scale": 3.0, CHECKPOINTING: True, "importance_sampling_level": "sample"},
        {"group_noise": "shared", "noise_pool": 3},
    ],
    ids=["renoise", "ddim", "guided-checkpointing", "noise"],
)
@pytest.mark.parametrize("lora", [True, False])
def test_the_ratio_on_unchanged_weights_is_exactly_1(lora: bool, settings: dict, base: Path, tmp_path: Path) -> None:
    trainer = quick_trainer(
        base,
        tmp_path,
        [black_box()],
        given=None if lora else {"peft_config": None},
        **{**PPO, "num_replayed_steps": 8, **settings},
    )
    randomize(trainer.networks, scale=0.02)
    experiences = collected(trainer)
    steps = trainer.args.num_inference_steps
    assert sorted(one.step for one in experiences) == list(range(steps - 1)), "all random steps"
    for one in experiences:
        x_0 = trainer.replay_step(one.rollout, one.step).detach()
        seen = one.directions["box"].recorded.at(x_0)
        assert torch.equal(seen.log_ratio, torch.zeros(4))
        assert torch.equal(seen.values, one.directions["box"].values)
        assert seen.values.abs().max() > 0


@pytest.mark.parametrize("sampler, eta", [("cps", None), ("flow_sde", None), ("cps", 0.3), ("renoise", None)])
def test_flow_models_have_a_ratio_too(sampler: str, eta: float | None, base: Path, tmp_path: Path) -> None:
    trainer = quick_trainer(base, tmp_path, [black_box()], **{**PPO, "num_replayed_steps": 3})
    family = trainer.networks.family
    family.schedule, family.prediction_type = FlowMatching(), "flow"
    trainer.sampler, trainer.times = make_sampler(sampler, eta), student_times(3)
    experiences = collected(trainer)
    assert [one.step for one in experiences] in ([0, 1], [1, 0])
    for one in experiences:
        signal = one.directions["box"].recorded
        seen = signal.at(trainer.replay_step(one.rollout, one.step).detach())
        assert torch.equal(seen.log_ratio, torch.zeros(4))
        assert one.directions["box"].values.abs().max() > 0
        # The direction is the score of the drawn step, whatever the sampler.
        step, states = one.rollout.transitions[one.step], one.rollout.states
        error = states[one.step + 1] - step.mean(one.rollout.x_0[one.step], states[one.step])
        score = step.x_0_scale * error / step.std.square()
        expected = one.directions["box"].recorded.advantages[:, None, None, None] * score
        torch.testing.assert_close(one.directions["box"].values, expected)


class RolloutWithout(RDMTrainer):
    """The fault of the first release of ReDiF: guidance in one of the two only."""

    def generate_rollout(self, batch: Any) -> Rollout:
        asked, self.args.guidance_scale = self.args.guidance_scale, 1.0
        made = super().generate_rollout(batch)
        self.args.guidance_scale = asked
        return made


class ReplayWithout(RDMTrainer):
    def replay_step(self, rollout: Rollout, step: int) -> Tensor:
        asked, self.args.guidance_scale = self.args.guidance_scale, 1.0
        made = super().replay_step(rollout, step)
        self.args.guidance_scale = asked
        return made


class MovedBetween(RDMTrainer):
    def compute_directions(self, *arguments: Any) -> dict[str, Direction]:
        made = super().compute_directions(*arguments)
        randomize(self.networks, scale=0.1)
        return made


@pytest.mark.parametrize("level", ["dimension", "sample"])
@pytest.mark.parametrize("kind", [RolloutWithout, ReplayWithout, MovedBetween])
def test_a_policy_that_is_not_the_one_that_was_rolled_out_stops_the_run(
    kind: type[RDMTrainer], level: str, base: Path, tmp_path: Path
) -> None:
    settings = {**PPO, "guidance_scale": 5.0, "importance_sampling_level": level}
    trainer = quick_trainer(base, tmp_path, [black_box()], kind=kind, **settings)
    before = trained_weights(trainer)
    with pytest.raises(RuntimeError, match=r"log ratio of reward 'box' reaches .* guidance in only one of the two"):
        trainer.train()
    if kind is not MovedBetween:
        assert not changed(before, trained_weights(trainer)), "it stops before the first update"


def test_training_raises_a_black_box_reward(base: Path, tmp_path: Path) -> None:
    def reward(latents: Tensor, prompts: list[str]) -> list[float]:
        return latents.mean((1, 2, 3)).tolist()

    settings = {"max_steps": 12, "per_device_train_batch_size": 32, "num_generations": 16, "learning_rate": 2e-2}
    given = [declare(reward, __name__="box", inputs="latents")]
    trainer = quick_trainer(base, tmp_path, given, **{**PPO, **settings, "num_inference_steps": 2})

    def mean() -> float:
        batch = prompt_batch(32, trainer.family.encode(["the digit 3"] * 32))
        return trainer.sample_student(batch, generator=torch.Generator().manual_seed(3)).sample.mean().item()

    before = mean()
    trainer.train()
    assert mean() > before + 0.1


# ----- groups -----


@pytest.mark.parametrize(
    "scale_rewards, batch, generations, micro",
    [("group", 4, 4, 1), ("group", 4, 2, 3), ("none", 12, 3, 2), ("batch", 10, 5, 1), ("group", 2, 2, 4)],
)
def test_prompts_never_mix(
    scale_rewards: str, batch: int, generations: int, micro: int, base: Path, tmp_path: Path
) -> None:
    """Advantages of a group sum to 0 and stay as they are when another group's rewards change."""
    raise_digit: dict[str, float] = {}

    def reward(images: Tensor, prompts: list[str]) -> list[float]:
        values = [(0.618 * index) % 1 for index in range(len(prompts))]
        return [raise_digit.get(one, 0.0) * value + value for one, value in zip(prompts, values, strict=True)]

    trainer = quick_trainer(
        base,
        tmp_path,
        [declare(reward, __name__="box")],
        **{
            **PPO,
            "num_inference_steps": 2,
            "per_device_train_batch_size": batch,
            "num_generations": generations,
            "gradient_accumulation_steps": micro,
            "scale_rewards": scale_rewards,
        },
    )
    experiences = collected(trainer)
    batches = [one.rollout.batch for one in experiences]
    assert len(batches) == micro
    numbers = torch.cat([one.group_ids for one in batches])
    assert numbers.unique(return_counts=True)[1].tolist() == [generations] * (batch * micro // generations)
    for one in batches:
        for group in one.group_ids.unique():
            rows = (one.group_ids == group).nonzero().flatten().tolist()
            assert len({one.prompts[row] for row in rows}) == 1, "a group is one prompt"
            assert rows == list(range(rows[0], rows[0] + generations)), "neighbours"
    before = torch.cat([one.directions["box"].recorded.advantages for one in experiences]).view(-1, generations)
    torch.testing.assert_close(before.sum(1), torch.zeros(len(before)), rtol=0, atol=1e-5)
    assert before.abs().amax(1).min() > 0

    first = batches[0].prompts[0]
    raise_digit[first] = 10.0
    trainer.reward_spreads.clear()
    after = torch.cat([one.directions["box"].recorded.advantages for one in collected(trainer)]).view(-1, generations)
    texts = [text for one in batches for text in one.prompts][::generations]
    others = [row for row, text in enumerate(texts) if text != first]
    torch.testing.assert_close(after.sum(1), torch.zeros(len(after)), rtol=0, atol=1e-5)
    if others and scale_rewards != "batch":
        # A small share of the spread over the batch keeps a group's own away from 0.
        torch.testing.assert_close(after[others], before[others], rtol=0.01, atol=1e-6)
    if others and scale_rewards == "batch":
        shrunk = after[others] / before[others]
        torch.testing.assert_close(shrunk, shrunk[:1, :1].expand_as(shrunk), rtol=1e-4, atol=0)
        assert shrunk[0, 0] < 1
    if scale_rewards == "none":
        assert not torch.allclose(after[0], before[0])


@pytest.mark.parametrize("scale_rewards", ["batch", "none"])
def test_the_baseline_of_the_batch_does_not_depend_on_how_it_is_cut(
    scale_rewards: str, base: Path, tmp_path: Path
) -> None:
    made = []
    for batch, micro in ((8, 1), (2, 4)):
        trainer = quick_trainer(
            base,
            tmp_path / str(micro),
            [black_box()],
            **{
                **PPO,
                "num_inference_steps": 2,
                "per_device_train_batch_size": batch,
                "gradient_accumulation_steps": micro,
                "reward_baseline": "batch",
                "scale_rewards": scale_rewards,
            },
        )
        experiences = collected(trainer)
        advantage = torch.cat([one.directions["box"].recorded.advantages for one in experiences])
        rewards = torch.cat([trainer.compute_rewards(one.rollout, one.step)["box"].rewards for one in experiences])
        rewards = rewards.double()
        expected = rewards - rewards.mean()
        if scale_rewards == "batch":
            expected /= rewards.std(correction=0)
        torch.testing.assert_close(advantage, expected.float(), rtol=1e-3, atol=1e-6)
        assert advantage.view(4, 2).sum(1).abs().max() > 1e-4, "groups do have means of their own"
        made.append(advantage)
    torch.testing.assert_close(made[1], made[0], rtol=1e-3, atol=1e-4)


def test_one_generation_acts_against_the_batch(base: Path, tmp_path: Path) -> None:
    settings = {"num_generations": 1, "reward_baseline": "batch", "scale_rewards": "batch"}
    (one,) = collected(quick_trainer(base, tmp_path, [black_box()], **{**PPO, **settings}))
    assert one.directions["box"].recorded.advantages.sum().abs() < 1e-5
    assert one.directions["box"].values.abs().amax((1, 2, 3)).min() > 0


# ----- noise -----


def test_generations_may_share_their_noise(base: Path, tmp_path: Path) -> None:
    settings = {**PPO, "per_device_train_batch_size": 6, "num_generations": 3, "gradient_accumulation_steps": 2}
    trainer = quick_trainer(base, tmp_path, [black_box()], **settings, group_noise="shared")
    rollouts = [trainer.generate_rollout(one) for one in trainer.prompt_batches(0)]
    starts = torch.cat([one.states[0] for one in rollouts])
    groups = torch.cat([one.batch.group_ids for one in rollouts])
    assert len(groups.unique()) == 4
    for row in range(len(starts)):
        for other in range(row):
            assert torch.equal(starts[row], starts[other]) == bool(groups[row] == groups[other])
    samples = torch.cat([one.sample for one in rollouts])
    assert all(not torch.equal(one, other) for one, other in pairwise(samples)), "the steps draw their own noise"
    later = trainer.generate_rollout(next(trainer.prompt_batches(1)))
    assert not torch.equal(later.states[0][0], starts[0])


@pytest.mark.parametrize("shared", [True, False])
def test_noises_of_a_pool_come_again(shared: bool, base: Path, tmp_path: Path) -> None:
    settings = {**PPO, "noise_pool": 2, "group_noise": "shared" if shared else "own"}
    trainer = quick_trainer(base, tmp_path, [black_box()], **settings)
    seen: dict[int, Tensor] = {}
    of_prompts: dict[str, set[int]] = {}
    for number in range(24):
        (batch,) = trainer.prompt_batches(number)
        rollout = trainer.generate_rollout(batch)
        for prompt, seed, state in zip(batch.prompts, batch.noise_seeds, rollout.states[0], strict=True):
            assert torch.equal(seen.setdefault(seed, state), state)
            of_prompts.setdefault(prompt, set()).add(seed)
        if shared:
            assert batch.noise_seeds[0] == batch.noise_seeds[1]
            assert batch.noise_seeds[2] == batch.noise_seeds[3]
    assert {len(seeds) for seeds in of_prompts.values()} <= {1, 2}
    assert len(seen) == sum(map(len, of_prompts.values())) > len(of_prompts), "a noise belongs to one prompt"
    states = list(seen.values())
    assert not any(torch.equal(states[0], other) for other in states[1:])


def test_own_noise_is_that_of_the_samples_generators(base: Path, tmp_path: Path) -> None:
    """As before there were pools: drawn first, from the generator that draws the steps' noise, too."""
    trainer = quick_trainer(base, tmp_path, ["rdm"], **HYBRID)
    (batch,) = trainer.prompt_batches(3)
    assert batch.noise_seeds is None
    rollout = trainer.generate_rollout(batch)
    generators = trainer.generators("rollout", batch)
    first = torch.stack([torch.randn(4, 8, 8, generator=one) for one in generators])
    second = torch.stack([torch.randn(4, 8, 8, generator=one) for one in generators])
    assert torch.equal(rollout.states[0], first)
    assert torch.equal(rollout.states[1], trainer.family.schedule.perturb(rollout.x_0[0], second, rollout.times[1]))


# ----- the hybrid -----


@pytest.fixture(scope="module")
def hybrid(base: Path, tmp_path_factory: pytest.TempPathFactory) -> RDMTrainer:
    """A run with all three kinds, one replayed step in each update."""
    settings = {**HYBRID, "max_steps": 6, "logging_steps": 1}

    class Recording(RDMTrainer):
        def compute_rewards(self, rollout: Rollout, step: int) -> dict[str, Direction]:
            self.steps = [*getattr(self, "steps", []), step]
            return super().compute_rewards(rollout, step)

    rewards = ["rdm", black_box(), brightness()]
    trainer = quick_trainer(base, tmp_path_factory.mktemp("hybrid"), rewards, kind=Recording, **settings)
    trainer.train()
    return trainer


def test_each_kind_acts_on_its_steps(hybrid: RDMTrainer) -> None:
    kinds = [type(one) for one in hybrid.rewards.values()]
    assert kinds[1:] == [PolicyGradientReward, PathwiseReward]
    rows = hybrid.state.log_history
    assert set(hybrid.steps) == {0, 1, 2}
    for step, row in zip(hybrid.steps, rows, strict=True):
        assert row["rewards/rdm/acted"] == 1
        assert row["rewards/box/acted"] == (step < 2)
        assert row["rewards/brightness/acted"] == (step == 2)
        assert ("rewards/box/log_ratio_max" in row) == (step < 2)
        if step < 2:
            assert row["rewards/box/log_ratio_min"] == row["rewards/box/log_ratio_max"] == 0
            assert row["rewards/box/effective_sample_size"] == pytest.approx(1)
            assert row["rewards/box/clip_fraction"] == 0


def count_of(rewards: list[Any], base: Path, folder: Path, **settings: Any) -> tuple[int, RDMTrainer]:
    """How often the reward 'box' is asked in a run."""
    calls = []
    original = next(one for one in rewards if getattr(one, "__name__", "") == "box")

    def counting(images: Tensor, prompts: list[str]) -> Any:
        calls.append(len(prompts))
        return original(images, prompts)

    given = [declare(counting, __name__="box") if one is original else one for one in rewards]
    trainer = quick_trainer(base, folder, given, **settings)
    trainer.train()
    return len(calls), trainer


def test_a_black_box_is_asked_only_if_its_answer_is_used(base: Path, tmp_path: Path) -> None:
    """An answer nobody waits for still runs, beside the next one, and its faults are lost."""
    calls, trainer = count_of(["rdm", black_box()], base, tmp_path, **{**HYBRID, "max_steps": 6})
    acted = sum(row["rewards/box/acted"] for row in trainer.state.log_history)
    assert 0 < acted < 6
    assert calls == acted


def test_a_black_box_is_asked_once_for_a_rollout(base: Path, tmp_path: Path) -> None:
    settings = {**PPO, "num_replayed_steps": 2, "gradient_accumulation_steps": 2, "max_steps": 2}
    calls, _ = count_of([black_box()], base, tmp_path, **settings)
    assert calls == 2 * 2


def test_units_of_a_black_box_do_not_matter(base: Path, tmp_path: Path) -> None:
    """Powers of two, so that only what is not scale-free could change a bit."""
    rows = {}
    for scale in (1.0, 1024.0):
        trainer = quick_trainer(
            base,
            tmp_path / str(scale),
            ["rdm", black_box(scale)],
            **{**HYBRID, "num_inference_steps": 2, "num_replayed_steps": 2, "max_steps": 2},
        )
        trainer.train()
        rows[scale] = trained_weights(trainer), trainer.state.log_history
    for name, weight in rows[1.0][0].items():
        torch.testing.assert_close(rows[1024.0][0][name], weight, rtol=1e-5, atol=1e-6)
    for one, other in zip(rows[1.0][1], rows[1024.0][1], strict=True):
        assert other["rewards/box/mean"] == pytest.approx(1024 * one["rewards/box/mean"])
        assert other["rewards/box/lambda"] == pytest.approx(one["rewards/box/lambda"], rel=1e-4)


def test_silence_about_a_third_of_the_samples(base: Path, tmp_path: Path) -> None:
    def reward(images: Tensor, prompts: list[str]) -> list[float | None]:
        values = images.detach().mean((1, 2, 3)).tolist()
        return [None if index % 3 == 2 else value for index, value in enumerate(values)]

    settings = {"per_device_train_batch_size": 12, "num_generations": 6}
    trainer = quick_trainer(base, tmp_path, [declare(reward, __name__="box")], **{**PPO, **settings})
    (one,) = collected(trainer)
    direction = one.directions["box"]
    silent = torch.arange(12) % 3 == 2
    assert torch.equal(direction.applicable, ~silent)
    rewards = trainer.compute_rewards(one.rollout, one.step)["box"].rewards
    assert torch.equal(rewards.isnan(), silent)
    assert direction.recorded.advantages[silent].abs().max() == 0
    assert direction.values[silent].abs().max() == 0
    values = rewards.view(2, 6)[:, [0, 1, 3, 4]]
    expected = (values - values.mean(1, keepdim=True)) / values.std(1, correction=0, keepdim=True)
    torch.testing.assert_close(
        direction.recorded.advantages.view(2, 6)[:, [0, 1, 3, 4]], expected, rtol=2e-3, atol=1e-3
    )
    trainer = quick_trainer(base, tmp_path, [declare(reward, __name__="box")], **{**PPO, **settings})
    trainer.train()
    assert trainer.state.log_history[0]["rewards/box/applicable"] == pytest.approx(2 / 3)


def test_silence_about_all_samples(base: Path, tmp_path: Path) -> None:
    """An update without any value is an update without that reward; the run goes on."""

    def reward(images: Tensor, prompts: list[str]) -> list[None]:
        return [None] * len(prompts)

    settings = {**HYBRID, "num_inference_steps": 2, "num_replayed_steps": 2}
    with_it = quick_trainer(base, tmp_path / "with", ["rdm", declare(reward, __name__="box")], **settings)
    with_it.train()
    without = quick_trainer(base, tmp_path / "without", ["rdm"], **settings)
    without.train()
    assert same(trained_weights(with_it), trained_weights(without))


def test_faults_are_counted_once(base: Path, tmp_path: Path) -> None:
    def reward(images: Tensor, prompts: list[str]) -> list[float]:
        values = images.detach().mean((1, 2, 3)).tolist()
        return [float("nan") if index == 1 else value for index, value in enumerate(values)]

    settings = {**PPO, "num_replayed_steps": 2, "on_reward_error": "skip", "num_generations": 4, "max_steps": 1}
    trainer = quick_trainer(base, tmp_path, [declare(reward, __name__="box")], **settings)
    trainer.train()
    assert trainer.state.log_history[0]["rewards/box/faults"] == 1
    strict = quick_trainer(
        base, tmp_path, [declare(reward, __name__="box")], **{**settings, "on_reward_error": "raise"}
    )
    with pytest.raises(RewardError, match="box"):
        strict.train()


def test_an_asynchronous_black_box_is_the_same_reward(base: Path, tmp_path: Path) -> None:
    async def reward(images: Tensor, prompts: list[str]) -> list[float]:
        await asyncio.sleep(0.001)
        return images.detach().mean((1, 2, 3)).tolist()

    made = []
    for index, one in enumerate([declare(reward, __name__="box"), black_box()]):
        trainer = quick_trainer(base, tmp_path / str(index), [one], **PPO)
        trainer.train()
        made.append((trained_weights(trainer), log_numbers(trainer)))
    assert same(*made)


def test_a_black_box_that_hangs_is_given_up(base: Path, tmp_path: Path) -> None:
    async def reward(images: Tensor, prompts: list[str]) -> list[float]:
        if images.requires_grad or "7" in "".join(prompts):
            return images.mean((1, 2, 3)).tolist()
        await asyncio.sleep(60)
        return []

    settings = {**PPO, "reward_timeout": 0.3, "max_steps": 1}
    trainer = quick_trainer(base, tmp_path, [declare(reward, __name__="box")], **settings)
    with pytest.raises(RewardError, match=r"no answer within 0\.3 seconds"):
        trainer.train()


def test_differentiable_rewards_as_black_boxes(base: Path, tmp_path: Path) -> None:
    """The values are the same; what acts is their likelihood gradient."""
    made = []
    for index, settings in enumerate(({}, {"reward_gradient": "score_function"})):
        reward = brightness(name="box") if settings else black_box()
        trainer = quick_trainer(base, tmp_path / str(index), [reward], **{**PPO, **settings})
        trainer.train()
        assert isinstance(trainer.rewards["box"], PolicyGradientReward)
        made.append((trained_weights(trainer), log_numbers(trainer)))
    assert same(*made)


def test_a_factor_for_each_step(base: Path, tmp_path: Path) -> None:
    settings = {**PPO, "num_inference_steps": 4, "num_replayed_steps": 3}
    plain = collected(quick_trainer(base, tmp_path / "plain", [black_box()], **settings))
    weighted = collected(quick_trainer(base, tmp_path / "std", [black_box()], **settings, step_weighting="std"))
    spreads = torch.stack([one.std for one in plain[0].rollout.transitions])
    assert len(spreads.unique()) == 3
    for one, other in zip(plain, weighted, strict=True):
        assert one.step == other.step
        factor = spreads[one.step] / spreads.mean()
        torch.testing.assert_close(other.directions["box"].values, factor * one.directions["box"].values)


# ----- the divergence from the start -----


@pytest.mark.parametrize("level", ["dimension", "sample"])
def test_beta_pulls_back_to_the_start(level: str, base: Path, tmp_path: Path) -> None:
    trainer = quick_trainer(
        base, tmp_path, [black_box()], **{**PPO, "beta": 0.5, "importance_sampling_level": level, "max_steps": 1}
    )
    randomize(trainer.networks, scale=0.02)
    start = {name: value.clone() for name, value in trainer.networks.state_dict("policy").items()}
    trainer.train()
    assert trainer.state.log_history[0]["policy/kl"] == 0
    (one,) = collected(trainer, 1)
    parameters = trainer.networks.parameters("policy")
    moved = {name: value.clone() for name, value in trainer.networks.state_dict("policy").items()}

    def gradients(loss: Tensor) -> list[Tensor]:
        return [value.clone() for value in torch.autograd.grad(loss, parameters, allow_unused=False)]

    with_beta = trainer.compute_policy_loss(one)
    assert same(moved, {name: value.clone() for name, value in trainer.networks.state_dict("policy").items()})
    got = gradients(with_beta.loss)
    reference, trainer.reference = trainer.reference, None
    without = gradients(trainer.compute_policy_loss(one).loss)
    trainer.reference = reference

    trainer.networks.load_state_dict("policy", start)
    with torch.no_grad():
        at_start = trainer.replay_step(one.rollout, one.step)
    trainer.networks.load_state_dict("policy", moved)
    x_0, step = trainer.replay_step(one.rollout, one.step), one.rollout.transitions[one.step]
    squares = (step.x_0_scale / step.std).square() * (x_0 - at_start).square().flatten(1) / 2
    divergence = (squares.mean(1) if level == "dimension" else squares.sum(1)).mean()
    assert with_beta.metrics["kl"] == pytest.approx(divergence.item(), rel=1e-4)
    assert divergence > 0
    for mine, plain, pull in zip(got, without, gradients(divergence), strict=True):
        torch.testing.assert_close(mine - plain, 0.5 * pull, rtol=2e-3, atol=1e-3 * pull.abs().max().item() + 1e-9)


def test_beta_acts_or_is_refused_with_a_pathwise_reward(base: Path, tmp_path: Path) -> None:
    settings = {**PPO, "beta": 0.5, "max_steps": 3}
    try:
        trainer = quick_trainer(base, tmp_path, [brightness()], **settings)
    except ValueError as error:
        assert "beta" in str(error)
        return
    trainer.train()
    assert any("policy/kl" in row for row in trainer.state.log_history)


# ----- what is refused -----


@pytest.mark.parametrize(
    ("rewards", "settings", "message"),
    [
        (
            [black_box()],
            {"num_inference_steps": 1},
            "'box' is a black box: .* num_inference_steps=1, .* no random step",
        ),
        (
            [black_box()],
            {"sampler": "ddim", "eta": 0.0},
            r"'box' is a black box: .* sampler='ddim' and eta=0.0 leave no random step .* eta above 0",
        ),
        (
            [brightness()],
            {"num_inference_steps": 1, "reward_gradient": "score_function"},
            "'brightness' is a black box: it acts through the likelihood",
        ),
        ([black_box()], {"num_generations": 1}, "num_generations=1: .* 'box' .* every advantage would be 0"),
        (["rdm"], {"guidance_scale": 2.0}, "guidance_scale=2.0 gives the policy guidance of its own"),
        (
            [brightness()],
            {"guidance_scale": 3.0, "warm_start": "ode"},
            "guidance_scale=3.0 asks the policy with guidance, but the warm",
        ),
        (["rdm"], {"epsilon": 0.1}, "epsilon is set, but no black-box reward acts"),
        ([brightness()], {"epsilon_high": 0.1}, "epsilon_high is set, but no black-box"),
        (["rdm"], {"advantage_clip": 2.0}, "advantage_clip is set, but no black-box"),
        (["rdm"], {"step_weighting": "std"}, "step_weighting is set, but no black-box"),
        (["rdm"], {"reward_baseline": "batch", "scale_rewards": "none"}, "reward_baseline is set, but no black-box"),
        (
            ["rdm", black_box()],
            {"reward_weights": [1.0, 0.0], "epsilon": 0.1},
            "epsilon is set, but no black-box reward acts in this run",
        ),
        (
            ["rdm"],
            {"importance_sampling_level": "sample"},
            "importance_sampling_level='sample' is set, but .* no likeli",
        ),
        ([black_box()], {"teacher_cache_dir": "somewhere"}, "teacher_cache_dir='somewhere' is set, but no reward asks"),
    ],
)
def test_what_cannot_act_is_refused(
    rewards: list[Any], settings: dict, message: str, tmp_path: Path, base: Path
) -> None:
    basis = QUICK if "rdm" in rewards else WITHOUT_RDM
    with pytest.raises(ValueError, match=message):
        quick_trainer(base, tmp_path, rewards, **{**basis, "num_inference_steps": 3, **settings})


@pytest.mark.parametrize("method", ["ddpo", "redif", "hybrid"])
def test_methods_of_the_policy_gradient_train(method: str, base: Path, tmp_path: Path) -> None:
    full = RDMConfig.from_method(method, output_dir=str(tmp_path), use_cpu=True)
    for name, value in METHODS[method][1].items():
        assert getattr(full, name) == value
    small = {"num_inference_steps": 4, "num_replayed_steps": 2, "max_steps": 2, "warm_start": "none"}
    settings = {**METHODS[method][1], **small, "fake_score_warmup_steps": 0}
    rewards = ["rdm", black_box(), brightness()] if method == "hybrid" else [black_box()]
    if method == "hybrid":
        settings["fake_score_updates_per_policy_update"] = 1
    trainer = quick_trainer(base, tmp_path, rewards, **settings)
    before = trained_weights(trainer)
    trainer.train()
    moved = {name.split("/")[0] for name in changed(before, trained_weights(trainer))}
    assert moved == ({"policy", "fake_score"} if method == "hybrid" else {"policy"})
    assert len(trainer.state.log_history) == 2


def test_a_watched_black_box_needs_nothing(base: Path, tmp_path: Path) -> None:
    settings = {**QUICK, "reward_weights": [1.0, 0.0], "num_generations": 1}
    trainer = quick_trainer(base, tmp_path, ["rdm", black_box()], **settings)
    assert isinstance(trainer.rewards["box"], WatchedReward)
    trainer.train()
    assert trainer.state.log_history[0]["rewards/box/acted"] == 0
