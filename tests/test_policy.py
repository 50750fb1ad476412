"""The rollout is the Gaussian chain it says it is, with noise drawn in a pipeline's order."""

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from rdm_rl.noise_schedule import FlowMatching, NoiseSchedule, VariancePreserving, append_dims
from rdm_rl.policy import random_times, rollout, student_times
from rdm_rl.randomness import Generators, seeded_generators
from rdm_rl.records import Conditioning, Rollout
from tests.helpers import prompt_batch

VP = VariancePreserving(DDIMScheduler(beta_schedule="scaled_linear").alphas_cumprod)
SHAPE = (2, 3, 3)


def policy(x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
    """Depends on the state, the time and the prompt."""
    shift = append_dims(t, x_t)
    if conditioning.tensors:
        shift = shift + append_dims(conditioning.tensors["embedding"], x_t)
    return torch.tanh(x_t) + shift


def walk(
    count: int, steps: int, generator: Generators, schedule: NoiseSchedule = VP, embedding: Tensor | None = None
) -> Rollout:
    conditioning = Conditioning(tensors={} if embedding is None else {"embedding": embedding})
    batch = prompt_batch(count, conditioning)
    return rollout(policy, batch, schedule, student_times(steps), shape=SHAPE, generator=generator)


@pytest.mark.parametrize("schedule", [VP, FlowMatching()])
@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_states_follow_the_transition(schedule: NoiseSchedule, steps: int) -> None:
    embedding = torch.tensor([0.0, 1.0, 2.0])
    chains = walk(3, steps, torch.Generator().manual_seed(5), schedule, embedding)
    # The same numbers, drawn here: initial noise, then one draw for each step but the last.
    again = torch.Generator().manual_seed(5)
    noise = [torch.randn((3, *SHAPE), generator=again) for _ in range(steps)]
    assert chains.times.tolist() == pytest.approx([1 - step / steps for step in range(steps)])
    assert torch.equal(chains.states[0], noise[0])
    for step, t in enumerate(chains.times):
        conditioning = Conditioning(tensors={"embedding": embedding})
        assert torch.equal(chains.x_0[step], policy(chains.states[step], t.expand(3), conditioning))
        if step + 1 < steps:
            then = chains.times[step + 1]
            expected = schedule.alpha(then) * chains.x_0[step] + schedule.sigma(then) * noise[step + 1]
            assert torch.equal(chains.states[step + 1], expected)
    assert torch.equal(chains.sample, chains.x_0[-1])


def test_rollout_draws_nothing_after_the_last_step() -> None:
    used, again = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
    walk(3, 2, used)
    for _ in range(2):
        torch.randn((3, *SHAPE), generator=again)
    assert torch.equal(used.get_state(), again.get_state())


def test_a_sample_does_not_depend_on_its_batch() -> None:
    whole = walk(6, 3, seeded_generators(0, "rollout", 0, range(6)))
    part = walk(2, 3, seeded_generators(0, "rollout", 0, [3, 4]))
    assert torch.equal(whole.states[:, 3:5], part.states)
    assert torch.equal(whole.x_0[:, 3:5], part.x_0)


def test_rollout_records_no_graph() -> None:
    weight = torch.ones((), requires_grad=True)
    chains = rollout(
        lambda x_t, t, conditioning: weight * x_t,
        prompt_batch(2),
        VP,
        student_times(2),
        shape=SHAPE,
        generator=torch.Generator(),
    )
    assert not chains.states.requires_grad
    assert not chains.x_0.requires_grad


@pytest.mark.parametrize("steps", [0, -1])
def test_a_student_needs_a_step(steps: int) -> None:
    with pytest.raises(ValueError, match="at least one step"):
        student_times(steps)


def test_records_refuse_what_does_not_fit() -> None:
    chains = walk(2, 2, torch.Generator())
    with pytest.raises(ValueError, match="must both be"):
        Rollout(batch=chains.batch, times=chains.times[:1], states=chains.states, x_0=chains.x_0)
    with pytest.raises(ValueError, match="3 samples but 2 prompts"):
        walked = torch.zeros(2, 3, *SHAPE)
        Rollout(batch=chains.batch, times=chains.times, states=walked, x_0=walked)
    with pytest.raises(ValueError, match="one entry for each sample"):
        prompt_batch(2, Conditioning(tensors={"embedding": torch.zeros(3)}))
    with pytest.raises(ValueError, match="one row for each sample"):
        Conditioning(tensors={"one": torch.zeros(2), "two": torch.zeros(3)})


def test_random_times_fall_from_noise_and_are_as_many_as_they_should() -> None:
    drawn = [random_times(28, torch.Generator().manual_seed(seed)) for seed in range(400)]
    assert all(times[0] == 1 and (times.diff() < 0).all() and times[-1] > 0 for times in drawn)
    counts = [len(times) for times in drawn]
    assert min(counts) == 1 and max(counts) > 24
    # (28 + 3) / 4 on average, with a standard deviation of 6.4: that of the mean is 0.32.
    assert sum(counts) / len(counts) == pytest.approx(7.75, abs=1.3)
    # An anchor that is not the first is anywhere: its mean is near the middle.
    anchors = [times[-1].item() for times in drawn if len(times) > 1]
    assert sum(anchors) / len(anchors) == pytest.approx(0.5, abs=0.06)
