"""Checkpoints: everything that a resumed run needs to continue as if it had not stopped.

A checkpoint is a folder ``checkpoint-<step>``:

=============================  ======================================================================
file                           content
=============================  ======================================================================
``policy.safetensors``         weights of the policy
``fake_score.safetensors``     weights of the fake score
``ema.safetensors``            averaged weights of the policy, if averaging is on
``reference.safetensors``      weights of the policy before the first update, with ``beta``
``optimizers.pt``              both optimisers, schedules, loss scalers, the weighting, reward spreads, skips
``last_samples.safetensors``   the samples that the fake score last saw, for its lag
``trainer_state.json``         step, epoch and log history, in transformers' format
``rdm_config.json``            the settings, and what else the run was made with
``manifest.json``              step, run, and the size and checksum of every file
=============================  ======================================================================

There is no generator state: random numbers are functions of the seed and the step (see ``rdm_rl.randomness``), and so
is the position in the data. ``optimizers.pt`` is read with ``weights_only=True``.

A checkpoint is written under another name, brought to the disk and then renamed, so that it is there whole or not at
all, and it is used only if every file is what its manifest says.

Weights and optimiser states are whole, whether the networks were sharded or not, and a run may go on with another
number of processes, or other batches, if the samples of an update stay as many.
"""

import json
import logging
import re
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from itertools import count
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.trainer_callback import TrainerState

from rdm_rl.files import written_whole
from rdm_rl.manifest import MANIFEST, damage, read_manifest, sync, write_manifest
from rdm_rl.student import student_parts

logger = logging.getLogger(__name__)
_NAME = re.compile(r"^checkpoint-(\d+)$")


def checkpoints(output_dir: str | Path) -> list[Path]:
    """The checkpoints in a folder, oldest first, whether they are complete or not.

    Args:
        output_dir: The run's folder; it need not exist.

    Returns:
        Their folders.
    """
    folder = Path(output_dir)
    if not folder.is_dir():
        return []
    numbered = [(int(match[1]), path) for path in folder.iterdir() if (match := _NAME.match(path.name))]
    return [path for _, path in sorted(numbered) if path.is_dir()]


def checkpoint_damage(folder: Path, *, contents: bool = True) -> list[str]:
    """What is wrong with a checkpoint; nothing if it is complete.

    Args:
        folder: The checkpoint.
        contents: Read the files and compare their checksums; without it, their sizes alone.

    Returns:
        A clause for each fault.
    """
    try:
        manifest = read_manifest(folder)
    except ValueError as error:
        return [str(error)]
    if "trainer_state.json" not in manifest["files"]:
        return [f"{MANIFEST} is of no checkpoint"]
    named = _NAME.match(folder.name)
    if named and manifest["step"] != int(named[1]):
        return [f"{MANIFEST} is of step {manifest['step']}"]
    return damage(folder, contents=contents)


def find_checkpoint(output_dir: str | Path, wish: str | Path | bool) -> Path:
    """The checkpoint that ``resume_from_checkpoint`` means.

    Args:
        output_dir: The run's folder.
        wish: True for the newest complete one in it, or a checkpoint's folder: a path, or its name in ``output_dir``.

    Returns:
        The checkpoint's folder; every file in it is what was written.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If the one that was named is damaged.
    """
    if str(wish).lower() == "true":  # The command line gives text.
        for folder in reversed(checkpoints(output_dir)):
            faults = checkpoint_damage(folder)
            if not faults:
                return folder
            logger.warning("The checkpoint %s is skipped, it is damaged: %s.", folder, "; ".join(faults))
        earlier = [path.name for path in sorted(Path(output_dir).glob("earlier-*"))]
        raise FileNotFoundError(
            f"resume_from_checkpoint=True, but {str(output_dir)!r} holds no complete checkpoint. Start without it, "
            f"or give a checkpoint's folder{f' (those of earlier runs are in {earlier})' if earlier else ''}."
        )
    folder = Path(str(wish))
    if not folder.is_dir():
        folder = Path(output_dir) / str(wish)
    others = ", ".join(path.name for path in checkpoints(output_dir) if path != folder) or "none"
    if not folder.is_dir():
        raise FileNotFoundError(
            f"resume_from_checkpoint={str(wish)!r} does not exist. Checkpoints in {str(output_dir)!r}: {others}."
        )
    faults = checkpoint_damage(folder)
    if faults:
        raise ValueError(
            f"The checkpoint {str(folder)!r} is damaged, or none of rdm_rl: {'; '.join(faults)}. Resume from another "
            f"(in {str(output_dir)!r}: {others}), or with True from the newest complete one."
        )
    return folder


def set_aside(output_dir: str | Path, run: str, step: int) -> Path | None:
    """Move what a run does not continue out of its way: checkpoints of other runs, and later ones, and a student.

    A saved student stays where a checkpoint does that the run continues.

    Args:
        output_dir: The run's folder.
        run: The run's id.
        step: Its step.

    Returns:
        The folder in ``output_dir`` that they are in now; None if there were none.
    """
    saved = checkpoints(output_dir)
    others = [folder for folder in saved if not _continues(folder, run, step)]
    if len(others) == len(saved):
        others += student_parts(Path(output_dir))
    if not others:
        return None
    places = (Path(output_dir) / f"earlier-{number}" for number in count(1))
    place = next(place for place in places if not place.exists())
    place.mkdir()
    for path in others:
        path.rename(place / path.name)
    return place


