r"""Samplers: how the policy goes from one state to the next, as a Gaussian whose mean is linear in its prediction.

.. math:: \pi_\theta(x_{k+1} \mid x_k) = N(a\, \hat x_0 + b\, x_k,\ s^2 I), \qquad \hat x_0 = G_\theta(x_k, t_k, c)

The last step of every sampler goes to t = 0 and is deterministic: its prediction is the sample.

========================  ============================================================================
sampler                   for
========================  ============================================================================
:func:`renoise`             few-step students: forget the state, renoise the prediction; any schedule
:func:`ddim`                many-step policies of variance-preserving models, with ``eta`` in [0, 1]
:func:`flow_sde`            flow models: the SDE with the marginals of the flow
:func:`cps`                 flow models: coefficients-preserving sampling, whose noise level is exact
========================  ============================================================================
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from rdm_rl.noise_schedule import FlowMatching, NoiseSchedule, append_dims

SamplerName = Literal["renoise", "ddim", "flow_sde", "cps"]

# How random each sampler is when the user does not say: as in DDPO, Flow-GRPO and RTDMD.
DEFAULT_ETA: dict[SamplerName, float] = {"ddim": 1.0, "flow_sde": 0.7, "cps": 0.9}


@dataclass(frozen=True, kw_only=True)
class Transition:
    r"""One step of the policy given its prediction: :math:`x' \sim N(a\,\hat x_0 + b\,x,\ s^2 I)`.

    Args:
        x_0_scale: The factor a of the prediction, any shape that :func:`append_dims` broadcasts: (), (N,) or (R, N).
        state_scale: The factor b of the state, the same shape.
        std: The standard deviation s, the same shape; 0 for a deterministic step.

    Example:
        >>> step = renoise(FlowMatching(), torch.tensor(1.0), torch.tensor(0.25))
        >>> step.x_0_scale, step.state_scale, step.std
        (tensor(0.7500), tensor(0.), tensor(0.2500))
    """

    x_0_scale: Tensor
    state_scale: Tensor
    std: Tensor

    def mean(self, x_0: Tensor, state: Tensor | None = None) -> Tensor:
        """The mean of the next state.

        Args:
            x_0: The prediction, shape (..., N, C, H, W).
            state: The state it was made at, the same shape; None where b = 0.

        Returns:
            The mean, of the shape of x_0.
        """
        mean = append_dims(self.x_0_scale, x_0) * x_0
        return mean if state is None else mean + append_dims(self.state_scale, x_0) * state


Sampler = Callable[[NoiseSchedule, Tensor, Tensor], Transition]


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
