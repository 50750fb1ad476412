r"""How the directions of several rewards become one: the one stateful object of the method.

==========================  ======================================================================================
object                      weight :math:`\lambda_j` of reward j
==========================  ======================================================================================
:class:`FixedWeighting`     :math:`w_j`: DMDR, the control
:class:`AdaptiveWeighting`  :math:`w_j F_{ref} / \mathrm{EMA}(\mathrm{rms} A_j)`: GNDMR, whatever a reward's units
:class:`BudgetedWeighting`  the adaptive one times a factor that keeps a fidelity signal within a budget
==========================  ======================================================================================

For each rollout the trainer measures the rewards and the directions of all samples (:mod:`rdm_rl.statistics`, pure),
shows the weighting what it found (``update``), and then combines the directions of each micro-batch (``combine``). So
the weights do not depend on how a batch is cut, nor on the number of processes.

References:
    | R_dm: Re-conceptualizing Distribution Matching as a Reward for Diffusion Distillation (Fan et al., 2026) joins
    | rewards by "adaptive weighting"; the rule here is our reconstruction (docs/method.md).
    | https://arxiv.org/abs/2603.28460
    | Distribution Matching Distillation Meets Reinforcement Learning (Jiang et al., 2025): one constant weight
    | https://arxiv.org/abs/2511.13649
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from rdm_rl.noise_schedule import append_dims
from rdm_rl.rdm import combine
from rdm_rl.records import Direction
from rdm_rl.settings import Finite, Positive, Whole, setting

Reference = Literal["cold_start", "online"]
RDM = "rdm"  # The reward whose force the others are measured by.
NO_DIRECTION = 1e-12  # A root mean square below this is no direction: a constant reward's gradient.


@dataclass(frozen=True, kw_only=True)
class RewardStatistics:
    """What one reward's values and directions look like in one update, over all of its samples.

    Args:
        mean: Mean of the reward's values; None without any.
        std: Standard deviation of the values; None without any.
        applicable: Share of the samples that have a value; None for a reward that gives no values.
        frac_zero_std: Share of the groups whose values are all equal; None without values.
        faults: Samples on which the reward failed and was skipped.
        rms: Root mean square of the direction over the samples it applied to; None if there were none.
        cosine: Mean cosine of the direction to that of ``rdm``, over the samples that have both; None without any.
    """

    mean: float | None = None
    std: float | None = None
    applicable: float | None = None
    frac_zero_std: float | None = None
    faults: int = 0
    rms: float | None = None
    cosine: float | None = None


@dataclass(frozen=True, kw_only=True)
class DirectionStatistics:
    """What the directions of one update look like, over all of its samples.

    Args:
        rewards: The statistics of each reward, by name.
        gap: The mean of ``rdm``'s metric ``gap`` (see :func:`rdm_rl.rewards.rdm.gap`), or None without it.
    """

    rewards: Mapping[str, RewardStatistics]
    gap: float | None = None

    def rms(self, name: str) -> float | None:
        """Root mean square of a reward's direction; None if the reward is unknown or applied nowhere."""
        return self.rewards[name].rms if name in self.rewards else None


@dataclass
class RunningMean:
    """An exponential average without bias towards its start.

    Args:
        decay: Share of the old average that an update keeps.

    Example:
        >>> mean = RunningMean(decay=0.9)
        >>> mean.add(4.0)
        >>> mean.value
        4.0
    """

    decay: float
    total: float = 0.0
    weight: float = 0.0

    def add(self, number: float) -> None:
        """Take a number in."""
        self.total = self.decay * self.total + (1 - self.decay) * number
        self.weight = self.decay * self.weight + (1 - self.decay)

    @property
    def value(self) -> float | None:
        """The average, or None before the first number."""
        return self.total / self.weight if self.weight else None

    def state(self) -> list[float]:
        """What :meth:`load` takes back, for a checkpoint."""
        return [self.total, self.weight]

    def load(self, state: Sequence[float]) -> None:
        """Take a state back; an empty one starts anew."""
        self.total, self.weight = state or (0.0, 0.0)


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


