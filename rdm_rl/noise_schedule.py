r"""Noise schedules: what :math:`x_t = \alpha_t x_0 + \sigma_t \epsilon` means for a family of models.

Time t lies in [0, 1] and t = 1 is noise. A model that was trained on T discrete timesteps 0 .. T-1 has its timestep n
at t = (n + 1) / T, so the usual four-step list 999, 749, 499, 249 is t = 1, 3/4, 1/2, 1/4.

Every network is wrapped to predict :math:`x_0`, once, at the border; :func:`x_0_from_output` is that wrapping.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

PredictionType = Literal["epsilon", "v_prediction", "sample", "flow"]


def append_dims(value: Tensor, like: Tensor) -> Tensor:
    """The tensor with singleton dimensions appended until it broadcasts over ``like``.

    Args:
        value: Shape (N,) or ().
        like: A tensor with at least as many dimensions.

    Returns:
        A view of shape (N, 1, ..., 1), or () unchanged.

    Example:
        >>> append_dims(torch.zeros(2), torch.zeros(2, 4, 8, 8)).shape
        torch.Size([2, 1, 1, 1])
    """
    return value if value.ndim == 0 else value.reshape(value.shape + (1,) * (like.ndim - value.ndim))


class NoiseSchedule(ABC):
    r"""The pair :math:`\alpha_t, \sigma_t`, and the number that the network receives for t."""

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        r"""Signal scale :math:`\alpha_t`, float32, of the shape of t, which is in [0, 1]."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        r"""Noise scale :math:`\sigma_t`, float32, of the shape of t, which is in [0, 1]."""

    @abstractmethod
    def timestep(self, t: Tensor) -> Tensor:
        """What the network is given as time, of the shape of t."""

    def descent(self, start: float, steps: int) -> Tensor:
        """Times from a start down to clean data, spaced as a many-step sampler of the model spaces them.

        Args:
            start: The first time, in (0, 1].
            steps: Steps to 0.

        Returns:
            The times, shape (steps + 1,), float32, falling from ``start`` to 0.
        """
        return torch.linspace(start, 0, steps + 1)

    def spaced(self, even: Tensor, steps: int) -> Tensor:
        """Times that lie among those of the model's sampler as even ones lie among even ones.

        Args:
            even: Times in [0, 1], any shape.
            steps: Steps of that sampler.
        """
        return even

    def perturb(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        r"""A noisy sample, :math:`x_t = \alpha_t x_0 + \sigma_t \epsilon`.

        Args:
            x_0: Clean samples, shape (N, ...).
            noise: Standard normal noise of the same shape.
            t: Time, shape (N,) or (), in [0, 1].

        Returns:
            The noisy samples, of the shape of x_0.
        """
        return append_dims(self.alpha(t), x_0) * x_0 + append_dims(self.sigma(t), x_0) * noise


@dataclass(frozen=True)
class VariancePreserving(NoiseSchedule):
    r"""The discrete variance-preserving schedule of DDPM and Stable Diffusion: :math:`\alpha^2 + \sigma^2 = 1`.

    References:
        | Denoising Diffusion Probabilistic Models (Ho et al., 2020), eq. 4
        | https://arxiv.org/abs/2006.11239

    Args:
        alphas_cumprod: :math:`\bar\alpha_n`, shape (T,), falling, as a diffusers scheduler holds it.

    Example:
        >>> schedule = VariancePreserving(torch.tensor([0.9, 0.5, 0.1]))
        >>> schedule.timestep(torch.tensor([1.0, 1 / 3]))
        tensor([2, 0])
    """

    alphas_cumprod: Tensor

    def timestep(self, t: Tensor) -> Tensor:
        """The nearest trained timestep, int64 in 0 .. T-1; every t below 1/T maps to 0."""
        steps = len(self.alphas_cumprod)
        return (t * steps).round().long().sub(1).clamp(0, steps - 1)

    def _alpha_bar(self, t: Tensor) -> Tensor:
        value = self.alphas_cumprod.to(t.device)[self.timestep(t)]
        # t = 0 is clean data, which lies below the first trained timestep.
        return torch.where(t > 0, value, torch.ones_like(value))

    def alpha(self, t: Tensor) -> Tensor:
        r"""Signal scale :math:`\sqrt{\bar\alpha}`."""
        return self._alpha_bar(t).sqrt()

    def sigma(self, t: Tensor) -> Tensor:
        r"""Noise scale :math:`\sqrt{1 - \bar\alpha}`."""
        return (1 - self._alpha_bar(t)).sqrt()


@dataclass(frozen=True)
class FlowMatching(NoiseSchedule):
    r"""The straight path of rectified flow: :math:`\alpha_t = 1 - t`, :math:`\sigma_t = t`.

    References:
        | Flow Straight and Fast (Liu et al., 2022), eq. 1, with the direction of time reversed
        | https://arxiv.org/abs/2209.03003

    Args:
        steps: What the network's time is multiplied by.
        shift: How much more of a sampler's steps lie at high noise, at least 1: evenly spaced u become
            shift u / (1 + (shift - 1) u), as in Stable Diffusion 3 (Esser et al., 2024, eq. 23).
        shift_per_step: What each step of a sampler multiplies the shift by: in FLUX.2, fewer steps lie higher.

    Example:
        >>> FlowMatching().alpha(torch.tensor(0.25))
        tensor(0.7500)
        >>> FlowMatching(shift=3.0).descent(1.0, 2)
        tensor([1.0000, 0.7500, 0.0000])
    """

    steps: int = 1000
    shift: float = 1.0
    shift_per_step: float = 1.0

    def descent(self, start: float, steps: int) -> Tensor:
        """Times evenly spaced before the shift."""
        shift = self._shift(steps)
        times = self.spaced(torch.linspace(start / (shift - (shift - 1) * start), 0, steps + 1), steps)
        times[0] = start  # Exactly: the rounding of there and back would leave a gap to the given state.
        return times

    def spaced(self, even: Tensor, steps: int) -> Tensor:
        """The shifted times; 1 stays exactly 1."""
        shift = self._shift(steps)
        return torch.where(even == 1, even, shift * even / (1 + (shift - 1) * even))

    def _shift(self, steps: int) -> float:
        return self.shift * self.shift_per_step**steps

    def timestep(self, t: Tensor) -> Tensor:
        """The time times ``steps``, float32."""
        return t.float() * self.steps

    def alpha(self, t: Tensor) -> Tensor:
        """Signal scale 1 - t."""
        return 1 - t.float()

    def sigma(self, t: Tensor) -> Tensor:
        """Noise scale t."""
        return t.float()


def x_0_from_output(output: Tensor, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor, kind: PredictionType) -> Tensor:
    r"""The clean sample that a network's output stands for.

    ========================  ================================================
    kind                      :math:`\hat x_0`
    ========================  ================================================
    ``epsilon``               :math:`(x_t - \sigma_t\,\mathrm{out})/\alpha_t`
    ``v_prediction``          :math:`\alpha_t x_t - \sigma_t\,\mathrm{out}`
    ``sample``                out
    ``flow``                  :math:`x_t - t\,\mathrm{out}` with :math:`t=\sigma_t`
    ========================  ================================================

    References:
        | Progressive Distillation for Fast Sampling of Diffusion Models (Salimans and Ho, 2022), section 4, appendix D
        | https://arxiv.org/abs/2202.00512

    Args:
        output: The network's output, shape (N, C, H, W).
        x_t: Its input, the same shape.
        alpha_t: Signal scale, shape (N,) or ().
        sigma_t: Noise scale, shape (N,) or ().
        kind: What the network predicts.

    Returns:
        The prediction of x_0, shape (N, C, H, W).

    Raises:
        ValueError: If the kind is unknown.

    Example:
        >>> one = torch.ones(1, 1, 1, 1)
        >>> x_0_from_output(one, one, torch.tensor(0.6), torch.tensor(0.8), "v_prediction").item()
        -0.19999998807907104
    """
    alpha_t, sigma_t = append_dims(alpha_t, x_t), append_dims(sigma_t, x_t)
    match kind:
        case "epsilon":
            return (x_t - sigma_t * output) / alpha_t
        case "v_prediction":
            return alpha_t * x_t - sigma_t * output
        case "sample":
            return output
        case "flow":
            return x_t - sigma_t * output
    raise ValueError(f"prediction type {kind!r} is unknown; use 'epsilon', 'v_prediction', 'sample' or 'flow'.")


def denoising_weight(alpha_t: Tensor, sigma_t: Tensor, kind: PredictionType) -> Tensor:
    r"""The factor that turns a squared error of :math:`\hat x_0` into that of the network's own output.

    :math:`\alpha^2/\sigma^2` for ``epsilon``, :math:`1/\sigma^2` for ``v_prediction`` and ``flow``, 1 for ``sample``:
    with it a denoising loss written in x_0 is the loss the model was pretrained with.

    Args:
        alpha_t: Signal scale, shape (N,).
        sigma_t: Noise scale, shape (N,), positive.
        kind: What the network predicts.

    Returns:
        The weight, shape (N,), float32.

    Raises:
        ValueError: If the kind is unknown.

    Example:
        >>> denoising_weight(torch.tensor([0.6]), torch.tensor([0.5]), "v_prediction")
        tensor([4.])
    """
    match kind:
        case "epsilon":
            return (alpha_t / sigma_t).square()
        case "v_prediction" | "flow":
            return sigma_t.square().reciprocal()
        case "sample":
            return torch.ones_like(sigma_t)
    raise ValueError(f"prediction type {kind!r} is unknown; use 'epsilon', 'v_prediction', 'sample' or 'flow'.")
