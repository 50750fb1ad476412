"""The updates of published methods, whose losses are written here from their formulas, on tensors of real sizes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rdm_rl import RDMTrainer
from rdm_rl.rdm import policy_loss
from rdm_rl.records import Direction, Rollout
from rdm_rl.trainers.methods import method_settings
from tests.helpers import QUICK, declare, latents, one_rollout, quick_trainer

SDXL = (4, 128, 128)


def smooth(x_0: Tensor) -> Tensor:
    return (x_0 * torch.linspace(-1, 1, x_0.shape[-1])).mean((1, 2, 3)) * 8


def small(x_0: Tensor) -> Tensor:
    return 1.2 - x_0.square().mean((1, 2, 3)) / 2


def hinged(reward: Any) -> Any:
    """DMDR's loss of a reward, relu(0.7 - r), as a reward."""
    return declare(
        lambda x_0, prompts: -(0.7 - reward(x_0)).relu(),
        **{"differentiable": True, "inputs": "latents", "__name__": reward.__name__},
    )


def trainer_of(
    base: Path, tmp_path: Path, method: str, rewards: list[Any], **settings: Any
) -> tuple[RDMTrainer, Rollout]:
    """A trainer of the method, and a rollout whose predictions have the size of SDXL's."""
    settings = {**QUICK, **method_settings(method), "num_inference_steps": 2, **settings}
    trainer = quick_trainer(base, tmp_path, rewards, **settings)
    rollout = one_rollout(trainer)
    x_0 = latents(2, len(rollout.batch.prompts), *SDXL)
    return trainer, replace(rollout, x_0=x_0, states=x_0, transitions=())


def descent(trainer: RDMTrainer, x_0: Tensor, directions: dict[str, Direction]) -> Tensor:
    """The gradient of our loss at the predictions."""
    x_0 = x_0.clone().requires_grad_()
    policy_loss(x_0, trainer.weighting.combine(directions)).loss.backward()
    return x_0.grad


@pytest.mark.parametrize("weights", [[1.0, 0.5], [1.0, 0.5, 0.5]])
def test_dmdr_makes_dmdrs_update(weights: list[float], base: Path, tmp_path: Path) -> None:
    rewards = [smooth, small][: len(weights) - 1]
    trainer, rollout = trainer_of(base, tmp_path, "dmdr", ["rdm", *map(hinged, rewards)], reward_weights=weights)
    x_0 = rollout.x_0[0]  # A step that is not the last: DMDR's rewards act on any.
    real, fake = latents(*x_0.shape, seed=1), latents(*x_0.shape, seed=2)
    matched = trainer.compute_distribution_matching(x_0, real, fake, torch.ones(len(x_0)), rollout.batch.group_ids)
    directions = {"rdm": Direction(values=matched, applicable=torch.ones(len(x_0), dtype=torch.bool))}
    for name in [reward.__name__ for reward in rewards]:
        directions[name] = trainer.rewards[name].judge(rollout, 0, generator=torch.Generator()).direction

    theirs = x_0.clone().requires_grad_()
    gradient = (fake - real) / (x_0 - real).abs().mean((1, 2, 3), keepdim=True)
    loss = 0.5 * (theirs - (x_0 - gradient)).square().mean()
    for reward in rewards:
        loss = loss + 0.5 * (0.7 - reward(theirs)).relu().mean()
    loss.backward()
    ours = descent(trainer, x_0, directions)
    assert (ours - theirs.grad).norm() < 1e-6 * theirs.grad.norm()
    distribution_matching_alone = descent(trainer, x_0, {"rdm": directions["rdm"]})
    assert (distribution_matching_alone - theirs.grad).norm() > 1e-3 * theirs.grad.norm(), "the rewards have a say"


def test_refl_descends_the_mean_of_minus_the_reward(base: Path, tmp_path: Path) -> None:
    trainer, rollout = trainer_of(base, tmp_path, "refl", [hinged(small)])
    x_0 = rollout.x_0[-1]
    direction = trainer.rewards["small"].judge(rollout, 1, generator=torch.Generator()).direction
    theirs = x_0.clone().requires_grad_()
    (0.7 - small(theirs)).relu().mean().backward()
    assert (descent(trainer, x_0, {"small": direction}) - theirs.grad).norm() < 1e-6 * theirs.grad.norm()


@pytest.mark.parametrize("weight", [1.0, -1.0])
@pytest.mark.parametrize("level", ["dimension", "sample"])
def test_ppo_with_a_weight_of_either_sign(weight: float, level: str, base: Path, tmp_path: Path) -> None:
    """A weight of -1 for a reward is a weight of 1 for minus the reward, in PPO's clipped loss as well."""

    def box(images: Tensor, prompts: list[str]) -> list[float]:
        return [0.0] * len(images)

    settings = {**QUICK, **method_settings("ddpo"), "num_inference_steps": 2, "guidance_scale": 1.0}
    settings |= {"num_iterations": 2, "num_replayed_steps": 1, "importance_sampling_level": level}
    trainer = quick_trainer(base, tmp_path, box, **settings, reward_weights=[weight])
    rollout, reward = one_rollout(trainer), trainer.rewards["box"]
    advantages = torch.tensor([1.0, -1.0]).repeat(len(rollout.batch.prompts) // 2)
    judgement = reward.judge(rollout, 0, generator=torch.Generator())
    direction = reward.direction(rollout, 0, judgement, advantages)

    # Two samples become likelier and two less likely, each by more than the clip allows.
    low, high = trainer.args.clip_range
    transition, x_0 = rollout.transitions[0], rollout.x_0[0]
    error = rollout.states[1] - transition.mean(x_0, rollout.states[0])
    towards = torch.tensor([1.0, 1.0, -1.0, -1.0]).repeat(len(x_0) // 4).view(-1, 1, 1, 1)
    factor = {"dimension": 1.0, "sample": x_0[0].numel()}[level]
    moved = (x_0 + towards * error * 3 * high / factor / transition.x_0_scale).requires_grad_()
    log_rho = error.square() - (rollout.states[1] - transition.mean(moved, rollout.states[0])).square()
    log_rho = log_rho.flatten(1).sum(1) / (2 * transition.std**2) * factor / x_0[0].numel()
    rho, signed = log_rho.exp(), weight * advantages
    loss = -torch.minimum(rho * signed, rho.clamp(1 - low, 1 + high) * signed).mean()
    loss.backward()
    assert (moved.grad.flatten(1).norm(dim=1) == 0).sum() == len(x_0) // 2, "half of them are clipped"

    now = replace(direction, values=direction.recorded.at(moved.detach()).values)
    ours = descent(trainer, moved.detach(), {"box": now})
    assert (ours - moved.grad).norm() < 1e-3 * moved.grad.norm()
