"""The parser of ``rdm-rl train`` and of the examples: flags over a YAML file, and a help text in groups."""

import argparse
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from difflib import get_close_matches
from enum import Enum
from pathlib import Path
from shutil import get_terminal_size
from textwrap import wrap
from typing import Any, get_type_hints

from transformers import TrainingArguments
from trl import TrlParser

from rdm_rl.trainers.rdm_config import HONOURED, METHODS, RDMConfig, method_settings

# Every setting is in one group (a test looks). Those of a script itself come under OWN_GROUP.
GROUPS = {
    "where settings come from": "help config method",
    "model and data": """
        model_name_or_path teacher teacher_adapter policy_init dataset dataset_split prompt_column resolution
    """,
    "adapters": "lora_r lora_alpha lora_target_modules full",
    "the few-step policy": """
        num_inference_steps num_generations sampler eta guidance_scale group_noise noise_pool ema_decay save_ema
    """,
    "distribution matching": """
        teacher_guidance_scale dm_normalization dm_group dm_scale_floor num_renoise renoise_distribution renoise_range
        renoise_anneal_steps
    """,
    "fake score": """
        fake_score_learning_rate fake_score_updates_per_policy_update fake_score_warmup_steps fake_score_max_grad_norm
    """,
    "rewards and their weights": """
        reward_funcs reward_options reward_weights reward_weighting adaptive_reference fidelity_budget
        reward_start_step reward_ramp_steps reward_conflict reward_gradient pathwise_steps
    """,
    "calling the rewards": """
        decode_batch_size reward_decoder reward_batch_size reward_timeout on_reward_error teacher_num_inference_steps
        teacher_cache_dir teacher_cache_gib
    """,
    "policy gradient and reuse of rollouts": """
        num_replayed_steps num_iterations importance_weight_clip importance_sampling_level epsilon epsilon_high
        reward_baseline scale_rewards advantage_clip step_weighting beta
    """,
    "warm start": """
        warm_start warm_start_steps warm_start_learning_rate warm_start_num_states warm_start_ode_steps
        warm_start_cache_dir
    """,
    "optimisation": """
        max_steps num_train_epochs per_device_train_batch_size gradient_accumulation_steps learning_rate
        lr_scheduler_type lr_scheduler_kwargs warmup_steps warmup_ratio optim optim_args weight_decay adam_beta1
        adam_beta2 adam_epsilon max_grad_norm seed data_seed
    """,
    "memory and processes": """
        bf16 fp16 tf32 activation_checkpointing gradient_checkpointing offload prompt_cache_dir shard use_cpu
        ddp_backend ddp_timeout
    """,
    "output, checkpoints and sample grids": """
        output_dir resume_from_checkpoint save_strategy save_steps save_total_limit eval_strategy eval_steps eval_delay
        eval_on_start per_device_eval_batch_size
    """,
    "logging": """
        logging_strategy logging_steps logging_first_step logging_dir disable_tqdm report_to run_name project
        trackio_space_id trackio_bucket_id trackio_static_space_id
    """,
    "hub": "push_to_hub hub_model_id hub_private_repo hub_revision hub_token",
}
OWN_GROUP = "this script"
# Accepted because launchers and old scripts give them, but a run does nothing with them.
WITHOUT_EFFECT = frozenset({"do_train", "do_eval", "local_rank", "remove_unused_columns"})

# Older transformers know the second name only.
OLD_NAMES = {"activation_checkpointing": "gradient_checkpointing"}