class Weighting:
    """What the trainer asks of a weighting. One of your own derives from it and overrides ``combine``.

    ``lambdas`` and ``metrics`` are read after each update: its weights by reward name, and further numbers for the log.

    Args:
        lambdas: The weight of each reward in the running update, by name, for the log.
    """

    def __init__(self, lambdas: Mapping[str, float] | None = None) -> None:
        """Start with some weights."""
        self.lambdas: dict[str, float] = dict(lambdas or {})
        self.metrics: dict[str, float] = {}

    def update(self, statistics: DirectionStatistics, step: int) -> None:
        """See the directions of an update before they are combined.

        Args:
            statistics: What they look like.
            step: Number of the update, from 0.
        """

    def combine(self, directions: Mapping[str, Direction]) -> Direction:
        """One direction from those of the rewards.

        Args:
            directions: Directions of shape (N, C, H, W) by reward name.

        Returns:
            The combined direction, applicable where any of them is.
        """
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """The running statistics, for a checkpoint: plain numbers, strings, lists, dicts and tensors."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the running statistics back."""


class FixedWeighting(Weighting):
    r"""Constant weights, after an optional cold start: :math:`\lambda_j = w_j \cdot \mathrm{ramp}`.

    Args:
        weights: Weight w of each reward, by name.
        start_step: Updates with ``rdm`` alone; the weights of all other rewards are 0 in them.
        ramp_steps: Updates over which those weights then grow linearly to their values.
        conflict: ``keep``, or ``project``: of every other direction, the part against ``rdm`` is removed, sample by
            sample.

    Example:
        >>> one = Direction(values=torch.ones(1, 1, 1, 1), applicable=torch.tensor([True]))
        >>> FixedWeighting({"rdm": 0.5}).combine({"rdm": one}).values.item()
        0.5
    """

    def __init__(
        self,
        weights: Mapping[str, float],
        *,
        start_step: int = 0,
        ramp_steps: int = 0,
        conflict: Literal["keep", "project"] = "keep",
    ) -> None:
        """Keep the settings."""
        super().__init__(weights)
        self.weights = dict(weights)
        self.start_step = start_step
        self.ramp_steps = ramp_steps
        self.conflict = conflict

    def ramp(self, step: int) -> float:
        """Share of their weights that rewards other than ``rdm`` have in an update.

        Args:
            step: Number of the update, from 0.

        Returns:
            A number in [0, 1].

        Example:
            >>> [FixedWeighting({}, start_step=2, ramp_steps=2).ramp(step) for step in range(5)]
            [0.0, 0.0, 0.5, 1.0, 1.0]
        """
        if step < self.start_step:
            return 0.0
        return min(1.0, (step - self.start_step + 1) / max(1, self.ramp_steps))

    def scale(self, name: str) -> float:
        """What a reward's weight is multiplied by, beside the ramp."""
        return 1.0

    def update(self, statistics: DirectionStatistics, step: int) -> None:
        """Set the weights of the update."""
        ramp = self.ramp(step)
        self.lambdas = {
            name: weight if name == RDM else weight * ramp * self.scale(name) for name, weight in self.weights.items()
        }

    def combine(self, directions: Mapping[str, Direction]) -> Direction:
        """The weighted sum of the directions, over the rewards that apply to a sample.

        Args:
            directions: Directions of shape (N, C, H, W) by reward name.

        Returns:
            The sum, applicable where any of them is.

        Raises:
            KeyError: If a reward has no weight.
        """
        if self.conflict == "keep" or RDM not in directions:
            return combine(directions, self.lambdas)
        rdm = directions[RDM]
        reference = torch.where(append_dims(rdm.applicable, rdm.values), rdm.values, 0.0)
        pushes = {}
        for name, direction in directions.items():
            push = self.lambdas[name] * direction.values
            pushes[name] = replace(direction, values=push if name == RDM else remove_opposition(push, reference))
        return combine(pushes, dict.fromkeys(pushes, 1.0))


