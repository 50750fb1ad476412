"""How the directions of several rewards become one: the one stateful object of the method.

``FixedWeighting`` is DMDR's constant weights. Adaptive weighting will be another class with the same three methods;
any object that has them is accepted as ``RDMTrainer(weighting=...)``.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import torch

from rdm_rl.data_types import DenseAdvantage
from rdm_rl.noise_schedule import append_dims


class Weighting(Protocol):
    """What the trainer asks of a weighting."""

    def combine(self, directions: Mapping[str, DenseAdvantage]) -> DenseAdvantage:
        """One direction from those of the rewards, by name. May update running statistics."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The running statistics, for a checkpoint: plain numbers, strings, lists, dicts and tensors."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the running statistics back."""
        ...


class FixedWeighting:
    """Constant weights: the sum of weight times direction, over the rewards that apply to a sample.

    Args:
        weights: Weight of each reward, by name.

    Example:
        >>> one = DenseAdvantage(values=torch.ones(1, 1, 1, 1), applicable=torch.tensor([True]))
        >>> FixedWeighting({"rdm": 0.5}).combine({"rdm": one}).values.item()
        0.5
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        """Keep the weights."""
        self.weights = dict(weights)

    def combine(self, directions: Mapping[str, DenseAdvantage]) -> DenseAdvantage:
        """The weighted sum of the directions.

        Args:
            directions: Directions of shape (N, C, H, W) by reward name.

        Returns:
            The sum, applicable where any of them is.

        Raises:
            KeyError: If a reward has no weight.
        """
        terms = [
            self.weights[name] * torch.where(append_dims(one.applicable, one.values), one.values, 0.0)
            for name, one in directions.items()
        ]
        applicable = torch.stack([one.applicable for one in directions.values()]).any(0)
        return DenseAdvantage(values=torch.stack(terms).sum(0), applicable=applicable)

    def state_dict(self) -> dict[str, Any]:
        """Nothing: constant weights have no state."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing to take back."""