# Inherited settings, in this library's terms and without what it refuses.
HELP = {
    "help": "Show this text.",
    "max_steps": "Policy updates; -1 counts num_train_epochs instead.",
    "num_train_epochs": "Times that the prompts are gone through, if max_steps is -1.",
    "per_device_train_batch_size": "Samples (not prompts) at once on a device: a multiple of num_generations.",
    "gradient_accumulation_steps": "Batches for each update. An update sees batch size x this x processes samples.",
    "lr_scheduler_type": "Schedule of both learning rates: constant, constant_with_warmup, linear, cosine, ...",
    "lr_scheduler_kwargs": "Further arguments of the schedule, as JSON.",
    "warmup_steps": "Updates over which the learning rate rises from 0; below 1, a share of all.",
    "warmup_ratio": "The same as a share of all updates.",
    "optim": "Optimiser: adamw_torch, adamw_torch_fused, adamw_bnb_8bit, adafactor, sgd, ...",
    "optim_args": "Further arguments of the optimiser: name=value,name=value.",
    "weight_decay": "Weight decay, of policy and fake score.",
    "adam_beta1": "Adam's decay of the first moment.",
    "adam_beta2": "Adam's decay of the second moment.",
    "adam_epsilon": "Adam's epsilon.",
    "max_grad_norm": "Gradient norm the policy is clipped to; 0 does not clip.",
    "seed": "Seed of everything that is drawn.",
    "data_seed": "Seed of the order of the prompts; default: seed.",
    "bf16": "Networks in bfloat16, adapters in float32.",
    "fp16": "Networks in float16, with loss scaling.",
    "tf32": "TF32 for what is left in float32, on Ampere GPUs and newer.",
    "activation_checkpointing": "Recompute activations in the backward pass: less memory, more time.",
    "gradient_checkpointing": "The same under its older name.",
    "use_cpu": "Stay on the CPU even if there is a GPU.",
    "ddp_backend": "Backend between processes: nccl or gloo; default: by device.",
    "ddp_timeout": "Seconds that processes wait for each other.",
    "output_dir": "Where the student, checkpoints and sample grids go.",
    "resume_from_checkpoint": "Folder of a checkpoint, or 'true' for the newest one in output_dir.",
    "save_strategy": "Write checkpoints: steps or no.",
    "save_steps": "Policy updates between checkpoints.",
    "save_total_limit": "Checkpoints that are kept; default: all.",
    "eval_strategy": "Draw sample grids: steps or no.",
    "eval_steps": "Policy updates between sample grids; default: logging_steps.",
    "eval_delay": "Updates before the first sample grid.",
    "eval_on_start": "Draw a sample grid before the first update.",
    "per_device_eval_batch_size": "Prompts in a sample grid.",
    "logging_strategy": "Log numbers: steps or no.",
    "logging_steps": "Policy updates between lines of the log.",
    "logging_first_step": "Log the first update, too.",
    "logging_dir": "Folder for TensorBoard.",
    "disable_tqdm": "No progress bar.",
    "report_to": "Tracker: tensorboard, wandb, trackio or none.",
    "run_name": "Name of the run for trackers.",
    "project": "Project of the run, for Trackio.",
    "trackio_space_id": "Hub space for Trackio.",
    "trackio_bucket_id": "Hub bucket for Trackio.",
    "trackio_static_space_id": "Read-only hub space for Trackio.",
    "push_to_hub": "Upload the student at the end.",
    "hub_model_id": "Name to upload to: owner/name.",
    "hub_private_repo": "Make it a private repository.",
    "hub_revision": "Branch to upload to.",
    "hub_token": "Token to upload with; default: the one you are logged in with.",
}
# What stands for a value; the others follow from the type.
METAVARS = {
    "config": "FILE.yaml",
    "method": "NAME",
    "lr_scheduler_type": "NAME",
    "optim": "NAME",
    "ddp_backend": "{nccl,gloo}",
    # RDMConfig refuses the other choices.
    "save_strategy": "{steps,no}",
    "eval_strategy": "{steps,no}",
    "logging_strategy": "{steps,no}",
    **dict.fromkeys(("output_dir", "warm_start_cache_dir", "teacher_cache_dir", "prompt_cache_dir"), "FOLDER"),
}


