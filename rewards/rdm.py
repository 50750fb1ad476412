"""Distribution matching as a reward: ``"rdm"`` in ``reward_funcs``."""

import torch
from torch import Tensor

from rdm_rl.noise_schedule import NoiseSchedule
from rdm_rl.policy import X0Predictor, ode_chord
from rdm_rl.randomness import Generators, normal
from rdm_rl.ratio import RecordedDistributionMatching
from rdm_rl.records import Direction, Rollout, Transition
from rdm_rl.renoise import anneal_progress, group_times
from rdm_rl.rewards.protocol import RewardContext, RewardInfo

ANCHOR_STEPS = (30, 5)  # The whole sampler's, and how many of them are made.


class DistributionMatchingReward:
    r"""R_dm, with the settings of the run (``dm_*``, ``renoise_*``, ``num_renoise``, ``teacher_guidance_scale``).

    The mathematics is :func:`rdm_rl.rdm.distribution_matching`, which the trainer's hook of a similar name calls; this
    object draws the re-noisings and asks the networks. The value is :math:`-\mathrm{mean}_{CHW}(\mu_{real} -
    \mu_{fake})^2`, the integrand of a Fisher divergence: 0 when the student's distribution is the teacher's.
    """

    name = "rdm"
    info = RewardInfo(
        description="The student's distribution is the teacher's: distribution matching, R_dm.",
        paper="R_dm: Re-conceptualizing Distribution Matching as a Reward for Diffusion Distillation "
        "(Fan et al., 2026), https://arxiv.org/abs/2603.28460",
        units="minus the mean squared difference of two predictions of x_0",
        expected_range="at most 0, and 0 when the distributions are equal",
    )

    def __init__(self) -> None:
        """Wait for the networks."""
        self._context: RewardContext | None = None

    def bind(self, context: RewardContext) -> None:
        """Take the networks and the settings."""
        self._context = context

    def direction(self, rollout: Rollout, step: int, *, generator: Generators) -> Direction:
        """Where the teacher would rather see a step's predictions than the fake score does; its metric is :func:`gap`.

        With ``first_step_anchor`` the first step is drawn to the teacher's own first steps instead. The direction is
        applicable everywhere; the arguments are those of :class:`DirectionReward`.

        Raises:
            RuntimeError: If the reward was not bound to networks.
        """
        if self._context is None:
            raise RuntimeError("The reward 'rdm' needs the networks: RDMTrainer calls bind() before training.")
        args, networks, schedule = self._context.args, self._context.networks, self._context.networks.family.schedule
        x_0, conditioning, groups = rollout.x_0[step], rollout.batch.conditioning, rollout.batch.group_ids
        teacher = networks.predictor("teacher", self._context.teacher_guidance_scale)
        if step == 0 and args.first_step_anchor:
            return anchored(rollout, teacher, schedule, args.first_step_anchor)
        progress = anneal_progress(self._context.global_step(), args.renoise_anneal_steps)
        fake_score = networks.predictor("fake_score")
        times, noisy = [], []
        for _ in range(args.num_renoise):
            t = group_times(
                groups,
                generator,
                distribution=args.renoise_distribution,
                interval=args.renoise_range,
                progress=progress,
            )
            times.append(t)
            noisy.append(schedule.perturb(x_0, normal(x_0.shape, generator, x_0.device), t))
        with torch.no_grad():
            pairs = list(zip(noisy, times, strict=True))
            teacher_x_0 = torch.stack([teacher(x_t, t, conditioning) for x_t, t in pairs])
            fake_x_0 = torch.stack([fake_score(x_t, t, conditioning) for x_t, t in pairs])
        t = torch.stack(times)
        directions = self._context.distribution_matching(x_0, teacher_x_0, fake_x_0, t, groups)
        recorded = None
        if args.num_iterations > 1:  # The rollout is used again.
            recorded = RecordedDistributionMatching(
                values=directions,
                action=torch.stack(noisy),
                x_0=x_0,
                transition=Transition(
                    x_0_scale=schedule.alpha(t), state_scale=torch.zeros_like(t), std=schedule.sigma(t)
                ),
                level=args.importance_sampling_level,
                clip=args.importance_weight_clip,
            )
        return Direction(
            values=directions.mean(0),
            applicable=torch.ones(len(x_0), dtype=torch.bool, device=x_0.device),
            rewards=-(teacher_x_0 - fake_x_0).square().flatten(2).mean((0, 2)),
            metrics={"gap": gap(x_0, teacher_x_0, fake_x_0)},
            recorded=recorded,
        )


def anchored(rollout: Rollout, teacher: X0Predictor, schedule: NoiseSchedule, weight: float) -> Direction:
    """From the first step's predictions towards where the teacher's first steps lead from the same noise.

    References:
        | DP-DMD (2026), https://arxiv.org/abs/2602.03139: 5 of 30 steps

    Args:
        rollout: The recorded chains.
        teacher: The teacher, guidance included.
        schedule: The noise schedule.
        weight: What the difference is multiplied by.
    """
    noise, x_0 = rollout.states[0], rollout.x_0[0]
    away = ode_chord(teacher, noise, rollout.times[0].item(), rollout.batch.conditioning, schedule, *ANCHOR_STEPS) - x_0
    return Direction(
        values=weight * away,
        applicable=torch.ones(len(x_0), dtype=torch.bool, device=x_0.device),
        metrics={"anchor_distance": away.square().mean().sqrt().item()},
    )


def gap(x_0: Tensor, teacher_x_0: Tensor, fake_x_0: Tensor) -> float:
    r"""How far the fake score is from the teacher.

    That is the rms of :math:`\mu_{real} - \mu_{fake}` over that of :math:`\hat x_0 - \mu_{real}`.

    Args:
        x_0: The policy's predictions, shape (N, C, H, W).
        teacher_x_0: The teacher's predictions at R re-noisings of them, shape (R, N, C, H, W).
        fake_x_0: The fake score's there.
    """
    difference = (teacher_x_0 - fake_x_0).square().mean()
    return (difference / (x_0 - teacher_x_0).square().mean().clamp_min(1e-24)).sqrt().item()
