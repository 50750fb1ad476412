r"""The four ways in which a reward acts, behind one interface: the trainer knows no kind.

=============================  ================================================================================
kind                           direction
=============================  ================================================================================
:class:`DirectedReward`        its own: ``rdm``, and any object with a ``direction`` method
:class:`PathwiseReward`        the gradient of the reward through the decoder (ReFL, DRaFT)
:class:`PolicyGradientReward`  of a black box: through the likelihood of the policy's random steps (DDPO, GRPO)
:class:`WatchedReward`         none: a reward with the weight 0 is evaluated and logged
=============================  ================================================================================

Everywhere, ``rollout`` holds the recorded chains of N samples, ``step`` is the index of the step that will be replayed,
and a direction is of shape (N, C, H, W).

References:
    | ImageReward: Learning and Evaluating Human Preferences for Text-to-Image Generation (Xu et al., 2023), ReFL
    | https://arxiv.org/abs/2304.05977
    | Directly Fine-Tuning Diffusion Models on Differentiable Rewards (Clark et al., 2023), DRaFT
    | https://arxiv.org/abs/2309.17400
    | Training Diffusion Models with Reinforcement Learning (Black et al., 2023), DDPO
    | https://arxiv.org/abs/2305.13301
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from rdm_rl.randomness import Generators
from rdm_rl.ratio import RecordedPolicyGradient, at_recorded
from rdm_rl.records import Direction, Judgement, Rollout
from rdm_rl.rewards.calling import PlainReward, RewardOutput, check_columns
from rdm_rl.rewards.model import RewardModel
from rdm_rl.rewards.protocol import BindableReward, DirectionReward, RewardContext


class TrainingReward(ABC):
    """A reward as the trainer uses it: it judges samples first, and has a direction then."""

    needs_likelihood: ClassVar[bool] = False
    """Whether it acts through the likelihood of random steps."""

    needs_fake_score: ClassVar[bool] = False
    """Whether it may use the networks, and with them the fake score."""

    wants_teacher_images: bool = False
    """Whether it compares with the teacher's images."""

    begins_early: ClassVar[bool] = False
    """Whether :meth:`begin` starts anything: then its answer is waited for last."""

    @abstractmethod
    def bind(self, context: RewardContext) -> None:
        """Take what the trainer gives before training."""

    def acts_on(self, step: int, rollout: Rollout) -> bool:
        """Whether the reward has a direction on a step."""
        return True

    def begin(self, rollout: Rollout, step: int) -> None:  # noqa: B027  # Most have nothing to begin.
        """Begin to ask, so that other rewards work while it does; the judgement of that step is asked for next."""

    @abstractmethod
    def judge(self, rollout: Rollout, step: int, *, generator: Generators) -> Judgement:
        """What the reward says of the samples at a step, with a direction unless that needs advantages.

        The ``generator`` is the reward's randomness: one generator, or one for each sample.

        Raises:
            RewardError: If the reward fails and that is not to be skipped.
        """

    def direction(self, rollout: Rollout, step: int, judgement: Judgement, advantages: Tensor) -> Direction:
        """Where the samples should move, for a reward whose judgement does not say it.

        Args:
            rollout: The recorded chains.
            step: Index of the step.
            judgement: What the reward said of it.
            advantages: Its normalised rewards, shape (N,).
        """
        raise NotImplementedError(f"{type(self).__name__} gives its direction with its judgement.")


class DirectedReward(TrainingReward):
    """A reward that knows its direction: ``rdm``, or an object of the user's."""

    needs_fake_score = True

    def __init__(self, reward: DirectionReward) -> None:
        """Keep the object."""
        self.reward = reward

    def bind(self, context: RewardContext) -> None:
        """Hand on what the trainer gives."""
        if isinstance(self.reward, BindableReward):
            self.reward.bind(context)

    def acts_on(self, step: int, rollout: Rollout) -> bool:
        """Whether it acts on a step; an object that does not say acts on every one."""
        return not hasattr(self.reward, "acts_on") or bool(self.reward.acts_on(step, rollout))

    def judge(self, rollout: Rollout, step: int, *, generator: Generators) -> Judgement:
        """The direction, and the values that came with it."""
        direction = self.reward.direction(rollout, step, generator=generator)
        return Judgement(rewards=direction.rewards, direction=direction, metrics=direction.metrics)


