"""``rdm-rl checkpoint``: whether the checkpoints of a run, or a saved student, are what was written."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from rdm_rl.manifest import MANIFEST, damage, read_manifest
from rdm_rl.trainers.checkpointing import checkpoint_damage, checkpoints


class State(NamedTuple):
    """The state of a checkpoint or a student.

    Args:
        name: Name of its folder.
        step: Updates that it was written after; None of a student, or if its manifest cannot be read.
        size: Bytes of its files, or None.
        faults: What is wrong with it.
    """

    name: str
    step: int | None
    size: int | None
    faults: list[str]

    def __str__(self) -> str:
        """A line of the listing."""
        step = "-" if self.step is None else f"{self.step:,}"
        size = "-" if self.size is None else f"{self.size / 2**20:,.1f}"
        state = f"DAMAGED: {'; '.join(self.faults)}" if self.faults else "complete"
        return f"{self.name:20} {step:>9} {size:>12}  {state}"


def states(folder: Path) -> Iterator[State]:
    """The states of what a folder is, or holds: a checkpoint or a student, and the checkpoints of a run.

    Args:
        folder: A run's folder, a checkpoint, or a student.

    Raises:
        FileNotFoundError: If it is nothing of that.
    """
    inside = checkpoints(folder)
    is_checkpoint = folder.is_dir() and folder.resolve().name.startswith("checkpoint-")
    itself = [folder] if is_checkpoint or (folder / MANIFEST).is_file() else []
    if not inside and not itself:
        raise FileNotFoundError(f"{str(folder)!r} is no checkpoint and no student, and holds no checkpoint.")
    for each in [*itself, *inside]:
        faults = checkpoint_damage(each) if is_checkpoint or each in inside else damage(each)
        try:
            manifest = read_manifest(each)
        except ValueError:
            yield State(each.name, None, None, faults)
        else:
            size = sum(written["size"] for written in manifest["files"].values())
            yield State(each.resolve().name, manifest.get("step"), size, faults)


def print_states(folder: Path) -> int:
    """Print a line for each state; 1 if anything is damaged, else 0."""
    damaged = 0
    for number, state in enumerate(states(folder)):
        if number == 0:
            print(f"{'folder':20} {'step':>9} {'MiB':>12}  state")
        print(state)
        damaged = damaged or int(bool(state.faults))
    return damaged
