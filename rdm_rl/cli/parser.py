"""The parser of ``rdm-rl train`` and of the examples: flags over a YAML file, and a help text in groups."""

import argparse
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

from transformers import TrainingArguments
from trl import TrlParser
from yaml import YAMLError

from rdm_rl.cli.help import EPILOG, USAGE, SettingsFormatter, help_text
from rdm_rl.settings import groups, help_of, nearest_setting
from rdm_rl.trainers.inherited import HONOURED, INHERITED, UNUSED
from rdm_rl.trainers.methods import METHODS, method_settings
from rdm_rl.trainers.rdm_config import RDMConfig

FIRST_GROUP = "Where settings come from"
OWN_GROUP = "This script"
# Older transformers know the second name only.
OLD_NAMES = {"activation_checkpointing": "gradient_checkpointing"}
# What stands for a value; the others follow from the type.
METAVARS = {
    **{"config": "FILE.yaml", "method": "NAME", "lr_scheduler_type": "NAME", "optim": "NAME"},
    **{"ddp_backend": "{nccl,gloo}", "output_dir": "PATH"},
    # RDMConfig refuses the other choices.
    **dict.fromkeys(("save_strategy", "eval_strategy", "logging_strategy"), "{steps,no}"),
}
_REFUSED = {each.name for each in fields(TrainingArguments)} - HONOURED
_HELP = {"help": "Show this text."} | {name: text for group in INHERITED.values() for name, text in group.items()}


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
            usage=USAGE,
            description=description.split("\n\n", 1)[0],
            epilog=EPILOG,
            formatter_class=SettingsFormatter,
            allow_abbrev=False,
        )
        self.kinds = tuple(kinds)
        self.config = None if config is None else Path(config)
        self._file: str | Path | None = None
        self._method: str | None = None
        self._words: list[str] = []
        # Left open, disable_tqdm would follow transformers' log level, which the command line lowers.
        self.defaults = {"disable_tqdm": False, **(defaults or {})}
        source = f" Default: {self.config.name} beside the script." if self.config else ""
        self.add_argument("--config", help=f"Settings by name. Flags win over them.{source}")
        if RDMConfig in kinds:  # A class derived from it is a method of its own.
            self.add_argument("--method", help=f"A method's settings: {', '.join(METHODS)}. The others win over them.")
        hints = {name: hint for kind in kinds for name, hint in get_type_hints(kind, include_extras=True).items()}
        texts = {each.name: help_of(kind, each.name) for kind in kinds for each in fields(kind)} | _HELP
        converted = {each.name for kind in kinds if groups(kind) for each in fields(kind)} - _REFUSED
        for action in self._actions:
            action.help = texts.get(action.dest, action.help or "").replace("`", "")
            action.metavar = METAVARS.get(action.dest) or _metavar(hints.get(action.dest, str), action.choices)
            if action.dest in converted:  # By the class itself, wherever a value comes from.
                action.type = action.choices = None

    def parse(self, words: Sequence[str] | None = None) -> tuple[Any, ...]:
        """The dataclasses, filled from the words of a command line, or from the process's own.

        Raises:
            FileNotFoundError: If the YAML file does not exist.
            ValueError: If a setting is unknown, or cannot work, or the file is no YAML.
        """
        first = argparse.ArgumentParser(prog=self.prog, usage=self.usage, add_help=False, allow_abbrev=False)
        first.add_argument("--config")
        first.add_argument("--method")
        source, rest = first.parse_known_args(sys.argv[1:] if words is None else list(words))
        self._method, self._file = source.method, source.config or self.config
        for name, old in self._old_names().items():
            rest = [re.sub(rf"^--{name}(?==|$)", f"--{old}", word) for word in rest]
        for flag in (word.partition("=")[0] for word in rest if word.startswith("--")):
            if flag not in self._option_string_actions:  # Before the settings are made, which may be wrong too.
                raise ValueError(f"The command line sets {self._unknown(flag)}")
        self._words = rest
        if self._file is None:
            self.set_defaults_with_config()
        elif Path(self._file).is_file():
            rest = ["--config", str(self._file), *rest]  # Which TRL reads.
        else:
            raise FileNotFoundError(f"--config {str(self._file)!r} does not exist.")
        try:
            *filled, strange = self.parse_args_and_config(rest, return_remaining_strings=True)
        except YAMLError as error:
            what = " ".join(str(error).split())
            raise ValueError(f"--config {str(self._file)!r} is no YAML: {what}. Mend it there.") from None
        if strange:
            raise ValueError(f"{strange[0]!r} on the command line belongs to no flag.")
        return tuple(filled[: len(self.kinds)])

    def set_defaults_with_config(self, **config: Any) -> list[str]:
        """Take a file's settings for defaults, over those of the method and of the script; nothing is left over.

        A ``dataset`` or ``eval_dataset`` that lies beside the file is found from any folder. Where flags choose the
        rewards, the file's ``reward_options`` of others are left out.

        Raises:
            ValueError: If a setting or the method is unknown.
        """
        settings = {self._old_names().get(name, name): value for name, value in {**self.defaults, **config}.items()}
        method = self._method or settings.get("method")
        if method is not None:
            settings = {**method_settings(method), **settings, "method": method}
        for name in ("dataset", "eval_dataset"):
            if self._file is not None and config.get(name) is not None:
                beside = Path(self._file).parent / config[name]
                settings[name] = str(beside) if beside.exists() else config[name]
        if isinstance(settings.get("reward_options"), dict):
            settings["reward_options"] = self._options_in_use(settings["reward_options"])
        strange = super().set_defaults_with_config(**settings)
        if strange:
            raise ValueError(f"{self._file} sets {self._unknown(strange[0])}")
        return []

    def _options_in_use(self, options: dict[str, Any]) -> dict[str, Any]:
        flag = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        flag.add_argument("--reward_funcs", nargs="*")
        names = flag.parse_known_args(self._words)[0].reward_funcs
        if names is None:
            return options
        unused = [name for name in options if name not in names]
        if unused:
            print(f"{self._file} has reward_options for {', '.join(unused)}, which --reward_funcs leaves out.")
        return {name: entry for name, entry in options.items() if name in names}

    def _old_names(self) -> dict[str, str]:
        return {name: old for name, old in OLD_NAMES.items() if f"--{name}" not in self._option_string_actions}

    def _unknown(self, name: str) -> str:
        known = [action.dest for _, actions in self.groups() for action in actions]
        word = name.removeprefix("--").replace("-", "_")
        near = nearest_setting(word, known)
        hint = f"Did you mean {near}?" if near else "--help lists them all."
        return f"{name.removeprefix('--')}, which is no setting. {hint}"

    def groups(self) -> Iterator[tuple[str, list[argparse.Action]]]:
        """The headings of the help text, and the flags under each."""
        shown: dict[str, argparse.Action] = {}
        for action in self._actions:  # The second of --save_ema and --no_save_ema is not shown.
            if action.dest not in _REFUSED and action.dest not in INHERITED[UNUSED]:
                shown.setdefault(action.dest, action)
        names: dict[str, list[str]] = {FIRST_GROUP: ["help", "config", "method"], OWN_GROUP: []}
        declared = [(title, [*members]) for kind in self.kinds for title, members in groups(kind).items()]
        for title, members in [*declared, *((title, [*members]) for title, members in INHERITED.items())]:
            names.setdefault(title, []).extend(members)
        grouped = {title: [shown.pop(name) for name in members if name in shown] for title, members in names.items()}
        grouped[OWN_GROUP] = [*shown.values()]
        yield from ((title, actions) for title, actions in grouped.items() if actions)

    def format_help(self) -> str:
        """The help text."""
        return help_text(self, self.groups())


def _metavar(hint: Any, choices: Any) -> str:
    """What stands for a value of a type such as ``list[float] | None``."""
    if choices:
        return "{" + ",".join(map(str, choices)) + "}"
    words = str(hint)
    if "expanduser" in words:
        return "PATH"
    return "{true,false}" if "bool" in words else "X" if "float" in words else "N" if "int" in words else "TEXT"
