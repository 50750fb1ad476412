"""A trainer of your own: one hook is changed, so that a reward leaves alone the samples that have had enough of it.

    python examples/custom_trainer.py                             # embedded digits, on the CPU: a minute
    python examples/custom_trainer.py --reward_targets '{}' --output_dir runs/without      # the same without targets
    accelerate launch examples/custom_trainer.py --config examples/sd15_gndmr.yaml --reward_targets '{"hpsv2.1": 0.3}'

A reward that is never satisfied gets gamed: ``ink`` wants bright pictures, and with a weight of 3 the digits swell
until they close. A *target* says what is enough. Samples that have reached it are left to the other rewards and to
distribution matching; those below are pushed on. (DMDR trains on ``relu(0.7 - reward)``, which is the same idea.)

``RDMTrainer`` is a list of such hooks, each with one job: ``generate_rollout``, ``compute_fake_score_loss``,
``compute_rewards``, ``compute_advantages``, ``compute_directions``, ``compute_policy_loss``, ... Override the one whose
job changes and call ``super()`` for the rest; everything else (logging, checkpoints, several processes, saving) goes on
working. ``docs/tutorials/your_own_trainer.md`` has a table of them.

========  ============================================================================================================
hardware  One CPU core.
memory    0.72 GiB, of the process at its peak. On other models as in their examples: the hook costs nothing.
time      61 to 65 s of processor time, start included.
expected  Mean grey level (``ink``) of the last ten updates' images, with the target and without: 0.360 and 0.461,
          0.360 and 0.451, 0.356 and 0.451 (seeds 1000 to 1002; the data's is 0.31). Log-probability of the right
          digit (``digit_logprob``, only watched): -0.06 and -0.37, -0.05 and -0.32, -0.05 and -0.15.
========  ============================================================================================================
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from rdm_rl import RDMConfig, RDMTrainer
from rdm_rl.cli.main import run_script
from rdm_rl.cli.parser import SettingsParser
from rdm_rl.cli.train import TrainArguments, load_eval_prompts, load_prompts, lora_config, make_rewards
from rdm_rl.records import Direction, Judgement, Rollout


class TargetTrainer(RDMTrainer):
    """An ``RDMTrainer`` whose rewards stop pushing a sample that has reached their target."""

    reward_targets: Mapping[str, float] = {}

    def compute_directions(
        self, rollout: Rollout, step: int, judgements: Mapping[str, Judgement], advantages: Mapping[str, Tensor]
    ) -> dict[str, Direction]:
        """Every reward's direction; "not applicable" where the sample has enough of it."""
        directions = super().compute_directions(rollout, step, judgements, advantages)
        for name, target in self.reward_targets.items():
            direction, rewards = directions[name], judgements[name].rewards
            if rewards is not None:  # Shape (N,), NaN where it does not apply: that is not enough.
                directions[name] = replace(direction, applicable=direction.applicable & ~(rewards >= target))
        return directions


@dataclass
class TargetArguments(TrainArguments):
    """What is trained on what; see :class:`~rdm_rl.cli.train.TrainArguments`.

    Args:
        reward_targets: What is enough, by reward: a mapping in YAML, JSON as a flag.
    """

    reward_targets: dict | str | None = field(  # type: ignore[type-arg]
        default=None, metadata={"help": "What is enough of a reward, as JSON: '{\"ink\": 0.35}'."}
    )


def main(words: Sequence[str] | None = None) -> None:
    """Parse, train, save, and say what became of the rewards."""
    parser = SettingsParser((TargetArguments, RDMConfig), str(__doc__), config=Path(__file__).with_suffix(".yaml"))
    arguments, args = parser.parse(words)
    targets = arguments.reward_targets or {}
    targets = json.loads(targets) if isinstance(targets, str) else targets

    trainer = TargetTrainer(
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
    unknown = targets.keys() - trainer.rewards.keys()
    if unknown:
        raise ValueError(f"reward_targets has {sorted(unknown)}, but the rewards are {list(trainer.rewards)}.")
    trainer.reward_targets = targets
    trainer.train()
    trainer.save_model()
    for name in trainer.rewards:  # Not every update asks every reward.
        means = [row[f"rewards/{name}/mean"] for row in trainer.state.log_history if f"rewards/{name}/mean" in row]
        trainer.accelerator.print(f"{name}: {f'{means[-1]:.3f} at the end' if means else 'not asked'}")
    trainer.accelerator.print(f"The student is in {args.output_dir}, sample grids in {args.output_dir}/samples")


if __name__ == "__main__":
    sys.exit(run_script(main))
