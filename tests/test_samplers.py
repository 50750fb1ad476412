"""Each step of a sampler is the Gaussian that its paper, or diffusers, says it is."""

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from rdm_rl.noise_schedule import FlowMatching, NoiseSchedule, VariancePreserving, x_0_from_output
from rdm_rl.policy import DEFAULT_ETA, Sampler, ddim, flow_sde, make_sampler, renoise, rollout, student_times, suits
from rdm_rl.records import Transition
from rdm_rl.student import load_student
from tests.helpers import WITHOUT_RDM, brightness, latents, prompt_batch, quick_trainer, randomize

VP = VariancePreserving(DDIMScheduler(beta_schedule="scaled_linear").alphas_cumprod)
FLOW = FlowMatching()
SHAPE = (3, 2, 4, 4)


def pairs(steps: int) -> list[tuple[Tensor, Tensor]]:
    times = student_times(steps)
    return list(pairwise(times))


@pytest.mark.parametrize("schedule", [VP, FLOW])
def test_renoise_is_the_schedule_itself(schedule: NoiseSchedule) -> None:
    x_0, noise = latents(*SHAPE), latents(*SHAPE, seed=1)
    for t, then in pairs(4):
        step = renoise(schedule, t, then)
        assert step.state_scale == 0
        made = step.mean(x_0) + step.std * noise
        assert torch.equal(made, schedule.perturb(x_0, noise, then))
        assert torch.equal(step.mean(x_0, latents(*SHAPE, seed=2)), step.mean(x_0)), "the state is forgotten"


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [2, 5])
def test_ddim_is_stock_ddim(kind: str, eta: float, steps: int) -> None:
    stock = DDIMScheduler(
        beta_schedule="scaled_linear", prediction_type=kind, clip_sample=False, timestep_spacing="trailing"
    )
    stock.set_timesteps(steps)
    schedule = VariancePreserving(stock.alphas_cumprod)
    assert ((stock.timesteps + 1) / 1000).tolist() == pytest.approx(student_times(steps).tolist())
    for (t, then), timestep in zip(pairs(steps), stock.timesteps[:-1], strict=True):
        state, output = latents(*SHAPE), latents(*SHAPE, seed=1)
        expected = stock.step(output, timestep, state, eta=eta, generator=torch.Generator().manual_seed(4)).prev_sample
        x_0 = x_0_from_output(output, state, schedule.alpha(t), schedule.sigma(t), kind)
        step = ddim(schedule, t, then, eta=eta)
        made = step.mean(x_0, state) + step.std * torch.randn(SHAPE, generator=torch.Generator().manual_seed(4))
        torch.testing.assert_close(made, expected, rtol=1e-4, atol=2e-5)
        assert bool(step.std > 0) == bool(eta)


@pytest.mark.parametrize(
    "schedule, name, eta",
    [(each, "cps", eta) for each in (VP, FLOW) for eta in (0.0, 0.4, 0.9, 1.0)] + [(VP, "ddim", 0.7)],
)
def test_signal_and_noise_keep_their_level(schedule: NoiseSchedule, name: str, eta: float) -> None:
    for t, then in pairs(8):
        step = make_sampler(name, eta)(schedule, t, then)
        signal = step.x_0_scale + step.state_scale * schedule.alpha(t)
        noise = torch.hypot(step.state_scale * schedule.sigma(t), step.std)
        torch.testing.assert_close(signal, schedule.alpha(then))
        torch.testing.assert_close(noise, schedule.sigma(then))
        if name == "cps":
            assert step.std.item() == pytest.approx(schedule.sigma(then).item() * math.sin(eta * math.pi / 2))


@pytest.mark.parametrize("schedule", [VP, FLOW])
def test_all_new_noise_is_renoising(schedule: NoiseSchedule) -> None:
    for t, then in pairs(4):
        one, other = make_sampler("cps", 1.0)(schedule, t, then), renoise(schedule, t, then)
        for name in ("x_0_scale", "state_scale", "std"):
            torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=1e-6, atol=1e-7)


def paper_sde(x: Tensor, x_0: Tensor, t: float, then: float, noise_level: float, sigma_t_at: float) -> tuple:
    """Flow-GRPO's eq. 9, with v the velocity towards noise and dt negative: mean and standard deviation."""
    v = (x - x_0) / t
    sigma_t = noise_level * math.sqrt(t / (1 - sigma_t_at))
    drift = v + sigma_t**2 / (2 * t) * (x + (1 - t) * v)
    return x + drift * (then - t), sigma_t * math.sqrt(t - then)


