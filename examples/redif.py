"""ReDiF on Stable Diffusion 1.5: a five-step student by policy gradient, rewarded for being like the teacher's image.

    accelerate launch examples/redif.py --config examples/redif.yaml
    accelerate launch examples/redif.py --config examples/redif.yaml --reward_gradient pathwise --eta 0  # DRaFT

The settings are those of ``ReDiFConfig`` and of ``rdm-rl train``; flags win over the YAML file, which spells the
recommended preset out and says what the paper's code has instead. The last ``--held_out`` rows are not trained on:
evaluations measure the student on them (``eval_rewards/*`` in the log), unless ``--eval_dataset`` names others.

=========  ============================================================================================================
hardware   One GPU. Not run by us on Stable Diffusion: what follows is computed or quoted, not measured.
memory     From parameter counts: 1.7 GB for the U-Net in bf16, 0.8 GB for decoder and text encoder in float32, 0.35 GB
           for CLIP ViT-B/32. Activations come on top; ``activation_checkpointing`` makes them small.
time       An update of 32 samples asks the U-Net 5 x 32 times without and 4 x 32 times with a backward pass, each
           twice for guidance; a new teacher image 50 times, twice for guidance, and a kept one never.
numbers    None. We have seen no figure of the paper's (arXiv 2512.22802), only its abstract and code, and have not
           measured this yet. On the embedded digits, benchmarks/redif.md has what we measured.
=========  ============================================================================================================
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from rdm_rl import ReDiFConfig, ReDiFTrainer
from rdm_rl.cli.main import run_script
from rdm_rl.cli.parser import SettingsParser
from rdm_rl.cli.train import TrainArguments, load_eval_prompts, load_prompts, lora_config, make_rewards


@dataclass
class ReDiFArguments(TrainArguments):
    """What is trained on what; see :class:`~rdm_rl.cli.train.TrainArguments`.

    Args:
        held_out: So many rows at the end of the data set are kept from training, for evaluations.
    """

    reward_funcs: list[str] = field(
        default_factory=lambda: ["teacher_clip"], metadata={"help": "Rewards; at least one compares with the teacher."}
    )
    held_out: int = field(default=16, metadata={"help": "Rows kept from training for evaluations."})


def main(words: Sequence[str] | None = None) -> None:
    """Parse, train, measure and save."""
    arguments, args = SettingsParser((ReDiFArguments, ReDiFConfig), str(__doc__)).parse(words)

    data = load_prompts(arguments)
    rows = data if isinstance(data, list) else list(data)
    if not 0 < arguments.held_out < len(rows):
        raise ValueError(
            f"held_out={arguments.held_out} of {len(rows)} prompts leaves none to measure with, or none to train on. "
            "Set it to a few."
        )
    train, held_out = rows[: -arguments.held_out], rows[-arguments.held_out :]
    trainer = ReDiFTrainer(
        arguments.model,
        make_rewards(arguments.reward_funcs, arguments.reward_options),
        args,
        train,
        load_eval_prompts(arguments) or held_out,
        teacher=arguments.teacher,
        teacher_adapter=arguments.teacher_adapter,
        policy_init=arguments.policy_init,
        peft_config=lora_config(arguments),
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    trainer.save_model()
    if trainer.accelerator.is_main_process:
        for name, value in after.items():
            print(f"{name}: {before[name]:.5f} before, {value:.5f} after")
        print(f"The student is in {args.output_dir}")


if __name__ == "__main__":
    sys.exit(run_script(main))
