"""Constant weights: the sum over the rewards that apply, per sample."""

import pytest
import torch

from rdm_rl.data_types import DenseAdvantage
from rdm_rl.weighting import FixedWeighting
from tests.helpers import latents


def direction(seed: int, applicable: list[bool]) -> DenseAdvantage:
    values = latents(len(applicable), 2, 2, 2, seed=seed)
    rows = torch.tensor(applicable)
    values[~rows] = float("nan")  # What is not applicable may hold anything.
    return DenseAdvantage(values=values, applicable=rows)


def test_weighted_sum_over_the_rewards_that_apply() -> None:
    one, two = direction(0, [True, True, False, False]), direction(1, [True, False, True, False])
    combined = FixedWeighting({"one": 2.0, "two": -0.5}).combine({"one": one, "two": two})
    assert torch.equal(combined.values[0], 2 * one.values[0] - 0.5 * two.values[0])
    assert torch.equal(combined.values[1], 2 * one.values[1])
    assert torch.equal(combined.values[2], -0.5 * two.values[2])
    assert torch.equal(combined.values[3], torch.zeros(2, 2, 2))
    assert combined.applicable.tolist() == [True, True, True, False]


def test_constant_weights_have_no_state() -> None:
    weighting = FixedWeighting({"one": 2.0})
    assert weighting.state_dict() == {}
    weighting.load_state_dict({})
    assert weighting.weights == {"one": 2.0}


def test_a_reward_without_weight_is_a_fault() -> None:
    with pytest.raises(KeyError, match="two"):
        FixedWeighting({"one": 1.0}).combine({"two": direction(0, [True])})


def test_a_direction_that_applies_must_be_finite() -> None:
    values = torch.zeros(3, 1, 1, 2)
    values[1, 0, 0, 1] = float("inf")
    with pytest.raises(ValueError, match=r"sample\(s\) \[1\] is not finite"):
        DenseAdvantage(values=values, applicable=torch.tensor([True, True, True]))
    DenseAdvantage(values=values, applicable=torch.tensor([True, False, True]))
    with pytest.raises(ValueError, match="must be bool of shape"):
        DenseAdvantage(values=values, applicable=torch.ones(3))
