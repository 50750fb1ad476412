"""Checkpoints: everything that a resumed run needs to continue as if it had not stopped.

A checkpoint is a folder ``checkpoint-<step>``:

=============================  ======================================================================
file                           content
=============================  ======================================================================
``policy.safetensors``         weights of the policy
``fake_score.safetensors``     weights of the fake score
``ema.safetensors``            averaged weights of the policy, if averaging is on
``reference.safetensors``      weights of the policy before the first update, with ``beta``
``optimizers.pt``              both optimisers, schedules, loss scalers, the weighting, reward spreads
``last_samples.safetensors``   the samples that the fake score last saw, for its lag
``trainer_state.json``         step, epoch and log history, in transformers' format
``rdm_config.json``            the settings
=============================  ======================================================================

There is no generator state: random numbers are functions of the seed and the step (see ``rdm_rl.randomness``), and so
is the position in the data. ``optimizers.pt`` is read with ``weights_only=True``.

Weights and optimiser states are whole, whether the networks were sharded or not, and a run may go on with another
number of processes if the samples of an update stay as many.
"""

import json
import re
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.trainer_callback import TrainerState

from rdm_rl.files import written_whole

_NAME = re.compile(r"^checkpoint-(\d+)$")


def checkpoints(output_dir: str | Path) -> list[Path]:
    """The complete checkpoints in a folder, oldest first.

    Args:
        output_dir: The run's folder; it need not exist.

    Returns:
        Their folders.
    """
    folder = Path(output_dir)
    if not folder.is_dir():
        return []
    numbered = [(int(match[1]), path) for path in folder.iterdir() if (match := _NAME.match(path.name))]
    return [path for _, path in sorted(numbered) if (path / "trainer_state.json").is_file()]


def find_checkpoint(output_dir: str | Path, wish: str | Path | bool) -> Path:
    """The checkpoint that ``resume_from_checkpoint`` means.

    Args:
        output_dir: The run's folder.
        wish: True for the newest one in it, or a checkpoint's folder: a path, or its name in ``output_dir``.

    Returns:
        The checkpoint's folder.

    Raises:
        FileNotFoundError: If there is none.
    """
    if str(wish).lower() == "true":  # The command line gives text.
        complete = checkpoints(output_dir)
        if not complete:
            raise FileNotFoundError(
                f"resume_from_checkpoint=True, but {str(output_dir)!r} holds no complete checkpoint. Start without it, "
                "or give a checkpoint's folder."
            )
        return complete[-1]
    folder = Path(str(wish))
    if not folder.is_dir():
        folder = Path(output_dir) / str(wish)
    if not (folder / "trainer_state.json").is_file():
        names = ", ".join(path.name for path in checkpoints(output_dir)) or "none"
        raise FileNotFoundError(
            f"resume_from_checkpoint={str(wish)!r} is no complete checkpoint of rdm_rl. Complete ones in "
            f"{str(output_dir)!r}: {names}."
        )
    return folder


def check_settings(
    folder: Path, settings: Mapping[str, Any], processes: int = 1, models: Mapping[str, str] | None = None
) -> None:
    """Check that a run with these settings can continue a checkpoint: the shapes of its state must be the same.

    Args:
        folder: The checkpoint.
        settings: The run's settings by name.
        processes: Its number of processes.
        models: Short names of the weights that its roles began with.

    Raises:
        ValueError: If a setting differs that must not.
    """
    saved = _readable(folder / "rdm_config.json", lambda file: json.loads(file.read_text(encoding="utf-8")))
    # The first three shape the state; the others live in it, or say where in the data the run is.
    fixed = ["num_inference_steps", "num_generations", "per_device_train_batch_size"]
    fixed += ["learning_rate", "fake_score_learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"]
    fixed += ["optim", "seed", "data_seed"]
    fixed += ["num_iterations"]
    fixed += [name for name in ("ema_decay", "beta") if bool(saved[name]) != bool(settings[name])]
    for name in fixed:
        if saved[name] != settings[name]:
            raise ValueError(
                f"The checkpoint {str(folder)!r} was made with {name}={saved[name]}, but this run has "
                f"{settings[name]}. Resume with the same value, or start a new run."
            )
    for role, name in (models or {}).items():
        if saved["models"].get(role, name) != name:
            raise ValueError(
                f"The checkpoint {str(folder)!r} was made with another {role} than this run's. Give the same model, "
                "teacher, teacher_adapter, policy_init and precision as the run that saved it."
            )
    # Where in the data the run is: each update takes a batch for each process and accumulated gradient.
    name = "gradient_accumulation_steps"
    batches, batches_now = saved[name] * saved["num_processes"], settings[name] * processes
    if batches != batches_now:
        fitting = f"Set {name}={batches // processes}" if batches % processes == 0 else "Take a number that divides it"
        raise ValueError(
            f"The checkpoint {str(folder)!r} was made with {batches} batches in an update ({saved['num_processes']} "
            f"process(es), {name}={saved[name]}), but this run has {batches_now} ({processes} process(es), "
            f"{name}={settings[name]}). {fitting}, or start a new run."
        )


