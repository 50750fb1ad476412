"""Likelihood ratios and what follows from them: the clipped policy gradient, the reuse of rollouts, the divergence."""

import math

import pytest
import torch
from torch import Tensor

from rdm_rl.noise_schedule import append_dims
from rdm_rl.policy import kl_divergence, log_ratio, over_dimensions
from rdm_rl.ratio import (
    RATIO_TOLERANCE,
    RecordedDistributionMatching,
    RecordedPolicyGradient,
    at_recorded,
    check_unmoved,
    ratio_metrics,
)
from rdm_rl.rdm import normalize_rewards, policy_gradient, policy_loss
from rdm_rl.records import Direction, Reweighted, Transition
from tests.helpers import latents

SHAPE = (2, 3, 3)
SIZE = math.prod(SHAPE)
LEVELS = ["dimension", "sample"]


def transition(a: float = 0.9, b: float = 0.4, s: float = 0.3) -> Transition:
    scales = (torch.tensor(one, dtype=torch.float64) for one in (a, b, s))
    return Transition(**dict(zip(("x_0_scale", "state_scale", "std"), scales, strict=True)))


def drawn(count: int, step: Transition) -> tuple[Tensor, Tensor, Tensor]:
    """The old prediction, the state, and a next state drawn from the old policy, in float64."""
    old, state = latents(count, *SHAPE).double(), latents(count, *SHAPE, seed=1).double()
    return old, state, step.mean(old, state) + step.std * latents(count, *SHAPE, seed=2).double()


def moved(old: Tensor, error: Tensor, step: Transition, targets: Tensor, level: str) -> Tensor:
    """Predictions at which the log ratios are the targets, beside the line through the action so that they vary."""
    energy = (error / step.std).square().flatten(1)
    energy = energy.mean(1) if level == "dimension" else energy.sum(1)
    share = 1 - (1 - 2 * targets / energy).sqrt()
    return old + append_dims(share, old) * error / step.x_0_scale


def log_probability(action: Tensor, x_0: Tensor, step: Transition, state: Tensor | None, level: str) -> Tensor:
    """The log-likelihood of a recorded step, from torch's normal distribution."""
    normal = torch.distributions.Normal(step.mean(x_0, state), step.std.double())
    return over_dimensions(normal.log_prob(action), level)


def applying(values: Tensor) -> Direction:
    return Direction(values=values, applicable=torch.ones(len(values), dtype=torch.bool))


# ----- the ratio -----


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("b", [0.0, 0.4])
def test_log_ratio_is_the_difference_of_log_probabilities(level: str, b: float) -> None:
    step = transition(b=b)
    old, state, action = drawn(4, step)
    given = state if b else None
    new = old + 0.1 * latents(4, *SHAPE, seed=3).double()
    expected = log_probability(action, new, step, given, level) - log_probability(action, old, step, given, level)
    assert expected.abs().min() > 1e-3
    torch.testing.assert_close(log_ratio(action, new, old, step, given, level), expected)


@pytest.mark.parametrize("level", LEVELS)
def test_equal_predictions_have_a_log_ratio_of_exactly_0(level: str) -> None:
    step = transition()
    old, state, action = (one.float() for one in drawn(4, step))
    assert torch.equal(log_ratio(action, old.clone(), old, step, state, level), torch.zeros(4))


@pytest.mark.parametrize("level", LEVELS)
def test_each_sample_has_its_own_scale_and_spread(level: str) -> None:
    scales, spreads = torch.tensor([0.9, 0.5, 0.1]), torch.tensor([0.2, 0.5, 0.9])
    step = Transition(x_0_scale=scales, state_scale=torch.zeros(3), std=spreads)
    old, new, action = latents(3, *SHAPE), latents(3, *SHAPE, seed=1), latents(3, *SHAPE, seed=2)
    made = log_ratio(action, new, old, step, level=level)
    for i in range(3):
        alone = transition(scales[i].item(), 0.0, spreads[i].item())
        expected = log_ratio(action[[i]], new[[i]], old[[i]], alone, level=level)
        assert made[i].item() == pytest.approx(expected.item(), rel=1e-4)


