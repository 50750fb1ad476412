r"""Dense advantages: the direction in which a reward wants a sample's :math:`\hat x_0` to move.

The reward here is distribution matching, :math:`R_{dm} = \log p_{real}(x_t) - \log p_{fake}(x_t)`, whose gradient at a
re-noised sample is the difference of two scores. In terms of the two networks' predictions of x_0 it points along
:math:`\mu_{real}(x_t) - \mu_{fake}(x_t)`; what remains to choose is the scale it is divided by.

References:
    | One-step Diffusion with Distribution Matching Distillation (Yin et al., 2023), eq. 7-8
    | https://arxiv.org/abs/2311.18828
    | R_dm: Re-conceptualizing Distribution Matching as a Reward for Diffusion Distillation (Fan et al., 2026)
    | https://arxiv.org/abs/2603.28460 (abstract only: the group scale is our reconstruction)
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from rdm_rl.noise_schedule import append_dims
from rdm_rl.records import Transition
from rdm_rl.renoise import Group as Group
from rdm_rl.renoise import Normalization as Normalization

RewardScale = Literal["group", "batch", "none"]
RewardBaseline = Literal["group", "batch"]
LARGEST_LOG_RATIO = 20.0  # A bad sample pushes no harder than with a ratio of 5e8; further up, float32 overflows.


def group_mean(values: Tensor, group_ids: Tensor) -> Tensor:
    """Each value replaced by the mean over its group.

    Args:
        values: Shape (..., N).
        group_ids: Group of each of the N entries, shape (N,), int64, any numbers.

    Returns:
        The means, of the shape of ``values``.

    Example:
        >>> group_mean(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([7, 7, 2]))
        tensor([2., 2., 5.])
    """
    _, inverse, counts = group_ids.unique(return_inverse=True, return_counts=True)
    sums = values.new_zeros((*values.shape[:-1], len(counts))).index_add_(-1, inverse, values)
    means: Tensor = (sums / counts)[..., inverse]
    return means


def distribution_matching_scale(
    x_0: Tensor,
    teacher_x_0: Tensor,
    fake_x_0: Tensor,
    group_ids: Tensor,
    *,
    normalization: Normalization,
    group: Group,
    scale_floor: float,
) -> Tensor:
    r"""The scale s that the distribution-matching direction is divided by.

    ``sample`` is the mean absolute difference of :math:`\hat x_0` and :math:`\mu_{real}` of the sample itself, which is
    what the released code of DMD and DMD2 divides by. ``group`` is the mean of that over the group, ``group_rms`` the
    root mean square of :math:`\mu_{real} - \mu_{fake}` over the group, ``none`` is 1.

    Args:
        x_0: The policy's predictions, shape (N, C, H, W).
        teacher_x_0: The teacher's predictions at R re-noisings of them, shape (R, N, C, H, W).
        fake_x_0: The fake score's, the same shape.
        group_ids: Group of each sample, shape (N,), int64.
        normalization: Which scale.
        group: What ``group`` and ``group_rms`` average over: the samples of a ``prompt``, the R ``renoise`` draws of
            one sample, or both.
        scale_floor: The smallest scale; s is clamped below by it, except for ``none``.

    Returns:
        The scale, shape (R, N, 1, 1, 1), float32.

    Raises:
        ValueError: If a name is unknown.
    """
    if normalization not in get_args(Normalization) or group not in get_args(Group):
        raise ValueError(
            f"normalization={normalization!r}, group={group!r}: use one of {get_args(Normalization)} and of "
            f"{get_args(Group)}."
        )
    if normalization == "none":
        return torch.ones_like(teacher_x_0[:, :, :1, :1, :1], dtype=torch.float32)
    if normalization == "group_rms":
        scale = (teacher_x_0 - fake_x_0).float().square().flatten(2).mean(2)
    else:
        scale = (x_0 - teacher_x_0).float().abs().flatten(2).mean(2)
    if normalization != "sample":
        if group != "renoise":
            scale = group_mean(scale, group_ids)
        if group != "prompt":
            scale = scale.mean(0, keepdim=True).expand_as(scale)
    if normalization == "group_rms":
        scale = scale.sqrt()
    return scale.clamp_min(scale_floor)[:, :, None, None, None]


def distribution_matching_directions(
    x_0: Tensor,
    teacher_x_0: Tensor,
    fake_x_0: Tensor,
    group_ids: Tensor,
    normalization: Normalization = "group",
    scale_floor: float = 1e-6,
    *,
    group: Group = "prompt",
) -> Tensor:
    r"""The distribution-matching direction, :math:`(\mu_{real}(x_t) - \mu_{fake}(x_t)) / s`.

    With ``normalization="sample"`` and one re-noising it equals minus the gradient of the released DMD and DMD2 code.
    With a group of one sample, ``group`` equals ``sample``. Over R re-noisings the direction is the mean; each draw is
    divided by its own s unless ``group`` pools the draws. It is never centred over the group: for a dense direction
    that would remove exactly the part that all samples share.

    Args:
        x_0: The policy's predictions, shape (N, C, H, W).
        teacher_x_0: The teacher's predictions at the re-noised samples, shape (N, C, H, W) or (R, N, C, H, W).
        fake_x_0: The fake score's predictions there, the same shape.
        group_ids: Group of each sample, shape (N,), int64.
        normalization: The scale, see :func:`distribution_matching_scale`.
        scale_floor: The smallest scale.
        group: What a group is.

    Returns:
        The direction of each re-noising, shape (R, N, C, H, W), float32; their mean is the advantage.

    Raises:
        ValueError: If shapes or names do not fit.

    Example:
        >>> zero, teacher = torch.zeros(2, 1, 1, 1), torch.tensor([1.0, 3.0]).view(2, 1, 1, 1)
        >>> distribution_matching_directions(zero, teacher, zero, torch.tensor([0, 0])).flatten()
        tensor([0.5000, 1.5000])
    """
    if teacher_x_0.ndim == x_0.ndim:
        teacher_x_0, fake_x_0 = teacher_x_0[None], fake_x_0[None]
    if teacher_x_0.shape != fake_x_0.shape or teacher_x_0.shape[1:] != x_0.shape or len(group_ids) != len(x_0):
        raise ValueError(
            f"Shapes do not fit: x_0 {tuple(x_0.shape)}, teacher_x_0 {tuple(teacher_x_0.shape)}, "
            f"fake_x_0 {tuple(fake_x_0.shape)}, group_ids {tuple(group_ids.shape)}."
        )
    scale = distribution_matching_scale(
        x_0, teacher_x_0, fake_x_0, group_ids, normalization=normalization, group=group, scale_floor=scale_floor
    )
    return (teacher_x_0.float() - fake_x_0.float()) / scale


def distribution_matching_advantage(
    x_0: Tensor,
    teacher_x_0: Tensor,
    fake_x_0: Tensor,
    group_ids: Tensor,
    normalization: Normalization = "group",
    scale_floor: float = 1e-6,
    *,
    group: Group = "prompt",
) -> Tensor:
    """The mean of :func:`distribution_matching_directions` over the re-noisings; the arguments are the same.

    Returns:
        The direction, shape (N, C, H, W), float32.
    """
    return distribution_matching_directions(
        x_0, teacher_x_0, fake_x_0, group_ids, normalization, scale_floor, group=group
    ).mean(0)


def policy_gradient_advantage(
    error: Tensor,
    transition: Transition,
    advantage: Tensor,
    log_rho: Tensor,
    *,
    level: Literal["dimension", "sample"],
    epsilon: float,
    epsilon_high: float,
) -> tuple[Tensor, Tensor]:
    r"""A black-box reward's direction: what descends PPO's clipped surrogate.

    .. math:: A = c\, \hat A_i\, \rho_i\, a\, (x_{k+1} - \mu_\theta) / s^2

    with the mean :math:`\mu_\theta = a \hat x_0 + b x_k` of the current policy, and 0 where the clip has stopped the
    sample: :math:`\hat A > 0` and :math:`\rho > 1 + \epsilon_{high}`, or :math:`\hat A < 0` and
    :math:`\rho < 1 - \epsilon`. With c = 1 for level ``dimension`` and c = C H W for ``sample``, the loss of
    :func:`rdm_rl.rdm.policy_loss` along A has the gradient of
    :math:`-\mathrm{mean}_N \min(\rho \hat A, \mathrm{clip}(\rho, 1 - \epsilon, 1 + \epsilon_{high}) \hat A)`.

    References:
        | Proximal Policy Optimization Algorithms (Schulman et al., 2017), eq. 7
        | https://arxiv.org/abs/1707.06347
        | Training Diffusion Models with Reinforcement Learning (Black et al., 2023), section 4.3
        | https://arxiv.org/abs/2305.13301

    Args:
        error: What was drawn minus the current mean, :math:`x_{k+1} - \mu_\theta`, shape (N, C, H, W).
        transition: How the step is made; its std is positive.
        advantage: The normalised rewards, shape (N,).
        log_rho: The log ratios, shape (N,).
        level: Level of the ratio.
        epsilon: Lower clip.
        epsilon_high: Upper clip.

    Returns:
        The direction, shape (N, C, H, W), and where the clip acted, shape (N,), bool.
    """
    rho = log_rho.clamp_max(LARGEST_LOG_RATIO).exp()
    clipped = ((advantage > 0) & (rho > 1 + epsilon_high)) | ((advantage < 0) & (rho < 1 - epsilon))
    factor = torch.where(clipped, 0.0, advantage * rho) * (error[0].numel() if level == "sample" else 1)
    score = append_dims(transition.x_0_scale / transition.std.square(), error) * error
    return append_dims(factor, error) * score, clipped


def remove_opposition(values: Tensor, reference: Tensor) -> Tensor:
    r"""A direction without the part that opposes another one, sample by sample.

    Where the inner product with the reference is negative, the component along it is taken out; elsewhere nothing
    changes.

    References:
        | Gradient Surgery for Multi-Task Learning (Yu et al., 2020), algorithm 1, with the reference itself unchanged
        | https://arxiv.org/abs/2001.06782

    Args:
        values: Directions, shape (N, C, H, W).
        reference: Directions they must not oppose, the same shape.

    Returns:
        The projected directions, shape (N, C, H, W).

    Example:
        >>> remove_opposition(torch.tensor([[[[-1.0, 2.0]]]]), torch.tensor([[[[1.0, 0.0]]]])).flatten()
        tensor([0., 2.])
    """
    product = (values * reference).flatten(1).sum(1)
    length = reference.square().flatten(1).sum(1)
    share = torch.where((product < 0) & (length > 0), product / length.clamp_min(1e-30), 0.0)
    return values - share[:, None, None, None] * reference


def normalize_rewards(
    rewards: Tensor,
    applicable: Tensor,
    group_ids: Tensor,
    scale: RewardScale = "group",
    *,
    spread: float = 1.0,
    batch_mean: float | None = None,
) -> Tensor:
    r"""Scalar rewards as advantages: centred on a mean, the group's if no other, and divided by a standard deviation.

    The group's mean is the baseline of group-relative policy optimisation. The epsilon that keeps a small group's
    standard deviation away from 0 is relative to the reward's own spread, so a reward's units cancel.

    References:
        | DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models (Shao et al., 2024), 4.1.2
        | https://arxiv.org/abs/2402.03300

    Args:
        rewards: The rewards, shape (N,).
        applicable: Where they apply, shape (N,), bool; other samples take no part.
        group_ids: Group of each sample, shape (N,), int64.
        scale: What divides: the standard deviation of the ``group``, ``spread`` itself (``batch``), or 1 (``none``).
        spread: Standard deviation of the reward over whole batches.
        batch_mean: The baseline instead of the group's mean; then ``scale`` is ``batch`` or ``none``.

    Returns:
        The advantages, shape (N,), float32; 0 where the reward does not apply and in groups of equal rewards.

    Example:
        >>> group, everywhere = torch.tensor([0, 0]), torch.tensor([True, True])
        >>> normalize_rewards(torch.tensor([1.0, 3.0]), everywhere, group, "none")
        tensor([-1.,  1.])
    """
    device = rewards.device
    rewards, applicable, group_ids = rewards.cpu().double(), applicable.cpu(), group_ids.cpu()
    weight = applicable.double()
    values = torch.where(applicable, rewards, 0.0)
    share = group_mean(weight, group_ids).clamp_min(1e-12)
    centred = (values - group_mean(values, group_ids) / share) * weight
    # Rounding leaves equal rewards with a deviation that is not quite 0.
    _, group = group_ids.unique(return_inverse=True)
    highest = values.new_full((len(values),), -torch.inf).scatter_reduce(
        0, group, values.where(applicable, -torch.inf), "amax"
    )
    lowest = values.new_full((len(values),), torch.inf).scatter_reduce(
        0, group, values.where(applicable, torch.inf), "amin"
    )
    centred = torch.where((highest == lowest)[group], 0.0, centred)
    if batch_mean is not None:
        centred = (values - batch_mean) * weight
    if scale == "batch":
        centred = centred / spread if spread > 0 else torch.zeros_like(centred)
    elif scale == "group":
        deviation = (group_mean(centred.square(), group_ids) / share).sqrt()
        centred = centred / (deviation + 1e-4 * spread).clamp_min(1e-300)
    return centred.float().to(device)
