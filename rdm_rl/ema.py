"""The averaged policy: what is saved, sampled and judged."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from rdm_rl.sharding import cut_like, local, with_local


class PolicyAverage:
    """An exponential moving average of the policy's weights.

    After n updates the decay is (1 + n) / (10 + n) until that reaches its final value, so that a short run averages
    over about its last tenth instead of keeping the start: the first update replaces it. Of sharded weights, each
    process averages its own part.

    Args:
        parameters: The policy's weights by name; the average starts from them.
        decay: The final decay, in (0, 1]; a copy that is never stepped has 1.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        """Copy the weights."""
        self._parameters = dict(parameters)
        self._averages = [local(parameter).clone() for parameter in self._parameters.values()]
        self._decay = decay
        self._updates = 0

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(self._averages, map(local, self._parameters.values()), strict=True)

    @torch.no_grad()
    def step(self) -> None:
        """Move the average towards the current weights."""
        n = self._updates
        decay = min(self._decay, (1 + n) / (10 + n)) if n else 0.0
        self._updates += 1
        for average, current in self._pairs():
            average.sub_((1 - decay) * (average - current))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the averaged weights into the policy for the length of the context."""
        kept = [current.to("cpu", copy=True) for _, current in self._pairs()]
        for average, current in self._pairs():
            current.copy_(average)
        try:
            yield
        finally:
            for (_, current), before in zip(self._pairs(), kept, strict=True):
                current.copy_(before)

    @property
    def updates(self) -> int:
        """How many updates went into the average."""
        return self._updates

    def tensors(self) -> dict[str, Tensor]:
        """The averaged weights by name; sharded if the weights are."""
        return {
            name: with_local(parameter, average)
            for (name, parameter), average in zip(self._parameters.items(), self._averages, strict=True)
        }

    def load(self, tensors: Mapping[str, Tensor], updates: int) -> None:
        """Take averaged weights, whole, and their number of updates back."""
        for (name, parameter), average in zip(self._parameters.items(), self._averages, strict=True):
            average.copy_(local(cut_like(tensors[name], parameter)))
        self._updates = updates
