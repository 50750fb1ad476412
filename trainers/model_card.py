"""What the model card of a student says of its run."""

from typing import TYPE_CHECKING, Any

from rdm_rl.student import public_name
from rdm_rl.weighting import Weighting

if TYPE_CHECKING:
    from rdm_rl.trainers.student_run import StudentRun


def card_facts(run: "StudentRun") -> dict[str, Any]:
    """The weights that are saved, and the rewards, models and settings that made them, by name."""
    averaged = run.average is not None and run.args.save_ema
    names = ["num_generations", "learning_rate", "seed"]
    names += ["dm_normalization"] if "rdm" in run.rewards else []
    names += ["resolution"] if len(run.sizes) > 1 else []
    usual = {"sampler": "renoise", "eta": None, "random_times": None, "num_iterations": 1}
    names += [name for name, value in usual.items() if getattr(run.args, name) != value]
    return {
        "weights": "averaged over training (EMA)" if averaged else "of the last update",
        "rewards": ", ".join(f"{name} (weight {run.reward_weights[name]:g})" for name in run.rewards)
        if type(run.weighting).__module__ == Weighting.__module__
        else f"{', '.join(run.rewards)}, combined by {type(run.weighting).__name__}",
        **{setting: public_name(name) for setting, name in run.models.sources.items()},
        "policy updates": run.state.global_step,
        "teacher_guidance_scale": run.teacher_guidance_scale,
        **{name: getattr(run.args, name) for name in names},
        **({"weighting": type(run.weighting).__name__} if len(run.rewards) > 1 else {}),
    }
