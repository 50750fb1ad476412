"""GNDM on FLUX.1-dev: a four-step student by group-normalised distribution matching alone, no reward.

    accelerate launch examples/flux_gndm.py                                       # the settings of flux_gndm.yaml
    accelerate launch --num_processes 4 examples/flux_gndm.py --shard --gradient_accumulation_steps 1
    accelerate launch examples/flux_gndm.py --reward_funcs rdm pickscore --reward_start_step 500     # with a reward
    rdm-rl sample --student runs/flux-gndm --model black-forest-labs/FLUX.1-dev --prompt "a heron"

Whether you may use the model's weights is for its licence to say: accept it on the hub and log in (``hf auth login``).
The student is a LoRA and a scheduler, which plain diffusers loads: the README.md beside it has the lines.

**An experiment.** SenseFlow (arXiv 2506.00523) reports that plain DMD does not converge on this model, and adds two
techniques of its own to make it. Whether GNDM does is not known: watch ``fake_score/lag`` and ``rdm/gap``
(docs/metrics.md).

========  ============================================================================================================
hardware  A large GPU, or several with ``--shard``.
memory    ``rdm-rl plan --model black-forest-labs/FLUX.1-dev --config examples/flux_gndm.yaml``
time      Not yet measured. Counted: an update asks the transformer 192 times for an image without and 192 times with a
          backward pass (32 images; 4 + 1 + 1, and 5 + 1).
expected  Not yet measured by us. For scale, SenseFlow's README, COCO-5k, 4 steps: HPSv2 0.2997 and ImageReward
          1.0921 for its student, 0.3000 and 1.1170 for the teacher with 50 steps, 0.2962 and 1.0755 for
          FLUX.1-schnell.
========  ============================================================================================================
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from rdm_rl import RDMConfig, RDMTrainer
from rdm_rl.cli.main import run_script
from rdm_rl.cli.parser import SettingsParser
from rdm_rl.cli.train import TrainArguments, load_eval_prompts, load_prompts, lora_config, make_rewards


def main(words: Sequence[str] | None = None) -> None:
    """Parse, train and save."""
    parser = SettingsParser((TrainArguments, RDMConfig), str(__doc__), config=Path(__file__).with_suffix(".yaml"))
    arguments, args = parser.parse(words)
    trainer = RDMTrainer(
        model=arguments.model,
        reward_funcs=make_rewards(arguments.reward_funcs, arguments.reward_options),
        args=args,
        train_dataset=load_prompts(arguments),
        eval_dataset=load_eval_prompts(arguments),
        teacher=arguments.teacher,  # None: the model itself
        teacher_adapter=arguments.teacher_adapter,
        policy_init=arguments.policy_init,
        peft_config=lora_config(arguments),  # A LoraConfig; None with --full.
    )
    trainer.train()
    trainer.save_model()
    trainer.accelerator.print(f"The student is in {args.output_dir}")


if __name__ == "__main__":
    sys.exit(run_script(main))