def test_an_unknown_level_is_refused() -> None:
    step = transition()
    old, state, action = drawn(1, step)
    with pytest.raises(ValueError, match="importance_sampling_level='group' is unknown"):
        log_ratio(action, old, old, step, state, "group")  # type: ignore[arg-type]


# ----- the clipped surrogate -----


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("b", [0.0, 0.4])
def test_the_direction_descends_the_textbook_loss(level: str, b: float) -> None:
    """Both signs of the advantage below, inside and above the clip, with two different limits."""
    epsilon, epsilon_high = 0.1, 0.25
    # Ratios: far below, just below, just inside, unmoved, just inside, just above, far above.
    targets = torch.tensor([0.6, 0.89, 0.91, 1.0, 1.24, 1.26, 1.35]).double().log().repeat(2)
    advantage = torch.tensor([1.3, -0.7]).double().repeat_interleave(7) * torch.linspace(0.5, 1.5, 14).double()
    step = transition(b=b)
    old, state, action = drawn(14, step)
    x_0 = moved(old, action - step.mean(old, state), step, targets, level).requires_grad_()
    rho = (log_probability(action, x_0, step, state, level) - log_probability(action, old, step, state, level)).exp()
    torch.testing.assert_close(rho.log().detach(), targets, rtol=0, atol=1e-6)
    textbook = -torch.minimum(rho * advantage, rho.clamp(1 - epsilon, 1 + epsilon_high) * advantage).mean()
    (expected,) = torch.autograd.grad(textbook, x_0)
    stopped = expected.flatten(1).abs().amax(1) == 0
    assert stopped.tolist() == [False] * 5 + [True] * 2 + [True] * 2 + [False] * 5

    now = x_0.detach()
    values, clipped = policy_gradient(
        action - step.mean(now, state),
        step,
        advantage,
        log_ratio(action, now, old, step, state, level),
        level=level,
        epsilon=epsilon,
        epsilon_high=epsilon_high,
    )
    assert torch.equal(clipped, stopped)
    (made,) = torch.autograd.grad(policy_loss(x_0, applying(values)).loss, x_0)
    torch.testing.assert_close(made, expected, rtol=1e-6, atol=1e-6 * expected.abs().max().item())

    record = RecordedPolicyGradient(
        action=action,
        state=state,
        x_0=old,
        transition=step,
        level=level,
        epsilon=epsilon,
        epsilon_high=epsilon_high,
        advantages=advantage,
        factor=0.5,
    )
    seen = record.at(now)
    torch.testing.assert_close(seen.values, 0.5 * values)
    torch.testing.assert_close(seen.log_ratio, targets, rtol=0, atol=1e-6)
    torch.testing.assert_close(seen.weight, rho.detach())
    assert torch.equal(seen.clipped, stopped)


def test_a_direction_is_complete_where_it_was_recorded() -> None:
    step = transition()
    old, state, action = drawn(3, step)
    advantages = torch.tensor([-2.0, 0.5, 2.0]).double()
    record = RecordedPolicyGradient(
        action=action,
        state=state,
        x_0=old,
        transition=step,
        level="dimension",
        epsilon=0.1,
        epsilon_high=0.1,
        advantages=advantages,
    )
    made = at_recorded(record, torch.tensor([True, False, True]))
    score = step.x_0_scale * (action - step.mean(old, state)) / step.std**2
    torch.testing.assert_close(made.values, append_dims(advantages, score) * score)
    assert made.recorded is record
    assert made.applicable.tolist() == [True, False, True]


