"""The settings of a run: ``RDMConfig``, a ``TrainingArguments`` with the fields of the method."""

import re
from dataclasses import MISSING, dataclass, fields
from typing import Any

from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.utils import is_torch_bf16_gpu_available, is_torch_xla_available

from rdm_rl.families.base import ModelSettings
from rdm_rl.families.resolution import read_resolutions
from rdm_rl.networks.offload import MemorySettings
from rdm_rl.policy import PolicySettings
from rdm_rl.ratio import PolicyGradientSettings
from rdm_rl.renoise import DistributionMatchingSettings
from rdm_rl.rewards.calling import RewardCallSettings
from rdm_rl.settings import Count, Folder, Size, check, convert, explains_names
from rdm_rl.trainers import processes
from rdm_rl.trainers.evaluation import EvaluationSettings
from rdm_rl.trainers.faults import FaultSettings
from rdm_rl.trainers.inherited import HONOURED, INSTEAD
from rdm_rl.trainers.methods import method_settings
from rdm_rl.trainers.optimization import AverageSettings, FakeScoreSettings, check_schedule
from rdm_rl.trainers.sanity import SanitySettings
from rdm_rl.trainers.warm_start import WarmStartSettings
from rdm_rl.weighting import WeightingSettings

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


@explains_names
@dataclass
class RDMConfig(  # In reverse, as a dataclass orders its fields.
    MemorySettings,
    EvaluationSettings,
    FaultSettings,
    SanitySettings,
    WarmStartSettings,
    PolicyGradientSettings,
    FakeScoreSettings,
    DistributionMatchingSettings,
    AverageSettings,
    PolicySettings,
    RewardCallSettings,
    WeightingSettings,
    ModelSettings,
    TrainingArguments,
):
    """The settings of :class:`~rdm_rl.RDMTrainer`: those of the method, beside transformers' ``TrainingArguments``.

    Each is declared in a class of settings beside what it sets, with its default, its choices or range, and what it
    does; ``rdm-rl train --help`` and ``docs/reference.md`` show them all. The inherited fields keep their meaning, with
    ``learning_rate``, ``max_grad_norm``, ``lr_scheduler_type`` and ``warmup_steps`` being those of the policy and one
    *step* being one policy update. Those that make no sense here are refused when set. Defaults that differ:
    ``learning_rate`` 1e-5, ``logging_steps`` 10, ``report_to`` "none", ``remove_unused_columns`` False.

    A value may be anything that can be read as its type: text for a number, a number for a list, a path, a number of
    NumPy.

    Raises:
        ValueError: If a value cannot work, or an inherited field is set that the trainer does not act on.
        TypeError: If there is no such setting.

    Example:
        >>> RDMConfig.from_method("dmd", output_dir="out", use_cpu=True).dm_normalization
        'sample'
    """

    learning_rate: Size = 1e-5
    logging_steps: float = 10
    # The order of the union is TrainingArguments': transformers' argument parser does not read another.
    report_to: None | str | list[str] = "none"  # noqa: RUF036
    remove_unused_columns: bool | None = False
    # As inherited, with the range or the kind of text that they have.
    per_device_train_batch_size: Count = 8
    per_device_eval_batch_size: Count = 8
    gradient_accumulation_steps: Count = 1
    resume_from_checkpoint: Folder | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot work before anything is loaded, and settle defaults that depend on others."""
        processes.refuse_foreign_sharding()
        self._refuse_ignored_fields()
        if str(self.resume_from_checkpoint) == "True":  # The newest one, which the command line calls by this text.
            self.resume_from_checkpoint = "true"
        ours = {each.name for each in fields(self)} - {each.name for each in fields(TrainingArguments)}
        convert(self, ours | HONOURED)
        check(self, ours | {*RDMConfig.__annotations__})
        launched = processes.LAUNCHED_PRECISION  # As in transformers' trainer it counts, unless a setting does.
        if launched in ("bf16", "fp16") and not (self.bf16 or self.fp16):
            setattr(self, launched, True)
        for refuse in _REFUSALS:
            refuse(self)
        if self.use_cpu:
            processes.join_on_cpu(self.ddp_backend, self.ddp_timeout)
        super().__post_init__()
        check_schedule(self)
        if self.renoise_distribution == "annealed_beta" and self.renoise_anneal_steps is None:
            self.renoise_anneal_steps = 2000
        if self.fake_score_warmup_steps is None:
            self.fake_score_warmup_steps = 100 if self.fake_score_updates_per_policy_update else 0

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
        if overrides.get("reward_gradient") == "score_function":
            settings.pop("pathwise_steps", None)
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
            if getattr(self, inherited.name) is None:  # YAML's null: it is not set.
                setattr(self, inherited.name, default)
            if getattr(self, inherited.name) not in (default, *SETTLED.get(inherited.name, ())):
                raise ValueError(
                    f"{inherited.name}={getattr(self, inherited.name)!r} is set, but RDMTrainer does not act on it. "
                    f"{INSTEAD.get(inherited.name, 'Remove it: docs/reference.md has all that it acts on.')}"
                )


def _refuse_precision(args: RDMConfig) -> None:
    """Refuse a precision that the machine does not have."""
    if args.bf16 and not (args.use_cpu or is_torch_bf16_gpu_available() or is_torch_xla_available()):
        raise ValueError(
            "bf16=True, but there is no GPU here that computes in bfloat16. Set bf16=False (--bf16 false; of "
            "accelerate launch, --mixed_precision no), or use_cpu=True, as a CPU does, slowly."
        )


def _refuse_run(args: RDMConfig) -> None:
    """Refuse how long a run goes on, what it writes and how it is batched, where that cannot work."""
    read_resolutions(args.resolution)
    for name in ("logging_strategy", "eval_strategy", "save_strategy"):
        value = getattr(getattr(args, name), "value", getattr(args, name))
        if value not in ("no", "steps"):
            raise ValueError(f"{name}={value!r}, but a run counts in policy updates. Use 'steps' or 'no'.")
    schedule = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
    if schedule in ("reduce_lr_on_plateau", "greedy"):
        raise ValueError(
            f"lr_scheduler_type={schedule!r} follows an evaluation loss, and a run has none. Use 'constant' or "
            "'linear', say."
        )
    if args.hub_model_id and not re.fullmatch(
        r"[\w.-]+(/[\w.-]+)?", args.hub_model_id
    ):  # It goes into the card's code.
        raise ValueError(f"hub_model_id={args.hub_model_id!r} is no name of the hub. Write owner/name.")
    if args.push_to_hub and not args.hub_model_id:
        raise ValueError("push_to_hub=True needs hub_model_id='owner/name'.")
    if args.per_device_train_batch_size % args.num_generations:
        fitting = max(1, round(args.per_device_train_batch_size / args.num_generations)) * args.num_generations
        raise ValueError(
            f"per_device_train_batch_size={args.per_device_train_batch_size} counts samples and is not a multiple "
            f"of num_generations={args.num_generations}, so a prompt's group would be split. Set it to {fitting}, or "
            "num_generations to a divisor of it."
        )


def _refuse_distribution_matching(args: RDMConfig) -> None:
    """Refuse settings of distribution matching and of the fake score that do not go together."""
    if args.renoise_anneal_steps is not None and args.renoise_distribution != "annealed_beta":
        raise ValueError(
            f"renoise_anneal_steps={args.renoise_anneal_steps} needs renoise_distribution='annealed_beta', not "
            f"{args.renoise_distribution!r}."
        )
    low, high = args.renoise_range if len(args.renoise_range) == 2 else (1.0, 0.0)
    if not 0 < low <= high:
        raise ValueError(f"renoise_range={args.renoise_range} must be two times, 0 < low <= high <= 1.")
    if args.fake_score_warmup_steps and not args.fake_score_updates_per_policy_update:
        raise ValueError(
            f"fake_score_updates_per_policy_update=0 does without a fake score, but fake_score_warmup_steps="
            f"{args.fake_score_warmup_steps} trains one. Leave that out."
        )


def _refuse_rewards(args: RDMConfig) -> None:
    """Refuse settings of rewards and their weights that do not go together."""
    if args.adaptive_reference == "online" and args.reward_weighting == "fixed":
        raise ValueError(
            "adaptive_reference='online' is set, but reward_weighting='fixed' uses no reference. Set "
            "reward_weighting='adaptive', or leave adaptive_reference alone."
        )
    if args.fidelity_budget is not None and args.reward_weighting != "budget":
        raise ValueError(
            f"fidelity_budget={args.fidelity_budget} needs reward_weighting='budget', not {args.reward_weighting!r}."
        )
    if args.reward_baseline == "batch" and args.scale_rewards == "group":
        raise ValueError(
            "reward_baseline='batch' centres on the batch, but scale_rewards='group' divides by a group's spread. "
            "Set scale_rewards to 'batch' or 'none'."
        )
    if args.pathwise_steps != "last" and args.reward_gradient != "pathwise":
        raise ValueError(
            f"pathwise_steps={args.pathwise_steps!r} is set, but with reward_gradient='score_function' no reward "
            "acts by its own gradient. Leave it out, or set reward_gradient='pathwise'."
        )


def _refuse_policy_gradient(args: RDMConfig) -> None:
    """Refuse settings of the sampler's randomness, and of what uses it, that do not go together."""
    if args.group_noise == "shared" and args.num_generations > 1 and not args.has_random_steps:
        raise ValueError(
            f"group_noise='shared' starts the {args.num_generations} generations of a prompt from one noise, and "
            "the policy has no random step, so they would be copies. Set num_generations=1, or group_noise='own'."
        )
    if args.sampler == "renoise" and args.eta is not None:
        raise ValueError(
            f"eta={args.eta} is set, but sampler='renoise' always draws all noise anew. Set sampler='ddim', say."
        )
    if args.sampler != "flow_sde" and args.eta is not None and args.eta > 1:
        raise ValueError(f"eta={args.eta}, but it must be between 0 and 1 with sampler={args.sampler!r}.")
    if args.importance_weight_clip != 0.2 and args.num_iterations == 1:
        raise ValueError(
            f"importance_weight_clip={args.importance_weight_clip} is set, but no rollout is used twice: set "
            "num_iterations to 2 or more, or leave it out."
        )
    if args.random_times and args.num_replayed_steps > 1:
        raise ValueError(
            f"num_replayed_steps={args.num_replayed_steps} is set, but with random_times={args.random_times} only the "
            "last step of a walk is kept. Set num_replayed_steps=1, or leave random_times out."
        )
    if args.random_times and (args.has_random_steps or args.num_inference_steps == 1):
        raise ValueError(
            f"random_times={args.random_times} is for students of two steps or more, each of which keeps its noise, "
            f"not for num_inference_steps={args.num_inference_steps}, sampler={args.sampler!r} and eta={args.eta}. Set "
            "sampler='ddim' (for flow models 'cps' or 'flow_sde') and eta=0, or leave it out."
        )
    if args.beta and not args.has_random_steps:
        raise ValueError(
            f"beta={args.beta} compares the policy's random steps with those at the start, but it has none: "
            f"num_inference_steps={args.num_inference_steps}, sampler={args.sampler!r}, eta={args.eta}. Set beta=0."
        )


_REFUSALS = (_refuse_precision, _refuse_run, _refuse_distribution_matching, _refuse_rewards, _refuse_policy_gradient)
