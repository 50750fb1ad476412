"""``ReDiFTrainer``: distillation by policy gradient towards the teacher's own image of the same prompt and noise."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rdm_rl.policy import NoisePool, SamplerName
from rdm_rl.rdm import RewardScale
from rdm_rl.rewards.registry import RewardSpec, find_reward
from rdm_rl.settings import Count, Finite, Size, Whole, convert, explains_names, setting
from rdm_rl.trainers.methods import method_settings
from rdm_rl.trainers.optimization import Decay
from rdm_rl.trainers.rdm_config import RDMConfig
from rdm_rl.trainers.rdm_trainer import RDMTrainer

_RECOMMENDED = method_settings("redif")

# `paper`: what its public code sets for SD1.5; ReDiF's authors advise against some of it.
_PAPER: dict[str, Any] = {
    "num_inference_steps": 5,
    "teacher_num_inference_steps": 50,
    "guidance_scale": 5.0,
    "teacher_guidance_scale": 5.0,
    "eta": 1.0,
    "epsilon": 1e-4,
    "importance_sampling_level": "dimension",
    "step_weighting": "none",
    "num_replayed_steps": 4,
    "num_generations": 8,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 2,
    "scale_rewards": "group",
    "group_noise": "own",
    "noise_pool": None,
    "beta": 0.0,
    "learning_rate": 1e-5,
    "weight_decay": 1e-4,
}
PRESETS: dict[str, dict[str, Any]] = {"paper": _PAPER}


@explains_names
@dataclass
class ReDiFConfig(RDMConfig):
    r"""The settings of :class:`ReDiFTrainer`: those of :class:`~rdm_rl.RDMConfig` with other defaults.

    They are the recommended ones: a five-step DDIM student with guidance 5 in rollout and update alike, ``eta``
    0.4, a factor for each step, groups that share their initial noise (so that a group has one teacher image), a pool
    of noises (so that teacher images are made once), and advantages over the spread of the batch.
    ``from_preset("paper")`` has what the paper's public code sets. The control is one switch:
    ``reward_gradient="pathwise"`` sends the gradient of the same reward through the last step instead (DRaFT-1). It
    needs no randomness, so ``eta`` is then 0 unless it is set: with it, the last step would learn to clean up noise
    that is not there in use. Nor does it need groups, whose samples would be copies: ``num_generations`` is then 1.

    References:
        | ReDiF: Reinforced Distillation for Few Step Diffusion (Tighkhorshid et al., 2025)
        | https://arxiv.org/abs/2512.22802
        | Directly Fine-Tuning Diffusion Models on Differentiable Rewards (Clark et al., 2023), DRaFT-1
        | https://arxiv.org/abs/2309.17400

    Example:
        >>> args = ReDiFConfig.from_preset("paper", output_dir="out", use_cpu=True)
        >>> args.eta, args.num_generations, args.teacher_cache_dir
        (1.0, 8, 'out/teacher-images')
    """

    num_inference_steps: Count = _RECOMMENDED["num_inference_steps"]
    reward_weighting: Literal["adaptive", "fixed", "budget"] = _RECOMMENDED["reward_weighting"]
    reward_gradient: Literal["pathwise", "score_function"] = setting(
        _RECOMMENDED["reward_gradient"], "`score_function` is the policy gradient, `pathwise` the DRaFT control."
    )
    fake_score_updates_per_policy_update: Whole = setting(0, "There is no fake score.")
    warm_start: Literal["ode", "none"] = _RECOMMENDED["warm_start"]
    sampler: SamplerName = _RECOMMENDED["sampler"]
    eta: Size | None = setting(
        None, "How random the sampler is in training. Default: 0.4, or 0 with `reward_gradient=pathwise`."
    )
    guidance_scale: Finite = _RECOMMENDED["guidance_scale"]
    teacher_guidance_scale: Finite | None = _RECOMMENDED["teacher_guidance_scale"]
    num_replayed_steps: Count = _RECOMMENDED["num_replayed_steps"]
    step_weighting: Literal["none", "std"] = _RECOMMENDED["step_weighting"]
    group_noise: Literal["own", "shared"] = _RECOMMENDED["group_noise"]
    noise_pool: NoisePool | None = _RECOMMENDED["noise_pool"]
    scale_rewards: RewardScale = _RECOMMENDED["scale_rewards"]
    ema_decay: Decay = _RECOMMENDED["ema_decay"]

    def __post_init__(self) -> None:
        """Give the teacher's images a place beside the run's other files, and settle ``eta``."""
        convert(self, {"eta"})
        if self.eta is None:
            self.eta = _RECOMMENDED["eta"] if self.reward_gradient == "score_function" else 0.0
        if self.reward_gradient == "pathwise" and self.eta == 0 and self.group_noise == "shared":
            self.num_generations = 1
        if self.teacher_cache_dir is None:
            self.teacher_cache_dir = str(Path(self.output_dir or "trainer_output") / "teacher-images")
        super().__post_init__()

    @classmethod
    def from_preset(cls, preset: str, **overrides: Any) -> "ReDiFConfig":
        """The settings of a preset; the defaults are the recommended ones.

        Args:
            preset: ``paper``.
            overrides: Further settings; they win over the preset's.

        Returns:
            The settings.

        Raises:
            ValueError: If the preset is unknown.
        """
        if preset not in PRESETS:
            raise ValueError(f"preset {preset!r} is unknown. Use one of {', '.join(PRESETS)}.")
        settings = dict(PRESETS[preset])
        if overrides.get("reward_gradient") == "pathwise":  # These are the policy gradient's.
            for name in ("eta", "epsilon", "importance_sampling_level", "step_weighting"):
                settings.pop(name, None)
        return cls(**{**settings, **overrides})


class ReDiFTrainer(RDMTrainer):
    """Trains a few-step student to make the teacher's image of the same prompt and the same initial noise.

    A thin :class:`~rdm_rl.RDMTrainer`: it needs a reward that is given ``teacher_images``. The arguments are those of
    :class:`~rdm_rl.RDMTrainer`.

    Args:
        model: The pipeline; it is also the teacher.
        reward_funcs: At least one teacher-match reward; others may stand beside it.
        args: The settings; None for :class:`ReDiFConfig`.
        train_dataset: Rows with a ``prompt``.
        eval_dataset: Rows that are not trained on, for evaluations; None uses the first training rows.
        options: What :class:`~rdm_rl.RDMTrainer` takes besides.

    Raises:
        ValueError: If no reward compares with the teacher's images, or ``rdm`` is one of the rewards.
    """

    def __init__(
        self,
        model: Any,
        reward_funcs: RewardSpec | Sequence[RewardSpec] = "teacher_clip",
        args: RDMConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        **options: Any,
    ) -> None:
        """Check the rewards before anything is loaded."""
        specs = reward_funcs if isinstance(reward_funcs, list | tuple) else [reward_funcs]
        if "rdm" in specs:
            raise ValueError(
                "reward_funcs has 'rdm': ReDiF matches images in pairs, not distributions. Leave it out, or use "
                "RDMTrainer, which takes both."
            )
        rewards = [find_reward(spec) if isinstance(spec, str) else spec for spec in specs]
        if not any(getattr(reward, "wants_teacher_images", False) for reward in rewards):
            raise ValueError(
                f"reward_funcs={reward_funcs!r} compares nothing with the teacher's images. Use 'teacher_clip', "
                "'teacher_dino', 'teacher_perceptual', 'teacher_mse' or 'teacher_histogram', or a reward of your own "
                "with wants_teacher_images = True."
            )
        super().__init__(model, reward_funcs, args or ReDiFConfig(), train_dataset, eval_dataset, **options)
