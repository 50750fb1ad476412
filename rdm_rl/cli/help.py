"""The help text of settings in groups, and that of ``rdm-rl train`` without the seconds that importing them takes.

``train_help.json`` holds what the parser of ``rdm-rl train`` shows: ``python -m rdm_rl.cli.reference`` writes it.
"""

import argparse
import json
from collections.abc import Iterable, Sequence
from enum import Enum
from pathlib import Path
from shutil import get_terminal_size
from textwrap import wrap

TRAIN_PROG = "rdm-rl train"
TRAIN_SUMMARY = "Distil a pipeline into a few-step student; `rdm-rl methods` lists what a method sets."
USAGE = "%(prog)s [--config FILE.yaml] [--setting VALUE ...]"
EPILOG = "docs/reference.md has the same, with links."
TRAIN_FILE = Path(__file__).parent / "train_help.json"


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


def help_text(parser: argparse.ArgumentParser, groups: Iterable[tuple[str, Sequence[argparse.Action]]]) -> str:
    """The help text of a parser whose flags are shown in groups: a heading and flags each."""
    formatter = SettingsFormatter(parser.prog)
    formatter.add_usage(parser.usage, [], [])
    formatter.add_text(parser.description)
    formatter.add_text("In brackets: the value of a run without the flag.")
    for title, actions in groups:
        formatter.start_section(title[0].lower() + title[1:])
        formatter.add_arguments(actions)
        formatter.end_section()
    formatter.add_text(parser.epilog)
    return formatter.format_help()


def stored_groups(groups: Iterable[tuple[str, Sequence[argparse.Action]]]) -> str:
    """Groups of flags as JSON: of each flag how it is written, and its help with the default."""
    formatter = SettingsFormatter("")
    shown = {
        title: {formatter._format_action_invocation(action): formatter._get_help_string(action) for action in actions}
        for title, actions in groups
    }
    return json.dumps(shown, indent=1) + "\n"


def train_help() -> str:
    """The help text of ``rdm-rl train``."""
    parser = argparse.ArgumentParser(TRAIN_PROG, USAGE, TRAIN_SUMMARY, EPILOG, add_help=False)
    groups = json.loads(TRAIN_FILE.read_text(encoding="utf-8"))
    return help_text(parser, ((title, [_shown(*flag) for flag in flags.items()]) for title, flags in groups.items()))


def _shown(invocation: str, text: str) -> argparse.Action:
    """A flag that is only shown: with its values as part of its name, and its default as part of its text."""
    return argparse.Action([invocation], "", nargs=0, help=text)
