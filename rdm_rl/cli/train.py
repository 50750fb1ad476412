"""``rdm-rl train``: a run from flags and a YAML file."""

import json
from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from typing import Any

from peft import LoraConfig

from rdm_rl.cli.embedded import EMBEDDED, embedded_prompts, named_model, spare_threads
from rdm_rl.cli.help import TRAIN_PROG, TRAIN_SUMMARY
from rdm_rl.cli.parser import SettingsParser
from rdm_rl.families.hub import one_line_errors
from rdm_rl.rewards.registry import get_reward
from rdm_rl.settings import Count, Folder, Whole, check, convert, setting
from rdm_rl.trainers.profiling import ProfileCallback
from rdm_rl.trainers.prompt_files import read_prompts
from rdm_rl.trainers.rdm_config import RDMConfig
from rdm_rl.trainers.rdm_trainer import RDMTrainer


@dataclass
class SourceSettings:
    """Model and data."""

    model_name_or_path: Folder = setting(
        MISSING,
        "The pipeline: a folder, a hub name, or a `.safetensors` file with the whole model; `digits` and `scenes` "
        "are the embedded teachers.",
    )
    dataset: Folder = setting(
        MISSING,
        "Prompts: a file (`.txt` with one a line, `.csv`, `.tsv`, `.json`, `.jsonl`, `.ndjson`, `.parquet`; "
        "gzipped, too: `.csv.gz`), a folder that `datasets` wrote, a hub name, or `digits` or `scenes`. In a YAML "
        "file, a path beside that file.",
    )
    teacher: Folder | None = setting(
        None,
        "Another pipeline of the same family as the teacher: a folder, a hub name or a file. Default: the model.",
    )
    teacher_adapter: Folder | None = setting(
        None, "A style LoRA that only the teacher has: a folder, a file, a hub name, or `owner/name/file.safetensors`."
    )
    policy_init: Folder | None = setting(
        None,
        "An already distilled student to start from, with `warm_start=none`: a LoRA, a pipeline or a bare network, as "
        "a folder, a hub name or a file.",
    )
    dataset_split: str = setting("train", "Split of a data set that has several.")
    prompt_column: str = setting("prompt", "Name of the text column.")
    eval_dataset: Folder | None = setting(
        None, "Prompts for evaluations, named as `dataset` is. Default: the first of the training's."
    )
    eval_dataset_split: str | None = setting(None, "Its split. Default: `dataset_split`.")
    dataset_encoding: str | None = setting(
        None, "Encoding of a file of prompts: `cp1252`, `latin-1`, ... Default: UTF-8, or what a byte order mark says."
    )


@dataclass
class AdapterSettings:
    """Adapters."""

    full: bool = setting(False, "Train two full copies of the network instead of adapters.")
    lora_r: Count = setting(64, "Rank of the adapters.")
    lora_alpha: Count | None = setting(None, "Their scale times the rank. Default: the rank.")
    lora_target_modules: list[str] | None = setting(
        None, "Modules with adapters; `all-linear` are all linear layers. Default: the family's own."
    )


@dataclass
class ProfileSettings:
    """Profile."""

    profile: Whole = setting(
        0,
        "Updates whose time is split into passes of each role, rewards and the rest, after the first; a trace of the "
        "next is `trace-0.json` in `output_dir`. The run goes on.",
    )


@dataclass
class RewardNameSettings:
    """Rewards and their weights."""

    reward_funcs: list[str] = setting(lambda: ["rdm"], "Rewards: names, `module:attribute` or `path.py:attribute`.")
    # The order of the union is TrainingArguments': transformers' argument parser does not read another.
    reward_options: dict[str, Any] | str | None = setting(
        None, 'What rewards take, by name: a mapping in YAML, JSON as a flag: `\'{"hpsv2": {"device": "cuda:1"}}\'`.'
    )


@dataclass
class TrainArguments(
    ProfileSettings, RewardNameSettings, AdapterSettings, SourceSettings
):  # In reverse, as a dataclass orders fields.
    """What is trained on what: the flags of ``rdm-rl train`` that are no settings of ``RDMConfig``."""

    def __post_init__(self) -> None:
        """Read every value as its type."""
        convert(self)
        check(self)

    @property
    def model(self) -> str:
        """The pipeline's folder or hub name."""
        return named_model(self.model_name_or_path)


