"""The records that pass between the rooms of the library: frozen, named, checked once where they are made.

Notation for shapes: P prompts, G generations of each, N = P * G samples (the G samples of a prompt are neighbours),
K student steps, (C, H, W) the latent shape.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from rdm_rl.noise_schedule import append_dims


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """What a network is told besides the noisy sample and its time, one row for each sample.

    Args:
        tensors: The network's own inputs by name, each of shape (N, ...); for Stable Diffusion that is
            ``encoder_hidden_states`` of shape (N, L, E).

    Raises:
        ValueError: If the tensors disagree about N.

    Example:
        >>> conditioning = Conditioning(tensors={"encoder_hidden_states": torch.zeros(2, 16, 64)})
        >>> len(conditioning.repeat(4))
        8
    """

    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check that every tensor has one row for each sample."""
        sizes = {name: len(value) for name, value in self.tensors.items()}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"Every conditioning tensor needs one row for each sample; got {sizes}.")

    def __len__(self) -> int:
        """Number of samples; 0 for a network without conditioning."""
        return len(next(iter(self.tensors.values()))) if self.tensors else 0

    def to(self, device: torch.device) -> "Conditioning":
        """The same rows on another device."""
        return Conditioning(tensors={key: value.to(device) for key, value in self.tensors.items()})

    def repeat(self, count: int) -> "Conditioning":
        """Each row repeated ``count`` times, neighbours together: (N, ...) becomes (N * count, ...)."""
        return Conditioning(tensors={key: value.repeat_interleave(count, 0) for key, value in self.tensors.items()})

    def then(self, other: "Conditioning") -> "Conditioning":
        """The rows of this record followed by those of another one."""
        return Conditioning(
            tensors={key: torch.cat([value, other.tensors[key]]) for key, value in self.tensors.items()}
        )


@dataclass(frozen=True, kw_only=True)
class PromptBatch:
    """The prompts of one batch of samples, and who each sample is.

    Args:
        prompts: The prompt of each sample, length N, group-contiguous.
        conditioning: The encoded prompts, N rows.
        group_ids: Index of the prompt of each sample, shape (N,), int64; equal for the samples of one prompt.
        sample_ids: Number of each sample in the whole run, over all processes and micro-batches. It seeds the
            sample's noise, so a sample does not depend on how a batch is cut.
        columns: The data set's other columns, each of length N.
        noise_seeds: Seed of each sample's initial noise, length N, where noises are named: those shared by a group, or
            paired with a teacher's images. None: they come from the rollout's generators.
        stream: The phase of the run, so that phases do not share random numbers.
        update: The update it belongs to, which seeds its noise too.

    Raises:
        ValueError: If the lengths differ.
    """

    prompts: Sequence[str]
    conditioning: Conditioning
    group_ids: Tensor
    sample_ids: Sequence[int]
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    noise_seeds: Sequence[int] | None = None
    stream: str = "train"
    update: int = 0

    def __post_init__(self) -> None:
        """Check the lengths."""
        sizes = {
            "prompts": len(self.prompts),
            "group_ids": len(self.group_ids),
            "sample_ids": len(self.sample_ids),
            **{f"columns[{name!r}]": len(values) for name, values in self.columns.items()},
        }
        if self.noise_seeds is not None:
            sizes["noise_seeds"] = len(self.noise_seeds)
        if self.conditioning.tensors:
            sizes["conditioning"] = len(self.conditioning)
        if len(set(sizes.values())) > 1:
            raise ValueError(f"Every field of a prompt batch has one entry for each sample; got {sizes}.")


@dataclass(frozen=True, kw_only=True)
class Transition:
    r"""One step of the policy given its prediction: :math:`x' \sim N(a\,\hat x_0 + b\,x,\ s^2 I)`.

    Args:
        x_0_scale: The factor a of the prediction, any shape that :func:`append_dims` broadcasts: () or (N,).
        state_scale: The factor b of the state, the same shape.
        std: The standard deviation s, the same shape; 0 for a deterministic step.

    Example:
        >>> step = Transition(x_0_scale=torch.tensor(0.75), state_scale=torch.tensor(0.5), std=torch.tensor(0.25))
        >>> step.mean(torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1)).flatten()
        tensor([1.2500])
    """

    x_0_scale: Tensor
    state_scale: Tensor
    std: Tensor

    def mean(self, x_0: Tensor, state: Tensor | None = None) -> Tensor:
        """The mean of the next state.

        Args:
            x_0: The prediction, shape (..., N, C, H, W).
            state: The state it was made at, the same shape; None where b = 0.

        Returns:
            The mean, of the shape of x_0.
        """
        mean = append_dims(self.x_0_scale, x_0) * x_0
        return mean if state is None else mean + append_dims(self.state_scale, x_0) * state

    def next_state(self, x_0: Tensor, state: Tensor, noise: Tensor | None) -> Tensor:
        """Where the step leads with this noise.

        Args:
            x_0: The prediction, shape (N, C, H, W).
            state: The state it was made at, the same shape; not looked at where b = 0.
            noise: Standard normal noise, the same shape; None where s = 0.

        Returns:
            The next state, of the shape of x_0.
        """
        mean = self.mean(x_0, state if self.state_scale else None)
        return mean if noise is None else mean + append_dims(self.std, x_0) * noise


