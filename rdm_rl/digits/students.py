"""Students of the embedded digits: their prompts and settings, and the evaluation that judges them."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor
from transformers.trainer_callback import TrainerCallback

from rdm_rl.digits.data import TEACHER_FOLDER, digit_prompts, load_digits, mixed_prompts
from rdm_rl.digits.judge import judge
from rdm_rl.evaluation.sampler_metrics import SamplerMetrics
from rdm_rl.evaluation.samplers import Evaluation
from rdm_rl.randomness import seeded_generator
from rdm_rl.trainers.rdm_config import RDMConfig
from rdm_rl.trainers.rdm_trainer import RDMTrainer

# Chosen on network A, training images and development seeds, for one scale of a prompt and five updates of the fake
# score: after this warm start no other scale can be told from it. What all students share:
COMMON_SETTINGS: dict[str, Any] = {
    "dm_normalization": "group",
    "fake_score_updates_per_policy_update": 5,
    "per_device_train_batch_size": 64,
    "num_generations": 8,
    "adam_beta1": 0.0,
    "teacher_guidance_scale": 1.0,
    "dm_scale_floor": 0.1,
    "fake_score_learning_rate": 1e-3,
    "fake_score_warmup_steps": 80,
    "warm_start_learning_rate": 2e-3,
    "warm_start_steps": 150,
    "logging_steps": 2,
    "adapter_pass": "added",  # The network is small.
}
# The fewer the steps, the more the warm start leaves to do. The rate falls to 0, and the averaged policy is judged;
# twice as many updates are still no better (benchmarks/normalization.md).
STUDENT_SETTINGS: dict[int, dict[str, Any]] = {
    4: {"learning_rate": 5e-5, "max_steps": 30},
    2: {"learning_rate": 1e-4, "max_steps": 40},
    1: {"learning_rate": 3e-4, "max_steps": 60},
}
LORA_RANK = 16


class DigitsEvaluation(Evaluation):
    """Evaluation on 500 prompts, of which every second is empty, by network B against held-out digits."""

    teacher_folder = TEACHER_FOLDER
    guidance_scale = 1.0
    num_images = 500

    def __init__(self, seed: int) -> None:
        """Choose prompts and seeds."""
        super().__init__(seed)
        self.prompts, self.wanted = mixed_prompts(self.num_images)

    def judge_images(self, images: Tensor, **row: Any) -> SamplerMetrics:
        """The measurements of one sampler's images."""
        real = load_digits("held_out").images
        return judge(images, self.wanted, data_images=real, teacher_images=self.reference, **row)

    def real_images(self) -> Tensor:
        """Training images of the digits asked for; any where the prompt is empty."""
        train = load_digits("train")
        order = torch.randperm(len(train.labels), generator=seeded_generator(self.seed, "demo/real"))
        of_digit = [order[train.labels[order] == digit].tolist() for digit in range(10)]
        any_digit = iter(order.tolist())
        chosen = [
            next(any_digit) if wanted.all() else of_digit[int(wanted.int().argmax())].pop() for wanted in self.wanted
        ]
        return train.images[chosen]

    def pictured(self) -> tuple[list[int], list[str]]:
        """The first image of each named digit, and six of the empty prompt."""
        shown = [2 * digit for digit in range(10)] + [2 * index + 1 for index in range(6)]
        return shown, [*map(str, range(10)), *["any"] * 6]


def training_prompts() -> list[dict[str, Any]]:
    """The 240 prompts that students are trained on: as often one that names a digit as the empty one.

    Example:
        >>> training_prompts()[0]
        {'prompt': 'a handwritten zero'}
    """
    named = [prompt for digit in range(10) for prompt in digit_prompts(digit)]
    return [{"prompt": prompt} for prompt in named + [""] * len(named)]


def digits_config(num_inference_steps: int, output_dir: str | Path, seed: int = 0, **overrides: Any) -> RDMConfig:
    """The settings of a student of the digits.

    Args:
        num_inference_steps: Steps K of the student; more than 4 and 3 take the settings of the next smaller number.
        output_dir: Where the run writes.
        seed: Seed of the run.
        overrides: Settings that replace these.

    Example:
        >>> digits_config(1, "out").num_inference_steps
        1
    """
    chosen = STUDENT_SETTINGS[max(steps for steps in STUDENT_SETTINGS if steps <= num_inference_steps)]
    fixed: dict[str, Any] = {
        "output_dir": str(output_dir),
        "seed": seed,
        "use_cpu": True,
        "save_strategy": "no",
        "report_to": "none",
    }
    return RDMConfig(**{"num_inference_steps": num_inference_steps, **COMMON_SETTINGS, **chosen, **fixed, **overrides})


def digits_trainer(args: RDMConfig, callbacks: list[TrainerCallback] | None = None) -> RDMTrainer:
    """A trainer of a student of the digits."""
    lora = LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK)
    return RDMTrainer(str(TEACHER_FOLDER), "rdm", args, training_prompts(), peft_config=lora, callbacks=callbacks or [])