@pytest.mark.parametrize("advantage", [0.0, -1.0])
def test_a_ratio_beyond_float_leaves_the_direction_finite(advantage: float) -> None:
    """At level 'sample' log ratios of hundreds are ordinary; a sample without an advantage must still not be pushed."""
    step = transition()
    values, _ = policy_gradient(
        latents(1, *SHAPE),
        step,
        torch.tensor([advantage]),
        torch.tensor([100.0]),
        level="sample",
        epsilon=0.2,
        epsilon_high=0.2,
    )
    assert values.isfinite().all()


# ----- Stein's lemma -----


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("b", [0.0, 0.4])
def test_the_policy_gradient_is_the_pathwise_gradient_on_average(level: str, b: float) -> None:
    """Reward times score, over many draws, against the gradient of the reward at the drawn state."""
    count, step = 40_000, transition(0.8, b, 0.5)
    one, state = latents(1, *SHAPE).double(), latents(1, *SHAPE, seed=1).double()
    target = latents(*SHAPE, seed=4).double()
    noise = torch.randn((count, *SHAPE), generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    leaf = one.expand(count, *SHAPE).clone().requires_grad_()
    action = step.mean(leaf, state) + step.std * noise
    reward = torch.cos(action - target).flatten(1).sum(1)
    (pathwise,) = torch.autograd.grad(reward.sum(), leaf)

    groups = torch.zeros(count, dtype=torch.long)
    advantage = normalize_rewards(reward.detach(), groups, "none").double()
    now = leaf.detach()
    unmoved = torch.zeros(count).double()
    values, clipped = policy_gradient(
        action.detach() - step.mean(now, state), step, advantage, unmoved, level=level, epsilon=0.2, epsilon_high=0.2
    )
    assert not clipped.any()
    (made,) = torch.autograd.grad(policy_loss(leaf, applying(values)).loss, leaf)
    # The loss is a mean over samples, and at level 'dimension' over dimensions, too: they weigh the log ratio.
    made = -made * count * (SIZE if level == "dimension" else 1)
    difference = made.mean(0) - pathwise.mean(0)
    error = (made.std(0).square() + pathwise.std(0).square()).sqrt() / math.sqrt(count)
    assert (difference.abs() < 4.5 * error).all()
    assert pathwise.mean(0).norm() > 10 * error.norm(), "the test must be able to tell"


# ----- the divergence -----


@pytest.mark.parametrize("level", LEVELS)
def test_the_divergence_is_the_mean_log_ratio(level: str) -> None:
    count, step = 50_000, transition(0.8, 0.4, 0.5)
    now, other, state = (latents(1, *SHAPE, seed=seed).double() for seed in (1, 2, 3))
    other = now + 0.2 * other
    noise = torch.randn((count, *SHAPE), generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    action = step.mean(now, state) + step.std * noise
    drawn = log_probability(action, now, step, state, level) - log_probability(action, other, step, state, level)
    exact = kl_divergence(now, other, step, level).item()
    assert abs(drawn.mean().item() - exact) < 4 * drawn.std().item() / math.sqrt(count)
    normal = torch.distributions.Normal
    by_torch = torch.distributions.kl_divergence(
        normal(step.mean(now, state), step.std.double()), normal(step.mean(other, state), step.std.double())
    )
    assert exact == pytest.approx((by_torch.mean() if level == "dimension" else by_torch.sum()).item(), rel=1e-6)


@pytest.mark.parametrize("level", LEVELS)
def test_the_gradient_of_the_divergence(level: str) -> None:
    step = transition()
    now, other = latents(3, *SHAPE).double().requires_grad_(), latents(3, *SHAPE, seed=1).double()
    (made,) = torch.autograd.grad(kl_divergence(now, other, step, level).sum(), now)
    expected = (step.x_0_scale / step.std) ** 2 * (now - other) / (SIZE if level == "dimension" else 1)
    torch.testing.assert_close(made, expected.detach(), rtol=1e-6, atol=1e-9)


# ----- reuse -----


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("clip", [0.0, 0.2, 1.0])
def test_a_reused_direction_is_weighted_by_the_truncated_ratio(level: str, clip: float) -> None:
    alpha, sigma = torch.tensor([0.9, 0.6, 0.4]), torch.tensor([0.3, 0.8, 0.9])
    step = Transition(x_0_scale=alpha, state_scale=torch.zeros(3), std=sigma)
    old, values = latents(3, *SHAPE), latents(3, *SHAPE, seed=1)
    action = append_dims(alpha, values) * old + append_dims(sigma, values) * latents(3, *SHAPE, seed=2)
    record = RecordedDistributionMatching(
        values=values, action=action, x_0=old, transition=step, level=level, clip=clip
    )
    unmoved = record.at(old.clone())
    assert torch.equal(unmoved.log_ratio, torch.zeros(3))
    assert torch.equal(unmoved.values, values), "bit for bit what a rollout that is used once does"
    assert not unmoved.clipped.any()

    now = old + torch.tensor([0.02, 0.3, 3.0])[:, None, None, None] * latents(3, *SHAPE, seed=3)
    seen = record.at(now)
    expected = torch.zeros_like(old)
    for i in range(3):
        squares = [((action[i] - alpha[i] * x_0[i]) / sigma[i]).double().square() / 2 for x_0 in (old, now)]
        log_rho = (squares[0] - squares[1]).mean() if level == "dimension" else (squares[0] - squares[1]).sum()
        weight = min(max(math.exp(log_rho), 1 - clip), 1 + clip)
        assert seen.log_ratio[i].item() == pytest.approx(log_rho.item(), rel=1e-3, abs=1e-5)
        assert seen.weight[i].item() == pytest.approx(weight, rel=1e-3)
        if clip:
            assert bool(seen.clipped[i]) == (abs(math.exp(log_rho) - 1) > clip)
        expected[i] = weight * values[i]
    torch.testing.assert_close(seen.values, expected, rtol=1e-3, atol=1e-4)
    if clip == 0.2:
        assert seen.clipped.any()
        assert not seen.clipped.all()
    if clip == 0:
        assert torch.equal(seen.values, values)


def test_a_reused_direction_survives_a_ratio_beyond_float() -> None:
    """The truncated weight stays finite, and so does what is logged."""
    step = transition(0.9, 0.0, 0.01)
    old = torch.zeros(1, *SHAPE)
    action = old + 0.1
    record = RecordedDistributionMatching(
        values=latents(1, *SHAPE), action=action, x_0=old, transition=step, level="sample", clip=0.2
    )
    seen = record.at(old + 0.1 / 0.9)
    assert seen.log_ratio.item() > 100
    assert seen.weight.item() == pytest.approx(1.2)
    assert seen.values.isfinite().all()


# ----- what the log says, and the check -----


def test_numbers_of_the_log() -> None:
    weight = torch.tensor([0.5, 1.0, 2.0, 0.5])
    clipped = torch.tensor([True, False, False, False])
    logs = torch.tensor([-0.4, 0.0, 0.7, -0.2])
    seen = ratio_metrics(Reweighted(values=torch.zeros(4), log_ratio=logs, weight=weight, clipped=clipped))
    assert seen == pytest.approx(
        {
            "log_ratio_mean": 0.025,
            "log_ratio_min": -0.4,
            "log_ratio_max": 0.7,
            "clip_fraction": 0.25,
            "effective_sample_size": 16 / (4 * 5.5),
        }
    )


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("exact", [True, False])
def test_the_check_lets_rounding_pass_and_nothing_else(level: str, exact: bool) -> None:
    limit = RATIO_TOLERANCE[exact, level]
    check_unmoved("jpeg", torch.tensor([[0.9 * limit, -0.9 * limit]]), level, exact=exact)
    for wrong in (1.1 * limit, -1.1 * limit, float("nan"), float("inf")):
        with pytest.raises(
            RuntimeError, match=r"log ratio of reward 'jpeg' reaches .* guidance in only one of the two"
        ):
            check_unmoved("jpeg", torch.tensor([[0.0, wrong]]), level, exact=exact)
