r"""Plain rewards as directions: what turns a callable into what the trainer asks for.

A differentiable reward wants :math:`\hat x_0` to move along its gradient (ReFL, DRaFT, AlignProp); a black box acts
through the likelihood of the policy's random steps (DDPO, GRPO); a reward that is only watched has no direction.

References:
    | ImageReward: Learning and Evaluating Human Preferences for Text-to-Image Generation (Xu et al., 2023), ReFL
    | https://arxiv.org/abs/2304.05977
    | Directly Fine-Tuning Diffusion Models on Differentiable Rewards (Clark et al., 2023), DRaFT
    | https://arxiv.org/abs/2309.17400
    | Training Diffusion Models with Reinforcement Learning (Black et al., 2023), DDPO
    | https://arxiv.org/abs/2305.13301
"""

from collections.abc import Callable
from dataclasses import replace

import torch

from rdm_rl.randomness import Generators
from rdm_rl.ratio import PolicyGradientDirection
from rdm_rl.records import DenseAdvantage, Rollout
from rdm_rl.rewards.calling import PlainReward, RewardOutput
from rdm_rl.rewards.model import RewardModel
from rdm_rl.rewards.protocol import RewardContext


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
        if "rewards" in args.offload and isinstance(self.reward.function, RewardModel):
            self.reward.function.offload = True
        if hasattr(self.reward.function, "prepare"):
            self.reward.function.prepare()

    @property
    def wants_teacher_images(self) -> bool:
        """Whether the reward compares with the teacher's images."""
        return self.reward.wants_teacher_images

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

    def acts_on(self, step: int, rollout: Rollout) -> bool:
        """Whether the reward has a direction on a step."""
        return self.context.args.pathwise_steps == "any" or step == len(rollout.times) - 1

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
        if not self.acts_on(step, rollout):
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


class FinalImageReward(PlainRewardAdapter):
    """What the adapters share that judge the finished samples alone: the reward is asked once for each rollout."""

    def __init__(self, name: str, function: Callable[..., object]) -> None:
        """Nothing is being waited for yet."""
        super().__init__(name, function)
        self._waiting: tuple[Rollout, Callable[[], RewardOutput]] | None = None
        self._known: tuple[Rollout, RewardOutput] | None = None

    def prefetch(self, rollout: Rollout, step: int) -> None:
        """Begin to ask the reward, so that other rewards work while it does.

        Args:
            rollout: The recorded chains.
            step: The step whose direction will be asked for.
        """
        if self._known is None or self._known[0] is not rollout:
            self._waiting = rollout, self.start(rollout, -1, gradient=False)

    def values(self, rollout: Rollout) -> RewardOutput:
        """The reward of the finished samples.

        Args:
            rollout: The recorded chains of N samples.

        Returns:
            The values. Faults are counted when they are first asked for.

        Raises:
            RewardError: If the reward fails and that is not to be skipped.
        """
        if self._known is not None and self._known[0] is rollout:
            return replace(self._known[1], faults=0)
        waiting, self._waiting = self._waiting, None
        if waiting is None or waiting[0] is not rollout:
            waiting = rollout, self.start(rollout, -1, gradient=False)
        output = waiting[1]()
        self._known = rollout, output
        return output


class WatchedReward(FinalImageReward):
    """A reward with the weight 0: evaluated on the finished samples and logged, without a direction."""

    def acts_on(self, step: int, rollout: Rollout) -> bool:
        """It never has a direction."""
        return False

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
        output, x_0 = self.values(rollout), rollout.x_0[step]
        return DenseAdvantage(
            values=torch.zeros_like(x_0),
            applicable=torch.zeros(len(x_0), dtype=torch.bool, device=x_0.device),
            reward=output.values,
            faults=output.faults,
        )


class PolicyGradientReward(FinalImageReward):
    r"""A black box: the finished sample's reward, credited to the noise that a random step drew.

    On step k the direction is :math:`\hat A_i \rho_i \nabla_{\hat x_0} \log \pi_\theta(x_{k+1} | x_k)` (see
    :func:`rdm_rl.advantages.policy_gradient_advantage`). The reward comes first and its normalisation
    :math:`\hat A` later, when the rewards of all samples are known.
    """

    def acts_on(self, step: int, rollout: Rollout) -> bool:
        """Whether the step is random: a likelihood is needed."""
        return rollout.is_random(step)

    def prefetch(self, rollout: Rollout, step: int) -> None:
        """Begin to ask the reward, if it acts on the step."""
        if self.acts_on(step, rollout):
            super().prefetch(rollout, step)

    def direction(self, rollout: Rollout, step: int, *, generator: Generators) -> DenseAdvantage:
        """The reward of the finished samples, with what makes a direction of its advantage.

        Args:
            rollout: The recorded chains of N samples.
            step: Index of the step that will be replayed.
            generator: Not used.

        Returns:
            A direction that is 0 until :func:`rdm_rl.ratio.with_advantage` fills it in; not applicable where the
            reward is not, or on a step that is not random.

        Raises:
            RewardError: If the reward fails and that is not to be skipped.
        """
        x_0, args = rollout.x_0[step], self.context.args
        if not self.acts_on(step, rollout):
            nowhere = torch.zeros(len(x_0), dtype=torch.bool, device=x_0.device)
            return DenseAdvantage(values=torch.zeros_like(x_0), applicable=nowhere)
        output = self.values(rollout)
        factor, transition = 1.0, rollout.transitions[step]
        if args.step_weighting == "std":
            spreads = torch.stack([one.std for one in rollout.transitions if one.std > 0])
            factor = (transition.std / spreads.mean()).item()
        low, high = args.clip_range
        return DenseAdvantage(
            values=torch.zeros_like(x_0),
            applicable=output.applicable,
            reward=output.values,
            faults=output.faults,
            replay=PolicyGradientDirection(
                action=rollout.states[step + 1],
                state=rollout.states[step],
                x_0=x_0,
                transition=transition,
                level=args.importance_sampling_level,
                epsilon=low,
                epsilon_high=high,
                factor=factor,
            ),
        )
