"""ReDiF on the embedded digits: a five-step student learns to make the teacher's image of the same prompt and noise.

    python examples/digits_redif.py --output_dir runs/redif                 # by policy gradient
    python examples/digits_redif.py --output_dir runs/draft --draft         # the control: the reward's own gradient

The student begins as the teacher itself, with 5 steps of DDIM instead of 50. The reward, ``teacher_mse``, compares its
image with what the teacher's 50 steps make of the same noise; ``teacher_histogram`` is only watched. Both are measured
before and after on prompts and noises that were not trained on. Expect the control to gain, and the policy gradient
next to nothing in so short a run (-0.00210 to -0.00212 with seed 0): ``benchmarks/redif.md`` says what it takes. It
shows the machinery. About two and a half minutes on one CPU core, less with ``--draft``; ``samples.png`` shows the
student before and after, and the teacher.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig
from torch import Tensor

from rdm_rl import ReDiFConfig, ReDiFTrainer
from rdm_rl.digits.data import TEACHER_FOLDER
from rdm_rl.digits.students import DigitsEvaluation, training_prompts
from rdm_rl.evaluation.pictures import image_grid
from rdm_rl.randomness import seeded_generators
from rdm_rl.rewards import get_reward

HELD_OUT = "the number "  # Prompts that begin so are not trained on.
REWARDS = ("teacher_mse", "teacher_histogram")  # The first is trained, the second watched.


def noises(count: int) -> list[torch.Generator]:
    """The held-out initial noises, one generator for each image."""
    return seeded_generators(0, "examples/digits_redif", 0, range(count))


@torch.no_grad()
def alignment(images: Tensor, prompts: list[str], teacher_images: Tensor) -> str:
    """The mean of each reward over pairs of images, as text."""
    means = {name: get_reward(name)(images, prompts, teacher_images).mean().item() for name in REWARDS}
    return ", ".join(f"{name} {mean:.5f}" for name, mean in means.items())


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/redif"), help="where everything goes")
    parser.add_argument("--draft", action="store_true", help="the control: the reward's gradient, on the last step")
    parser.add_argument("--max_steps", type=int, default=60, help="policy updates")
    parser.add_argument("--num_inference_steps", type=int, default=5, help="steps of the student: 4 or 5")
    parser.add_argument("--teacher_steps", type=int, default=50, help="steps of the teacher's images")
    parser.add_argument("--learning_rate", type=float, default=1e-4, help="learning rate")
    parser.add_argument(
        "--eta", type=float, default=0.15, help="randomness of the sampler in training; none in --draft"
    )
    parser.add_argument("--batch_size", type=int, default=128, help="samples of an update; a group is 8 of one prompt")
    parser.add_argument("--num_judged", type=int, default=100, help="held-out pairs before and after")
    parser.add_argument("--seed", type=int, default=0, help="seed of the run")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    """Train, measure and show."""
    options = parse(words)
    data = training_prompts()
    named = [row["prompt"] for row in data if row["prompt"].startswith(HELD_OUT)]
    args = ReDiFConfig(
        output_dir=str(options.output_dir),
        reward_gradient="pathwise" if options.draft else "score_function",
        reward_weights=[1.0, 0.0],
        num_inference_steps=options.num_inference_steps,
        teacher_num_inference_steps=options.teacher_steps,
        guidance_scale=1.0,  # The digits teacher was made to do without.
        teacher_guidance_scale=1.0,
        eta=None if options.draft else options.eta,  # The control's default is 0.
        learning_rate=options.learning_rate,
        lr_scheduler_type="constant",
        max_steps=options.max_steps,
        per_device_train_batch_size=options.batch_size,
        decode_batch_size=32,
        seed=options.seed,
        use_cpu=True,
        save_strategy="no",
    )
    trainer = ReDiFTrainer(
        TEACHER_FOLDER,
        REWARDS,
        args,
        [row for row in data if not row["prompt"].startswith(HELD_OUT)],
        [{"prompt": prompt} for prompt in named],
        peft_config=LoraConfig(r=16, lora_alpha=16),
    )

    prompts = [named[index % len(named)] for index in range(options.num_judged)]
    teacher_images = DigitsEvaluation.load_teacher()(
        prompts,
        num_inference_steps=options.teacher_steps,
        guidance_scale=1.0,
        generator=noises(len(prompts)),
        output_type="pt",
    ).images
    before = trainer.generate(prompts, generator=noises(len(prompts)))
    trainer.train()
    after = trainer.generate(prompts, generator=noises(len(prompts)))
    trainer.save_model(options.output_dir / "student")

    rows = {"student, before": before[:20], "student, after": after[:20], "teacher": teacher_images[:20]}
    image_grid(rows, prompts[:20]).save(options.output_dir / "samples.png")
    print(f"before: {alignment(before, prompts, teacher_images)}")
    print(f"after: {alignment(after, prompts, teacher_images)}")
    print(f"The student and samples.png are in {options.output_dir}")


if __name__ == "__main__":
    main()
