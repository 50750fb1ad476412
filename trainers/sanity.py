"""Once, before anything long: what would otherwise fail for the first time after hours."""

import json
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch

from rdm_rl.networks.sharding import gather
from rdm_rl.settings import setting
from rdm_rl.trainers.checkpointing import read_checkpoint, write_checkpoint

if TYPE_CHECKING:
    from rdm_rl.trainers.student_run import StudentRun


def check_run(trainer: "StudentRun") -> None:
    """Do once what a run does late: open trackers, write and read a checkpoint, decode an image, ask every reward.

    It costs about what a policy update does, and changes nothing that the run depends on.

    Args:
        trainer: The trainer, with its optimisers.

    Raises:
        OSError: If the output folder cannot be written.
        ValueError: If the state of a subclass, or of a weighting, could not be read back from a checkpoint.
        RewardError: If a reward fails and that is not to be skipped.
    """
    for tracker in trainer.trackers:
        tracker.on_train_begin(trainer.args, trainer.state, trainer.control)
    check_checkpoint(trainer)
    check_rewards(trainer)


def check_checkpoint(trainer: "StudentRun") -> None:
    """Write a checkpoint with one weight of each role to a temporary folder in ``output_dir``, and read it back."""
    weights = {role: dict(islice(trainer.networks.state_dict(role).items(), 1)) for role in trainer.optimizers}
    tensors, state = gather((weights, trainer.whole_state()), keep=trainer.accelerator.is_main_process)
    if not trainer.accelerator.is_main_process:
        return
    output_dir = Path(trainer.args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=output_dir, prefix=".checking-") as folder:
        checkpoint = Path(folder) / "checkpoint-0"
        write_checkpoint(checkpoint, tensors, state, json.loads(trainer.args.to_json_string()), trainer.state)
        try:
            read_checkpoint(checkpoint)
        except ValueError as error:
            raise ValueError(
                "A checkpoint of this run could not be read back. What state_dict() returns, a trainer's or a "
                "weighting's, may hold numbers, strings, lists, dicts and tensors alone: unpickling others runs code. "
                f"({str(error.__cause__).splitlines()[0]})"
            ) from error


@torch.no_grad()
def check_rewards(trainer: "StudentRun") -> None:
    """Roll out the samples of the first update, decode one, and let every reward judge them on a step it acts on."""
    rollout = trainer.generate_rollout(next(trainer.prompt_batches(0)))
    trainer.family.decode(rollout.sample[:1])
    steps = range(len(rollout.times))
    for name, reward in trainer.rewards.items():
        step = next((step for step in reversed(steps) if reward.acts_on(step, rollout)), steps[-1])
        reward.judge(rollout, step, generator=trainer.generators(f"reward/{name}", rollout.batch))


@dataclass
class SanitySettings:
    """The start of a run."""

    sanity_check: bool = setting(
        True,
        "Before anything long, open the trackers, write a checkpoint and read it back, decode a sample, and let every "
        "reward judge a batch.",
    )
    allow_config_change: bool = setting(
        False, "Resume a checkpoint although settings of the method, or the data, have changed since."
    )
