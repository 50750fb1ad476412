"""What the rewards say in an update, and where they push, over samples, micro-batches and processes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from rdm_rl.records import Direction, Judgement
from rdm_rl.statistics import measure_directions, measure_rewards
from rdm_rl.weighting import DirectionStatistics
from tests.helpers import latents, masked_direction


def judged(direction: Direction, **said: Any) -> Judgement:
    return Judgement(**{"rewards": None, "direction": direction, **said})


def measure(
    judgements: list[dict[str, Judgement]],
    groups: list[torch.Tensor],
    total: Callable[[torch.Tensor], torch.Tensor] = lambda sums: sums,
) -> DirectionStatistics:
    directions = [{name: said.direction for name, said in one.items()} for one in judgements]
    return measure_directions(measure_rewards(judgements, groups, total), directions, total)


def two_micro_batches() -> tuple[list[dict[str, Judgement]], list[torch.Tensor]]:
    """Three and two samples, of groups that are cut; where a direction is not applicable, it holds NaN."""
    judgements = []
    for seed, rows in ((0, [True, False, True]), (1, [False, True])):
        values = torch.tensor([1.0, float("nan"), 4.0] if seed == 0 else [float("nan"), 5.0])
        rdm = Direction(
            values=latents(len(rows), 2, 2, 2, seed=seed + 10), applicable=torch.ones(len(rows), dtype=torch.bool)
        )
        judgements.append(
            {
                "rdm": judged(rdm, metrics={"gap": 0.5 + seed}),
                "own": judged(masked_direction(seed, rows), rewards=values, faults=2),
            }
        )
    return judgements, [torch.tensor([0, 0, 1]), torch.tensor([1, 1])]


def test_statistics_by_hand() -> None:
    judgements, groups = two_micro_batches()
    found = measure(judgements, groups)
    directions = [{name: said.direction for name, said in one.items()} for one in judgements]
    own = torch.cat([one["own"].values[one["own"].applicable] for one in directions]).double()
    other = torch.cat([one["rdm"].values[one["own"].applicable] for one in directions]).double()
    everywhere = torch.cat([one["rdm"].values for one in directions]).double()
    assert len(own) == 3
    statistics = found.rewards["own"]
    assert found.rms("own") == statistics.rms == pytest.approx(own.square().mean().sqrt().item())
    assert found.rms("rdm") == pytest.approx(everywhere.square().mean().sqrt().item())
    cosines = torch.nn.functional.cosine_similarity(own.flatten(1), other.flatten(1))
    assert statistics.cosine == pytest.approx(cosines.mean().item())
    assert found.rewards["rdm"].cosine is None
    values = torch.tensor([1.0, 4.0, 5.0])
    assert statistics.mean == pytest.approx(10 / 3)
    assert statistics.std == pytest.approx(values.std(correction=0).item())
    assert (statistics.applicable, statistics.faults) == (pytest.approx(3 / 5), 4)
    assert found.rewards["rdm"].mean is None
    assert found.gap == 1.0
    assert found.rms("another") is None


def test_statistics_do_not_depend_on_the_order_or_the_process() -> None:
    judgements, groups = two_micro_batches()
    together, backwards = measure(judgements, groups), measure(judgements[::-1], groups[::-1])
    assert together.rms("own") == pytest.approx(backwards.rms("own"), rel=1e-12)
    # Two processes with one micro-batch each: what a process has is added to what the others have.
    parts: list[list[torch.Tensor]] = []
    for one, group in zip(judgements, groups, strict=True):
        parts.append([])
        measure([one], [group], lambda sums: parts[-1].append(sums.clone()) or sums)
    others = iter(parts[1])
    summed = measure(judgements[:1], groups[:1], lambda sums: sums + next(others))
    assert summed.rms("own") == pytest.approx(together.rms("own"), rel=1e-12)
    assert summed.rewards["own"].mean == pytest.approx(together.rewards["own"].mean)
    assert summed.gap == together.gap


def test_a_reward_that_applies_nowhere_has_no_statistics() -> None:
    found = measure([{"own": judged(masked_direction(0, [False, False]))}], [torch.tensor([0, 0])])
    assert found.rms("own") is None
    assert found.rewards["own"].cosine is None
    assert found.gap is None


def test_equal_values_have_no_spread() -> None:
    said = Judgement(rewards=torch.full((6,), 123456.7), direction=None)
    statistics = measure_rewards([{"own": said}], [torch.tensor([0, 0, 0, 1, 1, 1])]).rewards["own"]
    assert (statistics.std, statistics.frac_zero_std) == (0.0, 1.0)