def rotate_checkpoints(newest: Path, limit: int | None) -> None:
    """Delete checkpoints beside the newest one, those written first going first.

    Args:
        newest: The checkpoint that was just written. It stays, whatever an earlier run left beside it.
        limit: How many may be left; None and 0 keep all, as transformers does.
    """
    if limit:
        others = [folder for folder in checkpoints(newest.parent) if folder != newest]
        others.sort(key=lambda folder: (folder / "trainer_state.json").stat().st_mtime)
        for folder in others[: max(0, len(others) - limit + 1)]:
            shutil.rmtree(folder)


def write_checkpoint(
    folder: Path,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    settings: str,
    trainer_state: TrainerState,
    processes: int = 1,
    models: Mapping[str, str] | None = None,
) -> None:
    """Write a checkpoint.

    Args:
        folder: Where to write; made if needed.
        tensors: Weights by name, by file.
        state: State of optimisers, schedules and weighting: plain numbers, strings, lists, dicts and tensors.
        settings: The settings as JSON.
        trainer_state: Step, epoch and log history.
        processes: Number of processes of the run.
        models: Short names of the weights that its roles began with.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "trainer_state.json").unlink(missing_ok=True)
    for name, content in tensors.items():
        weights = {key: value.detach().cpu().contiguous() for key, value in content.items()}
        with written_whole(folder / f"{name}.safetensors") as file:
            save_file(weights, file)
    with written_whole(folder / "optimizers.pt") as file:
        torch.save(dict(state), file)
    facts = {**json.loads(settings), "num_processes": processes, "models": dict(models or {})}
    with written_whole(folder / "rdm_config.json") as file:
        file.write_text(json.dumps(facts, indent=2), encoding="utf-8")
    # Last, because a folder counts as complete when this file is there.
    with written_whole(folder / "trainer_state.json") as file:
        trainer_state.save_to_json(str(file))


def read_checkpoint(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any], TrainerState]:
    """What :func:`write_checkpoint` wrote, on the CPU.

    Args:
        folder: The checkpoint.

    Returns:
        The weights by file and name, the state, and the trainer's state.

    Raises:
        ValueError: If a file is damaged.
    """
    tensors = {file.stem: _readable(file, load_file) for file in sorted(folder.glob("*.safetensors"))}
    # Mapped, not read: the processes of one machine then share the memory of what each takes its part of.
    load = partial(torch.load, map_location="cpu", weights_only=True, mmap=True)
    trainer_state = _readable(folder / "trainer_state.json", lambda file: TrainerState.load_from_json(str(file)))
    return tensors, _readable(folder / "optimizers.pt", load), trainer_state


def _readable(file: Path, read: Callable[[Path], Any]) -> Any:
    """What a file of a checkpoint holds."""
    try:
        return read(file)
    except (SafetensorError, EOFError, RuntimeError, TypeError, ValueError, UnpicklingError) as error:
        raise ValueError(
            f"{str(file)!r} cannot be read, {file.stat().st_size} bytes: {str(error).splitlines()[0]}. Resume from an "
            "earlier checkpoint: give its folder in resume_from_checkpoint."
        ) from error
