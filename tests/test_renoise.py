"""Re-noising times have the distribution and the range that the settings ask for, and one value for each group."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from rdm_rl.randomness import seeded_generators
from rdm_rl.renoise import beta_parameters, group_times, renoise_times


def test_named_distributions() -> None:
    assert beta_parameters("uniform", 0.0) == (1, 1)
    assert beta_parameters("beta", 1.0) == (4, 1.5)
    assert beta_parameters("annealed_beta", 0.0) == (4, 1.5)
    assert beta_parameters("annealed_beta", 0.5) == pytest.approx((2.5, 1.25))
    assert beta_parameters("annealed_beta", 1.0) == (1, 1)
    assert beta_parameters("annealed_beta", 7.0) == (1, 1)
    first = [beta_parameters("annealed_beta", progress)[0] for progress in np.linspace(0, 1, 21)]
    assert all(later < earlier for earlier, later in pairwise(first))


@pytest.mark.parametrize(
    ("distribution", "progress", "mean", "variance"),
    [
        ("uniform", 1.0, 1 / 2, 1 / 12),
        ("beta", 1.0, 4 / 5.5, 4 * 1.5 / (5.5**2 * 6.5)),
        ("annealed_beta", 0.5, 2.5 / 3.75, 2.5 * 1.25 / (3.75**2 * 4.75)),
    ],
)
def test_moments(distribution: str, progress: float, mean: float, variance: float) -> None:
    low, high = 0.2, 0.7
    t = renoise_times(
        4000, torch.Generator().manual_seed(0), distribution=distribution, interval=(low, high), progress=progress
    )
    assert t.dtype == torch.float32
    assert t.min() >= low
    assert t.max() <= high
    share = (t - low) / (high - low)
    assert share.mean().item() == pytest.approx(mean, abs=0.02)
    assert share.var().item() == pytest.approx(variance, rel=0.1)


@pytest.mark.parametrize("distribution", ["uniform", "beta"])
def test_a_group_shares_its_time_in_any_batch(distribution: str) -> None:
    ids = torch.tensor([9, 9, 9, 4, 4, 4])
    t = group_times(ids, torch.Generator().manual_seed(0), distribution=distribution)
    assert (t[:3] == t[0]).all()
    assert (t[3:] == t[3]).all()
    assert t[0] != t[3]
    ids, samples = torch.tensor([0, 0, 1, 1, 2, 2]), range(6)
    whole = group_times(ids, seeded_generators(0, "t", 0, samples), distribution=distribution)
    part = group_times(ids[2:4], seeded_generators(0, "t", 0, [2, 3]), distribution=distribution)
    assert torch.equal(whole[2:4], part)


def test_unknown_distribution_is_refused() -> None:
    with pytest.raises(ValueError, match="renoise_distribution='gamma'"):
        renoise_times(1, torch.Generator(), distribution="gamma")
