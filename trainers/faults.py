"""Numbers that go wrong: an update of what is not finite is not made, and this says whose fault it was."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from rdm_rl.networks.roles import Role
from rdm_rl.networks.sharding import local
from rdm_rl.records import Experience, Rollout
from rdm_rl.rewards.calling import shorten_prompts
from rdm_rl.settings import Whole, setting


def samples_cause(rollouts: Iterable[Rollout]) -> str:
    """Why samples cannot be learnt from; empty if they can."""
    for rollout in rollouts:
        if not bool(rollout.x_0.isfinite().all()):
            rows = ~rollout.x_0.transpose(0, 1).flatten(1).isfinite().all(1)
            return f"the policy's samples are not finite for the prompt(s) {_prompts_of(rollout, rows)}"
    return ""


def directions_cause(experiences: Iterable[Experience]) -> str:
    """Which reward's direction is not finite, and for which prompts; empty if all are."""
    for experience in experiences:
        for name, direction in experience.directions.items():
            rows = direction.applicable & ~direction.values.flatten(1).isfinite().all(1)
            if bool(rows.any()):
                prompts = _prompts_of(experience.rollout, rows)
                return f"the direction of the reward {name!r} is not finite for the prompt(s) {prompts}"
    return ""


def _prompts_of(rollout: Rollout, rows: Tensor) -> str:
    return shorten_prompts([rollout.batch.prompts[row] for row in rows.nonzero().flatten().tolist()])


def update_cause(losses: Sequence[float], prompts: Sequence[Sequence[str]], norm: float) -> str:
    """Why an update is not made.

    Args:
        losses: The losses of its micro-batches.
        prompts: The prompts of each.
        norm: The norm of the gradient, of all processes.

    Example:
        >>> update_cause([0.5, math.nan], [["a cat"], ["a dog"]], math.nan)
        "its loss is nan for the prompt(s) 'a dog'"
        >>> update_cause([0.5], [["a cat"]], math.inf)
        "the norm of its gradient is inf, and its loss 0.5 for the prompt(s) 'a cat'"
    """
    for loss, texts in zip(losses, prompts, strict=True):
        if not math.isfinite(loss):
            return f"its loss is {loss} for the prompt(s) {shorten_prompts(texts)}"
    values, texts = ", ".join(f"{loss:.4g}" for loss in losses), [text for batch in prompts for text in batch]
    return f"the norm of its gradient is {norm}, and its loss {values} for the prompt(s) {shorten_prompts(texts)}"


def weights_cause(weights: Mapping[Role, Mapping[str, Tensor]]) -> str:
    """Which weights are not finite, by role and name, of sharded ones in this process's part; empty if all are."""
    for role, by_name in weights.items():
        wrong = [name for name, weight in by_name.items() if not bool(local(weight).isfinite().all())]
        if wrong:
            more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            return f"The weights of the {role} are not finite ({', '.join(wrong[:3])}{more})"
    return ""


@dataclass
class FaultSettings:
    """When something goes wrong."""

    max_skipped_updates: Whole = setting(
        3,
        "Successive updates that are left out because a loss, gradient, direction or sample is not finite; one more "
        "ends the run. With `num_iterations`, successive rollouts.",
    )
    stop_signals: list[Literal["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2"]] = setting(
        lambda: ["SIGTERM", "SIGINT"],
        "Signals on which a run finishes its update, saves a checkpoint and ends with 128 + their number (143, 130); "
        "add `SIGUSR1` where Slurm sends it early (`--signal=USR1@300`).",
    )
