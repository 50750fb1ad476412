"""Numbers with 95 % intervals: means and differences by prompt, and what a whole set of images is worth.

Images of one prompt have much in common, so the prompts are what is resampled, never single images. Resampling has a
generator of its own: the same values have the same interval.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isfinite, nan

import torch
from torch import Tensor

from rdm_rl.randomness import seeded_generator

RESAMPLES = 1000
HALVES = 25
_FEWEST_PROMPTS = 4


@dataclass(frozen=True)
class Estimate:
    """A measured number and its 95 % interval, whose ends are NaN where there are too few prompts to say.

    Args:
        value: The number; NaN if it could not be measured.
        low: Lower end of the interval.
        high: Upper end.
    """

    value: float
    low: float = nan
    high: float = nan

    @property
    def half_width(self) -> float:
        """Half the length of the interval."""
        return (self.high - self.low) / 2

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval is known and has only positive or only negative numbers in it."""
        return isfinite(self.low) and self.low * self.high > 0


def mean_by_prompt(values: Tensor) -> Estimate:
    """The mean over prompts, with the percentile bootstrap's interval.

    References:
        | Better Bootstrap Confidence Intervals (Efron, 1987), section 1

    Args:
        values: A value for each of P prompts and each of S images, shape (P, S), or for each prompt, shape (P,); NaN
            where there is none.

    Example:
        >>> estimate = mean_by_prompt(torch.tensor([[0.0, 2.0], [1.0, 1.0], [3.0, float("nan")], [3.0, 3.0]]))
        >>> estimate.value, estimate.low <= 2 <= estimate.high
        (2.0, True)
    """
    means = values.double().reshape(len(values), -1).nanmean(1)
    means = means[~means.isnan()]
    if len(means) < _FEWEST_PROMPTS:
        return Estimate(float(means.mean()))
    generator = seeded_generator(0, "evaluation/bootstrap")
    chosen = torch.randint(len(means), (RESAMPLES, len(means)), generator=generator)
    low, high = means[chosen].mean(1).quantile(torch.tensor([0.025, 0.975]).double()).tolist()
    return Estimate(float(means.mean()), low, high)


def paired_difference(values: Tensor, reference: Tensor) -> Estimate:
    """How much higher values are than those of a reference for the same prompts, with the bootstrap's interval.

    A prompt that is hard is hard for both, which cancels: the interval is narrower than those of the two means.

    Args:
        values: Values, shape (P, S); NaN where there is none.
        reference: Values of the reference for the same prompts and seeds, shape (P, S).

    Example:
        >>> paired_difference(torch.arange(5.0)[:, None] + 1, torch.arange(5.0)[:, None])
        Estimate(value=1.0, low=1.0, high=1.0)
    """
    return mean_by_prompt(values.double() - reference.double())


def by_halves(statistic: Callable[[Tensor], Mapping[str, float]], shape: tuple[int, int]) -> dict[str, Estimate]:
    """What a set of images is worth, with an interval from random halves of the prompts.

    A bootstrap would draw an image twice, and its nearest neighbour would be itself. Halves, drawn without repetition,
    scatter as the whole does (the delete-half jackknife): the interval is the value and 1.96 of their standard
    deviations to both sides. It is about the choice of prompts and noises; what the set is compared with stays.

    References:
        | A General Theory for Jackknife Variance Estimation (Shao and Wu, 1989)

    Args:
        statistic: Measures some of the images, given by their numbers, int64: values by name.
        shape: Prompts P, and images S of each; the images of a prompt follow each other.

    Returns:
        The values for all images.

    Example:
        >>> by_halves(lambda numbers: {"mean": float(torch.ones(16)[numbers].mean())}, (8, 2))["mean"]
        Estimate(value=1.0, low=1.0, high=1.0)
    """
    prompts = shape[0]
    numbers = torch.arange(prompts * shape[1]).view(shape)
    whole = statistic(numbers.flatten())
    if prompts < 2 * _FEWEST_PROMPTS:  # A half must have neighbours, too.
        return {name: Estimate(value) for name, value in whole.items()}
    generator = seeded_generator(0, "evaluation/halves")
    chosen = [torch.randperm(prompts, generator=generator)[: prompts // 2] for _ in range(HALVES)]
    halves = [statistic(numbers[rows].flatten()) for rows in chosen]
    errors = {name: 1.96 * float(torch.tensor([half[name] for half in halves]).double().std()) for name in whole}
    return {name: Estimate(value, value - errors[name], value + errors[name]) for name, value in whole.items()}
