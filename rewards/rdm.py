"""Distribution matching as a reward: ``"rdm"`` in ``reward_funcs``."""

import torch

from rdm_rl.randomness import Generators, normal
from rdm_rl.rdm import distribution_matching
from rdm_rl.records import DenseAdvantage, Rollout
from rdm_rl.renoise import anneal_progress, group_times
from rdm_rl.rewards.protocol import RewardContext, RewardInfo


class DistributionMatchingReward:
    """R_dm, with the settings of the run (``dm_*``, ``renoise_*``, ``num_renoise``, ``teacher_guidance_scale``).

    The mathematics is :func:`rdm_rl.rdm.distribution_matching`; this object draws the re-noisings and asks the
    networks.
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
        """Take the networks and the settings.

        Args:
            context: What the trainer gives before training.
        """
        self._context = context

    def direction(self, rollout: Rollout, step: int, *, generator: Generators) -> DenseAdvantage:
        """Where the teacher would rather see the predictions of a step than the fake score does.

        Args:
            rollout: The recorded chains of N samples.
            step: Index of the step that will be replayed.
            generator: One generator, or one for each sample.

        Returns:
            The direction, shape (N, C, H, W).

        Raises:
            RuntimeError: If the reward was not bound to networks.
        """
        if self._context is None:
            raise RuntimeError("The reward 'rdm' needs the networks: RDMTrainer calls bind() before training.")
        args, networks = self._context.args, self._context.networks
        x_0, groups = rollout.x_0[step], rollout.batch.group_ids
        progress = anneal_progress(self._context.global_step(), args.renoise_anneal_steps)
        times, noises = [], []
        for _ in range(args.num_renoise):
            times.append(
                group_times(
                    groups,
                    generator,
                    distribution=args.renoise_distribution,
                    interval=args.renoise_range,
                    progress=progress,
                )
            )
            noises.append(normal(x_0.shape, generator, x_0.device))
        return distribution_matching(
            x_0,
            rollout.batch.conditioning,
            groups,
            teacher=networks.predictor("teacher", self._context.teacher_guidance_scale),
            fake_score=networks.predictor("fake_score"),
            schedule=networks.family.schedule,
            t=torch.stack(times),
            noise=torch.stack(noises),
            normalization=args.dm_normalization,
            group=args.dm_group,
            scale_floor=args.dm_scale_floor,
            reuse=(args.importance_sampling_level, args.importance_weight_clip) if args.num_iterations > 1 else None,
        )
