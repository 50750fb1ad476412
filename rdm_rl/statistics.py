"""What rewards say in one update, and where they push, over all of its samples: for a weighting, and for the log."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rdm_rl.records import Direction, Judgement
from rdm_rl.weighting import RDM, DirectionStatistics, RewardStatistics, Weighting


def measure_rewards(
    judgements: Sequence[Mapping[str, Judgement]],
    group_ids: Sequence[Tensor],
    total: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> DirectionStatistics:
    """The statistics of the values of one update; those of the directions are still missing.

    Args:
        judgements: What each reward says, by name, for each micro-batch of this process.
        group_ids: The samples' groups, each of shape (N,), for each micro-batch.
        total: Sums a tensor over the processes.

    Returns:
        The statistics, equal in all processes and, but for the gap, however the batch is cut: the gap is a mean over
        micro-batches of a ratio.

    Example:
        >>> seen = Judgement(rewards=torch.tensor([1.0, 3.0, float("nan")]), direction=None)
        >>> statistics = measure_rewards([{"clarity": seen}], [torch.tensor([0, 0, 1])]).rewards["clarity"]
        >>> statistics.mean, statistics.std, statistics.faults
        (2.0, 1.0, 0)
    """
    sums = {
        name: _sum(_value_sums(judged[name], groups) for judged, groups in zip(judgements, group_ids, strict=True))
        for name in judgements[0]
    }
    gaps = [judged[RDM].metrics["gap"] for judged in judgements if RDM in judged and "gap" in judged[RDM].metrics]
    every = total(
        torch.stack([*sums.values(), torch.tensor([sum(gaps), len(gaps), 0, 0, 0, 0, 0], dtype=torch.float64)])
    )
    *rows, (gap, count, *_) = every.tolist()
    return DirectionStatistics(
        rewards={name: _value_statistics(*row) for name, row in zip(sums, rows, strict=True)},
        gap=gap / count if count else None,
    )


def measure_directions(
    statistics: DirectionStatistics,
    directions: Sequence[Mapping[str, Direction]],
    total: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> DirectionStatistics:
    """The statistics of one update, with those of the directions.

    Args:
        statistics: What :func:`measure_rewards` found.
        directions: The direction of each reward, by name, for each micro-batch of this process.
        total: Sums a tensor over the processes.

    Returns:
        The statistics, equal in all processes and however the batch is cut.

    Example:
        >>> away = Direction(values=torch.full((2, 1, 1, 4), 3.0), applicable=torch.tensor([True, False]))
        >>> seen = DirectionStatistics(rewards={"away": RewardStatistics()})
        >>> measure_directions(seen, [{"away": away}]).rms("away")
        3.0
    """
    names = list(directions[0])
    sums = {
        name: _sum(_direction_sums(by_name[name], None if name == RDM else by_name.get(RDM)) for by_name in directions)
        for name in names
    }
    rows = total(torch.stack([*sums.values()])).tolist()
    rewards = dict(statistics.rewards)
    for name, (squares, numbers, cosines, count) in zip(names, rows, strict=True):
        rewards[name] = replace(
            rewards.get(name, RewardStatistics()),
            rms=math.sqrt(squares / numbers) if numbers else None,
            cosine=cosines / count if count else None,
        )
    return replace(statistics, rewards=rewards)


def _sum(parts: Iterable[Tensor]) -> Tensor:
    return sum(parts, torch.zeros(()))


def _value_sums(judged: Judgement, groups: Tensor) -> Tensor:
    """Values: their sum, that of their squares, their number; samples; flat groups; groups; faults."""
    if judged.rewards is None:
        return torch.tensor([0.0] * 6 + [judged.faults], dtype=torch.float64)
    known = ~judged.rewards.isnan()
    values, ids = judged.rewards[known].cpu().double(), groups[known].cpu()
    flat = [bool((values[ids == group] == values[ids == group][0]).all()) for group in ids.unique()]
    sums = [values.sum().item(), values.square().sum().item(), len(values), len(known), sum(flat), len(flat)]
    return torch.tensor([*sums, judged.faults], dtype=torch.float64)


def _value_statistics(
    values: float, squares: float, count: float, samples: float, flat: float, groups: float, faults: float
) -> RewardStatistics:
    mean = values / count if count else None
    return RewardStatistics(
        mean=mean,
        std=None if mean is None else math.sqrt(max(0.0, squares / count - mean**2)),
        applicable=count / samples if samples else None,
        frac_zero_std=flat / groups if groups else None,
        faults=int(faults),
    )


def _direction_sums(direction: Direction, rdm: Direction | None) -> Tensor:
    """Sum and number of squares, sum and number of cosines to ``rdm``."""
    values = direction.values[direction.applicable].cpu().double().flatten(1)  # Not every accelerator has float64.
    cosines = torch.zeros(0)
    if rdm is not None:
        both = direction.applicable & rdm.applicable
        first, second = (each.values[both].cpu().double().flatten(1) for each in (direction, rdm))
        lengths = first.norm(dim=1) * second.norm(dim=1)
        cosines = ((first * second).sum(1) / lengths)[lengths > 0]
    sums = [values.square().sum().item(), values.numel(), cosines.sum().item(), len(cosines)]
    return torch.tensor(sums, dtype=torch.float64)


def reward_metrics(statistics: DirectionStatistics, weighting: Weighting) -> dict[str, float]:
    """What the log says of the rewards in one update.

    Args:
        statistics: What their directions and values look like.
        weighting: What combined them.

    Returns:
        Numbers by name; ``docs/metrics.md`` says what each means. A number that nothing is known of is left out.
    """
    metrics = dict(weighting.metrics)
    for name, reward in statistics.rewards.items():
        numbers = {
            "mean": reward.mean,
            "std": reward.std,
            "applicable": reward.applicable,
            "frac_zero_std": reward.frac_zero_std,
            "faults": reward.faults,
            "acted": float(reward.rms is not None),
            "direction_rms": reward.rms,
            "cosine_to_rdm": reward.cosine,
            "lambda": weighting.lambdas.get(name),
        }
        metrics |= {f"rewards/{name}/{key}": value for key, value in numbers.items() if value is not None}
    return metrics
