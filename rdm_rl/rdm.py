r"""THE METHOD, on one page: few-step distillation as policy optimisation, with distribution matching as a reward.

The policy :math:`G_\theta`, the frozen teacher and the fake score (an online score model of the policy's own samples)
are wrapped to predict x_0. ``RDMTrainer.training_step`` makes one update in this order, with these functions:

.. code-block:: text

    rollout      the policy walks K steps from noise, without a graph                 rdm_rl.policy.rollout
    fake score   a few denoising updates on the rollout's predictions                 fake_score_loss
    rewards      k is one recorded step, the same for all samples; each reward judges the samples, and has a
                 direction A_j in which it wants xhat_0 of step k to move:
                   distribution matching   (mu_real(x_t) - mu_fake(x_t)) / s          distribution_matching
                   differentiable reward   grad r(decode(xhat_0))                     rdm_rl.rewards.kinds
                   black-box reward        advantage x ratio x score of its noise     normalize_rewards, policy_gradient
    weights      A = sum_j lambda_j A_j                                               combine; lambda: rdm_rl.weighting
    policy       step k again with a graph, and xhat_0 moved along A                  policy_loss

Shapes: N samples, the generations of a prompt neighbours; x_0, x_t, noise and directions (N, C, H, W); times and
rewards (N,). State, optimisers and randomness are the trainer's: every function here is pure.
Left out: DMD2's GAN term and DMDR's DynaDG.

References:
    | R_dm: Re-conceptualizing Distribution Matching as a Reward for Diffusion Distillation (Fan et al., 2026)
    | https://arxiv.org/abs/2603.28460 (abstract only; docs/method.md lists what is reconstructed)
    | One-step Diffusion with Distribution Matching Distillation (Yin et al., 2023), eq. 7-8
    | https://arxiv.org/abs/2311.18828
    | Training Diffusion Models with Reinforcement Learning (Black et al., 2023), section 4.3
    | https://arxiv.org/abs/2305.13301
    | DeepSeekMath (Shao et al., 2024), section 4.1.2: advantages relative to a group
    | https://arxiv.org/abs/2402.03300
"""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from rdm_rl.noise_schedule import NoiseSchedule, PredictionType, append_dims, denoising_weight
from rdm_rl.policy import Level, X0Predictor
from rdm_rl.records import Conditioning, Direction, LossOutput, Transition

Normalization = Literal["sample", "group", "group_rms", "none"]
RewardScale = Literal["group", "batch", "none"]
RewardBaseline = Literal["group", "batch"]
LARGEST_LOG_RATIO = 20.0  # A bad sample pushes no harder than with a ratio of 5e8; further up, float32 overflows.


# ----- the fake score -----


def fake_score_loss(
    fake_score: X0Predictor,
    x_0: Tensor,
    conditioning: Conditioning,
    t: Tensor,
    noise: Tensor,
    schedule: NoiseSchedule,
    prediction_type: PredictionType,
) -> LossOutput:
    """The denoising loss of the fake score on the policy's samples, in the units of the network's own output.

    Args:
        fake_score: The fake score.
        x_0: Predictions of the policy, without a graph.
        conditioning: Their prompts.
        t: A time for each, in (0, 1].
        noise: Standard normal noise.
        schedule: The noise schedule.
        prediction_type: What the network predicts; its error is what the loss measures.
    """
    predicted = fake_score(schedule.perturb(x_0, noise, t), t, conditioning)
    weight = denoising_weight(schedule.alpha(t), schedule.sigma(t), prediction_type)
    return LossOutput(loss=(weight * (predicted - x_0).square().flatten(1).mean(1)).mean())


# ----- directions -----


