"""Students of the scenes: their prompts and settings, and the evaluation that judges them."""

from functools import cached_property
from pathlib import Path
from typing import Any

from peft import LoraConfig
from torch import Tensor

from rdm_rl.evaluation.distances import frechet_distance
from rdm_rl.evaluation.sampler_metrics import SamplerMetrics
from rdm_rl.evaluation.samplers import Evaluation
from rdm_rl.randomness import seeded_generator
from rdm_rl.scenes.data import (
    GUIDANCE_SCALE,
    TEACHER_FOLDER,
    compose,
    load_handwriting,
    random_attributes,
    scene_prompts,
)
from rdm_rl.scenes.recognisers import fulfilled, scene_features
from rdm_rl.trainers.rdm_config import RDMConfig
from rdm_rl.trainers.rdm_trainer import RDMTrainer

NUM_PROMPTS = 1024
LORA_RANK = 32
# Chosen on network A and development seeds (benchmarks/scene_students.md).
COMMON_SETTINGS: dict[str, Any] = {
    "num_inference_steps": 1,
    "per_device_train_batch_size": 32,
    "num_generations": 2,
    "adam_beta1": 0.0,
    "teacher_guidance_scale": GUIDANCE_SCALE,
    "dm_scale_floor": 0.1,
    "learning_rate": 3e-4,
    "fake_score_learning_rate": 1e-3,
    "fake_score_warmup_steps": 60,
    "fake_score_updates_per_policy_update": 1,
    "warm_start_learning_rate": 1e-3,
    "warm_start_num_states": 512,
    "warm_start_steps": 200,
    "max_steps": 48,
    "adapter_pass": "added",  # The network is small.
}


class ScenesEvaluation(Evaluation):
    """Evaluation on 300 prompts: distances by network B, what is shown by network C."""

    teacher_folder = TEACHER_FOLDER
    guidance_scale = GUIDANCE_SCALE
    num_images = 300

    def __init__(self, seed: int) -> None:
        """Choose prompts and seeds."""
        super().__init__(seed)
        self.attributes = random_attributes(self.num_images, seeded_generator(seed, "demo/judged"))
        self.prompts = scene_prompts(self.attributes, seeded_generator(seed, "demo/phrasing"))

    def judge_images(self, images: Tensor, **row: Any) -> SamplerMetrics:
        """The measurements of one sampler's images."""
        features, (real, teacher) = scene_features("B", images), self._features
        return SamplerMetrics(
            num_images=len(images),
            distance_to_data=frechet_distance(features, real),
            distance_to_teacher=frechet_distance(features, teacher),
            accuracy=fulfilled(images, self.prompts).all(1).double().mean().item(),
            **row,
        )

    @cached_property
    def _features(self) -> tuple[Tensor, Tensor]:
        """What every sampler is compared with: features of real scenes, and of the teacher's reference images."""
        return scene_features("B", self._composed("data")), scene_features("B", self.reference)

    def real_images(self) -> Tensor:
        """Scenes of held-out handwriting that answer the prompts."""
        return self._composed("real")

    def _composed(self, name: str) -> Tensor:
        generator = seeded_generator(self.seed, f"demo/{name}")
        return compose(self.attributes, load_handwriting("held_out"), generator)

    def pictured(self) -> tuple[list[int], list[str]]:
        """The first twelve images."""
        return list(range(12)), self.prompts[:12]


def training_prompts() -> list[dict[str, Any]]:
    """What students are trained on: 1,024 prompts, a fixed draw of what there is to ask for.

    Example:
        >>> training_prompts()[0]
        {'prompt': 'a blue 9 above a pink 7'}
    """
    generator = seeded_generator(0, "benchmark/scene_students/prompts")
    attributes = random_attributes(NUM_PROMPTS, generator)
    return [{"prompt": prompt} for prompt in scene_prompts(attributes, generator)]


def scenes_config(output_dir: str | Path, seed: int = 0, **overrides: Any) -> RDMConfig:
    """The settings of a student of the scenes.

    Args:
        output_dir: Where the run writes.
        seed: Seed of the run.
        overrides: Settings that replace these.

    Example:
        >>> scenes_config("out").num_inference_steps
        1
    """
    fixed: dict[str, Any] = {
        "output_dir": str(output_dir),
        "seed": seed,
        "use_cpu": True,
        "save_strategy": "no",
        "report_to": "none",
    }
    return RDMConfig(**{**COMMON_SETTINGS, **fixed, **overrides})


def scenes_trainer(args: RDMConfig, reward_funcs: Any = "rdm", **options: Any) -> RDMTrainer:
    """A trainer of a student of the scenes; ``options`` are other arguments of :class:`RDMTrainer`."""
    lora = LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK)
    return RDMTrainer(str(TEACHER_FOLDER), reward_funcs, args, training_prompts(), peft_config=lora, **options)
