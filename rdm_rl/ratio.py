r"""Directions that depend on the current policy, through the likelihood of a random step that an older one took.

=====================================  ==============================================================================
record                                 direction at the current prediction
=====================================  ==============================================================================
:class:`RecordedPolicyGradient`        of a black-box reward: the gradient of the clipped PPO surrogate
:class:`RecordedDistributionMatching`  of distribution matching on a rollout that is used again: :math:`\rho A_{old}`
=====================================  ==============================================================================

A rollout stores what was drawn and under which prediction; the ratio :math:`\rho = \pi_\theta / \pi_{old}` then needs
the current prediction alone. On unchanged weights it is 1, and :func:`check_unmoved` makes sure of that.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from rdm_rl.noise_schedule import append_dims
from rdm_rl.policy import Level, log_ratio
from rdm_rl.rdm import LARGEST_LOG_RATIO, RewardBaseline, RewardScale, policy_gradient
from rdm_rl.records import Direction, Reweighted, Transition
from rdm_rl.settings import Count, Positive, Share, Size, setting

# How far from 0 the log ratio of unchanged weights may be, by precision and level. Equal batch shapes give exactly 0 on
# a CPU; other kernels round differently, and the sum over D dimensions adds their errors up.
RATIO_TOLERANCE: Mapping[tuple[bool, Level], float] = {
    (True, "dimension"): 1e-4,
    (True, "sample"): 1e-2,
    (False, "dimension"): 1e-2,
    (False, "sample"): 1.0,
}


@dataclass(frozen=True, kw_only=True)
class RecordedPolicyGradient:
    r"""A black-box reward's direction on a random step of the sampler (method page, "The policy gradient").

    Args:
        action: The state that was reached, :math:`x_{k+1}`, shape (N, C, H, W).
        state: The state it started from, :math:`x_k`, the same shape.
        x_0: The prediction that the policy made then, the same shape.
        transition: How the sampler went on from it.
        level: Level of the ratio.
        epsilon: The ratio may fall to 1 - epsilon before a bad sample stops pushing.
        epsilon_high: It may rise to 1 + epsilon_high before a good one does.
        advantages: The normalised rewards, shape (N,).
        factor: A number for this step that multiplies the direction.
    """

    action: Tensor
    state: Tensor
    x_0: Tensor
    transition: Transition
    level: Level
    epsilon: float
    epsilon_high: float
    advantages: Tensor
    factor: float = 1.0

    def at(self, x_0: Tensor) -> Reweighted:
        """The direction at a prediction.

        Args:
            x_0: The current prediction, shape (N, C, H, W), without a graph.

        Returns:
            The direction.
        """
        log_rho = log_ratio(self.action, x_0, self.x_0, self.transition, self.state, self.level)
        values, clipped = policy_gradient(
            self.action - self.transition.mean(x_0, self.state),
            self.transition,
            self.advantages,
            log_rho,
            level=self.level,
            epsilon=self.epsilon,
            epsilon_high=self.epsilon_high,
        )
        weight = log_rho.clamp_max(LARGEST_LOG_RATIO).exp()
        return Reweighted(values=self.factor * values, log_ratio=log_rho, weight=weight, clipped=clipped)


@dataclass(frozen=True, kw_only=True)
class RecordedDistributionMatching:
    r"""Distribution matching's direction on a rollout that is used again: :math:`w A`.

    The action is the re-noised sample :math:`x_t \sim N(\alpha_t \hat x_0, \sigma_t^2 I)` itself. The score difference
    there does not depend on the policy, so the stored direction stays exact while teacher and fake score stand still,
    and the truncated weight :math:`w = \mathrm{clip}(\rho, 1 - c, 1 + c)` accounts for the change of the policy that
    draws it. (The scale that it was divided by, and the state it started from, are those of the old policy.)

    Args:
        values: The direction A, shape (N, C, H, W).
        action: The re-noised samples, the same shape.
        x_0: The prediction that was re-noised, the same shape.
        transition: :math:`\alpha_t`, 0 and :math:`\sigma_t`, each of shape (N,).
        level: Level of the ratio.
        clip: The c above; 0 uses the direction without the ratio.
    """

    values: Tensor
    action: Tensor
    x_0: Tensor
    transition: Transition
    level: Level
    clip: float

    def at(self, x_0: Tensor) -> Reweighted:
        """The direction at a prediction.

        Args:
            x_0: The current prediction, shape (N, C, H, W), without a graph.

        Returns:
            The direction.
        """
        log_rho = log_ratio(self.action, x_0, self.x_0, self.transition, level=self.level)
        ratio = log_rho.exp()
        weight = ratio.clamp(1 - self.clip, 1 + self.clip)
        values = append_dims(weight, self.values) * self.values
        return Reweighted(values=values, log_ratio=log_rho, weight=weight, clipped=weight != ratio)


def at_recorded(signal: RecordedPolicyGradient, applicable: Tensor) -> Direction:
    """The direction of a black box at the prediction that the policy made then.

    Args:
        signal: What was recorded.
        applicable: Where the reward has a value, shape (N,), bool.

    Returns:
        The direction, which also says what it is at any other prediction.
    """
    return Direction(values=signal.at(signal.x_0).values, applicable=applicable, recorded=signal)


def ratio_metrics(reweighted: Reweighted) -> dict[str, float]:
    """What the log says of the ratios of one direction.

    Args:
        reweighted: The direction at the current prediction.

    Returns:
        Mean, lowest and highest log ratio, the share of samples on which the clip acted, and the effective sample size
        of the weights as a share of their number.

    Example:
        >>> import torch
        >>> ratio = torch.tensor([1.0, 3.0])
        >>> seen = Reweighted(values=torch.zeros(2), log_ratio=ratio.log(), weight=ratio, clipped=ratio > 2)
        >>> ratio_metrics(seen)["clip_fraction"], round(ratio_metrics(seen)["effective_sample_size"], 3)
        (0.5, 0.8)
    """
    weight = reweighted.weight.double() if reweighted.weight.device.type != "mps" else reweighted.weight
    return {
        "log_ratio_mean": reweighted.log_ratio.mean().item(),
        "log_ratio_min": reweighted.log_ratio.min().item(),
        "log_ratio_max": reweighted.log_ratio.max().item(),
        "clip_fraction": reweighted.clipped.float().mean().item(),
        "effective_sample_size": (
            weight.sum().square() / (weight.numel() * weight.square().sum()).clamp_min(1e-30)
        ).item(),
    }


def check_unmoved(name: str, log_ratio: Tensor, level: Level, *, exact: bool) -> None:
    """Check that a policy that has not been updated since the rollout agrees with it.

    Args:
        name: The reward, for the message.
        log_ratio: Log ratios before the first update on a rollout, any shape.
        level: Their level.
        exact: Whether networks run in float32, rather than in half precision.

    Raises:
        RuntimeError: If one is further from 0 than rounding explains.
    """
    worst, tolerance = log_ratio.abs().max().item(), RATIO_TOLERANCE[exact, level]
    if not worst <= tolerance:
        raise RuntimeError(
            f"The policy has not been updated since the rollout, and yet the log ratio of reward {name!r} reaches "
            f"{worst:.3g} (tolerance {tolerance:g} at importance_sampling_level={level!r}). The policy that is "
            "replayed is not the one that made the samples. Usual causes: guidance in only one of the two (override "
            "generate_rollout and replay_step alike, or set guidance_scale), dropout or train() mode, a change of "
            "dtype or autocast, another batch shape, or weights changed between them."
        )


@dataclass
class PolicyGradientSettings:
    """Policy gradient and reuse of rollouts."""

    num_replayed_steps: Count = setting(
        1, "Recorded steps that are replayed in each policy update, at most all those that a reward acts on."
    )
    num_iterations: Count = setting(
        1, "Policy updates M on each rollout. Fake-score updates and rewards come once for each rollout."
    )
    importance_weight_clip: Share = setting(
        0.2,
        "When a rollout is used again, the direction of `rdm` is weighted by the likelihood ratio, clipped to 1 plus "
        "and minus this; 0 leaves the ratio out.",
    )
    importance_sampling_level: Level = setting(
        "dimension",
        "The log ratio is the mean over a sample's dimensions (`dimension`: a trust region), or their sum (`sample`: "
        "the likelihood, for small models).",
    )
    epsilon: Size | None = setting(
        None,
        "How far a step's likelihood ratio may fall below 1 before its bad sample stops pushing. Default: 1e-4 at "
        "level `dimension` and 0.2 at `sample`.",
    )
    epsilon_high: Size | None = setting(
        None, "How far it may rise above 1 before its good sample does. Default: `epsilon`."
    )
    reward_baseline: RewardBaseline = setting(
        "group",
        "What a black box's rewards are centred on: the mean of the `group`, or of the whole `batch`.",
    )
    scale_rewards: RewardScale = setting(
        "group",
        "What they are then divided by to make advantages: the standard deviation of the `group` or of the `batch` (a "
        "running one), or 1 (`none`).",
    )
    advantage_clip: Positive = setting(5.0, "Advantages are clipped to plus and minus this.")
    step_weighting: Literal["none", "std"] = setting(
        "none",
        "A factor for each step of a policy gradient: `none`, or in proportion to the `std` of its noise, because the "
        "direction grows as the noise shrinks.",
    )
    beta: Size = setting(
        0.0, "Weight of the divergence of the policy's random steps from those it had before the first update."
    )
