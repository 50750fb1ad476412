"""The methods: what each sets."""

from typing import Any

from rdm_rl.settings import did_you_mean

_WITHOUT_FAKE_SCORE = {"fake_score_updates_per_policy_update": 0}

# Each method is a setting of one trainer. `rdm-rl methods` prints this table.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "dmd": (
        "distribution matching, scaled for each sample; the baseline",
        {"dm_normalization": "sample", "dm_scale_floor": 1e-6},
    ),
    "gndm": ("group-normalised distribution matching", {"dm_normalization": "group_rms"}),
    "dmdr": (
        "distribution matching and rewards with constant weights; the baseline with rewards",
        {"dm_normalization": "sample", "dm_scale_floor": 1e-6, "reward_weighting": "fixed", "pathwise_steps": "any"},
    ),
    "gndmr": (
        "group-normalised distribution matching and rewards with adaptive weights",
        {"dm_normalization": "group_rms", "reward_weighting": "adaptive"},
    ),
    "refl": (
        "gradients of differentiable rewards alone, without 'rdm' in reward_funcs; the control",
        {"reward_weighting": "fixed", **_WITHOUT_FAKE_SCORE},
    ),
    "ddpo": (
        "policy gradient of black-box rewards on a many-step sampler, without 'rdm'; what TRL's DDPOTrainer did",
        {
            **{"reward_weighting": "fixed", "reward_gradient": "score_function", **_WITHOUT_FAKE_SCORE},
            **{"warm_start": "none", "sampler": "ddim", "eta": 1.0, "num_inference_steps": 50, "guidance_scale": 5.0},
            **{"num_replayed_steps": 50, "ema_decay": 0.0, "learning_rate": 3e-4},
        },
    ),
    "redif": (
        "policy gradient towards the teacher's image of the same prompt and noise, without 'rdm' (ReDiFTrainer)",
        {
            **{"reward_weighting": "fixed", "reward_gradient": "score_function", **_WITHOUT_FAKE_SCORE},
            **{"warm_start": "none", "sampler": "ddim", "eta": 0.4, "num_inference_steps": 5, "guidance_scale": 5.0},
            **{"teacher_guidance_scale": 5.0, "num_replayed_steps": 4, "step_weighting": "std"},
            **{"group_noise": "shared", "noise_pool": 4, "scale_rewards": "batch", "ema_decay": 0.0},
        },
    ),
    "hybrid": (
        "'rdm' on every step, black-box rewards on the random ones, gradients of rewards on the last; after RTDMD",
        {"dm_normalization": "group_rms", "reward_weighting": "adaptive", "num_replayed_steps": 2},
    ),
}


def method_settings(method: str) -> dict[str, Any]:
    """The settings that make a method.

    Args:
        method: Its name.

    Returns:
        Values of :class:`RDMConfig` by field.

    Raises:
        ValueError: If the method is unknown.

    Example:
        >>> method_settings("dmd")
        {'dm_normalization': 'sample', 'dm_scale_floor': 1e-06}
    """
    if method not in METHODS:
        hint = did_you_mean(method, METHODS)
        raise ValueError(f"method {method!r} is unknown.{hint} Known: {', '.join(METHODS)}.")
    return dict(METHODS[method][1])
