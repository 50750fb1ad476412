"""The settings of a run: ``RDMConfig``, a ``TrainingArguments`` with the fields of the method."""

from dataclasses import MISSING, dataclass, field, fields
from difflib import get_close_matches
from math import isfinite
from typing import Any, Literal, get_args

from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

from rdm_rl.policy import Level, SamplerName
from rdm_rl.rdm import Group, Normalization, RewardBaseline, RewardScale
from rdm_rl.renoise import RenoiseDistribution
from rdm_rl.trainers import processes
from rdm_rl.weighting import Reference

MOST_NOISES = 2**24  # In a pool.
_WITHOUT_FAKE_SCORE = {"fake_score_updates_per_policy_update": 0, "fake_score_warmup_steps": 0}

# Each method is a setting of one trainer. `rdm-rl methods` prints this table.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "dmd": ("distribution matching, scaled for each sample; the baseline", {"dm_normalization": "sample"}),
    "gndm": ("group-normalised distribution matching", {"dm_normalization": "group"}),
    "dmdr": (
        "distribution matching and rewards with constant weights; the baseline with rewards",
        {"dm_normalization": "sample", "reward_weighting": "fixed"},
    ),
    "gndmr": (
        "group-normalised distribution matching and rewards with adaptive weights",
        {"dm_normalization": "group", "reward_weighting": "adaptive"},
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
        {"dm_normalization": "group", "reward_weighting": "adaptive", "num_replayed_steps": 2},
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
        {'dm_normalization': 'sample'}
    """
    if method not in METHODS:
        hint = _did_you_mean(method, METHODS)
        raise ValueError(f"method {method!r} is unknown.{hint} Known: {', '.join(METHODS)}.")
    return dict(METHODS[method][1])


# Inherited fields that the trainer acts on. Any other one is refused when it is set, never ignored.
HONOURED = frozenset(
    """
    output_dir per_device_train_batch_size num_train_epochs max_steps learning_rate lr_scheduler_type
    lr_scheduler_kwargs warmup_steps warmup_ratio optim optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon
    gradient_accumulation_steps max_grad_norm bf16 fp16 tf32 activation_checkpointing gradient_checkpointing
    logging_dir logging_strategy logging_steps logging_first_step disable_tqdm report_to run_name project
    trackio_space_id trackio_bucket_id trackio_static_space_id eval_strategy eval_steps eval_delay eval_on_start
    per_device_eval_batch_size save_strategy save_steps save_total_limit push_to_hub hub_token
    hub_private_repo hub_model_id hub_revision remove_unused_columns seed data_seed use_cpu resume_from_checkpoint
    ddp_backend ddp_timeout do_train do_eval local_rank
    """.split()
)

# What TrainingArguments and its argument parser make of defaults: `dataclasses.replace` and the command line set them.
SETTLED: dict[str, tuple[Any, ...]] = {
    "include_num_input_tokens_seen": (False,),
    "debug": ([],),
    "accelerator_config": (AcceleratorConfig(),),
    "dataloader_pin_memory": (False,),
    "fsdp": ([], False),
    "fsdp_config": ({}, {"min_num_params": 0, "xla": False, "xla_fsdp_v2": False, "xla_fsdp_grad_ckpt": False}),
    "average_tokens_across_devices": (False,),
}


@dataclass
class RDMConfig(TrainingArguments):
    r"""The settings of :class:`~rdm_rl.RDMTrainer`.

    The fields of transformers' ``TrainingArguments`` keep their meaning, with ``learning_rate``, ``max_grad_norm``,
    ``lr_scheduler_type`` and ``warmup_steps`` being those of the policy and one *step* being one policy update. Those
    that make no sense here are refused when set. Defaults that differ: ``learning_rate`` 1e-5, ``logging_steps`` 10,
    ``report_to`` "none", ``remove_unused_columns`` False.

    Args:
        resolution: Height and width of the images in pixels; None is the model's own.
        prompt_cache_dir: Where encoded prompts are kept: each is encoded once, and the text encoders then leave the
            GPU. None encodes each batch anew.
        offload: What waits on the CPU while it is not used: ``text_encoders``, ``rewards`` (those with a network), and,
            when full copies are trained, the ``teacher``.
        shard: Divide the frozen networks, or the full copies, among the processes (FSDP2).
        num_inference_steps: Steps K of the student.
        num_generations: Samples G of each prompt; a group is never split. ``per_device_train_batch_size`` counts
            samples and must be a multiple of it.
        dm_normalization: What the distribution-matching direction is divided by: ``group`` (GNDM), ``sample`` (DMD),
            ``group_rms`` or ``none``.
        dm_group: What a group is: the generations of a ``prompt``, the ``renoise`` draws of one sample, or both.
        num_renoise: Re-noisings R of each sample that the direction is averaged over.
        dm_scale_floor: The smallest scale that the direction is divided by.
        renoise_distribution: Distribution of the re-noising time: ``uniform``, ``beta`` (biased to high noise), or
            ``annealed_beta`` (from the second to the first, as DMDR's DynaRS). The fake score trains on the same.
        renoise_range: The lowest and the highest re-noising time of distribution matching.
        renoise_anneal_steps: Policy updates over which ``annealed_beta`` anneals; None means 2,000 for it.
        teacher_guidance_scale: Guidance of the teacher, baked into the student; None is the family's published value.
        reward_weights: Weight of each reward. None is 1 for ``rdm`` and, with adaptive weights, 0.3 for each other
            reward, else 1.
        reward_weighting: How rewards are combined: ``adaptive`` (GNDMR: each pushes with its weight times the force of
            distribution matching), ``fixed`` weights (DMDR), or ``budget`` (adaptive, within ``fidelity_budget``).
        adaptive_reference: The force that adaptive weights refer to: that of the ``cold_start``, or the running one
            (``online``).
        reward_start_step: Updates with distribution matching alone before the other rewards begin to count.
        reward_ramp_steps: Updates over which their weights then grow to their values.
        reward_conflict: ``project`` removes the part of a reward's direction that opposes distribution matching.
        fidelity_budget: How many times its value in the cold start the gap to the teacher may be; None means 1.5 for
            ``reward_weighting="budget"``.
        pathwise_steps: The steps on which gradients of rewards act: the ``last``, or ``any``.
        reward_gradient: How rewards that are differentiable act: by their own gradient (``pathwise``), or as black
            boxes through the policy's likelihood (``score_function``), as those that are not always do.
        scale_rewards: What a black box's centred rewards are divided by to make advantages: the standard deviation of
            the ``group`` or of the ``batch`` (a running one), or 1 (``none``).
        reward_baseline: What they are centred on: the mean of the ``group``, or of the whole ``batch``.
        advantage_clip: Advantages are clipped to plus and minus this.
        epsilon: How far a step's likelihood ratio may fall below 1 before its bad sample stops pushing; None is 1e-4 at
            level ``dimension`` and 0.2 at ``sample``.
        epsilon_high: How far it may rise above 1 before its good sample does; None is ``epsilon``.
        importance_sampling_level: The log ratio is the mean over a sample's dimensions (``dimension``: a trust region),
            or their sum (``sample``: the likelihood, for small models).
        step_weighting: A factor for each step of a policy gradient: ``none``, or in proportion to the ``std`` of its
            noise, because the direction grows as the noise shrinks.
        beta: Weight of the divergence of the policy's random steps from those it had before the first update.
        num_replayed_steps: Recorded steps that are replayed in each policy update, at most all those that a reward acts
            on.
        num_iterations: Policy updates M on each rollout. Fake-score updates and rewards come once for each rollout.
        importance_weight_clip: When a rollout is used again, distribution matching's direction is weighted by the
            likelihood ratio, clipped to 1 plus and minus this; 0 leaves the ratio out.
        sampler: How the policy goes from step to step: ``renoise``, ``ddim``, or, for flow models, ``flow_sde`` or
            ``cps`` (see :mod:`rdm_rl.policy`).
        eta: How random ``ddim``, ``flow_sde`` and ``cps`` are in training; None is 1, 0.7 and 0.9.
        guidance_scale: Guidance of the policy itself, in rollouts and updates alike. The saved student needs it too.
        group_noise: Whether each generation starts from its ``own`` noise, or those of one prompt from a ``shared``
            one.
        noise_pool: Number of initial noises for each prompt, drawn from again and again, so that a teacher's images of
            them can be kept; None always draws new ones.
        teacher_cache_dir: Where the teacher's images are kept on disk, for rewards that ask for them; None keeps none.
        teacher_cache_gib: Most disk space that they take, in GiB; the least recently used go first. None: no limit.
        reward_batch_size: Most samples that a reward is called with; None is all.
        reward_timeout: Seconds after which a reward counts as hung; None waits for ever.
        on_reward_error: What happens when a reward fails: ``raise``, or ``skip`` the samples concerned.
        reward_decoder: Folder or hub name of a tiny autoencoder that makes the rewards' images; None is the
            model's own.
        decode_batch_size: Samples that are decoded at once for rewards.
        teacher_num_inference_steps: Steps of the teacher's images, for rewards that ask for them.
        fake_score_learning_rate: Learning rate of the fake score; it must be well above the policy's.
        fake_score_updates_per_policy_update: Updates of the fake score before each policy update, or, with
            ``num_iterations``, on each rollout.
        fake_score_warmup_steps: Updates of the fake score on the initial policy before the first policy update.
        fake_score_max_grad_norm: Gradient norm that the fake score's gradients are clipped to; 0 does not clip.
        ema_decay: Decay of the averaged policy, reached after about 9 / (1 - decay) updates; 0 switches averaging off.
        save_ema: Save and evaluate the averaged policy instead of the last one.
        warm_start: ``ode`` regresses the policy on the teacher's ODE solutions first; ``none`` does not (a student that
            is already distilled), nor does None.
        warm_start_steps: Updates of that regression.
        warm_start_learning_rate: Its highest learning rate.
        warm_start_num_states: Teacher solutions for each student step.
        warm_start_ode_steps: Teacher steps of a solution from pure noise; proportionally fewer from lower noise.
        warm_start_cache_dir: Where solutions are kept; None is ``output_dir/warm_start``.

    Raises:
        ValueError: If a value cannot work, or an inherited field is set that the trainer does not act on.

    Example:
        >>> RDMConfig.from_method("dmd", output_dir="out", use_cpu=True).dm_normalization
        'sample'
    """

    learning_rate: float = field(default=1e-5, metadata={"help": "Learning rate of the policy."})
    logging_steps: float = field(default=10, metadata={"help": "Log every so many policy updates."})
    # The order of the union is TrainingArguments': transformers' argument parser does not read another.
    report_to: None | str | list[str] = field(  # noqa: RUF036
        default="none", metadata={"help": "Trackers to report to."}
    )
    remove_unused_columns: bool | None = field(
        default=False, metadata={"help": "Columns beside the prompt always stay: rewards may need them."}
    )

    resolution: int | None = field(default=None, metadata={"help": "Height and width of the images in pixels."})
    prompt_cache_dir: str | None = field(default=None, metadata={"help": "Where encoded prompts are kept."})
    offload: list[str] = field(
        default_factory=list,
        metadata={"help": "What waits on the CPU while it is not used: text_encoders, rewards, teacher."},
    )
    shard: bool = field(default=False, metadata={"help": "Divide the networks among the processes (FSDP2)."})
    num_inference_steps: int = field(default=4, metadata={"help": "Steps K of the student."})
    num_generations: int = field(default=8, metadata={"help": "Samples G of each prompt."})
    dm_normalization: Normalization = field(
        default="group", metadata={"help": "What the distribution-matching direction is divided by."}
    )
    dm_group: Group = field(default="prompt", metadata={"help": "What a group is."})
    num_renoise: int = field(default=1, metadata={"help": "Re-noisings R that the direction is averaged over."})
    dm_scale_floor: float = field(default=1e-6, metadata={"help": "Smallest scale the direction is divided by."})
    renoise_distribution: RenoiseDistribution = field(
        default="uniform", metadata={"help": "Distribution of the re-noising time."}
    )
    renoise_range: list[float] = field(
        default_factory=lambda: [0.02, 0.98], metadata={"help": "Lowest and highest re-noising time."}
    )
    renoise_anneal_steps: int | None = field(
        default=None, metadata={"help": "Policy updates over which annealed_beta anneals."}
    )
    teacher_guidance_scale: float | None = field(default=None, metadata={"help": "Guidance of the teacher."})
    reward_weights: list[float] | None = field(default=None, metadata={"help": "Weight of each reward."})
    reward_weighting: Literal["adaptive", "fixed", "budget"] = field(
        default="adaptive", metadata={"help": "How rewards are combined."}
    )
    adaptive_reference: Reference = field(
        default="cold_start", metadata={"help": "The force of distribution matching that adaptive weights refer to."}
    )
    reward_start_step: int = field(
        default=0, metadata={"help": "Updates with distribution matching alone before other rewards count."}
    )
    reward_ramp_steps: int = field(
        default=0, metadata={"help": "Updates over which the rewards' weights then grow to their values."}
    )
    reward_conflict: Literal["keep", "project"] = field(
        default="keep", metadata={"help": "What happens to the part of a reward that opposes distribution matching."}
    )
    fidelity_budget: float | None = field(
        default=None, metadata={"help": "How many times its cold-start value the gap to the teacher may be."}
    )
    pathwise_steps: Literal["last", "any"] = field(
        default="last", metadata={"help": "The steps on which gradients of rewards act."}
    )
    reward_gradient: Literal["pathwise", "score_function"] = field(
        default="pathwise", metadata={"help": "How differentiable rewards act: by their gradient, or as black boxes."}
    )
    scale_rewards: RewardScale = field(
        default="group", metadata={"help": "Whose standard deviation divides a black box's centred rewards."}
    )
    reward_baseline: RewardBaseline = field(default="group", metadata={"help": "Whose mean they are centred on."})
    advantage_clip: float = field(default=5.0, metadata={"help": "Largest advantage, on both sides."})
    epsilon: float | None = field(default=None, metadata={"help": "Lower clip of the likelihood ratio."})
    epsilon_high: float | None = field(default=None, metadata={"help": "Upper clip of the likelihood ratio."})
    importance_sampling_level: Level = field(
        default="dimension", metadata={"help": "Log ratios: mean over the dimensions, or their sum ('sample')."}
    )
    step_weighting: Literal["none", "std"] = field(
        default="none", metadata={"help": "A factor for each step of a policy gradient."}
    )
    beta: float = field(default=0.0, metadata={"help": "Weight of the divergence from the policy at the start."})
    num_replayed_steps: int = field(default=1, metadata={"help": "Recorded steps replayed in each policy update."})
    num_iterations: int = field(default=1, metadata={"help": "Policy updates M on each rollout."})
    importance_weight_clip: float = field(
        default=0.2, metadata={"help": "Clip of the weight of a rollout that is used again; 0: no weight."}
    )
    sampler: SamplerName = field(default="renoise", metadata={"help": "How the policy goes from step to step."})
    eta: float | None = field(default=None, metadata={"help": "Randomness of ddim, flow_sde and cps in training."})
    guidance_scale: float = field(default=1.0, metadata={"help": "Guidance of the policy itself."})
    group_noise: Literal["own", "shared"] = field(
        default="own", metadata={"help": "Whether the generations of a prompt share their initial noise."}
    )
    noise_pool: int | None = field(
        default=None, metadata={"help": "Initial noises for each prompt to draw from; default: always new ones."}
    )
    teacher_cache_dir: str | None = field(default=None, metadata={"help": "Where the teacher's images are kept."})
    teacher_cache_gib: float | None = field(
        default=20.0, metadata={"help": "Most disk space that they take, in GiB; null: no limit."}
    )
    reward_batch_size: int | None = field(
        default=None, metadata={"help": "Most samples that a reward is called with; default: all."}
    )
    reward_timeout: float | None = field(
        default=600.0, metadata={"help": "Seconds after which a reward counts as hung."}
    )
    on_reward_error: Literal["raise", "skip"] = field(
        default="raise", metadata={"help": "What happens when a reward fails: stop, or skip the samples."}
    )
    reward_decoder: str | None = field(
        default=None, metadata={"help": "Tiny autoencoder that makes the rewards' images; default: the model's own."}
    )
    decode_batch_size: int = field(default=4, metadata={"help": "Samples decoded at once for rewards."})
    teacher_num_inference_steps: int = field(
        default=50, metadata={"help": "Steps of the teacher's images, for rewards that ask for them."}
    )
    fake_score_learning_rate: float = field(default=1e-4, metadata={"help": "Learning rate of the fake score."})
    fake_score_updates_per_policy_update: int = field(
        default=5, metadata={"help": "Fake-score updates before each policy update."}
    )
    fake_score_warmup_steps: int = field(
        default=0, metadata={"help": "Fake-score updates on the initial policy before the first policy update."}
    )
    fake_score_max_grad_norm: float = field(
        default=1.0, metadata={"help": "Gradient norm the fake score is clipped to; 0 does not clip."}
    )
    ema_decay: float = field(default=0.999, metadata={"help": "Decay of the averaged policy; 0 switches it off."})
    save_ema: bool = field(default=True, metadata={"help": "Save and evaluate the averaged policy."})
    warm_start: Literal["ode", "none"] | None = field(
        default="ode", metadata={"help": "Regression on the teacher's ODE solutions before distribution matching."}
    )
    warm_start_steps: int = field(default=300, metadata={"help": "Updates of the warm start."})
    warm_start_learning_rate: float = field(default=1e-4, metadata={"help": "Learning rate of the warm start."})
    warm_start_num_states: int = field(default=1000, metadata={"help": "Teacher solutions for each student step."})
    warm_start_ode_steps: int = field(default=20, metadata={"help": "Teacher steps of a solution from noise."})
    warm_start_cache_dir: str | None = field(default=None, metadata={"help": "Where teacher solutions are kept."})

    def __post_init__(self) -> None:
        """Refuse what cannot work before anything is loaded, and settle defaults that depend on others."""
        processes.refuse_foreign_sharding()
        launched = processes.LAUNCHED_PRECISION  # As in transformers' trainer it counts, unless a setting does.
        if launched in ("bf16", "fp16") and not (bool(self.bf16) or bool(self.fp16)):
            setattr(self, launched, True)
        self.warm_start = self.warm_start or "none"
        self._refuse_ignored_fields()
        self._check_choices()
        self._check_numbers()
        super().__post_init__()
        if self.renoise_distribution == "annealed_beta" and self.renoise_anneal_steps is None:
            self.renoise_anneal_steps = 2000

    @property
    def has_random_steps(self) -> bool:
        """Whether a step of the policy has a likelihood: not the last, nor any with ``eta=0``."""
        return self.num_inference_steps > 1 and self.eta != 0

    @property
    def clip_range(self) -> tuple[float, float]:
        """The lower and upper clip of likelihood ratios: the settings, or the level's defaults."""
        low = (
            {"dimension": 1e-4, "sample": 0.2}[self.importance_sampling_level] if self.epsilon is None else self.epsilon
        )
        return low, low if self.epsilon_high is None else self.epsilon_high

    @classmethod
    def from_method(cls, method: str, **overrides: Any) -> "RDMConfig":
        """The settings of a named method.

        Args:
            method: A name that ``rdm-rl methods`` lists.
            overrides: Further settings; they win over the method's.

        Returns:
            The settings.

        Raises:
            ValueError: If the method is unknown.
        """
        settings = method_settings(method)
        if method == "redif" and overrides.get("reward_gradient") == "pathwise":  # The control has no policy gradient.
            del settings["step_weighting"]
            settings |= {"eta": 0.0, "num_generations": 1}
        return cls(**{**settings, **overrides})

    def _refuse_ignored_fields(self) -> None:
        for inherited in fields(TrainingArguments):
            if inherited.name in HONOURED or not inherited.init:
                continue
            default = inherited.default
            if inherited.default_factory is not MISSING:
                default = inherited.default_factory()
            if getattr(self, inherited.name) not in (default, None, *SETTLED.get(inherited.name, ())):
                raise ValueError(
                    f"{inherited.name}={getattr(self, inherited.name)!r} is set, but RDMTrainer does not act on it. "
                    "Remove it; the fields it honours are in rdm_rl.trainers.rdm_config.HONOURED."
                )

    def _check_choices(self) -> None:
        choices: dict[str, tuple[str, ...]] = {
            "dm_normalization": get_args(Normalization),
            "dm_group": get_args(Group),
            "renoise_distribution": get_args(RenoiseDistribution),
            "reward_weighting": ("adaptive", "fixed", "budget"),
            "adaptive_reference": get_args(Reference),
            "reward_conflict": ("keep", "project"),
            "pathwise_steps": ("last", "any"),
            "scale_rewards": get_args(RewardScale),
            "reward_baseline": get_args(RewardBaseline),
            "reward_gradient": ("pathwise", "score_function"),
            "importance_sampling_level": get_args(Level),
            "step_weighting": ("none", "std"),
            "sampler": get_args(SamplerName),
            "group_noise": ("own", "shared"),
            "on_reward_error": ("raise", "skip"),
            "warm_start": ("ode", "none"),
        }
        for name, known in choices.items():
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"{name}={value!r} is unknown.{_did_you_mean(str(value), known)} Use one of {known}.")
        for value in self.offload:
            known = ("text_encoders", "rewards", "teacher")
            if value not in known:
                raise ValueError(f"offload has {value!r}, unknown.{_did_you_mean(value, known)} Use some of {known}.")
        for name in ("logging_strategy", "eval_strategy", "save_strategy"):
            value = getattr(getattr(self, name), "value", getattr(self, name))
            if value not in ("no", "steps"):
                raise ValueError(f"{name}={value!r}, but a run counts in policy updates. Use 'steps' or 'no'.")
        schedule = getattr(self.lr_scheduler_type, "value", self.lr_scheduler_type)
        if schedule in ("reduce_lr_on_plateau", "greedy"):
            raise ValueError(
                f"lr_scheduler_type={schedule!r} follows an evaluation loss, and a run has none. Use 'constant' or "
                "'linear', say."
            )
        if self.adaptive_reference == "online" and self.reward_weighting == "fixed":
            raise ValueError(
                "adaptive_reference='online' is set, but reward_weighting='fixed' uses no reference. Set "
                "reward_weighting='adaptive', or leave adaptive_reference alone."
            )
        if self.fidelity_budget is not None and self.reward_weighting != "budget":
            raise ValueError(
                f"fidelity_budget={self.fidelity_budget} needs reward_weighting='budget', not "
                f"{self.reward_weighting!r}."
            )
        if self.reward_baseline == "batch" and self.scale_rewards == "group":
            raise ValueError(
                "reward_baseline='batch' centres on the batch, but scale_rewards='group' divides by a group's spread. "
                "Set scale_rewards to 'batch' or 'none'."
            )
        if self.pathwise_steps != "last" and self.reward_gradient != "pathwise":
            raise ValueError(
                f"pathwise_steps={self.pathwise_steps!r} is set, but with reward_gradient='score_function' no reward "
                "acts by its own gradient. Leave it out, or set reward_gradient='pathwise'."
            )
        if self.group_noise == "shared" and self.num_generations > 1 and not self.has_random_steps:
            raise ValueError(
                f"group_noise='shared' starts the {self.num_generations} generations of a prompt from one noise, and "
                "the policy has no random step, so they would be copies. Set num_generations=1, or group_noise='own'."
            )
        if self.sampler == "renoise" and self.eta is not None:
            raise ValueError(
                f"eta={self.eta} is set, but sampler='renoise' always draws all noise anew. Set sampler='ddim', say."
            )
        if self.importance_weight_clip != 0.2 and self.num_iterations == 1:
            raise ValueError(
                f"importance_weight_clip={self.importance_weight_clip} is set, but no rollout is used twice: set "
                "num_iterations to 2 or more, or leave it out."
            )
        if self.beta and not self.has_random_steps:
            raise ValueError(
                f"beta={self.beta} compares the policy's random steps with those at the start, but it has none: "
                f"num_inference_steps={self.num_inference_steps}, sampler={self.sampler!r}, eta={self.eta}. Set beta=0."
            )
        if self.push_to_hub and not self.hub_model_id:
            raise ValueError("push_to_hub=True needs hub_model_id='owner/name'.")
        if self.dm_group != "prompt":
            if self.dm_normalization not in ("group", "group_rms"):
                raise ValueError(
                    f"dm_group={self.dm_group!r} says what a group is, but dm_normalization={self.dm_normalization!r} "
                    "uses no group. Set dm_normalization='group' or leave dm_group='prompt'."
                )
            if self.num_renoise < 2:
                raise ValueError(
                    f"dm_group={self.dm_group!r} pools the re-noisings of a sample, but num_renoise="
                    f"{self.num_renoise}. Set num_renoise to 2 or more."
                )
        if self.renoise_anneal_steps is not None and self.renoise_distribution != "annealed_beta":
            raise ValueError(
                f"renoise_anneal_steps={self.renoise_anneal_steps} needs renoise_distribution='annealed_beta', not "
                f"{self.renoise_distribution!r}."
            )

    def _check_numbers(self) -> None:
        at_least = {
            "resolution": 1,
            "num_inference_steps": 1,
            "num_generations": 1,
            "num_renoise": 1,
            "fake_score_updates_per_policy_update": 0,
            "fake_score_warmup_steps": 0,
            "warm_start_steps": 1,
            "warm_start_num_states": 1,
            "warm_start_ode_steps": 1,
            "dm_scale_floor": 0,
            "reward_start_step": 0,
            "reward_ramp_steps": 0,
            "reward_batch_size": 1,
            "decode_batch_size": 1,
            "teacher_num_inference_steps": 1,
            "num_replayed_steps": 1,
            "num_iterations": 1,
            "beta": 0,
            "eta": 0,
            "epsilon": 0,
            "epsilon_high": 0,
            "noise_pool": 1,
            "fake_score_max_grad_norm": 0,
            "gradient_accumulation_steps": 1,
            "per_device_train_batch_size": 1,
            "per_device_eval_batch_size": 1,
        }
        for name, lowest in at_least.items():
            if getattr(self, name) is not None and getattr(self, name) < lowest:
                raise ValueError(f"{name}={getattr(self, name)}, but it must be at least {lowest}.")
        if self.per_device_train_batch_size % self.num_generations:
            fitting = max(1, round(self.per_device_train_batch_size / self.num_generations)) * self.num_generations
            raise ValueError(
                f"per_device_train_batch_size={self.per_device_train_batch_size} counts samples and is not a multiple "
                f"of num_generations={self.num_generations}, so a prompt's group would be split. Set it to {fitting}."
            )
        for name in ("beta", "epsilon", "epsilon_high", "guidance_scale", "eta"):
            value = getattr(self, name)
            if value is not None and not isfinite(value):
                raise ValueError(f"{name}={value}, but it must be a finite number.")
        for name in ("importance_weight_clip", *(() if self.sampler == "flow_sde" else ("eta",))):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name}={value}, but it must be between 0 and 1.")
        if self.noise_pool is not None and self.noise_pool > MOST_NOISES:
            raise ValueError(f"noise_pool={self.noise_pool}, but it can be {MOST_NOISES} at most. None has no end.")
        if not 0 < self.advantage_clip < float("inf"):
            raise ValueError(f"advantage_clip={self.advantage_clip}, but it must be a positive number.")
        for name in ("reward_timeout", "fidelity_budget", "teacher_cache_gib"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name}={value}, but it must be a positive number, or None.")
        if self.fake_score_warmup_steps and not self.fake_score_updates_per_policy_update:
            raise ValueError(
                f"fake_score_updates_per_policy_update=0 does without a fake score, but fake_score_warmup_steps="
                f"{self.fake_score_warmup_steps} trains one. Set both to 0, or neither."
            )
        low, high = self.renoise_range if len(self.renoise_range) == 2 else (1.0, 0.0)
        if not 0 < low <= high <= 1:
            raise ValueError(f"renoise_range={self.renoise_range} must be two times, 0 < low <= high <= 1.")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay={self.ema_decay} must be in [0, 1); 0 switches averaging off.")


def _did_you_mean(value: str, known: Any) -> str:
    near = get_close_matches(value, list(known), n=1, cutoff=0.4)
    return f" Did you mean {near[0]!r}?" if near else ""