def load_prompts(arguments: TrainArguments) -> Any:
    """The prompts that the arguments name, a ``datasets.Dataset`` or rows, with the text column called ``prompt``.

    Raises:
        FileNotFoundError: If a file does not exist.
        OSError: If the hub does not give a data set.
        ValueError: If the prompts cannot be read.
    """
    return _prompts("dataset", arguments.dataset, arguments.dataset_split, arguments)


def load_eval_prompts(arguments: TrainArguments) -> Any:
    """The prompts of evaluations, as :func:`load_prompts` gives those of training; None if the arguments name none.

    Raises:
        FileNotFoundError: If a file does not exist.
        OSError: If the hub does not give a data set.
        ValueError: If the prompts cannot be read.
    """
    if arguments.eval_dataset is None:
        return None
    split = arguments.eval_dataset_split or arguments.dataset_split
    return _prompts("eval_dataset", arguments.eval_dataset, split, arguments)


def _prompts(setting: str, source: str, split: str, arguments: TrainArguments) -> Any:
    """The prompts that one setting names."""
    if source in EMBEDDED:
        return embedded_prompts(source)
    try:
        return read_prompts(
            source,
            prompt_column=arguments.prompt_column,
            dataset_split=split,
            dataset_encoding=arguments.dataset_encoding,
        )
    except ConnectionError:  # Of the hub: what is here is read without one.
        with one_line_errors(setting, source):
            raise


def make_rewards(names: Sequence[str], options: dict[str, Any] | str | None) -> list[Any]:
    """The rewards of a run: names, or objects where there are options.

    Args:
        names: The rewards' names.
        options: Options by name, as a dictionary or as JSON.

    Raises:
        ValueError: If the options are no JSON object of objects, or belong to a reward that is not used.

    Example:
        >>> make_rewards(["rdm", "ink"], None)
        ['rdm', 'ink']
    """
    try:
        by_name: Any = json.loads(options) if isinstance(options, str) else options or {}
    except json.JSONDecodeError as error:
        raise ValueError(f"--reward_options {options!r} is no JSON: {error}.") from None
    if not isinstance(by_name, dict) or not all(isinstance(entry, dict) for entry in by_name.values()):
        raise ValueError(
            f'--reward_options {options!r} must be options by reward, e.g. {{"hpsv2": {{"device": "cpu"}}}}.'
        )
    unused = sorted(by_name.keys() - {*names})
    if unused:
        raise ValueError(f"--reward_options has options for {', '.join(unused)}, but reward_funcs is {list(names)}.")
    return [get_reward(name, **by_name[name]) if name in by_name else name for name in names]


def lora_config(arguments: TrainArguments) -> LoraConfig | None:
    """The adapters that the arguments ask for; None for full copies.

    Example:
        >>> lora_config(TrainArguments(model_name_or_path="digits", dataset="digits", lora_r=8)).lora_alpha
        8
    """
    if arguments.full:
        return None
    alpha = arguments.lora_r if arguments.lora_alpha is None else arguments.lora_alpha
    modules: Any = arguments.lora_target_modules
    if modules == ["all-linear"]:  # Which PEFT knows as text alone.
        modules = "all-linear"
    return LoraConfig(r=arguments.lora_r, lora_alpha=alpha, target_modules=modules)


def train_parser() -> SettingsParser:
    """The parser of ``rdm-rl train``."""
    return SettingsParser((TrainArguments, RDMConfig), TRAIN_SUMMARY, prog=TRAIN_PROG)


def train_command(words: Sequence[str]) -> None:
    """Parse, train and save.

    The words are the flags of :class:`TrainArguments` and of ``RDMConfig``, ``--config FILE.yaml`` for both, and
    ``--method NAME`` for a method's settings, which other flags and the file override.
    """
    arguments, args = train_parser().parse(words)
    spare_threads(named_model(arguments.model_name_or_path))
    trainer = RDMTrainer(
        arguments.model,
        make_rewards(arguments.reward_funcs, arguments.reward_options),
        args,
        load_prompts(arguments),
        load_eval_prompts(arguments),
        teacher=arguments.teacher,
        teacher_adapter=arguments.teacher_adapter,
        policy_init=arguments.policy_init,
        peft_config=lora_config(arguments),
    )
    if arguments.profile:
        trainer.add_callback(ProfileCallback(trainer, arguments.profile))
    trainer.train()
    trainer.save_model()
    trainer.accelerator.print(f"The student is in {args.output_dir}")
