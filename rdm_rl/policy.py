r"""The few-step student as a Gaussian policy.

Step k takes the state :math:`x_k` at time :math:`t_k` to

.. math::
    \hat x_0 = G_\theta(x_k, t_k, c), \qquad
    x_{k+1} = \alpha_{k+1} \hat x_0 + \sigma_{k+1} \epsilon
    \;\;\Rightarrow\;\; \pi_\theta(x_{k+1} \mid x_k) = N(\alpha_{k+1} \hat x_0,\ \sigma_{k+1}^2 I),

the re-noising sampler of consistency models. Every sampler is a Gaussian whose mean is linear in the prediction,
:math:`N(a\, \hat x_0 + b\, x_k,\ s^2 I)`, and the last step has no noise: its prediction is the
sample. Stock ``LCMScheduler`` walks the same chain (see ``rdm_rl.families``), bit for bit on the CPU.

================  =========================================================================
sampler           for
================  =========================================================================
:func:`renoise`   few-step students: forget the state, renoise the prediction; any schedule
:func:`ddim`      many-step policies of variance-preserving models, with ``eta`` in [0, 1]
:func:`flow_sde`  flow models: the SDE with the marginals of the flow
:func:`cps`       flow models: coefficients-preserving sampling, whose noise level is exact
================  =========================================================================

A Gaussian's likelihood is known in closed form, so that of a recorded step needs one prediction and no autograd:

.. math::
    \log \pi_\theta(x' \mid x) = -\frac{\lVert x' - a \hat x_0 - b x \rVert^2}{2 s^2} - \tfrac{D}{2} \log 2\pi s^2

Summed over the D dimensions (level ``sample``) it is the likelihood itself, whose ratio between two policies explodes
with D; its mean over them (level ``dimension``) is what public implementations of DDPO and its kin use.

References:
    | Consistency Models (Song et al., 2023), algorithm 1
    | https://arxiv.org/abs/2303.01469
    | Improved Distribution Matching Distillation for Fast Image Synthesis (Yin et al., 2024), section 4.4
    | https://arxiv.org/abs/2405.14867
    | Training Diffusion Models with Reinforcement Learning (Black et al., 2023), section 4.3
    | https://arxiv.org/abs/2305.13301
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Annotated, Literal

import torch
from torch import Tensor

from rdm_rl.noise_schedule import FlowMatching, NoiseSchedule, append_dims
from rdm_rl.randomness import Generators, normal, seeded_generator
from rdm_rl.records import Conditioning, PromptBatch, Rollout, Transition
from rdm_rl.settings import Count, Finite, Size, Within, setting

# A network wrapped to predict x_0: (x_t of shape (N, C, H, W), t of shape (N,), conditioning) -> shape (N, C, H, W).
X0Predictor = Callable[[Tensor, Tensor, Conditioning], Tensor]
Level = Literal["dimension", "sample"]
# Standard normal noise: (shape, generator, device) -> a tensor of the shape.
StepNoise = Callable[[Sequence[int], Generators, torch.device], Tensor]
SamplerName = Literal["renoise", "ddim", "flow_sde", "cps"]
NoisePool = Annotated[int, Within(1, 2**24)]
RandomTimes = Annotated[int, Within(2, 1000)]

# How random each sampler is when the user does not say: as in DDPO, Flow-GRPO and RTDMD.
DEFAULT_ETA: dict[SamplerName, float] = {"ddim": 1.0, "flow_sde": 0.7, "cps": 0.9}
Sampler = Callable[[NoiseSchedule, Tensor, Tensor], Transition]


def student_times(num_inference_steps: int) -> Tensor:
    """The times that a K-step student visits: 1, (K-1)/K, ..., 1/K.

    Args:
        num_inference_steps: K, at least 1.

    Returns:
        The times, shape (K,), float32.

    Raises:
        ValueError: If K < 1.

    Example:
        >>> student_times(4)
        tensor([1.0000, 0.7500, 0.5000, 0.2500])
    """
    if num_inference_steps < 1:
        raise ValueError(f"num_inference_steps={num_inference_steps}, but a student needs at least one step.")
    return torch.arange(num_inference_steps, 0, -1, dtype=torch.float32) / num_inference_steps


def random_times(longest: int, generator: torch.Generator) -> Tensor:
    r"""Times that a student walks down to one at which it learns: a schedule of random length.

    Of :math:`N \sim U\{1, ..., longest\}` times, 1 and N - 1 others that are drawn from thousandths without repetition,
    one is the last, and nothing is walked beyond it: (longest + 3) / 4 steps on average.

    References:
        | Continuous-Time Distribution Matching for Few-Step Diffusion Distillation (Liu et al., 2026): N up to 28
        | https://arxiv.org/abs/2605.06376

    Args:
        longest: The longest schedule, 1 to 1000 times.
        generator: Where the draws come from.

    Returns:
        The times, falling from 1, float32.

    Example:
        >>> random_times(28, torch.Generator().manual_seed(3))
        tensor([1.0000, 0.8940, 0.8850, 0.8710, 0.8540, 0.8420])
    """
    count = int(torch.randint(1, longest + 1, (1,), generator=generator))
    others = torch.randperm(999, generator=generator)[: count - 1].add(1).sort(descending=True).values
    times = torch.cat([torch.ones(1), others / 1000])
    return times[: int(torch.randint(1, count + 1, (1,), generator=generator))]


def renoise(schedule: NoiseSchedule, t: Tensor, next_t: Tensor) -> Transition:
    r"""Renoise the prediction: :math:`x' = \alpha' \hat x_0 + \sigma' \epsilon`.

    References:
        | Consistency Models (Song et al., 2023), algorithm 1
        | https://arxiv.org/abs/2303.01469

    Args:
        schedule: The noise schedule.
        t: Time of the state, shape (); not used.
        next_t: Time of the next state, shape ().

    Returns:
        The transition.
    """
    alpha = schedule.alpha(next_t)
    return Transition(x_0_scale=alpha, state_scale=torch.zeros_like(alpha), std=schedule.sigma(next_t))


def ddim(schedule: NoiseSchedule, t: Tensor, next_t: Tensor, *, eta: float) -> Transition:
    r"""DDIM: keep a part of the noise that the state holds, and replace the rest.

    .. math::
        s = \eta \frac{\sigma'}{\sigma} \sqrt{1 - \alpha^2 / \alpha'^2}, \qquad
        x' = \alpha' \hat x_0 + \sqrt{\sigma'^2 - s^2}\,\hat\epsilon + s\,\epsilon, \qquad
        \hat\epsilon = (x - \alpha \hat x_0)/\sigma

    References:
        | Denoising Diffusion Implicit Models (Song et al., 2020), eq. 12 and 16
        | https://arxiv.org/abs/2010.02502

    Args:
        schedule: A variance-preserving schedule.
        t: Time of the state, shape ().
        next_t: Time of the next state, shape ().
        eta: 0 is the deterministic sampler, 1 is DDPM's ancestral one.

    Returns:
        The transition.
    """
    ratio = (schedule.alpha(t) / schedule.alpha(next_t)).square()
    std = eta * schedule.sigma(next_t) / schedule.sigma(t) * (1 - ratio).clamp_min(0).sqrt()
    return _keep_noise(schedule, t, next_t, std)


def cps(schedule: NoiseSchedule, t: Tensor, next_t: Tensor, *, eta: float) -> Transition:
    r"""Coefficients-preserving sampling: DDIM's step with :math:`s = \sigma' \sin(\eta \pi / 2)`.

    The next state has exactly the signal and the noise level of its time, whatever eta; at 1 it is :func:`renoise`.

    References:
        | Coefficients-Preserving Sampling for Reinforcement Learning with Flow Matching (Wang and Yu, 2025)
        | https://arxiv.org/abs/2509.05952

    Args:
        schedule: The noise schedule.
        t: Time of the state, shape ().
        next_t: Time of the next state, shape ().
        eta: The share of new noise, in [0, 1], as an angle.

    Returns:
        The transition.
    """
    return _keep_noise(schedule, t, next_t, schedule.sigma(next_t) * math.sin(eta * math.pi / 2))


def _keep_noise(schedule: NoiseSchedule, t: Tensor, next_t: Tensor, std: Tensor) -> Transition:
    kept = (schedule.sigma(next_t).square() - std.square()).clamp_min(0).sqrt() / schedule.sigma(t)
    return Transition(x_0_scale=schedule.alpha(next_t) - kept * schedule.alpha(t), state_scale=kept, std=std)


def flow_sde(schedule: NoiseSchedule, t: Tensor, next_t: Tensor, *, eta: float) -> Transition:
    r"""One Euler-Maruyama step of the SDE that has the marginals of a flow.

    .. math::
        x' = x + \Big[v + \frac{g^2}{2t} \hat\epsilon\Big] (t' - t) + g \sqrt{t - t'}\, \epsilon, \qquad
        v = \frac{x - \hat x_0}{t}, \quad \hat\epsilon = \frac{x - (1 - t) \hat x_0}{t}, \quad
        g = \eta \sqrt{\frac{t}{1 - t}}

    At t = 1 the 1 - t under the root is taken at t' instead. Unlike in Flow-GRPO the last step has no noise.

    References:
        | Flow-GRPO: Training Flow Matching Models via Online RL (Liu et al., 2025)
        | https://arxiv.org/abs/2505.05470

    Args:
        schedule: A flow-matching schedule.
        t: Time of the state, shape ().
        next_t: Time of the next state, shape ().
        eta: The noise level, positive.

    Returns:
        The transition.
    """
    t, next_t = t.float(), next_t.float()
    step = t - next_t
    variance = eta**2 * t / (1 - torch.where(t < 1, t, next_t))
    x_0_scale = step / t * (1 + variance * (1 - t) / (2 * t))
    state_scale = 1 - step / t - variance * step / (2 * t.square())
    return Transition(x_0_scale=x_0_scale, state_scale=state_scale, std=(variance * step).sqrt())


def make_sampler(name: SamplerName, eta: float | None = None) -> Sampler:
    """A sampler by name.

    Args:
        name: Its name.
        eta: How random it is, see each sampler; None is :data:`DEFAULT_ETA`.

    Returns:
        A function from the schedule, a time and the next time to the :class:`Transition` between them.

    Example:
        >>> sampler = make_sampler("cps", 0.5)
        >>> round(sampler(FlowMatching(), torch.tensor(0.5), torch.tensor(0.25)).std.item(), 4)
        0.1768
    """
    if name == "renoise":
        return renoise
    functions: dict[str, Callable[..., Transition]] = {"ddim": ddim, "flow_sde": flow_sde, "cps": cps}
    return partial(functions[name], eta=DEFAULT_ETA[name] if eta is None else eta)


def suits(name: SamplerName, schedule: NoiseSchedule) -> bool:
    """Whether a sampler is made for a schedule.

    Example:
        >>> suits("ddim", FlowMatching()), suits("cps", FlowMatching())
        (False, True)
    """
    return name == "renoise" or (name in ("flow_sde", "cps")) == isinstance(schedule, FlowMatching)


@torch.no_grad()
def rollout(
    policy: X0Predictor,
    batch: PromptBatch,
    schedule: NoiseSchedule,
    times: Tensor,
    *,
    shape: Sequence[int],
    generator: Generators,
    sampler: Sampler = renoise,
    step_noise: StepNoise = normal,
) -> Rollout:
    """Walk the policy from noise to samples and record every state and prediction, without a graph.

    Noise is drawn in the order of a diffusers pipeline: the initial state, then one draw for each random step. Where
    the batch names the seeds of its initial noises, these are drawn from the seeds alone.

    Args:
        policy: The student.
        batch: The prompts, N rows.
        schedule: The noise schedule.
        times: Time of each step, shape (K,), falling from 1.
        shape: The latent shape (C, H, W).
        generator: One generator, or one for each sample.
        sampler: How to go from one state to the next.
        step_noise: Draws the noise of a random step; a pipeline of packed latents draws it in another order.

    Returns:
        The recorded chains.
    """
    count, device = len(batch.prompts), times.device
    initial = generator
    if batch.noise_seeds is not None:
        initial = [seeded_generator(seed, "initial_noise") for seed in batch.noise_seeds]
    states, predictions, transitions = [normal((count, *shape), initial, device)], [], []
    for step, t in enumerate(times):
        predictions.append(policy(states[-1], t.expand(count), batch.conditioning))
        if step + 1 < len(times):
            transition = sampler(schedule, t, times[step + 1])
            noise = step_noise((count, *shape), generator, device) if transition.std else None
            states.append(transition.next_state(predictions[-1], states[-1], noise))
            transitions.append(transition)
    return Rollout(
        batch=batch,
        times=times,
        states=torch.stack(states),
        x_0=torch.stack(predictions),
        transitions=tuple(transitions),
    )


@torch.no_grad()
def ode_solution(
    network: X0Predictor, x_t: Tensor, t: float, conditioning: Conditioning, schedule: NoiseSchedule, steps: int
) -> Tensor:
    r"""The end of the deterministic sampler that starts at a state.

    Each step goes along the straight line in :math:`(\hat x_0, \hat\epsilon)`, that is DDIM with :math:`\eta = 0` for a
    variance-preserving schedule and an Euler step for flow matching.

    References:
        | Denoising Diffusion Implicit Models (Song et al., 2020), eq. 12
        | https://arxiv.org/abs/2010.02502

    Args:
        network: The teacher, guidance included.
        x_t: States, shape (N, C, H, W).
        t: Their common time, in (0, 1].
        conditioning: Encoded prompts, N rows.
        schedule: The noise schedule.
        steps: Steps from noise, that is from t = 1; a start at lower noise takes proportionally fewer.

    Returns:
        The solutions, shape (N, C, H, W).
    """
    count = max(1, math.ceil(steps * t - 1e-6))
    return _deterministic_steps(network, x_t, schedule.descent(t, count), conditioning, schedule)


@torch.no_grad()
def ode_chord(
    network: X0Predictor,
    x_t: Tensor,
    t: float,
    conditioning: Conditioning,
    schedule: NoiseSchedule,
    steps: int,
    walked: int,
) -> Tensor:
    r"""The prediction that leads in one deterministic step to where the first steps of the sampler lead.

    If these end in :math:`x_s`, it is :math:`\frac{x_s - (\sigma_s / \sigma_t) x_t}{\alpha_s - (\sigma_s / \sigma_t)
    \alpha_t}`; for flow matching, where the chord's velocity leads at time 0.

    References:
        | Progressive Distillation for Fast Sampling of Diffusion Models (Salimans and Ho, 2022), appendix G
        | https://arxiv.org/abs/2202.00512

    Args:
        network: As in :func:`ode_solution`.
        x_t: As there.
        t: As there.
        conditioning: As there.
        schedule: As there.
        steps: Steps of the whole sampler, from t.
        walked: How many of them are made, at least 1.

    Returns:
        The predictions of x_0, shape (N, C, H, W).
    """
    times = schedule.descent(t, steps)[: walked + 1]
    x_s = _deterministic_steps(network, x_t, times, conditioning, schedule)
    start, end = times[0].to(x_t.device), times[-1].to(x_t.device)
    ratio = schedule.sigma(end) / schedule.sigma(start)
    return (x_s - ratio * x_t) / (schedule.alpha(end) - ratio * schedule.alpha(start))


def _deterministic_steps(
    network: X0Predictor, x_t: Tensor, times: Tensor, conditioning: Conditioning, schedule: NoiseSchedule
) -> Tensor:
    """Where the deterministic sampler comes from the first to the last of some times."""
    for now, then in pairwise(times.to(x_t.device)):
        x_0 = network(x_t, now.expand(len(x_t)), conditioning)
        noise = (x_t - schedule.alpha(now) * x_0) / schedule.sigma(now)
        x_t = schedule.alpha(then) * x_0 + schedule.sigma(then) * noise
    return x_t


def over_dimensions(values: Tensor, level: Level) -> Tensor:
    """The sum over a sample's dimensions (``sample``) or their mean (``dimension``).

    Args:
        values: Shape (..., C, H, W).
        level: Which of the two.

    Returns:
        Shape (...).

    Raises:
        ValueError: If the level is unknown.

    Example:
        >>> over_dimensions(torch.ones(2, 1, 3, 4), "sample"), over_dimensions(torch.ones(2, 1, 3, 4), "dimension")
        (tensor([12., 12.]), tensor([1., 1.]))
    """
    flat = values.flatten(-3)
    match level:
        case "dimension":
            return flat.mean(-1)
        case "sample":
            return flat.sum(-1)
    raise ValueError(f"importance_sampling_level={level!r} is unknown; use 'dimension' or 'sample'.")


def log_ratio(
    action: Tensor,
    x_0: Tensor,
    old_x_0: Tensor,
    transition: Transition,
    state: Tensor | None = None,
    level: Level = "sample",
) -> Tensor:
    r"""How much likelier a recorded step is now: :math:`\log \rho = \log \pi_\theta(x'|x) - \log \pi_{old}(x'|x)`.

    Written with the difference :math:`\Delta = a(\hat x_0 - \hat x_{0,old})`, so that equal predictions give exactly 0.

    Args:
        action: The state that was reached, x', shape (N, C, H, W).
        x_0: The current prediction.
        old_x_0: The prediction when the step was made.
        transition: How the step is made; its std is positive.
        state: The state it started from; None where b = 0.
        level: Summed over the dimensions, or their mean.

    Returns:
        The log ratio, shape (N,).
    """
    difference = append_dims(transition.x_0_scale, action) * (x_0 - old_x_0)
    error = action - transition.mean(old_x_0, state)
    variance = append_dims(transition.std, action).square()
    return over_dimensions(difference * (2 * error - difference) / (2 * variance), level)


def kl_divergence(x_0: Tensor, reference_x_0: Tensor, transition: Transition, level: Level = "sample") -> Tensor:
    r"""The divergence of one step of the policy from that of a reference policy at the same state, in closed form.

    .. math:: \mathrm{KL}(\pi_\theta \,\|\, \pi_{ref}) = \frac{a^2 \lVert \hat x_0 - \hat x_{0,ref} \rVert^2}{2 s^2}

    Args:
        x_0: The policy's prediction, shape (N, C, H, W).
        reference_x_0: The reference's, the same shape.
        transition: How the step is made; its std is positive.
        level: Summed over the dimensions, or their mean.

    Returns:
        The divergence, shape (N,).
    """
    scaled = append_dims(transition.x_0_scale / transition.std, x_0) * (x_0 - reference_x_0)
    return over_dimensions(0.5 * scaled.square(), level)


@dataclass
class PolicySettings:
    """The few-step policy."""

    num_inference_steps: Count = setting(4, "Steps K of the student.")
    num_generations: Count = setting(
        8,
        "Samples G of each prompt; a group is never split. `per_device_train_batch_size` counts samples and must be a "
        "multiple of it.",
    )
    sampler: SamplerName = setting(
        "renoise",
        "How the policy goes from step to step: `renoise`, `ddim`, or, for flow models, `flow_sde` or `cps`.",
    )
    eta: Size | None = setting(
        None,
        "How random `ddim`, `flow_sde` and `cps` are in training. Default: 1, 0.7 and 0.9. The saved student walks "
        "with 0.",
    )
    random_times: RandomTimes | None = setting(
        None,
        "Train on walks down to one of up to so many random times, of which only the last is learnt from, instead of "
        "on the student's own K (CDM: 28). Needs `eta=0`, with `ddim` or, for flow models, `cps` or `flow_sde`.",
    )
    guidance_scale: Finite = setting(
        1.0,
        "Guidance of the policy itself, in rollouts and updates alike. The saved student needs it too. Refused beside "
        "`rdm` and a warm start, except for a network that is told its guidance (FLUX.1-dev, an LCM U-Net).",
    )
    group_noise: Literal["own", "shared"] = setting(
        "own", "Whether each generation starts from its `own` noise, or those of one prompt from a `shared` one."
    )
    noise_pool: NoisePool | None = setting(
        None,
        "Number of initial noises for each prompt, drawn from again and again, so that a teacher's images of them can "
        "be kept. Default: always new ones.",
    )