@pytest.mark.parametrize("eta", [0.3, 0.7, 1.2])
def test_flow_sde_is_the_sde_of_the_paper(eta: float) -> None:
    state, x_0 = latents(*SHAPE).double(), latents(*SHAPE, seed=1).double()
    for t, then in [(0.9, 0.6), (0.5, 0.25), (0.75, 0.7), (1.0, 0.75)]:
        mean, std = paper_sde(state, x_0, t, then, eta, t if t < 1 else then)
        step = flow_sde(FLOW, torch.tensor(t), torch.tensor(then), eta=eta)
        torch.testing.assert_close(step.mean(x_0, state), mean, rtol=1e-5, atol=1e-5)
        assert step.std.item() == pytest.approx(std, rel=1e-5)


def test_flow_sde_has_the_marginals_of_the_flow_to_first_order() -> None:
    errors = []
    for step_size in (0.02, 0.01, 0.005):
        t, then = torch.tensor(0.6), torch.tensor(0.6 - step_size)
        step = flow_sde(FLOW, t, then, eta=0.7)
        # Of a single clean sample: x_t has the mean (1 - t) x_0 and the standard deviation t.
        assert (step.x_0_scale + step.state_scale * (1 - t)).item() == pytest.approx(1 - then.item(), abs=1e-6)
        variance = (step.state_scale * t).square() + step.std.square()
        errors.append(abs(variance.item() - then.item() ** 2))
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(4, rel=0.1)


def test_without_randomness_flow_sde_is_euler() -> None:
    state, x_0 = latents(*SHAPE), latents(*SHAPE, seed=1)
    for t, then in pairs(5):
        step = flow_sde(FLOW, t, then, eta=0.0)
        assert step.std == 0
        torch.testing.assert_close(step.mean(x_0, state), state + (state - x_0) / t * (then - t))


@pytest.mark.parametrize(
    "schedule, sampler",
    [
        (VP, make_sampler("ddim", 0.0)),
        (VP, make_sampler("ddim", 0.5)),
        (VP, make_sampler("ddim", 1.0)),
        (FLOW, make_sampler("flow_sde", 0.3)),
        (FLOW, make_sampler("flow_sde", 0.7)),
        (FLOW, make_sampler("cps", 0.0)),
    ],
)
def test_many_small_steps_end_at_the_data(schedule: NoiseSchedule, sampler: Sampler) -> None:
    """With the exact prediction for Gaussian data every step is linear, so mean and variance follow in closed form."""
    data_mean, data_variance = 0.8, 0.3
    times = student_times(1000)
    mean = schedule.alpha(times[0]).item() * data_mean
    variance = (schedule.alpha(times[0]).square() * data_variance + schedule.sigma(times[0]).square()).item()
    for index, t in enumerate(times):
        alpha, sigma = schedule.alpha(t).item(), schedule.sigma(t).item()
        slope = alpha * data_variance / (alpha**2 * data_variance + sigma**2)
        shift = data_mean * (1 - slope * alpha)
        if index + 1 < len(times):
            step = sampler(schedule, t, times[index + 1])
            a, b, s = step.x_0_scale.item(), step.state_scale.item(), step.std.item()
        else:
            a, b, s = 1.0, 0.0, 0.0
        mean, variance = a * (slope * mean + shift) + b * mean, (a * slope + b) ** 2 * variance + s**2
    assert mean == pytest.approx(data_mean, abs=0.01)
    assert variance == pytest.approx(data_variance, rel=0.03)


def test_a_chain_is_walked_by_its_sampler() -> None:
    def policy(x_t: Tensor, t: Tensor, _: object) -> Tensor:
        return torch.tanh(x_t) + t[:, None, None, None]

    sampler, times = make_sampler("ddim", 0.6), student_times(4)
    chains = rollout(
        policy,
        prompt_batch(3),
        VP,
        times,
        shape=SHAPE[1:],
        generator=torch.Generator().manual_seed(2),
        sampler=sampler,
    )
    again = torch.Generator().manual_seed(2)
    assert torch.equal(chains.states[0], torch.randn(SHAPE, generator=again))
    for index, (t, then) in enumerate(pairs(4)):
        step = sampler(VP, t, then)
        expected = step.mean(chains.x_0[index], chains.states[index]) + step.std * torch.randn(SHAPE, generator=again)
        assert torch.equal(chains.states[index + 1], expected)
        assert chains.is_random(index)
        assert chains.transitions[index] == step
    assert [chains.is_random(step) for step in (-1, 3, 4)] == [False] * 3


