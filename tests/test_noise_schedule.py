"""Schedules are monotone and agree with diffusers; conversions invert."""

import pytest
import torch
from diffusers import DDIMScheduler

from rdm_rl.noise_schedule import (
    FlowMatching,
    NoiseSchedule,
    VariancePreserving,
    append_dims,
    denoising_weight,
    x_0_from_output,
)
from tests.helpers import latents

SCHEDULER = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
VP = VariancePreserving(SCHEDULER.alphas_cumprod)


@pytest.mark.parametrize("schedule", [VP, FlowMatching()])
def test_noise_grows_with_time_from_none(schedule: NoiseSchedule) -> None:
    t = torch.linspace(0.001, 1, 1000)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    assert (alpha[1:] < alpha[:-1]).all()
    assert (sigma[1:] > sigma[:-1]).all()
    x_0 = latents(2, 4, 2, 2)
    assert torch.equal(schedule.perturb(x_0, latents(2, 4, 2, 2, seed=1), torch.zeros(2)), x_0)


def test_variance_preserving_keeps_the_variance() -> None:
    t = torch.linspace(0, 1, 101)
    torch.testing.assert_close(VP.alpha(t).square() + VP.sigma(t).square(), torch.ones(101))


def test_variance_preserving_perturbs_as_diffusers() -> None:
    x_0, noise = latents(4, 4, 2, 2), latents(4, 4, 2, 2, seed=1)
    timesteps = torch.tensor([0, 249, 749, 999])
    expected = SCHEDULER.add_noise(x_0, noise, timesteps)
    assert torch.equal(VP.perturb(x_0, noise, (timesteps + 1) / 1000), expected)


def test_variance_preserving_timesteps() -> None:
    assert VP.timestep(torch.tensor([1, 0.75, 0.5, 0.25])).tolist() == [999, 749, 499, 249]
    every = torch.arange(1000)
    assert torch.equal(VP.timestep((every + 1) / 1000), every)
    assert VP.timestep(torch.tensor([1e-6, 0.0])).tolist() == [0, 0]


def test_flow_matching_is_the_straight_line() -> None:
    t = torch.tensor([0.25])
    x_0, noise = latents(1, 4, 2, 2), latents(1, 4, 2, 2, seed=1)
    torch.testing.assert_close(FlowMatching().perturb(x_0, noise, t), 0.75 * x_0 + 0.25 * noise)
    assert FlowMatching().timestep(t).item() == 250


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample", "flow"])
def test_true_output_gives_back_x_0(kind: str) -> None:
    schedule = FlowMatching() if kind == "flow" else VP
    times = torch.tensor([0.02, 0.5, 1.0])
    alpha, sigma = schedule.alpha(times), schedule.sigma(times)
    x_0, noise = latents(3, 4, 2, 2), latents(3, 4, 2, 2, seed=1)
    x_t = schedule.perturb(x_0, noise, times)
    output = {
        "epsilon": noise,
        "v_prediction": append_dims(alpha, x_0) * noise - append_dims(sigma, x_0) * x_0,
        "sample": x_0,
        "flow": noise - x_0,
    }[kind]
    torch.testing.assert_close(x_0_from_output(output, x_t, alpha, sigma, kind), x_0, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample", "flow"])
def test_weight_turns_an_error_in_x_0_into_that_of_the_output(kind: str) -> None:
    schedule = FlowMatching() if kind == "flow" else VP
    t = torch.tensor([0.1, 0.4, 0.9])
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    x_t, one, two = (latents(3, 4, 2, 2, seed=seed) for seed in range(3))
    difference = x_0_from_output(one, x_t, alpha, sigma, kind) - x_0_from_output(two, x_t, alpha, sigma, kind)
    in_x_0 = denoising_weight(alpha, sigma, kind) * difference.square().flatten(1).mean(1)
    torch.testing.assert_close(in_x_0, (one - two).square().flatten(1).mean(1), rtol=1e-4, atol=1e-6)


def test_unknown_prediction_type_is_refused() -> None:
    one = torch.ones(1)
    with pytest.raises(ValueError, match="'velocity' is unknown"):
        x_0_from_output(one, one, one, one, "velocity")
    with pytest.raises(ValueError, match="'velocity' is unknown"):
        denoising_weight(one, one, "velocity")
