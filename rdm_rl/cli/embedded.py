"""The problems that come with the package, by the names that the command line has for them."""

import os
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

EMBEDDED = ("digits", "scenes")


def embedded_teacher(name: str) -> Path:
    """The folder of an embedded problem's teacher.

    Example:
        >>> embedded_teacher("scenes").name
        'teacher'
    """
    folder: Path = import_module(f"rdm_rl.{name}.data").TEACHER_FOLDER
    return folder


def named_model(name: str) -> str:
    """What the command line calls a model: the folder of an embedded teacher, or the folder or hub name itself.

    Example:
        >>> named_model("owner/name")
        'owner/name'
    """
    return str(embedded_teacher(name)) if name in EMBEDDED else name


def spare_threads(model: str) -> None:
    """Give the network of an embedded problem one thread, unless ``OMP_NUM_THREADS`` is set.

    A second gains little on networks as small, and two wait badly for each other on a busy machine.

    Args:
        model: The model as :func:`named_model` gives it; any other keeps its threads.
    """
    if model in map(named_model, EMBEDDED) and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


def embedded_prompts(name: str) -> list[dict[str, Any]]:
    """The prompts that an embedded problem's students are trained on.

    Example:
        >>> len(embedded_prompts("digits"))
        240
    """
    rows: list[dict[str, Any]] = import_module(f"rdm_rl.{name}.students").training_prompts()
    return rows