def test_a_step_without_noise_draws_none() -> None:
    used, again = torch.Generator().manual_seed(2), torch.Generator().manual_seed(2)
    chains = rollout(
        lambda x_t, t, _: x_t,
        prompt_batch(3),
        VP,
        student_times(4),
        shape=SHAPE[1:],
        generator=used,
        sampler=make_sampler("ddim", 0.0),
    )
    torch.randn(SHAPE, generator=again)
    assert torch.equal(used.get_state(), again.get_state())
    assert not any(chains.is_random(step) for step in range(4))


def test_how_random_a_sampler_is_by_default() -> None:
    t, then = torch.tensor(0.5), torch.tensor(0.25)
    for name, eta in DEFAULT_ETA.items():
        schedule = VP if name == "ddim" else FLOW
        usual, stated = make_sampler(name)(schedule, t, then), make_sampler(name, eta)(schedule, t, then)
        still = make_sampler(name, 0.0)(schedule, t, then)
        assert usual == stated
        assert usual.std > 0
        assert still.std == 0
    assert make_sampler("renoise", 0.0) is renoise


def test_samplers_and_their_schedules() -> None:
    names = ("renoise", "ddim", "flow_sde", "cps")
    assert [suits(name, VP) for name in names] == [True, True, False, False]
    assert [suits(name, FLOW) for name in names] == [True, False, True, True]


def test_scales_of_each_sample_broadcast() -> None:
    step = Transition(
        x_0_scale=torch.tensor([[1.0, 2.0, 3.0]]), state_scale=torch.tensor([[0.0, 1.0, 0.5]]), std=torch.ones(1, 3)
    )
    x_0, state = latents(1, *SHAPE), latents(1, *SHAPE, seed=1)
    made = step.mean(x_0, state)
    for row in range(3):
        expected = step.x_0_scale[0, row] * x_0[0, row] + step.state_scale[0, row] * state[0, row]
        torch.testing.assert_close(made[0, row], expected)


@pytest.mark.parametrize(
    "kind, guidance, lora",
    [("epsilon", 1.0, True), ("epsilon", 3.0, False), ("v_prediction", 3.0, True)],
)
def test_a_saved_ddim_student_is_stock(
    kind: str, guidance: float, lora: bool, bases: Callable[..., Path], tmp_path: Path
) -> None:
    base = bases(kind)
    trainer = quick_trainer(
        base,
        tmp_path / "run",
        [brightness()],
        given=None if lora else {"peft_config": None},
        **{**WITHOUT_RDM, "num_inference_steps": 4, "sampler": "ddim", "guidance_scale": guidance},
    )
    randomize(trainer.networks, scale=0.02)
    trainer.save_model(tmp_path / "student")
    student = load_student(tmp_path / "student", base)
    assert student.call == {"num_inference_steps": 4, "guidance_scale": guidance}
    prompts = ["the digit 3", "the digit 4"]
    expected = student.draw(prompts, generator=torch.Generator().manual_seed(3), output_type="latent")
    batch = prompt_batch(2, trainer.family.encode(prompts))
    ours = trainer.sample_student(batch, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(ours.sample, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())
    student.call["guidance_scale"] = 2.0
    other = student.draw(prompts, generator=torch.Generator().manual_seed(3), output_type="latent")
    assert (other - expected).abs().max() > 10 * (ours.sample - expected).abs().max()


def test_steps_that_stock_ddim_cannot_chain_are_refused(base: Path, tmp_path: Path) -> None:
    settings = {**WITHOUT_RDM, "num_inference_steps": 3, "sampler": "ddim"}
    with pytest.raises(ValueError, match="only chain if their number divides 1000"):
        quick_trainer(base, tmp_path, [brightness()], **settings)


@pytest.mark.parametrize("sampler", ["renoise", "ddim"])
def test_more_steps_than_the_model_knows_times_are_refused(sampler: str, base: Path, tmp_path: Path) -> None:
    settings = {**WITHOUT_RDM, "num_inference_steps": 2000, "sampler": sampler}
    with pytest.raises(ValueError, match="num_inference_steps=2000, but the model knows 1000 times"):
        quick_trainer(base, tmp_path, [brightness()], **settings)


@pytest.mark.parametrize("sampler", ["cps", "flow_sde"])
def test_a_sampler_of_flows_is_refused_for_another_model(sampler: str, base: Path, tmp_path: Path) -> None:
    settings = {**WITHOUT_RDM, "num_inference_steps": 2, "sampler": sampler}
    with pytest.raises(ValueError, match="is not made for this model's noise schedule"):
        quick_trainer(base, tmp_path, [brightness()], **settings)
