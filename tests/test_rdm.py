"""The algorithm on data where everything is known: a Gaussian teacher has a closed-form denoiser and optimum."""

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from rdm_rl.noise_schedule import FlowMatching, NoiseSchedule, VariancePreserving, append_dims
from rdm_rl.policy import rollout, student_times
from rdm_rl.rdm import distribution_matching, fake_score_loss, policy_loss
from rdm_rl.records import Conditioning, Direction
from rdm_rl.renoise import group_times, renoise_times
from tests.helpers import latents, prompt_batch

VP = VariancePreserving(DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod)
SHAPE = (4, 1, 1)
MEAN = torch.tensor([1.0, -2.0, 0.5, 3.0]).reshape(SHAPE)
STD = torch.tensor([0.5, 1.0, 1.5, 2.0]).reshape(SHAPE)
NONE = Conditioning()
COUNT = 512  # samples of a batch in `distil`


class Gaussian(nn.Module):
    """A Gaussian with the exact denoiser E[x_0 | x_t], which makes it a teacher or, trained, a fake score."""

    def __init__(self, mean: Tensor, std: Tensor, schedule: NoiseSchedule = VP) -> None:
        super().__init__()
        self.mean, self.log_std = nn.Parameter(mean.clone()), nn.Parameter(std.log())
        self.schedule = schedule

    def forward(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        alpha, sigma = (append_dims(one(t), x_t) for one in (self.schedule.alpha, self.schedule.sigma))
        variance = (2 * self.log_std).exp()
        gain = alpha * variance / (alpha.square() * variance + sigma.square())
        return self.mean + gain * (x_t - alpha * self.mean)


def matched(
    x_0: Tensor, teacher: nn.Module, fake_score: nn.Module, t: Tensor, noise: Tensor, *settings: Any, schedule: Any = VP
) -> Direction:
    """R_dm's direction from one re-noising."""
    x_t = schedule.perturb(x_0.detach(), noise, t)
    values = distribution_matching(x_0.detach(), teacher(x_t, t, NONE), fake_score(x_t, t, NONE), *settings)
    return Direction(values=values, applicable=torch.ones(len(x_0), dtype=torch.bool))


class AffinePolicy(nn.Module):
    """One step from noise z to mean + std * z: a Gaussian again."""

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.mean, self.log_std = nn.Parameter(mean.clone()), nn.Parameter(std.log())

    def forward(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        return self.mean + self.log_std.exp() * x_t


def distil(sign: float, normalization: str, schedule: NoiseSchedule = VP, updates: int = 500) -> tuple[float, float]:
    """Distribution matching with the library's functions; the worst error of the mean, and of the std in per cent."""
    teacher = Gaussian(MEAN, STD, schedule)
    policy = AffinePolicy(MEAN + 1.5 * STD, STD * torch.tensor([2.0, 0.5, 2.0, 0.5]).reshape(SHAPE))
    fake_score = Gaussian(policy.mean.detach(), policy.log_std.detach().exp(), schedule)
    fast = torch.optim.Adam(fake_score.parameters(), 0.06, (0.0, 0.99))
    slow = torch.optim.Adam(policy.parameters(), 0.04, (0.0, 0.99))
    decays = [
        torch.optim.lr_scheduler.PolynomialLR(one, steps, power=2)
        for one, steps in ((fast, updates * 3), (slow, updates))
    ]
    generator, batch, times = torch.Generator().manual_seed(0), prompt_batch(COUNT, per_group=16), student_times(1)
    for _ in range(updates):
        chains = rollout(policy, batch, schedule, times, shape=SHAPE, generator=generator)
        for _ in range(3):
            t = renoise_times(COUNT, generator)
            noise = torch.randn(chains.sample.shape, generator=generator)
            loss = fake_score_loss(fake_score, chains.sample, NONE, t, noise, schedule, "v_prediction").loss
            fast.zero_grad()
            loss.backward()
            fast.step()
            decays[0].step()
        t = group_times(batch.group_ids, generator)
        noise = torch.randn((COUNT, *SHAPE), generator=generator)
        direction = matched(
            *(chains.x_0[0], teacher, fake_score, t, noise, batch.group_ids, normalization), schedule=schedule
        )
        direction = Direction(values=sign * direction.values, applicable=direction.applicable)
        slow.zero_grad()
        policy_loss(policy(chains.states[0], times[0].expand(COUNT), NONE), direction).loss.backward()
        slow.step()
        decays[1].step()
    with torch.no_grad():
        mean = (policy.mean - MEAN).abs().max().item()
        std = 100 * (policy.log_std.exp() / STD - 1).abs().max().item()
    return mean, std


@pytest.mark.parametrize(
    ("normalization", "schedule"),
    [("group", VP), ("sample", VP), ("group", FlowMatching())],
    ids=["group", "sample", "group-flow"],
)
def test_a_gaussian_is_learnt(normalization: str, schedule: NoiseSchedule) -> None:
    mean, std = distil(1.0, normalization, schedule)
    assert mean < 0.02
    assert std < 3


def test_the_wrong_sign_does_not_learn_it() -> None:
    """What the test above would see if the direction were turned round: it ends farther away than it began."""
    mean, _ = distil(-1.0, "group", updates=200)
    assert mean > 1.5 * STD.max().item()


@pytest.mark.parametrize(("normalization", "agreement"), [("none", 0.9999), ("group", 0.9999), ("sample", 0.9)])
@pytest.mark.parametrize("time", [0.2, 0.7])
def test_direction_is_that_of_the_true_kl_gradient(normalization: str, agreement: float, time: float) -> None:
    policy = AffinePolicy(MEAN + STD, 0.7 * STD)
    teacher, exact_fake_score = Gaussian(MEAN, STD), Gaussian(MEAN + STD, 0.7 * STD)
    z, noise = latents(40000, *SHAPE), latents(40000, *SHAPE, seed=1)
    z = torch.cat([z[:20000], -z[:20000]])  # Antithetic, so that odd moments cancel.
    noise[20000:] = -noise[:20000]
    x_0 = policy(z, torch.ones(40000), NONE)
    t, groups = torch.full((40000,), time), torch.zeros(40000, dtype=torch.long)
    direction = matched(x_0, teacher, exact_fake_score, t, noise, groups, normalization)
    policy_loss(x_0, direction).loss.backward()
    ours = torch.stack([policy.mean.grad, policy.log_std.grad]).flatten()

    mean, log_std = policy.mean.detach().requires_grad_(), policy.log_std.detach().requires_grad_()
    alpha, sigma = VP.alpha(t[0]), VP.sigma(t[0])
    student_variance = (alpha * log_std.exp()).square() + sigma.square()
    real_variance = (alpha * STD).square() + sigma.square()
    kl = 0.5 * (student_variance / real_variance + (alpha * (mean - MEAN)).square() / real_variance)
    (kl - 0.5 * student_variance.log()).sum().backward()
    # mu_real - mu_fake is sigma^2 / alpha times the difference of the scores, and x_t moves alpha times as far as x_0.
    truth = torch.stack([mean.grad, log_std.grad]).flatten() * (sigma / alpha).square() / MEAN.numel()
    assert torch.cosine_similarity(ours, truth, dim=0) > agreement
    if normalization == "none":
        torch.testing.assert_close(ours, truth, rtol=0.02, atol=0.02 * truth.abs().max().item())


def test_nothing_moves_at_the_optimum() -> None:
    teacher = Gaussian(MEAN, STD)
    x_0 = (MEAN + STD * latents(8, *SHAPE)).requires_grad_()
    t, noise = torch.full((8,), 0.5), latents(8, *SHAPE, seed=1)
    direction = matched(x_0, teacher, Gaussian(MEAN, STD), t, noise, torch.arange(8) // 4)
    policy_loss(x_0, direction).loss.backward()
    assert torch.equal(x_0.grad, torch.zeros_like(x_0))


def test_gradient_of_the_policy_loss() -> None:
    x_0 = latents(3, 4, 2, 2).requires_grad_()
    values = latents(3, 4, 2, 2, seed=1)
    values[1] = float("nan")
    applicable = torch.tensor([True, False, True])
    output = policy_loss(x_0, Direction(values=values, applicable=applicable))
    output.loss.backward()
    expected = -torch.where(applicable[:, None, None, None], values, 0.0) / x_0.numel()
    torch.testing.assert_close(x_0.grad, expected, rtol=1e-4, atol=1e-7)


def test_policy_loss_reaches_no_score_network() -> None:
    policy, teacher, fake_score = AffinePolicy(MEAN, STD), Gaussian(MEAN, STD), Gaussian(MEAN + 1, STD)
    z = latents(4, *SHAPE)
    x_0 = policy(z, torch.ones(4), NONE)
    t, noise = torch.full((4,), 0.5), latents(4, *SHAPE, seed=1)
    direction = matched(x_0, teacher, fake_score, t, noise, torch.zeros(4, dtype=torch.long))
    assert not direction.values.requires_grad
    policy_loss(x_0, direction).loss.backward()
    assert policy.mean.grad.abs().sum() > 0
    assert all(one.grad is None for network in (teacher, fake_score) for one in network.parameters())


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_fake_score_loss_is_the_error_of_the_networks_output(kind: str) -> None:
    fake_score, x_0, noise = Gaussian(MEAN, STD), latents(5, *SHAPE), latents(5, *SHAPE, seed=1)
    t = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9])
    output = fake_score_loss(fake_score, x_0, NONE, t, noise, VP, kind)
    alpha, sigma = VP.alpha(t)[:, None, None, None], VP.sigma(t)[:, None, None, None]
    x_t = alpha * x_0 + sigma * noise
    predicted = fake_score(x_t, t, NONE)
    as_output = {
        "epsilon": lambda x: (x_t - alpha * x) / sigma,
        "v_prediction": lambda x: (alpha * x_t - x) / sigma,
        "sample": lambda x: x,
    }[kind]
    expected = (as_output(predicted) - as_output(x_0)).square().mean()
    torch.testing.assert_close(output.loss, expected, rtol=1e-4, atol=1e-6)
    output.loss.backward()
    assert fake_score.mean.grad.abs().sum() > 0


def test_the_exact_fake_score_has_the_smallest_loss() -> None:
    x_0, noise = MEAN + STD * latents(4000, *SHAPE), latents(4000, *SHAPE, seed=1)
    t = renoise_times(4000, torch.Generator().manual_seed(0))

    def loss(mean: Tensor, std: Tensor) -> float:
        return fake_score_loss(Gaussian(mean, std), x_0, NONE, t, noise, VP, "v_prediction").loss.item()

    best = loss(MEAN, STD)
    assert best < min(loss(MEAN + 0.3, STD), loss(MEAN - 0.3, STD), loss(MEAN, 1.3 * STD), loss(MEAN, 0.7 * STD))