@torch.no_grad()
def distribution_matching(
    x_0: Tensor,
    teacher_x_0: Tensor,
    fake_x_0: Tensor,
    group_ids: Tensor,
    normalization: Normalization = "group_rms",
    scale_floor: float = 1e-6,
) -> Tensor:
    r"""R_dm's direction: towards the teacher and away from the fake score, :math:`(\mu_{real} - \mu_{fake})(x_t) / s`.

    R_dm is :math:`\log p_{real}(x_t) - \log p_{fake}(x_t)`; its gradient, the difference of two scores, points along
    the difference of the two predictions. What remains to choose is the scale s, clamped to ``scale_floor`` from below:

    ========================  ========================================================================================
    ``sample`` (DMD, DMD2)    the mean over C, H, W of :math:`|\hat x_0 - \mu_{real}|`; minus their released gradient
    ``group``                 the mean of that over the samples of the prompt
    ``group_rms`` (GNDM)      the root mean square of :math:`\mu_{real} - \mu_{fake}` over them
    ``none``                  1
    ========================  ========================================================================================

    It is never centred over a group: for a vector field that would remove exactly the part that all samples share.

    Args:
        x_0: The policy's predictions at the recorded step.
        teacher_x_0: The teacher's predictions at a re-noising of them.
        fake_x_0: The fake score's there.
        group_ids: Prompt of each sample, shape (N,), int64.
        normalization: The scale s.
        scale_floor: The smallest s.

    Returns:
        The direction, float32.

    Raises:
        ValueError: If shapes do not fit, or a name is unknown.

    Example:
        >>> zero, teacher = torch.zeros(2, 1, 1, 1), torch.tensor([1.0, 3.0]).view(2, 1, 1, 1)
        >>> distribution_matching(zero, teacher, zero, torch.tensor([0, 0]), "group").flatten()
        tensor([0.5000, 1.5000])
    """
    if not teacher_x_0.shape == fake_x_0.shape == x_0.shape or len(group_ids) != len(x_0):
        raise ValueError(
            f"Shapes do not fit: x_0 {tuple(x_0.shape)}, teacher_x_0 {tuple(teacher_x_0.shape)}, "
            f"fake_x_0 {tuple(fake_x_0.shape)}, group_ids {tuple(group_ids.shape)}."
        )

    gap, error = teacher_x_0.float() - fake_x_0.float(), (x_0 - teacher_x_0).float()
    match normalization:
        case "none":
            return gap
        case "sample":
            scale = error.abs().flatten(1).mean(1)
        case "group":
            scale = group_mean(error.abs().flatten(1).mean(1), group_ids)
        case "group_rms":
            scale = group_mean(gap.square().flatten(1).mean(1), group_ids).sqrt()
        case _:
            raise ValueError(f"normalization={normalization!r} is unknown; use sample, group, group_rms or none.")
    return gap / append_dims(scale.clamp_min(scale_floor), gap)


def normalize_rewards(
    rewards: Tensor,
    group_ids: Tensor,
    scale: RewardScale = "group",
    *,
    spread: float = 1.0,
    batch_mean: float | None = None,
) -> Tensor:
    r"""Advantages of black-box rewards: centred on the prompt's group, and divided by a standard deviation.

    The epsilon that keeps a small group's deviation away from 0 is relative to the reward's own spread: units cancel.

    Args:
        rewards: The rewards, NaN where one does not apply; such samples take no part.
        group_ids: Prompt of each sample, shape (N,), int64.
        scale: What divides: the deviation of the ``group``, ``spread`` itself (``batch``), or 1 (``none``).
        spread: Standard deviation of the reward over whole batches.
        batch_mean: The baseline instead of the group's mean; then ``scale`` is ``batch`` or ``none``.

    Returns:
        The advantages, float32; 0 where the reward does not apply and in groups of equal rewards.

    Example:
        >>> normalize_rewards(torch.tensor([1.0, 3.0]), torch.tensor([0, 0]), "none")
        tensor([-1.,  1.])
    """
    values, group_ids, known = rewards.cpu().double(), group_ids.cpu(), ~rewards.isnan().cpu()
    weight, values = known.double(), torch.where(known, values, 0.0)
    share = group_mean(weight, group_ids).clamp_min(1e-12)
    centred = (values - group_mean(values, group_ids) / share) * weight
    # Rounding leaves equal rewards with a deviation that is not quite 0.
    highest = group_max(torch.where(known, values, -torch.inf), group_ids)
    lowest = -group_max(torch.where(known, -values, -torch.inf), group_ids)
    centred = torch.where(highest == lowest, 0.0, centred)
    if batch_mean is not None:
        centred = (values - batch_mean) * weight
    if scale == "batch":
        centred = centred / spread if spread > 0 else torch.zeros_like(centred)
    elif scale == "group":
        deviation = (group_mean(centred.square(), group_ids) / share).sqrt()
        centred = centred / (deviation + 1e-4 * spread).clamp_min(1e-300)
    return centred.float().to(rewards.device)


