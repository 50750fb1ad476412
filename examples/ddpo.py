r"""What TRL's ``examples/scripts/ddpo.py`` did: a many-step policy learns to please a reward by policy gradient (DDPO).

    python examples/ddpo.py                                                   # embedded digits, on the CPU
    accelerate launch examples/ddpo.py --config examples/ddpo.yaml            # Stable Diffusion 1.5
    python examples/ddpo.py --reward_gradient pathwise --reward_funcs ink     # AlignProp's job: see below

The policy is a DDIM sampler with ``eta`` 1. The reward of a finished image is compared with those of the same prompt's
other images, and PPO's clipped surrogate is climbed on its random steps: on all of them with Stable Diffusion, on three
of nine, drawn anew for each update, with the digits. ``before_after.png`` shows the same noise before and after; judged
images are drawn without the sampler's randomness, as a stock pipeline draws them. Every field of ``RDMConfig`` is a
flag. ``docs/migration_from_trl.md`` has the settings of TRL beside ours.

**AlignProp's job.** ``--reward_gradient pathwise`` sends the gradient of a differentiable reward through the last step
(``--pathwise_steps any``: through every step, one at a time) instead: ``ink`` on the digits, ``aesthetic`` with Stable
Diffusion. There is no back-propagation through several steps.

==========  ==============================================================  ==================================
\           digits (the defaults)                                           Stable Diffusion 1.5 (``ddpo.yaml``)
==========  ==============================================================  ==================================
hardware    one CPU core                                                    a GPU
memory      0.7 GiB, of the process at its peak                             not yet measured
time        62 s of processor time, start and judging included              not yet measured
expected    JPEG size of 240 judged images 1.052 kB before; 0.875, 0.956    not yet measured
            and 0.927 kB after 30 updates (development seeds 1000 to 1002)
AlignProp   ``ink`` from 0.309 to 0.386 in 10 updates, 30 s, 0.8 GiB        not yet measured
==========  ==============================================================  ==================================

Look at the picture, too: whatever digit is asked for, what comes is nearly always an upright stroke, which is small as
a JPEG file. That is what the reward asks for, and nothing here holds the policy back; ``--beta`` would, or ``rdm``.
(AlignProp: ``--max_steps 10 --num_generations 1 --learning_rate 1e-3``, seed 1000.)

For Stable Diffusion, the README of the paper's PyTorch code (https://github.com/kvablack/ddpo-pytorch) says: less than
10 GB of GPU memory with LoRA, and about 4 hours for 100 epochs on eight A100; its figures show the reward's curves.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rdm_rl import RDMConfig, RDMTrainer
from rdm_rl.cli.main import run_script
from rdm_rl.cli.parser import SettingsParser
from rdm_rl.cli.train import TrainArguments, load_eval_prompts, load_prompts, lora_config, make_rewards
from rdm_rl.evaluation.pictures import image_grid
from rdm_rl.randomness import seeded_generators
from rdm_rl.records import PromptBatch
from rdm_rl.rewards.kinds import AskedReward
from rdm_rl.trainers.prompts import other_columns

# Common animals, as in the paper's experiments; the choice is ours.
ANIMALS = (
    "ant bat bear bee beetle bird butterfly camel cat chicken cow crab deer dog dolphin donkey duck eagle elephant "
    "fish fox frog giraffe goat goose gorilla hamster hedgehog horse kangaroo lion lizard monkey mouse otter owl panda "
    "penguin pig rabbit raccoon shark sheep snail snake spider squirrel tiger turtle whale wolf zebra"
).split()

# Method "ddpo" for a model of 32 x 32 pixels. Chosen on development seeds.
DIGITS: dict[str, Any] = {
    "method": "ddpo",
    "output_dir": "runs/ddpo",
    "num_inference_steps": 10,
    "num_replayed_steps": 3,
    "guidance_scale": 1.0,
    "per_device_train_batch_size": 64,
    "num_generations": 8,
    "decode_batch_size": 64,
    "max_steps": 30,
    "logging_steps": 5,
    "learning_rate": 3e-3,
    "lr_scheduler_type": "constant",
    "save_strategy": "no",
}


@dataclass
class Arguments(TrainArguments):
    """What is trained on what, with the digits as the default.

    Args:
        model_name_or_path: As in ``rdm-rl train``.
        dataset: As there; ``animals`` are names of animals.
        reward_funcs: As there.
        lora_r: As there.
        num_judged: Images that are judged before and after.
    """

    model_name_or_path: str = field(default="digits", metadata={"help": "Pipeline folder or hub name, or 'digits'."})
    dataset: str = field(default="digits", metadata={"help": "File of prompts, hub data set, 'digits' or 'animals'."})
    reward_funcs: list[str] = field(
        default_factory=lambda: ["jpeg_compressibility"],
        metadata={"help": "Names of rewards, module:attribute or path.py:attribute."},
    )
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapters."})
    num_judged: int = field(default=240, metadata={"help": "Images that are judged before and after training."})


def parse(words: Sequence[str] | None) -> tuple[Arguments, RDMConfig]:
    """The settings from flags and a YAML file, over the digits' defaults."""
    arguments, args = SettingsParser((Arguments, RDMConfig), str(__doc__), defaults=DIGITS).parse(words)
    return arguments, args