class AdaptiveWeighting(FixedWeighting):
    r"""Every reward pushes with :math:`w_j` times a reference force of distribution matching, whatever its units.

    .. math:: \lambda_j = w_j \, F_{ref} / \mathrm{EMA}(\mathrm{rms} A_j), \qquad \lambda_{dm} = w_{dm}

    So a reward may be multiplied by any positive number without any effect, as long as its direction stays above 1e-12:
    there is no additive epsilon and no cap. A direction below that is zero and gets the weight 0. Without ``rdm`` the
    reference is 1. A force of ``rdm`` below 1e-12 is never taken for the reference: until there is one, rewards wait.

    Args:
        weights: Weight w of each reward, by name.
        reference: ``cold_start``: the average force of ``rdm``, frozen when the cold start ends (after the first update
            without one). ``online``: its running average, so that the rewards' force shrinks with it.
        decay: Decay of the averages, in updates in which a direction applies.
        settings: Those of :class:`FixedWeighting`.

    Raises:
        ValueError: If an ``online`` reference cannot reach a balance: the rewards together must push less than
            ``rdm`` does.

    Example:
        >>> weighting = AdaptiveWeighting({"rdm": 1.0, "aesthetic": 0.5})
        >>> seen = {"rdm": RewardStatistics(rms=0.2), "aesthetic": RewardStatistics(rms=400.0)}
        >>> weighting.update(DirectionStatistics(rewards=seen), step=0)
        >>> weighting.lambdas
        {'rdm': 1.0, 'aesthetic': 0.00025}
    """

    def __init__(
        self,
        weights: Mapping[str, float],
        *,
        reference: Reference = "cold_start",
        decay: float = 0.95,
        **settings: Any,
    ) -> None:
        """Check that the weights can balance."""
        super().__init__(weights, **settings)
        external = sum(abs(weight) for name, weight in weights.items() if name != RDM)
        if reference == "online" and RDM in weights and external >= weights[RDM]:
            raise ValueError(
                f"With adaptive_reference='online' the rewards' force follows that of 'rdm', and their weights "
                f"(together {external:g}) reach its own ({weights[RDM]:g}): nothing would stop them. Use "
                "adaptive_reference='cold_start', or smaller reward_weights."
            )
        self.reference: Reference = reference
        self.forces = {name: RunningMean(decay=decay) for name in weights}
        self._force = RunningMean(decay=decay)  # Of rdm; the reference.
        self._still: set[str] = set()  # Rewards whose direction is zero in this update.

    @property
    def reference_force(self) -> float:
        """The force that rewards are scaled to."""
        return 1.0 if RDM not in self.weights else self._force.value or 0.0

    def scale(self, name: str) -> float:
        """What makes the reward's force the reference force."""
        force = self.forces[name].value
        return 0.0 if force is None or name in self._still else self.reference_force / force

    def update(self, statistics: DirectionStatistics, step: int) -> None:
        """Take the update's forces in and set its weights."""
        for name, force in self.forces.items():
            rms = statistics.rms(name)
            self._still.discard(name)
            if rms is not None and rms < NO_DIRECTION:
                self._still.add(name)  # It says nothing now, and that must not make it shout when it speaks again.
            elif rms is not None:
                force.add(rms)
        rdm = statistics.rms(RDM)
        # A force of 0, of a policy that still equals the teacher, say, would be a reference that silences all rewards.
        open_reference = self.reference == "online" or step < self.start_step or self._force.value is None
        if rdm is not None and rdm >= NO_DIRECTION and open_reference:
            self._force.add(rdm)
        super().update(statistics, step)

    def state_dict(self) -> dict[str, Any]:
        """The averages."""
        return {
            "forces": {name: mean.state() for name, mean in self.forces.items()},
            "reference": self._force.state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the averages back; a reward that is new starts without one."""
        for name, mean in self.forces.items():
            mean.load(state.get("forces", {}).get(name, ()))
        self._force.load(state.get("reference", ()))


class BudgetedWeighting(AdaptiveWeighting):
    r"""Adaptive weights times a common factor that spends a fidelity budget: as much reward as fidelity allows.

    The fidelity signal is ``rdm``'s gap, :math:`\mathrm{rms}(\mu_{real} - \mu_{fake}) / \mathrm{rms}(\hat x_0 -
    \mu_{real})`, averaged. While it is below ``budget`` times its value in the cold start, the factor grows by ``rate``
    in every update, otherwise it shrinks. It starts at 1 and stays between 0.001 and 10.

    Args:
        weights: Weight w of each reward, by name; ``rdm`` must be one of them.
        budget: How many times its cold-start value the gap may be.
        rate: Change of the factor's logarithm in one update.
        settings: Those of :class:`AdaptiveWeighting`; ``start_step`` must be at least 1.

    Raises:
        ValueError: If there is no ``rdm`` or no cold start to compare with.
    """

    def __init__(
        self, weights: Mapping[str, float], *, budget: float = 1.5, rate: float = 0.05, **settings: Any
    ) -> None:
        """Check that there is something to compare with."""
        super().__init__(weights, **settings)
        if RDM not in weights or self.start_step < 1:
            raise ValueError(
                "reward_weighting='budget' compares the gap of 'rdm' with its value in the cold start: put 'rdm' into "
                "reward_funcs and set reward_start_step to at least 1 (20 gives a steadier average)."
            )
        self.budget, self.rate, self.factor = budget, rate, 1.0
        self.gap = RunningMean(decay=self._force.decay)
        self.cold_gap = RunningMean(decay=self._force.decay)

    def scale(self, name: str) -> float:
        """The adaptive scale times the common factor."""
        return self.factor * super().scale(name)

    def update(self, statistics: DirectionStatistics, step: int) -> None:
        """Take the gap in, move the factor, and set the weights."""
        if statistics.gap is not None:
            self.gap.add(statistics.gap)
            if statistics.gap > 0 and (step < self.start_step or self.cold_gap.value is None):
                self.cold_gap.add(statistics.gap)
        if step >= self.start_step and self.gap.value is not None and self.cold_gap.value is not None:
            direction = 1 if self.gap.value <= self.budget * self.cold_gap.value else -1
            self.factor = min(10.0, max(1e-3, self.factor * math.exp(direction * self.rate)))
            self.metrics = {"budget/factor": self.factor, "budget/gap": self.gap.value / self.cold_gap.value}
        super().update(statistics, step)

    def state_dict(self) -> dict[str, Any]:
        """The averages and the factor."""
        budget = {"factor": self.factor, "gap": self.gap.state(), "cold_gap": self.cold_gap.state()}
        return super().state_dict() | budget

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the averages and the factor back."""
        super().load_state_dict(state)
        self.factor = state.get("factor", 1.0)
        self.gap.load(state.get("gap", ()))
        self.cold_gap.load(state.get("cold_gap", ()))


def make_weighting(
    kind: str, weights: Mapping[str, float], *, budget: float | None = None, **settings: Any
) -> Weighting:
    """The weighting that ``RDMConfig`` asks for.

    Args:
        kind: ``adaptive``, ``fixed`` or ``budget``.
        weights: Weight of each reward, by name.
        budget: The budget, for ``budget``.
        settings: What the class takes; ``reference`` is left out for ``fixed``.

    Returns:
        The weighting.

    Example:
        >>> make_weighting("fixed", {"rdm": 1.0}, reference="cold_start").lambdas
        {'rdm': 1.0}
    """
    if kind == "fixed":
        settings.pop("reference", None)
        return FixedWeighting(weights, **settings)
    if kind == "budget":
        return BudgetedWeighting(weights, **settings, **({} if budget is None else {"budget": budget}))
    return AdaptiveWeighting(weights, **settings)


@dataclass
class WeightingSettings:
    """Rewards and their weights."""

    reward_weights: list[Finite] | None = setting(
        None,
        "Weight of each reward, in the order of `reward_funcs`. Default: 1 for `rdm` and 0.3 for each other one, or 1 "
        "for all with `fixed` weights or without `rdm`.",
    )
    reward_weighting: Literal["adaptive", "fixed", "budget"] = setting(
        "adaptive",
        "How rewards are combined: `adaptive` (GNDMR: each pushes with its weight times the force of distribution "
        "matching), `fixed` weights (DMDR), or `budget` (adaptive, within `fidelity_budget`).",
    )
    adaptive_reference: Reference = setting(
        "cold_start",
        "The force that adaptive weights refer to: that of the `cold_start`, or the running one (`online`).",
    )
    fidelity_budget: Positive | None = setting(
        None,
        "How many times its average in the cold start `rewards/rdm/gap` may be. Default: 1.5 with "
        "`reward_weighting=budget`; it is refused with the others.",
    )
    reward_start_step: Whole = setting(
        0, "Updates with distribution matching alone before the other rewards begin to count."
    )
    reward_ramp_steps: Whole = setting(0, "Updates over which their weights then grow to their values.")
    reward_conflict: Literal["keep", "project"] = setting(
        "keep", "`project` removes the part of a reward's direction that opposes distribution matching."
    )
    reward_gradient: Literal["pathwise", "score_function"] = setting(
        "pathwise",
        "How rewards that are differentiable act: by their own gradient (`pathwise`), or as black boxes through the "
        "policy's likelihood (`score_function`), as those that are not always do.",
    )
    pathwise_steps: Literal["last", "any"] = setting(
        "last", "The steps on which gradients of rewards act: the `last`, or `any`."
    )
