"""The averaged policy: what is saved, sampled and judged."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from diffusers.training_utils import EMAModel
from torch import Tensor, nn


class PolicyAverage:
    """An exponential moving average of the policy's weights.

    The decay grows as (1 + n) / (10 + n) over updates n until it reaches its final value, so that a short run averages
    over about its last tenth instead of keeping the start.

    Args:
        parameters: The policy's weights by name; the average starts from them.
        decay: The final decay, in (0, 1]; a copy that is never stepped has 1.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        """Copy the weights."""
        self._parameters = dict(parameters)
        self._average = EMAModel(list(self._parameters.values()), decay=decay)

    def step(self) -> None:
        """Move the average towards the current weights."""
        self._average.step(self._parameters.values())

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the averaged weights into the policy for the length of the context."""
        self._average.store(self._parameters.values())
        self._average.copy_to(self._parameters.values())
        try:
            yield
        finally:
            self._average.restore(self._parameters.values())

    @property
    def updates(self) -> int:
        """How many updates went into the average."""
        return int(self._average.optimization_step)

    def tensors(self) -> dict[str, Tensor]:
        """The averaged weights by name."""
        return dict(zip(self._parameters, self._average.shadow_params, strict=True))

    def load(self, tensors: Mapping[str, Tensor], updates: int) -> None:
        """Take averaged weights and their number of updates back."""
        for name, average in self.tensors().items():
            average.copy_(tensors[name])
        self._average.optimization_step = updates
