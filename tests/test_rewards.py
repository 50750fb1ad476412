"""The registry, and distribution matching as a registered reward."""

from pathlib import Path

import pytest
import torch

from rdm_rl.data_types import DenseAdvantage, Rollout
from rdm_rl.randomness import normal, seeded_generators
from rdm_rl.rdm import distribution_matching
from rdm_rl.renoise import group_times
from rdm_rl.rewards import get_reward, list_rewards, register_reward
from rdm_rl.rewards.rdm import DistributionMatchingReward
from rdm_rl.rewards.registry import load_rewards, reward_weights, unregister_reward
from rdm_rl.trainers.rdm_trainer import RDMTrainer
from tests.helpers import StepAway, randomize, tiny_trainer


@pytest.fixture
def registered() -> str:
    register_reward("away")(StepAway)
    yield "away"
    unregister_reward("away")


def test_rdm_is_registered() -> None:
    assert "rdm" in list_rewards()
    assert isinstance(get_reward("rdm"), DistributionMatchingReward)
    assert get_reward("rdm") is not get_reward("rdm")


def test_own_reward_is_registered_once(registered: str) -> None:
    assert registered in list_rewards()
    assert isinstance(get_reward(registered), StepAway)
    with pytest.raises(ValueError, match="'away' is already registered"):
        register_reward("away")(StepAway)
    with pytest.raises(ValueError, match="'rdm' is already registered"):
        register_reward("rdm")(StepAway)


def test_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"No reward is named 'rmd'\. Did you mean 'rdm'\?"):
        get_reward("rmd")
    with pytest.raises(ValueError, match="rdm-rl rewards list"):
        get_reward("zzzz")


def test_own_rewards_only_can_be_removed() -> None:
    with pytest.raises(KeyError):
        unregister_reward("rdm")


def test_names_and_objects_are_resolved_in_order(registered: str) -> None:
    reward = StepAway(name="other")
    resolved = load_rewards([registered, reward, "rdm"])
    assert list(resolved) == ["away", "other", "rdm"]
    assert resolved["other"] is reward
    assert list(load_rewards("rdm")) == ["rdm"]
    assert list(load_rewards(reward)) == ["other"]


@pytest.mark.parametrize(
    ("specs", "error", "message"),
    [
        ([], ValueError, "reward_funcs is empty"),
        (["rdm", "rdm"], ValueError, "names 'rdm' twice"),
        ([object()], TypeError, "neither a name, nor a callable"),
        ("rmd", ValueError, "Did you mean 'rdm'"),
    ],
)
def test_what_is_no_reward_is_refused(specs: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        load_rewards(specs)


def test_weights_of_rewards() -> None:
    assert reward_weights(["rdm", "away"], [1.0, 0.0]) == {"rdm": 1.0, "away": 0.0}
    assert reward_weights(["rdm", "away"], None) == {"rdm": 1.0, "away": 1.0}
    with pytest.raises(ValueError, match=r"1 entries for 2 rewards \(rdm, away\)"):
        reward_weights(["rdm", "away"], [1.0])


def test_rdm_without_networks_says_so(base: Path, tmp_path: Path) -> None:
    rollout = one_rollout(tiny_trainer(base, tmp_path))
    with pytest.raises(RuntimeError, match="needs the networks"):
        DistributionMatchingReward().direction(rollout, 0, generator=torch.Generator())


def one_rollout(trainer: RDMTrainer) -> Rollout:
    return trainer.generate_rollout(next(trainer.prompt_batches(0)))


def ask(trainer: RDMTrainer, rollout: Rollout, step: int = 1) -> DenseAdvantage:
    generator = seeded_generators(0, "reward", 0, rollout.batch.sample_ids)
    return trainer.rewards["rdm"].direction(rollout, step, generator=generator)


@pytest.mark.parametrize("settings", [{}, {"num_renoise": 3, "dm_group": "prompt_renoise", "dm_scale_floor": 0.1}])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_rdm_follows_the_settings(settings: dict, guidance: float, base: Path, tmp_path: Path) -> None:
    """The reward is `distribution_matching` with the run's settings and draws made here in the documented order."""
    trainer = tiny_trainer(
        base,
        tmp_path,
        renoise_range=[0.3, 0.4],
        renoise_distribution="beta",
        teacher_guidance_scale=guidance,
        **settings,
    )
    randomize(trainer.networks)
    rollout = one_rollout(trainer)
    groups, generator = rollout.batch.group_ids, seeded_generators(0, "reward", 0, rollout.batch.sample_ids)
    times, noise = [], []
    for _ in range(settings.get("num_renoise", 1)):
        times.append(group_times(groups, generator, distribution="beta", interval=(0.3, 0.4)))
        noise.append(normal(rollout.x_0[1].shape, generator))
    assert len(torch.stack(times).unique()) == len(times) * 2  # One for each group and each re-noising.
    expected = distribution_matching(
        rollout.x_0[1],
        rollout.batch.conditioning,
        groups,
        teacher=trainer.networks.predictor("teacher", guidance),
        fake_score=trainer.networks.predictor("fake_score"),
        schedule=trainer.family.schedule,
        t=torch.stack(times),
        noise=torch.stack(noise),
        group=settings.get("dm_group", "prompt"),
        scale_floor=settings.get("dm_scale_floor", 1e-6),
    )
    direction = ask(trainer, rollout)
    assert torch.equal(direction.values, expected.values)
    assert direction.values.abs().sum() > 0
    assert not direction.values.requires_grad


def test_guidance_of_the_family_is_the_default(base: Path, tmp_path: Path) -> None:
    default = tiny_trainer(base, tmp_path, teacher_guidance_scale=None)
    published = tiny_trainer(base, tmp_path, teacher_guidance_scale=default.family.teacher_guidance_scale)
    rollout = one_rollout(default)
    assert torch.equal(ask(default, rollout).values, ask(published, rollout).values)
    assert default.teacher_guidance_scale == 1.75


def test_annealing_follows_the_run(base: Path, tmp_path: Path) -> None:
    trainer = tiny_trainer(base, tmp_path, renoise_distribution="annealed_beta", renoise_anneal_steps=10)
    randomize(trainer.networks)
    rollout = one_rollout(trainer)
    start = ask(trainer, rollout)
    trainer.state.global_step = 10
    end = ask(trainer, rollout)
    uniform = tiny_trainer(base, tmp_path)
    randomize(uniform.networks)
    assert torch.equal(end.values, ask(uniform, rollout).values)
    assert not torch.equal(start.values, end.values)