def _continues(folder: Path, run: str, step: int) -> bool:
    try:
        manifest = read_manifest(folder)
    except ValueError:
        return False
    return bool(manifest.get("run") == run and manifest["step"] <= step)


def rotate_checkpoints(newest: Path, limit: int | None) -> None:
    """Delete the oldest checkpoints beside the newest one; those whose files are not all there count as none.

    Args:
        newest: The checkpoint that was just written, and stays.
        limit: How many may be left; None and 0 keep all, as transformers does.
    """
    if limit:
        whole = [folder for folder in checkpoints(newest.parent) if not checkpoint_damage(folder, contents=False)]
        others = [folder for folder in whole if folder != newest]
        for folder in others[: max(0, len(others) - limit + 1)]:
            shutil.rmtree(folder.rename(_hidden(folder, "deleted")))


def _hidden(folder: Path, why: str) -> Path:
    """Where a checkpoint is while it is being written or deleted, so that it is there whole or not at all."""
    return folder.with_name(f".{folder.name}.{why}")


def write_checkpoint(
    folder: Path,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    made_with: Mapping[str, Any],
    trainer_state: TrainerState,
    run: str = "",
) -> None:
    """Write a checkpoint; another one of this name is replaced as a whole.

    Args:
        folder: Where to write; made if needed.
        tensors: Weights by name, by file.
        state: State of optimisers, schedules and weighting: plain numbers, strings, lists, dicts and tensors.
        made_with: The settings, and what else the run was made with, as JSON can hold it.
        trainer_state: Step, epoch and log history.
        run: The run's id.

    Raises:
        ValueError: If weights are not finite. Nothing is written then.
        OSError: If the disk is full, say. What was there stays.
    """
    _check_finite(folder, tensors, trainer_state.global_step)
    draft, replaced = _hidden(folder, "partial"), _hidden(folder, "deleted")
    try:
        for leftover in folder.parent.glob(".checkpoint-*.*"):  # Of a process that was killed.
            shutil.rmtree(leftover)
        for name, content in tensors.items():
            weights = {key: value.detach().cpu().contiguous() for key, value in content.items()}
            with written_whole(draft / f"{name}.safetensors") as file:
                save_file(weights, file)
        with written_whole(draft / "optimizers.pt") as file:
            torch.save(dict(state), file)
        with written_whole(draft / "rdm_config.json") as file:
            file.write_text(json.dumps(dict(made_with), indent=2), encoding="utf-8")
        with written_whole(draft / "trainer_state.json") as file:
            trainer_state.save_to_json(str(file))
        write_manifest(draft, draft.iterdir(), step=trainer_state.global_step, run=run)
        if folder.exists():  # The two renamings follow each other at once; nothing is deleted before both are done.
            folder.rename(replaced)
        draft.rename(folder)
        sync(folder.parent)
    except (OSError, RuntimeError, SafetensorError) as error:  # The libraries have errors of their own for a full disk.
        size = sum(value.nbytes for content in tensors.values() for value in content.values())
        raise OSError(_unwritten(folder, size, str(error).splitlines()[0])) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)  # It is there if the disk is full, say.
    if replaced.exists():
        shutil.rmtree(replaced)


def _unwritten(folder: Path, size: int, reason: str) -> str:
    """Why a checkpoint with weights of so many bytes was not written, and what to do about it."""
    place = next(parent for parent in folder.absolute().parents if parent.exists())
    before = [path for path in checkpoints(folder.parent) if not checkpoint_damage(path, contents=False)]
    kept = f"{str(before[-1])!r} is whole: resume from it" if before else "There is no earlier one: start again"
    return (
        f"{str(folder)!r} cannot be written: {reason}. Its weights take {size / 2**30:.3g} GiB, and the state of the "
        f"optimisers up to twice as much; {shutil.disk_usage(place).free / 2**30:.3g} GiB are free in {str(place)!r}. "
        f"{kept}, after making room there, or with another output_dir, a lower save_total_limit or a lower rank."
    )


def _check_finite(folder: Path, tensors: Mapping[str, Mapping[str, Tensor]], step: int) -> None:
    for role, weights in tensors.items():
        for name, value in weights.items():
            if role != "last_samples" and not torch.isfinite(value).all():
                before = [str(path) for path in checkpoints(folder.parent) if path != folder][-1:]
                instead = f"resume from {before[0]!r}" if before else "start again"
                raise ValueError(
                    f"After {step} updates the weights of {role} are not finite ({name!r} holds NaN or infinity), so "
                    f"{folder.name} is not written. Look for the cause in the log, then {instead} with a lower "
                    "learning_rate or fake_score_learning_rate, say."
                )


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings that a checkpoint was made with, and what else its run was made with, by name."""
    settings: dict[str, Any] = _readable(
        folder / "rdm_config.json", lambda file: json.loads(file.read_text(encoding="utf-8"))
    )
    return settings


def read_checkpoint(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any], TrainerState]:
    """What :func:`write_checkpoint` wrote, on the CPU.

    Args:
        folder: The checkpoint, whose files :func:`checkpoint_damage` has compared with its manifest.

    Returns:
        The weights by file and name, the state, and the trainer's state.

    Raises:
        ValueError: If a file is damaged.
    """
    files = [folder / name for name in read_manifest(folder)["files"]]
    tensors = {file.stem: _readable(file, load_file) for file in files if file.suffix == ".safetensors"}
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
