"""What the log says is going wrong, while there is time: a few pure functions of logged numbers, each with its cure."""

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from statistics import median
from typing import NamedTuple

WINDOW = 50  # Entries of the log that are looked at.
_IN_A_ROW = 3


class Sign(NamedTuple):
    """How a number of the log shows that something is going wrong.

    Args:
        metrics: The names that it is looked for in, with ``*`` for a reward's.
        shows: Says so of the number's values, oldest first.
        what: What it means, and what to do.
    """

    metrics: str
    shows: Callable[[Sequence[float]], bool]
    what: str


def is_behind(lags: Sequence[float]) -> bool:
    """Whether the fake score's lag, in parts of its loss, stays above a tenth."""
    return len(lags) >= _IN_A_ROW and min(lags[-_IN_A_ROW:]) > 0.1


def is_flat(shares: Sequence[float]) -> bool:
    """Whether nearly all groups have one value only, again and again."""
    return len(shares) >= _IN_A_ROW and min(shares[-_IN_A_ROW:]) >= 0.9


def has_collapsed(spreads: Sequence[float]) -> bool:
    """Whether a spread that was there is gone."""
    return len(spreads) > _IN_A_ROW and max(spreads[-_IN_A_ROW:]) < 1e-3 * max(spreads[:-_IN_A_ROW])


def is_extreme(log_ratios: Sequence[float]) -> bool:
    """Whether a likelihood has changed by a factor of more than 20."""
    return abs(log_ratios[-1]) > 3.0


def is_out_of_range(norms: Sequence[float]) -> bool:
    """Whether the last two gradient norms, not one spike, are ten times what was usual before."""
    return len(norms) >= 12 and min(norms[-2:]) > 10 * median(norms[:-2])


SIGNS = (
    Sign(
        "fake_score/lag / fake_score/fresh_loss",
        is_behind,
        "the fake score falls behind the policy, whose updates then push in an outdated direction. Raise "
        "fake_score_updates_per_policy_update or fake_score_learning_rate, or lower learning_rate",
    ),
    Sign(
        "rewards/*/frac_zero_std",
        is_flat,
        "nearly all prompts have samples of one value, and no advantage follows from them. Use a finer reward, "
        "a larger num_generations, group_noise='own' or a higher eta",
    ),
    Sign(
        "rewards/*/std",
        has_collapsed,
        "the samples have become alike, or the reward is saturated. Look at the grids, go back to an earlier "
        "checkpoint, and lower the reward's weight or learning_rate",
    ),
    Sign(
        "rewards/*/log_ratio_m[ai][xn]",
        is_extreme,
        "the policy moves too far on one rollout. Lower learning_rate or num_iterations",
    ),
    Sign(
        "*/grad_norm",
        is_out_of_range,
        "the gradient has left its range. Look at the grids and at fake_score/lag; lower the role's learning rate, set "
        "max_grad_norm (fake_score_max_grad_norm), or go back to an earlier checkpoint",
    ),
)


def signs(history: Sequence[Mapping[str, float]]) -> dict[str, str]:
    """What is going wrong.

    Args:
        history: The entries of the log, oldest first.

    Returns:
        By the name of the number that shows it: its value, what that means, and what to do.

    Example:
        >>> signs([{"rewards/ocr/frac_zero_std": 1.0}] * 3)["rewards/ocr/frac_zero_std"][:60]
        'rewards/ocr/frac_zero_std is 1: nearly all prompts have samp'
    """
    values: dict[str, list[float]] = {}
    for row in history[-WINDOW:]:
        lag, loss = row.get("fake_score/lag"), row.get("fake_score/fresh_loss")
        derived = {SIGNS[0].metrics: lag / loss} if lag is not None and loss else {}
        for name, value in {**row, **derived}.items():
            values.setdefault(name, []).append(value)
    return {
        name: f"{name} is {seen[-1]:.3g}: {sign.what}"
        for sign in SIGNS
        for name, seen in values.items()
        if fnmatchcase(name, sign.metrics) and sign.shows(seen)
    }