class AskedReward(TrainingReward):
    """A reward that is a callable: binding, and asking it."""

    def __init__(self, name: str, function: Callable[..., object]) -> None:
        """Read the reward's declarations."""
        self.name = name
        self.reward = PlainReward(name, function)
        self.wants_teacher_images = self.reward.wants_teacher_images
        self._context: RewardContext | None = None

    def bind(self, context: RewardContext) -> None:
        """Take the decoder and the settings."""
        self._context = context
        args = context.args
        self.reward.batch_size, self.reward.timeout = args.reward_batch_size, args.reward_timeout
        self.reward.on_error, self.reward.last_checkpoint = args.on_reward_error, context.last_checkpoint
        if "rewards" in args.offload and isinstance(self.reward.function, RewardModel):
            self.reward.function.offload = True
        if hasattr(self.reward.function, "prepare"):
            self.reward.function.prepare()

    @property
    def context(self) -> RewardContext:
        """What the trainer gave."""
        if self._context is None:
            raise RuntimeError(f"The reward {self.name!r} needs a decoder: RDMTrainer calls bind() before training.")
        return self._context

    def start(self, rollout: Rollout, step: int, *, gradient: bool) -> Callable[[], RewardOutput]:
        """Begin to ask about a step, with the gradient at the inputs or not; what is returned waits for the answer."""
        inputs = rollout.x_0[step] if self.reward.inputs == "latents" else self.context.decoder.images(rollout, step)
        teacher_images = self.context.teacher_images(rollout) if self.reward.wants_teacher_images else None
        return self.reward.start(inputs, rollout.batch, gradient=gradient, teacher_images=teacher_images)


class PathwiseReward(AskedReward):
    r"""A differentiable reward: the direction is :math:`D\, \nabla_{\hat x_0} r(\mathrm{decode}(\hat x_0), c)`.

    With D = C H W, :func:`~rdm_rl.rdm.policy_loss` along it descends the mean of :math:`-r` over the samples: a fixed
    weight is that of the papers' losses, whose reward term is a mean over samples, and not over pixels, too.

    It acts on the last step, whose prediction is the sample that the reward is meant for, or on any step if
    ``pathwise_steps="any"``.
    """

    def acts_on(self, step: int, rollout: Rollout) -> bool:
        """Whether the reward has a direction on a step."""
        return self.context.args.pathwise_steps == "any" or step == len(rollout.times) - 1

    def judge(self, rollout: Rollout, step: int, *, generator: Generators) -> Judgement:
        """The values at the predictions of a step and their gradient, which is the direction."""
        x_0 = rollout.x_0[step]
        if not self.acts_on(step, rollout):
            return Judgement(rewards=None, direction=Direction.nowhere(x_0))
        output = self.start(rollout, step, gradient=True)()
        values = torch.zeros_like(x_0) if output.gradient is None else output.gradient
        applicable, faults = output.applicable, output.faults
        if self.reward.inputs == "images":
            values = self.context.decoder.pull_back(x_0, values)
            overflown = applicable & ~values.flatten(1).isfinite().all(1)
            if bool(overflown.any()):
                prompts = [rollout.batch.prompts[place] for place in overflown.nonzero().flatten().tolist()]
                error = ValueError("its gradient overflows on the way through the decoder")
                faults += self.reward.fault(prompts, error)
                applicable = applicable & ~overflown
        rewards = output.values.masked_fill(~applicable, torch.nan)
        values = values * x_0[0].numel()
        return Judgement(rewards=rewards, direction=Direction(values=values, applicable=applicable), faults=faults)


class FinalImageReward(AskedReward):
    """A reward that judges the finished samples alone: it is asked once for each rollout."""

    begins_early = True

    def __init__(self, name: str, function: Callable[..., object]) -> None:
        """Nothing is being waited for yet."""
        super().__init__(name, function)
        self._waiting: tuple[Rollout, Callable[[], RewardOutput]] | None = None
        self._known: tuple[Rollout, RewardOutput] | None = None

    def begin(self, rollout: Rollout, step: int) -> None:
        """Ask in a thread of its own, unless the answer is known."""
        if self._known is None or self._known[0] is not rollout:
            self._waiting = rollout, self.start(rollout, -1, gradient=False)

    def output(self, rollout: Rollout) -> RewardOutput:
        """The values of the finished samples; faults are counted when they are first asked for."""
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

    def judge(self, rollout: Rollout, step: int, *, generator: Generators) -> Judgement:
        """The values of the finished samples, and no direction."""
        output = self.output(rollout)
        return Judgement(rewards=output.values, direction=Direction.nowhere(rollout.x_0[step]), faults=output.faults)


