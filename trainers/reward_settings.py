"""Settings of rewards that cannot be acted on are refused; those that will hardly do what was meant are pointed out."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import fields

from rdm_rl.rewards.kinds import PathwiseReward, TrainingReward
from rdm_rl.trainers.rdm_config import RDMConfig
from rdm_rl.weighting import AdaptiveWeighting, Weighting, make_weighting

logger = logging.getLogger(__name__)

WEIGHTING_SETTINGS = (
    "reward_start_step",
    "reward_ramp_steps",
    "reward_conflict",
    "adaptive_reference",
    "fidelity_budget",
)
POLICY_GRADIENT_SETTINGS = ("epsilon", "epsilon_high", "advantage_clip", "step_weighting", "reward_baseline")


def choose_weighting(args: RDMConfig, weights: Mapping[str, float], weighting: Weighting | None) -> Weighting:
    """The user's own weighting, or the one that the settings ask for.

    Args:
        args: The settings.
        weights: The weight of each reward by name.
        weighting: The user's own weighting, or None.

    Returns:
        The weighting.

    Raises:
        TypeError: If the user's does not derive from :class:`~rdm_rl.weighting.Weighting`.
        ValueError: If a setting is changed that nothing would act on: beside the user's own, or without ``rdm``.
    """
    if weighting is not None and not isinstance(weighting, Weighting):
        raise TypeError(
            f"weighting={weighting!r} does not derive from rdm_rl.weighting.Weighting. Derive from it and override "
            "combine(directions), and update(statistics, step) if it learns from them."
        )
    changed = ", ".join(_changed(args, WEIGHTING_SETTINGS))
    if changed and weighting is not None:
        raise ValueError(
            f"weighting= is given, so {changed} would not be acted on. Give what it says to your weighting, and leave "
            "it out of the settings."
        )
    if changed and "rdm" not in weights:
        raise ValueError(
            f"{changed} is set, which says how rewards join distribution matching, but 'rdm' is not in reward_funcs. "
            "Leave it out, or add 'rdm'."
        )
    if weighting is not None:
        return weighting
    return make_weighting(
        args.reward_weighting,
        weights,
        budget=args.fidelity_budget,
        reference=args.adaptive_reference,
        start_step=args.reward_start_step,
        ramp_steps=args.reward_ramp_steps,
        conflict=args.reward_conflict,
    )


def check_reward_settings(args: RDMConfig, rewards: Mapping[str, TrainingReward]) -> None:
    """Refuse rewards that could not act, and settings of theirs that nothing would act on.

    Args:
        args: The settings.
        rewards: The rewards by name.

    Raises:
        ValueError: If something cannot work.
    """
    if "rdm" in rewards and not args.fake_score_updates_per_policy_update:
        raise ValueError(
            "reward_funcs has 'rdm', which compares the teacher with the fake score, but the fake score is never "
            "trained: fake_score_updates_per_policy_update=0. Set it to 5, say, or leave out 'rdm'."
        )
    boxes = [name for name, reward in rewards.items() if reward.needs_likelihood]
    if boxes and not args.has_random_steps:
        raise ValueError(
            f"The reward {boxes[0]!r} is a black box: it acts through the likelihood of the policy's random steps. But "
            f"num_inference_steps={args.num_inference_steps}, sampler={args.sampler!r} and eta={args.eta} leave no "
            "random step (the last one never is). Use two steps or more and eta above 0; or, if the reward's values "
            "have a graph to the images, declare differentiable = True; or watch it with the weight 0."
        )
    if boxes and args.num_generations == 1 and args.reward_baseline == "group":
        raise ValueError(
            f"num_generations=1: the reward {boxes[0]!r} is compared with the mean of its group, which is itself, so "
            "every advantage would be 0. Set num_generations to 2 or more (8, say), or reward_baseline='batch' with "
            "scale_rewards='batch'."
        )
    changed = _changed(args, POLICY_GRADIENT_SETTINGS)
    if changed and not boxes:
        raise ValueError(
            f"{', '.join(changed)} is set, but no black-box reward acts in this run. Leave it out, give one a weight, "
            "or set reward_gradient='score_function'."
        )
    if _changed(args, ["importance_weight_clip"]) and "rdm" not in rewards:
        raise ValueError(
            f"importance_weight_clip={args.importance_weight_clip} is set, which weights the direction of 'rdm' on a "
            "rollout that is used again, but 'rdm' is not in reward_funcs. Leave it out."
        )
    if args.first_step_anchor:
        anchor = f"first_step_anchor={args.first_step_anchor} anchors the first step"
        if "rdm" not in rewards:
            raise ValueError(f"{anchor} instead of 'rdm', which is not in reward_funcs. Leave it out.")
        if args.num_inference_steps == 1:
            raise ValueError(f"{anchor}, but the student has no other for 'rdm' to act on. Leave it out.")
        if len(rewards) > 1 and args.reward_weighting != "fixed":
            raise ValueError(
                f"{anchor} with another force than that of 'rdm', by which reward_weighting={args.reward_weighting!r} "
                "measures the other rewards. Set reward_weighting='fixed', or leave it out."
            )
    comparing = [f"the reward {name!r}" for name, reward in rewards.items() if reward.wants_teacher_images]
    if args.random_times and (args.first_step_anchor or comparing):
        other = f"first_step_anchor={args.first_step_anchor}" if args.first_step_anchor else comparing[0]
        raise ValueError(
            f"random_times={args.random_times} keeps the last step of a walk alone, but {other} begins with its first "
            "noise. Leave one of them out."
        )
    if args.random_times and args.pathwise_steps == "last":
        looking = [name for name, reward in rewards.items() if isinstance(reward, PathwiseReward)]
        if looking:
            raise ValueError(
                f"random_times={args.random_times}: the last step of a walk may be at any time, so the reward "
                f"{looking[0]!r} would see predictions from much noise, too. Set pathwise_steps='any' if that is meant."
            )
    directed = any(reward.needs_fake_score for reward in rewards.values())  # rdm, or the user's.
    ratios = boxes or (args.num_iterations > 1 and directed) or args.beta
    if _changed(args, ["importance_sampling_level"]) and not ratios:
        raise ValueError(
            f"importance_sampling_level={args.importance_sampling_level!r} is set, but this run uses no likelihood: no "
            "black-box reward acts, num_iterations=1 and beta=0. Leave it out."
        )
    if _changed(args, ["teacher_cache_gib"]) and args.teacher_cache_dir is None:
        raise ValueError(
            f"teacher_cache_gib={args.teacher_cache_gib} is set, but no images are kept: set teacher_cache_dir, too."
        )
    if args.teacher_cache_dir is not None and not (comparing or args.eval_on_start or args.eval_strategy != "no"):
        raise ValueError(
            f"teacher_cache_dir={args.teacher_cache_dir!r} is set, but no reward asks for the teacher's images, and no "
            "evaluation. Leave it out, use a reward such as 'teacher_clip', or set eval_strategy='steps'."
        )


def _changed(args: RDMConfig, names: Sequence[str]) -> list[str]:
    """Those of the settings that differ from the defaults of their class."""
    defaults = {field.name: field.default for field in fields(args)}
    return [name for name in names if getattr(args, name) != defaults[name]]


def warn_of_reward_settings(
    args: RDMConfig, rewards: Mapping[str, TrainingReward], weights: Mapping[str, float], weighting: Weighting
) -> None:
    """Point out what will run, but hardly as meant.

    Args:
        args: The settings.
        rewards: The rewards by name.
        weights: Their weights.
        weighting: What combines them.
    """
    unused = not any(reward.needs_fake_score for reward in rewards.values())
    pushing = [name for name, weight in weights.items() if weight and name != "rdm"]
    if unused and args.fake_score_updates_per_policy_update:
        logger.warning(
            "No reward uses the fake score, and yet it is trained: set fake_score_updates_per_policy_update=0, "
            "as RDMConfig.from_method('refl') does, or put 'rdm' into reward_funcs."
        )
    first = -(-args.reward_start_step // args.num_iterations) * args.num_iterations  # Weights are set for each rollout.
    if pushing and first and 0 < args.max_steps <= first:
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
