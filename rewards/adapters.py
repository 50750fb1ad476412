r"""Plain rewards as directions: what turns a callable into what the trainer asks for.

A differentiable reward wants :math:`\hat x_0` to move along its gradient (ReFL, DRaFT, AlignProp); a reward that is
only watched has no direction.

References:
    | ImageReward: Learning and Evaluating Human Preferences for Text-to-Image Generation (Xu et al., 2023), ReFL
    | https://arxiv.org/abs/2304.05977
    | Directly Fine-Tuning Diffusion Models on Differentiable Rewards (Clark et al., 2023), DRaFT
    | https://arxiv.org/abs/2309.17400
"""

from collections.abc import Callable

import torch

from rdm_rl.data_types import DenseAdvantage, Rollout
from rdm_rl.randomness import Generators
from rdm_rl.rewards.registry import RewardContext
from rdm_rl.rewards.scoring import PlainReward, RewardOutput


class PlainRewardAdapter:
    """What the two adapters share: binding, and asking the reward.

    Args:
        name: The reward's name.
        function: The callable.
    """

    def __init__(self, name: str, function: Callable[..., object]) -> None:
        """Read the reward's declarations."""
        self.name = name
        self.reward = PlainReward(name, function)
        self._context: RewardContext | None = None

    def bind(self, context: RewardContext) -> None:
        """Take the decoder and the settings.

        Args:
            context: What the trainer gives before training.
        """
        self._context = context
        args = context.args
        self.reward.batch_size, self.reward.timeout = args.reward_batch_size, args.reward_timeout
        self.reward.on_error, self.reward.last_checkpoint = args.on_reward_error, context.last_checkpoint
        if hasattr(self.reward.function, "prepare"):
            self.reward.function.prepare()

    @property
    def context(self) -> RewardContext:
        """What the trainer gave."""
        if self._context is None:
            raise RuntimeError(f"The reward {self.name!r} needs a decoder: RDMTrainer calls bind() before training.")
        return self._context

    def start(self, rollout: Rollout, step: int, *, gradient: bool) -> Callable[[], RewardOutput]:
        """Begin to ask the reward about a recorded step.

        Args:
            rollout: The recorded chains of N samples.
            step: Index of the step.
            gradient: Whether its gradient at what it looks at is wanted.

        Returns:
            A function that waits for the answer.
        """
        inputs = rollout.x_0[step] if self.reward.inputs == "latents" else self.context.decoder.images(rollout, step)
        teacher_images = self.context.teacher_images(rollout) if self.reward.wants_teacher_images else None
        return self.reward.start(inputs, rollout.batch, gradient=gradient, teacher_images=teacher_images)


class PathwiseReward(PlainRewardAdapter):
    r"""A differentiable reward: the direction is :math:`\nabla_{\hat x_0} r(\mathrm{decode}(\hat x_0), c)`.

    It acts on the last step, whose prediction is the sample that the reward is meant for, or on any step if
    ``pathwise_steps="any"``.
    """

    def direction(self, rollout: Rollout, step: int, *, generator: Generators) -> DenseAdvantage:
        """The gradient of the reward at the predictions of a step.

        Args:
            rollout: The recorded chains of N samples.
            step: Index of the step that will be replayed.
            generator: Not used: a reward draws nothing.

        Returns:
            The direction, shape (N, C, H, W); not applicable where the reward is not, or the step is not its.

        Raises:
            RewardError: If the reward fails and that is not to be skipped.
        """
        x_0 = rollout.x_0[step]
        if self.context.args.pathwise_steps == "last" and step != len(rollout.times) - 1:
            nowhere = torch.zeros(len(x_0), dtype=torch.bool, device=x_0.device)
            return DenseAdvantage(values=torch.zeros_like(x_0), applicable=nowhere)
        output = self.start(rollout, step, gradient=True)()
        values = torch.zeros_like(x_0) if output.gradient is None else output.gradient
        applicable, faults = output.applicable, output.faults
        if self.reward.inputs == "images":
            values = self.context.decoder.pull_back(x_0, values)
            overflown = applicable & ~values.flatten(1).isfinite().all(1)
            if bool(overflown.any()):
                prompts = [rollout.batch.prompts[place] for place in overflown.nonzero().flatten().tolist()]
                faults += self.reward.fault(
                    prompts, ValueError("its gradient overflows on the way through the decoder")
                )
                applicable = applicable & ~overflown
        return DenseAdvantage(
            values=values,
            applicable=applicable,
            reward=output.values.masked_fill(~applicable, torch.nan),
            faults=faults,
        )


class WatchedReward(PlainRewardAdapter):
    """A reward with the weight 0: evaluated on the finished samples and logged, without a direction."""

    def __init__(self, name: str, function: Callable[..., object]) -> None:
        """Nothing is being waited for yet."""
        super().__init__(name, function)
        self._waiting: tuple[Rollout, Callable[[], RewardOutput]] | None = None

    def prefetch(self, rollout: Rollout) -> None:
        """Begin to ask the reward, so that other rewards work while it does.

        Args:
            rollout: The recorded chains.
        """
        self._waiting = rollout, self.start(rollout, -1, gradient=False)

    def direction(self, rollout: Rollout, step: int, *, generator: Generators) -> DenseAdvantage:
        """The reward of the finished samples, and no direction.

        Args:
            rollout: The recorded chains of N samples.
            step: Not used: the finished samples are judged.
            generator: Not used.

        Returns:
            A direction that applies nowhere, with the values as its reward.

        Raises:
            RewardError: If the reward fails and that is not to be skipped.
        """
        waiting, self._waiting = self._waiting, None
        if waiting is None or waiting[0] is not rollout:
            waiting = rollout, self.start(rollout, -1, gradient=False)
        output = waiting[1]()
        x_0 = rollout.x_0[step]
        return DenseAdvantage(
            values=torch.zeros_like(x_0),
            applicable=torch.zeros(len(x_0), dtype=torch.bool, device=x_0.device),
            reward=output.values,
            faults=output.faults,
        )