class PolicyGradientReward(FinalImageReward):
    r"""A black box: the finished sample's reward, credited to the noise that a random step drew.

    On step k the direction is :math:`\hat A_i \rho_i \nabla_{\hat x_0} \log \pi_\theta(x_{k+1} | x_k)` (see
    :func:`rdm_rl.rdm.policy_gradient`), whose advantages :math:`\hat A` need the rewards of all samples first.

    Args:
        name: The reward's name.
        function: The callable.
        opposed: Whether its weight is negative, so that a low value is the good one.
    """

    needs_likelihood = True

    def __init__(self, name: str, function: Callable[..., object], *, opposed: bool = False) -> None:
        """Note whether high values are to be avoided."""
        super().__init__(name, function)
        self._sign = -1.0 if opposed else 1.0

    def acts_on(self, step: int, rollout: Rollout) -> bool:
        """Whether the step is random: a likelihood is needed."""
        return rollout.is_random(step)

    def begin(self, rollout: Rollout, step: int) -> None:
        """Begin to ask the reward, if it acts on the step."""
        if self.acts_on(step, rollout):
            super().begin(rollout, step)

    def judge(self, rollout: Rollout, step: int, *, generator: Generators) -> Judgement:
        """The values of the finished samples, if the step is random."""
        if not self.acts_on(step, rollout):
            return Judgement(rewards=None, direction=Direction.nowhere(rollout.x_0[step]))
        output = self.output(rollout)
        return Judgement(rewards=output.values, direction=None, faults=output.faults)

    def direction(self, rollout: Rollout, step: int, judgement: Judgement, advantages: Tensor) -> Direction:
        """The gradient of the clipped surrogate, at the recorded prediction and at any other.

        The advantages, shape (N,), are clipped to ``advantage_clip`` on both sides.

        Raises:
            ValueError: If the judgement has no values.
        """
        if judgement.rewards is None:
            raise ValueError(f"The reward {self.name!r} is a black box: without values it has no direction.")
        args, transition, factor = self.context.args, rollout.transitions[step], self._sign
        if args.step_weighting == "std":
            spreads = torch.stack([each.std for each in rollout.transitions if each.std > 0])
            factor *= (transition.std / spreads.mean()).item()
        low, high = args.clip_range
        signal = RecordedPolicyGradient(
            action=rollout.states[step + 1],
            state=rollout.states[step],
            x_0=rollout.x_0[step],
            transition=transition,
            level=args.importance_sampling_level,
            epsilon=low,
            epsilon_high=high,
            # With a negative weight, what PPO's clip takes for good is the opposite; factor and weight undo the sign.
            advantages=self._sign * advantages.clamp(-args.advantage_clip, args.advantage_clip),
            factor=factor,
        )
        return at_recorded(signal, ~judgement.rewards.isnan())


def as_training_rewards(
    rewards: Mapping[str, Any], weights: Mapping[str, float], columns: Sequence[str], *, pathwise: bool = True
) -> dict[str, TrainingReward]:
    """Rewards of any kind as the trainer uses them.

    Args:
        rewards: The rewards by name.
        weights: Their weights. A plain reward with the weight 0 is only watched.
        columns: The data set's columns beside the prompt.
        pathwise: Whether differentiable rewards act by their gradient; else they are black boxes, too.

    Raises:
        ValueError: If a column is missing.
    """
    made: dict[str, TrainingReward] = {}
    for name, reward in rewards.items():
        if isinstance(reward, DirectionReward):
            made[name] = DirectedReward(reward)
            continue
        check_columns(name, reward, columns)
        if weights[name] == 0:
            made[name] = WatchedReward(name, reward)
        elif pathwise and getattr(reward, "differentiable", False):
            made[name] = PathwiseReward(name, reward)
        else:
            made[name] = PolicyGradientReward(name, reward, opposed=weights[name] < 0)
    return made