def policy_gradient(
    error: Tensor,
    transition: Transition,
    advantages: Tensor,
    log_rho: Tensor,
    *,
    level: Level,
    epsilon: float,
    epsilon_high: float,
) -> tuple[Tensor, Tensor]:
    r"""A black box's direction on a random step, :math:`A = c\, \hat A_i\, \rho_i\, a\, (x_{k+1} - \mu_\theta) / s^2`.

    It is 0 where PPO's clip has stopped the sample: :math:`\hat A > 0` and :math:`\rho > 1 + \epsilon_{high}`, or
    :math:`\hat A < 0` and :math:`\rho < 1 - \epsilon`. With c = 1 for level ``dimension`` and c = C H W for ``sample``,
    :func:`policy_loss` along A has the gradient of minus the mean of :math:`\min(\rho \hat A, \mathrm{clip}(\rho)
    \hat A)`.

    Args:
        error: What was drawn minus the current mean, :math:`x_{k+1} - \mu_\theta`, with :math:`\mu = a \hat x_0 + b x`.
        transition: How the step is made: a, b and s > 0.
        advantages: The normalised rewards :math:`\hat A`.
        log_rho: :math:`\log \pi_\theta / \pi_{old}` of the recorded step.
        level: Whether log-likelihoods are means over the dimensions or sums.
        epsilon: The ratio may fall this far below 1.
        epsilon_high: It may rise this far above 1.

    Returns:
        The direction, and where the clip acted, shape (N,), bool.
    """
    rho = log_rho.clamp_max(LARGEST_LOG_RATIO).exp()
    clipped = ((advantages > 0) & (rho > 1 + epsilon_high)) | ((advantages < 0) & (rho < 1 - epsilon))
    factor = torch.where(clipped, 0.0, advantages * rho) * (error[0].numel() if level == "sample" else 1)
    score = append_dims(transition.x_0_scale / transition.std.square(), error) * error
    return append_dims(factor, error) * score, clipped


def group_mean(values: Tensor, group_ids: Tensor) -> Tensor:
    """Each value, shape (..., N), replaced by the mean over its group.

    Example:
        >>> group_mean(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([7, 7, 2]))
        tensor([2., 2., 5.])
    """
    _, inverse, counts = group_ids.unique(return_inverse=True, return_counts=True)
    sums = values.new_zeros((*values.shape[:-1], len(counts))).index_add_(-1, inverse, values)
    means: Tensor = (sums / counts)[..., inverse]
    return means


def group_max(values: Tensor, group_ids: Tensor) -> Tensor:
    """Each value, shape (N,), replaced by the largest of its group."""
    _, inverse = group_ids.unique(return_inverse=True)
    return torch.full_like(values, -torch.inf).scatter_reduce(0, inverse, values, "amax")[inverse]


# ----- one direction, and the policy's loss -----


def combine(directions: Mapping[str, Direction], lambdas: Mapping[str, float]) -> Direction:
    r"""One direction from those of the rewards, :math:`A = \sum_j \lambda_j A_j`, over those that apply to a sample.

    Args:
        directions: The direction of each reward, by name.
        lambdas: Its weight.

    Returns:
        The sum, applicable where any of them is.

    Raises:
        KeyError: If a reward has no weight.
    """
    terms = [
        lambdas[name] * torch.where(append_dims(direction.applicable, direction.values), direction.values, 0.0)
        for name, direction in directions.items()
    ]
    applicable = torch.stack([direction.applicable for direction in directions.values()]).any(0)
    return Direction(values=torch.stack(terms).sum(0), applicable=applicable)


def policy_loss(x_0: Tensor, direction: Direction) -> LossOutput:
    r"""The surrogate whose gradient moves :math:`\hat x_0` along a direction.

    .. math:: L = \tfrac12\, \mathrm{mean}_{N,C,H,W}\, (\hat x_0 - \mathrm{sg}(\hat x_0 + A))^2

    Its value is half the mean square of A and says nothing about progress; its gradient with respect to
    :math:`\hat x_0` is :math:`-A / (N C H W)`. With R_dm alone this is the loss of DMD (eq. 7).

    Args:
        x_0: The predictions at the recorded step, with a graph.
        direction: A.

    Example:
        >>> x_0 = torch.zeros(1, 1, 1, 2, requires_grad=True)
        >>> wish = Direction(values=torch.tensor([[[[2.0, -4.0]]]]), applicable=torch.tensor([True]))
        >>> policy_loss(x_0, wish).loss.backward()
        >>> x_0.grad.flatten()
        tensor([-1.,  2.])
    """
    wish = torch.where(append_dims(direction.applicable, x_0), direction.values, 0.0)
    # The same as x_0 - (x_0 + A).detach(), whose sum would round a small A away.
    return LossOutput(loss=0.5 * (x_0 - x_0.detach() - wish).square().mean())