class SettingsFormatter(argparse.HelpFormatter):
    """One spelling of each flag, and the default in brackets."""

    def __init__(self, prog: str) -> None:
        """Use the terminal's width as far as lines stay readable."""
        super().__init__(prog, max_help_position=36, width=min(get_terminal_size().columns, 112) - 2)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return wrap(" ".join(text.split()), width, break_on_hyphens=False)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        name = action.option_strings[-1] if action.dest == "help" else action.option_strings[0]
        return f"{name} {self._format_args(action, '')}".rstrip()

    def _get_help_string(self, action: argparse.Action) -> str:
        default = action.default.value if isinstance(action.default, Enum) else action.default
        shown = " ".join(map(str, default)) if isinstance(default, list | tuple) else str(default)
        shown = json.dumps(default) if isinstance(default, bool | dict) else shown
        if action.required:
            shown = "needed"
        elif default is None or shown in ("", argparse.SUPPRESS):
            return (action.help or "").replace("%", "%%")
        return f"{action.help} [{shown}]".replace("%", "%%")


class SettingsParser(TrlParser):
    """TRL's parser of flags over a YAML file, with a file of its own, methods, and a help text in groups.

    Settings come from, later ones winning: the dataclasses' defaults, the method, ``defaults``, the YAML file, flags.

    Args:
        kinds: Dataclasses whose fields are the flags.
        description: What the command is for; of a docstring, the first paragraph is shown.
        config: The YAML file that is read unless ``--config`` names another.
        defaults: Defaults that differ from the dataclasses'.
        prog: The command's name; None for the script's.

    Example:
        >>> from rdm_rl.cli.train import TrainArguments
        >>> parser = SettingsParser((TrainArguments, RDMConfig), "A run.", defaults={"method": "dmd"})
        >>> arguments, args = parser.parse("--model_name_or_path digits --dataset digits --lora_r 8 --use_cpu".split())
        >>> arguments.lora_r, args.dm_normalization
        (8, 'sample')
    """

    def __init__(
        self,
        kinds: Sequence[type],
        description: str,
        *,
        config: str | Path | None = None,
        defaults: Mapping[str, Any] | None = None,
        prog: str | None = None,
    ) -> None:
        """Make the flags."""
        super().__init__(
            list(kinds),
            prog=prog,
            usage="%(prog)s [--config FILE.yaml] [--setting VALUE ...]",
            description=description.split("\n\n", 1)[0],
            epilog="Each setting is explained in docs/reference.md and in the docstring of its class.",
            formatter_class=SettingsFormatter,
            allow_abbrev=False,
        )
        self.kinds = tuple(kinds)
        self.config = None if config is None else Path(config)
        self._file: str | Path | None = None
        self._method: str | None = None
        # Left open, disable_tqdm would follow transformers' log level, which the command line lowers.
        self.defaults = {"disable_tqdm": False, **(defaults or {})}
        source = f" Default: {self.config.name} beside the script." if self.config else ""
        self.add_argument("--config", help=f"Settings by name. Flags win over them.{source}")
        if RDMConfig in kinds:  # A class derived from it is a method of its own.
            self.add_argument("--method", help=f"A method's settings: {', '.join(METHODS)}. The others win over them.")
        hints = {name: hint for kind in kinds for name, hint in get_type_hints(kind).items()}
        for action in self._actions:
            action.help = HELP.get(action.dest, action.help)
            action.metavar = METAVARS.get(action.dest) or _metavar(hints.get(action.dest, str), action.choices)

    def parse(self, words: Sequence[str] | None = None) -> tuple[Any, ...]:
        """The dataclasses, filled.

        Args:
            words: The command line; None for the process's own.

        Returns:
            An object for each dataclass.

        Raises:
            FileNotFoundError: If the YAML file does not exist.
            ValueError: If a setting is unknown, or cannot work.
        """
        first = argparse.ArgumentParser(prog=self.prog, usage=self.usage, add_help=False, allow_abbrev=False)
        first.add_argument("--config")
        first.add_argument("--method")
        given, left = first.parse_known_args(sys.argv[1:] if words is None else list(words))
        self._method, self._file = given.method, given.config or self.config
        for name, old in self._old_names().items():
            left = [re.sub(rf"^--{name}(?==|$)", f"--{old}", word) for word in left]
        for flag in (word.partition("=")[0] for word in left if word.startswith("--")):
            if flag not in self._option_string_actions:  # Before the settings are made, which may be wrong too.
                raise ValueError(f"The command line sets {self._unknown(flag)}")
        if self._file is None:
            self.set_defaults_with_config()
        elif Path(self._file).is_file():
            left = ["--config", str(self._file), *left]  # Which TRL reads.
        else:
            raise FileNotFoundError(f"--config {str(self._file)!r} does not exist.")
        *found, strange = self.parse_args_and_config(left, return_remaining_strings=True)
        if strange:
            raise ValueError(f"{strange[0]!r} on the command line belongs to no flag.")
        return tuple(found[: len(self.kinds)])

    def set_defaults_with_config(self, **config: Any) -> list[str]:
        """Take a file's settings for defaults, over those of the method and of the script.

        Args:
            config: Values by setting. A ``dataset`` that lies beside the file is found from any folder.

        Returns:
            Nothing that is left over.

        Raises:
            ValueError: If a setting or the method is unknown.
        """
        settings = {self._old_names().get(name, name): value for name, value in {**self.defaults, **config}.items()}
        method = self._method or settings.get("method")
        if method is not None:
            settings = {**method_settings(method), **settings, "method": method}
        if self._file is not None and "dataset" in config:
            beside = Path(self._file).parent / config["dataset"]
            settings["dataset"] = str(beside) if beside.exists() else config["dataset"]
        strange = super().set_defaults_with_config(**settings)
        if strange:
            raise ValueError(f"{self._file} sets {self._unknown(strange[0])}")
        return []

    def _old_names(self) -> dict[str, str]:
        return {name: old for name, old in OLD_NAMES.items() if f"--{name}" not in self._option_string_actions}

    def _unknown(self, name: str) -> str:
        known = [action.dest for _, actions in self.groups() for action in actions]
        near = get_close_matches(name.removeprefix("--").replace("-", "_"), known, n=1)
        hint = f"Did you mean {near[0]}?" if near else "--help lists them all."
        return f"{name.removeprefix('--')}, which is no setting. {hint}"

    def groups(self) -> Iterator[tuple[str, list[argparse.Action]]]:
        """The headings of the help text, and the flags under each."""
        refused = ({one.name for one in fields(TrainingArguments)} - HONOURED) | WITHOUT_EFFECT
        left: dict[str, argparse.Action] = {}
        for action in self._actions:  # The second of --save_ema and --no_save_ema is not shown.
            if action.dest not in refused:
                left.setdefault(action.dest, action)
        grouped = {title: [left.pop(name) for name in names.split() if name in left] for title, names in GROUPS.items()}
        first, *others = grouped.items()
        for title, actions in (first, (OWN_GROUP, list(left.values())), *others):
            if actions:
                yield title, actions

    def format_help(self) -> str:
        """The help text."""
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, [], [])
        formatter.add_text(self.description)
        formatter.add_text("In brackets: the value of a run without the flag.")
        for title, actions in self.groups():
            formatter.start_section(title)
            formatter.add_arguments(actions)
            formatter.end_section()
        formatter.add_text(self.epilog)
        text: str = formatter.format_help()
        return text


def _metavar(hint: Any, choices: Any) -> str:
    """What stands for a value of a type such as ``list[float] | None``."""
    if choices:
        return "{" + ",".join(map(str, choices)) + "}"
    words = str(hint)
    return "{true,false}" if "bool" in words else "X" if "float" in words else "N" if "int" in words else "TEXT"
