"""A reward of your own: even digits are to be drawn bold and odd ones thin, and a second one is only watched.

    python examples/custom_reward.py --output_dir runs/custom

``bold_if_even`` is differentiable and has a weight, so it moves the student; it reads a column of the data set.
``pieces`` counts the connected pieces of ink, which nobody can differentiate; it has the weight 0 and is only watched
in the log. It should stay where it was: a reward that ruins the digits may tear them apart. The teacher is the embedded
one. About a minute and a half on one CPU core; ``samples.png`` shows the result.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig
from torch import Tensor
from torch.nn.functional import max_pool2d

from rdm_rl import RDMConfig, RDMTrainer
from rdm_rl.digits.data import TEACHER_FOLDER, digit_prompts
from rdm_rl.evaluation.pictures import image_grid
from rdm_rl.rewards import register_reward

BOLD, THIN = 0.38, 0.24  # Mean grey levels. Those of the data are 0.25 to 0.39, with 0.31 in the middle.


@register_reward("bold_if_even", differentiable=True)
def bold_if_even(images: Tensor, prompts: list[str], digit: list[int]) -> Tensor:
    """Minus the distance of the mean grey level from the wanted one, shape (N,)."""
    wanted = torch.tensor([THIN if number % 2 else BOLD for number in digit], device=images.device)
    return -(images.mean((1, 2, 3)) - wanted).abs()


@register_reward("pieces")
def pieces(images: Tensor, prompts: list[str]) -> Tensor:
    """How many connected pieces the ink is in, shape (N,)."""
    ink = (images.mean(1, keepdim=True) > 0.5).float()
    labels = ink * torch.arange(1, ink[0].numel() + 1, device=ink.device).view_as(ink[:1])
    while True:  # Each pixel takes the largest label around it, until every piece has one label.
        spread = max_pool2d(labels, 3, stride=1, padding=1) * ink
        if torch.equal(spread, labels):
            return torch.tensor([float(len(label.unique()) - 1) for label in labels])  # Without the background's 0.
        labels = spread


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/custom"), help="where everything goes")
    parser.add_argument("--weight", type=float, default=1.5, help="weight of bold_if_even; 0 only watches it, too")
    parser.add_argument("--max_steps", type=int, default=60, help="policy updates, the first 10 without it")
    parser.add_argument("--warm_start_steps", type=int, default=100, help="updates of the warm start")
    parser.add_argument("--warm_start_num_states", type=int, default=500, help="what it learns from")
    parser.add_argument("--fake_score_warmup_steps", type=int, default=40, help="updates of the fake score before")
    parser.add_argument("--seed", type=int, default=0, help="seed of the run")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    """Train and show."""
    options = parse(words)
    args = RDMConfig.from_method(
        "gndmr",
        output_dir=str(options.output_dir),
        reward_weights=[1.0, options.weight, 0.0],
        reward_start_step=10,
        seed=options.seed,
        use_cpu=True,
        save_strategy="no",
        max_steps=options.max_steps,
        num_inference_steps=1,
        num_generations=4,
        per_device_train_batch_size=32,
        decode_batch_size=32,
        learning_rate=3e-4,
        lr_scheduler_type="constant",
        adam_beta1=0.0,
        dm_scale_floor=0.1,
        teacher_guidance_scale=1.0,
        fake_score_learning_rate=1e-3,
        fake_score_warmup_steps=options.fake_score_warmup_steps,
        warm_start_learning_rate=2e-3,
        warm_start_steps=options.warm_start_steps,
        warm_start_num_states=options.warm_start_num_states,
        warm_start_ode_steps=10,
    )
    data = [{"prompt": prompt, "digit": digit} for digit in range(10) for prompt in digit_prompts(digit)]
    trainer = RDMTrainer(
        TEACHER_FOLDER, ["rdm", "bold_if_even", "pieces"], args, data, peft_config=LoraConfig(r=16, lora_alpha=16)
    )
    trainer.train()
    trainer.save_model(options.output_dir / "student")

    prompts = [digit_prompts(digit)[0] for digit in range(10)]
    images = trainer.generate(prompts * 20, generator=torch.Generator().manual_seed(0)).cpu()
    image_grid({"one step": images[:40].unflatten(0, (4, 10))}, [str(digit) for digit in range(10)]).save(
        options.output_dir / "samples.png"
    )
    grey = images.mean((1, 2, 3))
    print(f"grey level of even digits {grey[::2].mean():.3f}, of odd ones {grey[1::2].mean():.3f}")
    print(f"pieces of ink in a digit: {pieces(images, prompts * 20).mean():.2f}")
    print(f"The student and samples.png are in {options.output_dir}")


if __name__ == "__main__":
    main()