@torch.no_grad()
def look(trainer: RDMTrainer, rows: Sequence[dict[str, Any]]) -> tuple[dict[str, float], Tensor]:
    """Mean rewards of the current policy's images from fixed noise, and the images, shape (N, 3, H, W)."""
    values: dict[str, list[Tensor]] = {}
    images = []
    size = trainer.args.per_device_train_batch_size
    for first in range(0, len(rows), size):
        some = rows[first : first + size]
        prompts, numbers = [row["prompt"] for row in some], range(first, first + len(some))
        batch = PromptBatch(
            prompts=prompts,
            conditioning=trainer.family.encode(prompts),
            group_ids=torch.arange(len(some)),
            sample_ids=numbers,
            columns=other_columns(some, 1),
        )
        chains = trainer.sample_student(batch, generator=seeded_generators(0, "ddpo/look", 0, numbers))
        images.append(trainer.family.decode(chains.sample).cpu())
        for name, reward in trainer.rewards.items():
            if isinstance(reward, AskedReward):
                values.setdefault(name, []).append(reward.start(chains, -1, gradient=False)().values.cpu())
    return {name: torch.cat(numbers).nanmean().item() for name, numbers in values.items()}, torch.cat(images)


def main(words: Sequence[str] | None = None) -> None:
    """Judge, train, judge again, and save."""
    arguments, args = parse(words)
    animals = arguments.dataset == "animals"
    data = [{"prompt": name} for name in ANIMALS] if animals else load_prompts(arguments)
    trainer = RDMTrainer(
        arguments.model,
        make_rewards(arguments.reward_funcs, arguments.reward_options),
        args,
        data,
        load_eval_prompts(arguments),
        teacher=arguments.teacher,
        teacher_adapter=arguments.teacher_adapter,
        policy_init=arguments.policy_init,
        peft_config=lora_config(arguments),
    )
    rows = [trainer.prompts[index % len(trainer.prompts)] for index in range(arguments.num_judged)]
    before, first_images = look(trainer, rows)
    trainer.train()
    after, last_images = look(trainer, rows)
    trainer.save_model()
    if not trainer.accelerator.is_main_process:
        return
    folder = Path(args.output_dir)
    shown = [index * len(rows) // min(20, len(rows)) for index in range(min(20, len(rows)))]
    pictures = {"before": first_images[shown], "after": last_images[shown]}
    image_grid(pictures, [rows[index]["prompt"] for index in shown]).save(folder / "before_after.png")
    result = {"before": before, "after": after, "log": trainer.state.log_history}
    (folder / "result.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    for name in before:
        print(f"{name}: {before[name]:.4f} before, {after[name]:.4f} after {trainer.state.global_step} updates")
    print(f"The policy and before_after.png are in {folder}")


if __name__ == "__main__":
    sys.exit(run_script(main))
