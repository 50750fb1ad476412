"""How directions become one: constant weights, adaptive ones by hand, and the budget."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from rdm_rl.records import Direction
from rdm_rl.weighting import (
    AdaptiveWeighting,
    BudgetedWeighting,
    DirectionStatistics,
    FixedWeighting,
    RewardStatistics,
    RunningMean,
    Weighting,
    make_weighting,
)
from tests.helpers import masked_direction


def seen(gap: float | None = None, **rms: float) -> DirectionStatistics:
    """Statistics of directions with these root mean squares; a reward that is not named applied nowhere."""
    return DirectionStatistics(rewards={name: RewardStatistics(rms=value) for name, value in rms.items()}, gap=gap)


def test_weighted_sum_over_the_rewards_that_apply() -> None:
    one, two = masked_direction(0, [True, True, False, False]), masked_direction(1, [True, False, True, False])
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
        FixedWeighting({"one": 1.0}).combine({"two": masked_direction(0, [True])})


def test_what_applies_is_said_for_each_sample() -> None:
    with pytest.raises(ValueError, match="must be bool of shape"):
        Direction(values=torch.zeros(3, 1, 1, 2), applicable=torch.ones(3))


# ----- running averages -----


def test_a_running_mean_is_not_biased_to_its_start() -> None:
    mean, numbers = RunningMean(decay=0.8), [5.0, -1.0, 2.0, 2.0]
    assert mean.value is None
    for count, number in enumerate(numbers, 1):
        mean.add(number)
        shares = [0.8 ** (count - 1 - index) for index in range(count)]
        expected = sum(share * one for share, one in zip(shares, numbers, strict=False)) / sum(shares)
        assert mean.value == pytest.approx(expected)


# ----- when rewards count -----


def test_rewards_begin_late_and_ramp_in() -> None:
    weighting = FixedWeighting({"rdm": 2.0, "one": 4.0}, start_step=3, ramp_steps=4)
    found = []
    for step in range(9):
        weighting.update(seen(), step)
        assert weighting.lambdas["rdm"] == 2.0
        found.append(weighting.lambdas["one"])
    assert found == [0, 0, 0, 1, 2, 3, 4, 4, 4]


def test_the_cold_start_holds_for_adaptive_weights_too() -> None:
    weighting = AdaptiveWeighting({"rdm": 1.0, "one": 4.0}, start_step=1, ramp_steps=2)
    found = []
    for step in range(4):
        weighting.update(seen(rdm=0.5, one=2.0), step)
        found.append(weighting.lambdas["one"])
    assert found == pytest.approx([0, 0.5, 1, 1])


# ----- adaptive weights -----


def test_adaptive_weights_by_hand() -> None:
    """w F / EMA(rms), both averages corrected for their start, each over the updates in which it applies."""
    weighting = AdaptiveWeighting({"rdm": 3.0, "one": 0.5, "two": -2.0}, reference="online", decay=0.9)
    steps = [{"rdm": 0.4, "one": 10.0}, {"rdm": 0.8, "two": 1e-3}, {"one": 40.0, "two": 3e-3}, {"rdm": 0.1}]
    kept: dict[str, list[float]] = {"rdm": [], "one": [], "two": []}

    def average(numbers: Sequence[float]) -> float:
        shares = [0.9**age for age in range(len(numbers))][::-1]
        return sum(share * number for share, number in zip(shares, numbers, strict=True)) / sum(shares)

    for step, rms in enumerate(steps):
        for name, value in rms.items():
            kept[name].append(value)
        weighting.update(seen(**rms), step)
        assert weighting.lambdas["rdm"] == 3.0
        for name, weight in (("one", 0.5), ("two", -2.0)):
            expected = weight * average(kept["rdm"]) / average(kept[name]) if kept[name] else 0.0
            assert weighting.lambdas[name] == pytest.approx(expected)


@pytest.mark.parametrize(("start_step", "expected"), [(0, 1.0), (1, 1.0), (3, 3.0)])
def test_the_reference_of_the_cold_start_is_frozen(start_step: int, expected: float) -> None:
    forces = [1.0, 2.0, 4.0, 100.0, 1000.0]
    frozen = AdaptiveWeighting({"rdm": 1.0, "one": 1.0}, start_step=start_step, decay=0.5)
    online = AdaptiveWeighting({"rdm": 1.0, "one": 0.9}, start_step=start_step, decay=0.5, reference="online")
    for step, force in enumerate(forces):
        frozen.update(seen(rdm=force, one=1.0), step)
        online.update(seen(rdm=force, one=1.0), step)
    # The average of the first three is (1 + 2 * 2 + 4 * 4) / 7.
    assert frozen.lambdas["one"] == pytest.approx(expected)
    assert online.lambdas["one"] > 100


@pytest.mark.parametrize("silence", [{}, {"rdm": 0.0}, {"rdm": 0.9e-12}])
@pytest.mark.parametrize("start_step", [0, 1])
def test_a_reference_is_taken_late_if_rdm_begins_late(silence: dict[str, float], start_step: int) -> None:
    weighting = AdaptiveWeighting({"rdm": 1.0, "one": 1.0}, start_step=start_step)
    weighting.update(seen(**silence, one=2.0), 0)
    assert weighting.lambdas["one"] == 0
    weighting.update(seen(rdm=3.0, one=2.0), 1)
    assert weighting.lambdas["one"] == 1.5


def test_without_distribution_matching_every_reward_has_its_own_unit() -> None:
    weighting = AdaptiveWeighting({"one": 2.0, "two": 3.0})
    weighting.update(seen(one=10.0, two=0.1), 0)
    assert weighting.lambdas == pytest.approx({"one": 0.2, "two": 30})


@pytest.mark.parametrize(("rms", "expected"), [(0.0, 0.0), (0.9e-12, 0.0), (1.1e-12, 1 / 1.1e-12)])
def test_what_is_no_direction_gets_no_weight(rms: float, expected: float) -> None:
    weighting = AdaptiveWeighting({"rdm": 1.0, "one": 1.0})
    weighting.update(seen(rdm=1.0, one=rms), 0)
    assert weighting.lambdas["one"] == pytest.approx(expected)


def test_units_cancel_without_any_rest() -> None:
    """No epsilon and no cap: a power of two is exact."""
    scales = [2.0**-30, 1.0, 2.0**40]
    each = [AdaptiveWeighting({"rdm": 1.0, "one": 0.7}, reference="online") for _ in scales]
    for step, rms in enumerate([0.3, 0.1, 7.0]):
        for scale, weighting in zip(scales, each, strict=True):
            weighting.update(seen(rdm=0.3 / (step + 1), one=scale * rms), step)
        assert len({weighting.lambdas["one"] * scale for scale, weighting in zip(scales, each, strict=True)}) == 1


@pytest.mark.parametrize(
    ("weights", "refused"),
    [
        ({"rdm": 1.0, "one": 1.0}, True),
        ({"rdm": 1.0, "one": 0.6, "two": 0.5}, True),
        ({"rdm": 1.0, "one": 0.6, "two": -0.5}, True),
        ({"rdm": 0.0, "one": 0.0}, True),
        ({"rdm": 1.0, "one": 0.5, "two": 0.4}, False),
        ({"rdm": 2.0, "one": 1.5}, False),
        ({"one": 5.0}, False),
    ],
)
def test_an_online_reference_needs_a_balance(weights: dict[str, float], refused: bool) -> None:
    AdaptiveWeighting(weights)
    if refused:
        with pytest.raises(ValueError, match="nothing would stop them"):
            AdaptiveWeighting(weights, reference="online")
    else:
        AdaptiveWeighting(weights, reference="online")


# ----- conflicts -----


def test_what_opposes_distribution_matching_is_projected_out() -> None:
    """Per sample; agreement, other samples and rdm itself are left alone."""
    rdm = Direction(values=torch.tensor([[1.0, 0.0]] * 4).view(4, 1, 1, 2), applicable=torch.tensor([True] * 4))
    values = torch.tensor([[-3.0, 2.0], [3.0, 2.0], [-3.0, 2.0], [-5.0, 0.0]]).view(4, 1, 1, 2)
    one = Direction(values=values, applicable=torch.tensor([True, True, False, True]))
    given = {"one": one, "rdm": rdm}
    keep = FixedWeighting({"rdm": 10.0, "one": 1.0}).combine(given).values.view(4, 2)
    project = FixedWeighting({"rdm": 10.0, "one": 1.0}, conflict="project").combine(given).values.view(4, 2)
    assert keep.tolist() == [[7, 2], [13, 2], [10, 0], [5, 0]]
    assert project.tolist() == [[10, 2], [13, 2], [10, 0], [10, 0]]


def test_where_rdm_does_not_apply_nothing_is_opposed() -> None:
    rdm = Direction(values=torch.ones(1, 1, 1, 2), applicable=torch.tensor([False]))
    one = Direction(values=-torch.ones(1, 1, 1, 2), applicable=torch.tensor([True]))
    weighting = FixedWeighting({"rdm": 1.0, "one": 1.0}, conflict="project")
    assert torch.equal(weighting.combine({"rdm": rdm, "one": one}).values, one.values)
    alone = FixedWeighting({"one": 1.0}, conflict="project")
    assert torch.equal(alone.combine({"one": one}).values, one.values)


# ----- the budget -----


def budget(**settings: Any) -> BudgetedWeighting:
    return BudgetedWeighting({"rdm": 1.0, "one": 0.5}, **{"start_step": 2, "budget": 1.5, "rate": 0.1, **settings})


def test_the_budget_is_spent_and_kept() -> None:
    weighting = budget(decay=0.5)
    for step in range(2):
        weighting.update(seen(gap=0.2, rdm=1.0, one=2.0), step)
        assert weighting.factor == 1.0
        assert weighting.lambdas["one"] == 0
    for step in range(2, 5):  # 0.28 is within 1.5 times 0.2.
        weighting.update(seen(gap=0.28, rdm=1.0, one=2.0), step)
    assert weighting.factor == pytest.approx(math.exp(0.3))
    assert weighting.lambdas == pytest.approx({"rdm": 1.0, "one": 0.25 * math.exp(0.3)})
    for step in range(5, 12):  # 0.5 is not, once the average is there.
        weighting.update(seen(gap=0.5, rdm=1.0, one=2.0), step)
    assert weighting.factor < math.exp(0.3) * math.exp(-0.4)
    assert weighting.cold_gap.value == pytest.approx(0.2)


def test_a_gap_of_0_is_no_budget() -> None:
    weighting = budget()
    weighting.update(seen(gap=0.0, rdm=0.0, one=2.0), 0)
    for step in range(1, 4):
        weighting.update(seen(gap=0.2, rdm=1.0, one=2.0), step)
    assert weighting.cold_gap.value == pytest.approx(0.2)
    assert weighting.metrics["budget/gap"] == pytest.approx(weighting.gap.value / 0.2)


@pytest.mark.parametrize(("gap", "bound"), [(0.01, 10.0), (5.0, 1e-3)])
def test_the_budgets_factor_is_bounded(gap: float, bound: float) -> None:
    weighting = budget(rate=1.0)
    for step in range(20):
        weighting.update(seen(gap=0.2 if step < 2 else gap, rdm=1.0, one=2.0), step)
        assert 1e-3 <= weighting.factor <= 10
    if bound < 1:
        for step in range(20, 120):
            weighting.update(seen(gap=gap, rdm=1.0, one=2.0), step)
    assert weighting.factor == bound


def test_the_budgets_factor_comes_back() -> None:
    weighting, factors = budget(decay=0.5, rate=0.5), []
    for step in range(40):
        weighting.update(seen(gap=0.2 if step < 2 or step > 20 else 5.0, rdm=1.0, one=2.0), step)
        factors.append(weighting.factor)
    assert factors[20] == 1e-3
    assert factors[-1] > 10 * factors[20]


@pytest.mark.parametrize(
    ("weights", "settings"), [({"rdm": 1.0, "one": 1.0}, {"start_step": 0}), ({"one": 1.0}, {"start_step": 5})]
)
def test_a_budget_needs_something_to_compare_with(weights: dict[str, float], settings: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="compares the gap of 'rdm' with its value in the cold start"):
        BudgetedWeighting(weights, **settings)


# ----- state -----


@pytest.mark.parametrize("kind", ["adaptive", "online", "budget"])
def test_a_weighting_goes_on_from_its_state(kind: str) -> None:
    def make() -> Weighting:
        weights = {"rdm": 1.0, "one": 0.5, "two": 0.2}
        if kind == "budget":
            return make_weighting("budget", weights, start_step=2, budget=1.2)
        reference = "online" if kind == "online" else "cold_start"
        return make_weighting("adaptive", weights, reference=reference, start_step=2)

    steps = [seen(gap=0.1 * index + 0.1, rdm=1.0 + index, one=5.0 / (index + 1)) for index in range(6)]
    whole, first, second = make(), make(), make()
    for step, found in enumerate(steps[:3]):
        whole.update(found, step)
        first.update(found, step)
    second.load_state_dict(first.state_dict())
    for step, found in enumerate(steps[3:], 3):
        whole.update(found, step)
        second.update(found, step)
        assert second.lambdas == whole.lambdas
    assert second.state_dict() == whole.state_dict() != first.state_dict()


def test_a_state_survives_a_safe_file(tmp_path: Any) -> None:
    weighting = budget()
    weighting.update(seen(gap=0.2, rdm=1.0, one=2.0), 0)
    torch.save(weighting.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state == weighting.state_dict()


def test_a_new_reward_starts_without_an_average() -> None:
    old = AdaptiveWeighting({"rdm": 1.0, "one": 1.0})
    old.update(seen(rdm=2.0, one=4.0), 0)
    new = AdaptiveWeighting({"rdm": 1.0, "one": 1.0, "two": 1.0})
    new.load_state_dict(old.state_dict())
    new.update(seen(rdm=100.0, one=4.0, two=8.0), 1)
    assert new.lambdas == pytest.approx({"rdm": 1.0, "one": 0.5, "two": 0.25})


@pytest.mark.parametrize("name", ["gap", "factor", "gap in the cold start"])
def test_a_reward_may_have_any_name(name: str) -> None:
    def make() -> BudgetedWeighting:
        return BudgetedWeighting({"rdm": 1.0, name: 0.5}, start_step=1)

    first, second = make(), make()
    rewards = {"rdm": RewardStatistics(rms=1.0), name: RewardStatistics(rms=2.0)}
    for step in range(3):
        first.update(DirectionStatistics(rewards=rewards, gap=0.3), step)
    second.load_state_dict(first.state_dict())
    assert second.forces[name].value == first.forces[name].value == 2.0


def test_settings_make_the_weighting_they_name() -> None:
    weights = {"rdm": 1.0, "one": 1.0}
    common = {"reference": "cold_start", "start_step": 3, "ramp_steps": 2, "conflict": "project"}
    made = {kind: make_weighting(kind, weights, **common) for kind in ("fixed", "adaptive", "budget")}
    assert [type(one) for one in made.values()] == [FixedWeighting, AdaptiveWeighting, BudgetedWeighting]
    for one in made.values():
        assert isinstance(one, FixedWeighting)
        assert (one.start_step, one.ramp_steps, one.conflict) == (3, 2, "project")
    assert make_weighting("budget", weights, budget=2.5, **common).budget == 2.5
    assert make_weighting("budget", weights, **common).budget == 1.5


def test_projection_looks_at_the_push_and_not_at_the_reward() -> None:
    """With a negative weight it is the reward's own direction that opposes distribution matching."""
    rdm, reward = (
        Direction(values=torch.tensor([[[values]]]), applicable=torch.tensor([True]))
        for values in ([1.0, 0.0], [1.0, 1.0])
    )
    weighting = FixedWeighting({"rdm": 1.0, "one": -2.0}, conflict="project")
    combined = weighting.combine({"rdm": rdm, "one": reward}).values.flatten()
    assert combined.tolist() == [1.0, -2.0]
