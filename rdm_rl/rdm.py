r"""THE ALGORITHM, on one page: few-step distillation as policy optimisation with distribution matching as a reward.

One update, with the policy :math:`G_\theta`, the frozen teacher and the fake score (an online score model of the
policy's own samples), all wrapped to predict x_0:

.. code-block:: text

    1. rollout = policy walks K steps from noise                                  (no graph; rdm_rl.policy)
    2. fake score: a few denoising updates on the rollout's predictions            fake_score_loss
    3. k = one recorded step, the same for every sample
       for each reward: a direction A_j in which it wants xhat_0 of step k to move
           distribution matching: re-noise xhat_0 to x_t, A = (mu_real(x_t) - mu_fake(x_t)) / s
           differentiable reward r: A = grad r(decode(xhat_0)) at xhat_0            (rdm_rl.rewards.kinds)
           black-box reward r: A = normalised r times the score of the step's noise  (rdm_rl.ratio)
       A = sum_j lambda_j A_j                                                     (rdm_rl.weighting)
    4. policy: replay step k with gradients and move xhat_0 along A                policy_loss
       (again on the same rollout, with A weighted by how likely it still is, if num_iterations > 1)

``RDMTrainer`` calls these functions in this order; state, optimisers and randomness live there. Every function here is
pure. DMD2's GAN term and DMDR's DynaDG are left out.

References:
    | R_dm: Re-conceptualizing Distribution Matching as a Reward for Diffusion Distillation (Fan et al., 2026)
    | https://arxiv.org/abs/2603.28460 (abstract only; docs/method.md lists what is reconstructed)
    | One-step Diffusion with Distribution Matching Distillation (Yin et al., 2023), eq. 7-8
    | https://arxiv.org/abs/2311.18828
"""

import torch
from torch import Tensor

from rdm_rl.advantages import Group, Normalization, distribution_matching_directions
from rdm_rl.noise_schedule import NoiseSchedule, PredictionType, append_dims, denoising_weight
from rdm_rl.policy import Level, X0Predictor
from rdm_rl.ratio import ReweightedDirection
from rdm_rl.records import Conditioning, DenseAdvantage, LossOutput, Transition


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
        fake_score: The fake score, wrapped to predict x_0.
        x_0: Predictions of the policy, without graph, shape (N, C, H, W).
        conditioning: Their prompts.
        t: A time for each, shape (N,), in (0, 1].
        noise: Standard normal noise, shape (N, C, H, W).
        schedule: The noise schedule.
        prediction_type: What the network predicts; its error is what the loss measures.

    Returns:
        The loss, shape ().
    """
    predicted = fake_score(schedule.perturb(x_0, noise, t), t, conditioning)
    weight = denoising_weight(schedule.alpha(t), schedule.sigma(t), prediction_type)
    loss = (weight * (predicted - x_0).square().flatten(1).mean(1)).mean()
    return LossOutput(loss=loss, metrics={"loss": loss.item()})


@torch.no_grad()
def distribution_matching(
    x_0: Tensor,
    conditioning: Conditioning,
    group_ids: Tensor,
    *,
    teacher: X0Predictor,
    fake_score: X0Predictor,
    schedule: NoiseSchedule,
    t: Tensor,
    noise: Tensor,
    normalization: Normalization = "group",
    group: Group = "prompt",
    scale_floor: float = 1e-6,
    reuse: tuple[Level, float] | None = None,
) -> DenseAdvantage:
    r"""R_dm as a dense advantage: where the teacher would rather see the sample than the fake score does.

    The scalar reported as ``reward`` is :math:`-\mathrm{mean}_{CHW}(\mu_{real} - \mu_{fake})^2`, the integrand of a
    Fisher divergence: 0 when the student's distribution is the teacher's.

    Args:
        x_0: The policy's predictions at the replayed step, shape (N, C, H, W).
        conditioning: Their prompts, N rows.
        group_ids: Index of each sample's prompt, shape (N,), int64.
        teacher: The teacher, guidance included.
        fake_score: The fake score.
        schedule: The noise schedule.
        t: Times of the R re-noisings, shape (R, N), in (0, 1], equal within a group.
        noise: Standard normal noise, shape (R, N, C, H, W).
        normalization: Which scale divides the direction.
        group: What a group is.
        scale_floor: The smallest scale.
        reuse: If the direction will serve several updates: the level of the ratio and the clip of its weight.

    Returns:
        The direction, shape (N, C, H, W), applicable everywhere. Its metric is ``gap``, the root mean square of
        :math:`\mu_{real} - \mu_{fake}` over that of :math:`\hat x_0 - \mu_{real}`.
    """
    noisy = [schedule.perturb(x_0, noise_r, t_r) for noise_r, t_r in zip(noise, t, strict=True)]
    teacher_x_0 = torch.stack([teacher(x_t, t_r, conditioning) for x_t, t_r in zip(noisy, t, strict=True)])
    fake_x_0 = torch.stack([fake_score(x_t, t_r, conditioning) for x_t, t_r in zip(noisy, t, strict=True)])
    values = distribution_matching_directions(
        x_0, teacher_x_0, fake_x_0, group_ids, normalization, scale_floor, group=group
    )
    replay = None
    if reuse is not None:
        drawn = Transition(x_0_scale=schedule.alpha(t), state_scale=torch.zeros_like(t), std=schedule.sigma(t))
        replay = ReweightedDirection(
            values=values, action=torch.stack(noisy), x_0=x_0, transition=drawn, level=reuse[0], clip=reuse[1]
        )
    difference = (teacher_x_0 - fake_x_0).square()
    gap = (difference.mean() / (x_0 - teacher_x_0).square().mean().clamp_min(1e-24)).sqrt()
    return DenseAdvantage(
        values=values.mean(0),
        applicable=torch.ones(len(x_0), dtype=torch.bool, device=x_0.device),
        reward=-difference.flatten(2).mean((0, 2)),
        metrics={"gap": gap.item()},
        replay=replay,
    )


def policy_loss(x_0: Tensor, advantage: DenseAdvantage, weights: Tensor | None = None) -> LossOutput:
    r"""The surrogate whose gradient moves :math:`\hat x_0` along the advantage.

    .. math:: L = \tfrac12\, \mathrm{mean}_{N,C,H,W}\; w_i\, (\hat x_0 - \mathrm{sg}(\hat x_0 + A))^2

    Its value is half the mean square of the advantage and says nothing about progress; its gradient with respect to
    :math:`\hat x_0` is :math:`-w A / (N C H W)`. With R_dm alone this is the loss of DMD (eq. 7).

    Args:
        x_0: The replayed predictions, with graph, shape (N, C, H, W).
        advantage: The combined direction, shape (N, C, H, W).
        weights: A factor for each sample, shape (N,), or None for 1.

    Returns:
        The loss, shape ().

    Example:
        >>> x_0 = torch.zeros(1, 1, 1, 2, requires_grad=True)
        >>> wish = DenseAdvantage(values=torch.tensor([[[[2.0, -4.0]]]]), applicable=torch.tensor([True]))
        >>> policy_loss(x_0, wish).loss.backward()
        >>> x_0.grad.flatten()
        tensor([-1.,  2.])
    """
    mask = append_dims(advantage.applicable, x_0)
    # The same as x_0 - (x_0 + A).detach(), whose sum would round a small A away.
    error = (x_0 - x_0.detach() - torch.where(mask, advantage.values, 0.0)).square()
    loss = 0.5 * (error if weights is None else error * append_dims(weights, error)).mean()
    return LossOutput(loss=loss, metrics={"loss": loss.item()})
