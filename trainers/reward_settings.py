"""Settings of rewards that cannot be acted on are refused; those that will hardly do what was meant are pointed out."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from rdm_rl.rewards.adapters import PathwiseReward, WatchedReward
from rdm_rl.trainers.rdm_config import RDMConfig
from rdm_rl.weighting import AdaptiveWeighting, Weighting

logger = logging.getLogger(__name__)

WEIGHTING_SETTINGS = (
    "reward_start_step",
    "reward_ramp_steps",
    "reward_conflict",
    "adaptive_reference",
    "fidelity_budget",
)


def check_weighting_settings(args: RDMConfig, names: Sequence[str], weighting: Weighting | None) -> None:
    """Refuse settings of the weighting that nothing would act on.

    Args:
        args: The settings.
        names: The rewards.
        weighting: The user's own weighting, or None.

    Raises:
        ValueError: If a setting is changed beside a weighting of the user's own, or without ``rdm``.
    """
    defaults = {one.name: one.default for one in fields(RDMConfig)}
    changed = ", ".join(name for name in WEIGHTING_SETTINGS if getattr(args, name) != defaults[name])
    if changed and weighting is not None:
        raise ValueError(
            f"weighting= is given, so {changed} would not be acted on. Give what it says to your weighting, and leave "
            "it out of the settings."
        )
    if changed and "rdm" not in names:
        raise ValueError(
            f"{changed} is set, which says how rewards join distribution matching, but 'rdm' is not in reward_funcs. "
            "Leave it out, or add 'rdm'."
        )


def warn_of_reward_settings(
    args: RDMConfig, rewards: Mapping[str, Any], weights: Mapping[str, float], weighting: Weighting
) -> None:
    """Point out what will run, but hardly as meant.

    Args:
        args: The settings.
        rewards: The rewards, as directions, by name.
        weights: Their weights.
        weighting: What combines them.
    """
    all_plain = all(isinstance(reward, PathwiseReward | WatchedReward) for reward in rewards.values())
    pushing = [name for name, weight in weights.items() if weight and name != "rdm"]
    if all_plain and args.fake_score_updates_per_policy_update:
        logger.warning(
            "No reward uses the fake score, and yet it is trained: set fake_score_updates_per_policy_update=0 and "
            "fake_score_warmup_steps=0, as RDMConfig.from_method('refl') does, or put 'rdm' into reward_funcs."
        )
    if all_plain and args.pathwise_steps == "last" and args.num_inference_steps > 1:
        logger.warning(
            "All rewards act on the last of %d steps only, and the step is drawn anew in each update: most updates "
            "will move nothing. Set pathwise_steps='any'.",
            args.num_inference_steps,
        )
    if pushing and 0 < args.max_steps <= args.reward_start_step:
        logger.warning(
            "reward_start_step=%d is not before max_steps=%d: %s will never act.",
            *(args.reward_start_step, args.max_steps, ", ".join(pushing)),
        )
    if not isinstance(weighting, AdaptiveWeighting) or "rdm" not in rewards:
        return
    if pushing and weighting.reference == "cold_start" and weighting.start_step == 0:
        logger.warning(
            "reward_start_step=0: the weights of %s refer to the force of 'rdm' in the first update alone, a single "
            "noisy draw, and tiny where the policy still equals the teacher. Set reward_start_step=20, say.",
            ", ".join(pushing),
        )