@dataclass(frozen=True, kw_only=True)
class Rollout:
    r"""The chains of states from noise to sample that the policy walked, recorded without a graph.

    Step k = 0 .. K-1 goes from state :math:`x_k` at time :math:`t_k` to the prediction :math:`\hat x_0`; the last
    prediction is the sample.

    Args:
        batch: The prompts.
        times: Time of each step, shape (K,), in (0, 1], falling; 1 is noise.
        states: The state that each step started from, shape (K, N, C, H, W).
        x_0: The policy's prediction at each step, shape (K, N, C, H, W).
        transitions: How each step but the last went on from its prediction, length K - 1; none if that is not known,
            and then no step has a likelihood.

    Raises:
        ValueError: If the shapes differ, or the number of prompts is not N.
    """

    batch: PromptBatch
    times: Tensor
    states: Tensor
    x_0: Tensor
    transitions: Sequence[Transition] = ()

    def __post_init__(self) -> None:
        """Check the shapes."""
        if self.states.shape != self.x_0.shape or len(self.times) != len(self.states):
            raise ValueError(
                f"states {tuple(self.states.shape)} and x_0 {tuple(self.x_0.shape)} must both be (K, N, C, H, W) with "
                f"K = {len(self.times)} times."
            )
        if self.states.shape[1] != len(self.batch.prompts):
            raise ValueError(f"{self.states.shape[1]} samples but {len(self.batch.prompts)} prompts.")
        if len(self.transitions) not in (0, len(self.times) - 1):
            raise ValueError(f"{len(self.transitions)} transitions between {len(self.times)} steps.")

    def is_random(self, step: int) -> bool:
        """Whether a step's next state was drawn, so that it has a likelihood; the last step's never is."""
        return 0 <= step < len(self.transitions) and bool(self.transitions[step].std > 0)

    def only(self, step: int) -> "Rollout":
        """One step of the chains, counted as in a list, as chains of their own: its predictions are the samples."""
        return replace(self, times=self.times[[step]], states=self.states[[step]], x_0=self.x_0[[step]], transitions=())

    @property
    def sample(self) -> Tensor:
        """The finished samples, shape (N, C, H, W): the prediction of the last step."""
        return self.x_0[-1]


@dataclass(frozen=True, kw_only=True)
class Reweighted:
    r"""A direction at the current prediction, and how far the policy has moved since the rollout.

    Args:
        values: The direction, shape (N, C, H, W).
        log_ratio: :math:`\log \rho` of the recorded random steps, shape (N,).
        weight: What the recorded directions were multiplied by, shape (N,).
        clipped: Where a clip acted, shape (N,), bool.
    """

    values: Tensor
    log_ratio: Tensor
    weight: Tensor
    clipped: Tensor


class RecordedSignal(Protocol):
    """What makes a direction anew for another prediction, through the likelihood of a recorded step."""

    def at(self, x_0: Tensor) -> Reweighted:
        """The direction at a prediction, shape (N, C, H, W), without a graph."""
        ...


@dataclass(frozen=True, kw_only=True)
class Direction:
    r"""Where one reward, or all of them together, want each sample's :math:`\hat x_0` to move.

    Args:
        values: A vector field over :math:`\hat x_0`, shape (N, C, H, W). A trainer makes no update of what is not
            finite.
        applicable: Whether there is an opinion on the sample, shape (N,), bool. Where it is False the direction counts
            as absent, whatever ``values`` holds.
        rewards: The reward itself for the log, shape (N,), NaN where it has no value, or None.
        metrics: Further numbers for the log.
        recorded: For a direction that depends on the current prediction: what makes it anew (see :mod:`rdm_rl.ratio`).
            ``values`` is its value at the recorded prediction.

    Raises:
        ValueError: If the shapes differ.
    """

    values: Tensor
    applicable: Tensor
    rewards: Tensor | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    recorded: RecordedSignal | None = None

    def __post_init__(self) -> None:
        """Check the shapes."""
        if self.applicable.dtype != torch.bool or self.applicable.shape != self.values.shape[:1]:
            raise ValueError(
                f"applicable must be bool of shape ({len(self.values)},); got {self.applicable.dtype} "
                f"{tuple(self.applicable.shape)}."
            )

    @classmethod
    def nowhere(cls, x_0: Tensor) -> "Direction":
        """The direction of a reward that has no opinion on any of the samples, shape (N, C, H, W)."""
        return cls(values=torch.zeros_like(x_0), applicable=torch.zeros(len(x_0), dtype=torch.bool, device=x_0.device))


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """What one reward says of the samples at a recorded step.

    Args:
        rewards: Its values, shape (N,), NaN where it does not apply; None for a reward that gives no values.
        direction: Where it wants the samples to move, if that came with the values, as a gradient does; None for a
            black box, whose direction needs the advantages of all samples first.
        faults: Samples on which it failed and was skipped.
        metrics: Further numbers for the log.

    Raises:
        ValueError: If it has neither rewards nor a direction.
    """

    rewards: Tensor | None
    direction: Direction | None
    faults: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check that it says anything."""
        if self.rewards is None and self.direction is None:
            raise ValueError("A judgement has rewards or a direction: without either the samples cannot be moved.")


@dataclass(frozen=True, kw_only=True)
class LossOutput:
    """A loss to differentiate and what to log beside it.

    Args:
        loss: The loss, shape ().
        metrics: Numbers for the log.
    """

    loss: Tensor
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Experience:
    """One recorded step of a rollout and where the rewards want it to move: what a policy update learns from.

    Args:
        rollout: The recorded chains.
        step: Index of the step.
        directions: The direction of each reward, by name.
    """

    rollout: Rollout
    step: int
    directions: Mapping[str, Direction]
