"""The problems that come with the package, by the names that the command line has for them."""

from importlib import import_module
from pathlib import Path
from typing import Any

EMBEDDED = ("digits", "scenes")


def embedded_teacher(name: str) -> Path:
    """The folder of an embedded problem's teacher.

    Example:
        >>> embedded_teacher("scenes").name
        'teacher'
    """
    folder: Path = import_module(f"rdm_rl.{name}.data").TEACHER_FOLDER
    return folder


def embedded_prompts(name: str) -> list[dict[str, Any]]:
    """The prompts that an embedded problem's students are trained on.

    Example:
        >>> len(embedded_prompts("digits"))
        240
    """
    rows: list[dict[str, Any]] = import_module(f"rdm_rl.{name}.students").training_prompts()
    return rows
