"""``rdm-rl demo``: the embedded 50-step teacher becomes a 4-step and a 1-step student, and a report says how well."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    LCMScheduler,
    StableDiffusionPipeline,
)
from peft import LoraConfig
from torch import Tensor
from tqdm import tqdm
from transformers.trainer_callback import TrainerCallback

from rdm_rl.demo.digits import TEACHER_FOLDER, balanced_prompts, digit_prompts, load_digits
from rdm_rl.evaluation.metrics import Kind, SamplerMetrics, judge
from rdm_rl.evaluation.pictures import first_of_each
from rdm_rl.evaluation.report import Report, write_report
from rdm_rl.evaluation.tables import format_table
from rdm_rl.randomness import seeded_generator
from rdm_rl.student import load_student
from rdm_rl.trainers.rdm_config import RDMConfig
from rdm_rl.trainers.rdm_trainer import RDMTrainer

TEACHER_STEPS = 50
NUM_IMAGES = 500

# Chosen on network A, development seeds and training images; benchmarks/ says how. What both students share:
COMMON_SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": 128,
    "num_generations": 8,
    "adam_beta1": 0.0,
    "teacher_guidance_scale": 1.0,
    "dm_scale_floor": 0.1,
    "fake_score_warmup_steps": 80,
    "warm_start_learning_rate": 2e-3,
    "logging_steps": 5,
}
# What depends on the number of steps:
STUDENT_SETTINGS: dict[int, dict[str, Any]] = {
    4: {"learning_rate": 5e-5, "fake_score_learning_rate": 4e-4, "max_steps": 50},
    1: {"learning_rate": 2e-4, "fake_score_learning_rate": 1e-3, "max_steps": 80},
}
LORA_RANK = 32
# A sampler's first word says what it is to the report.
_KINDS: dict[str, Kind] = {"teacher": "teacher", "warm": "baseline", "student": "student"}


@dataclass(frozen=True, kw_only=True)
class Draw:
    """Images that one sampler drew for the evaluation prompts.

    Args:
        images: Images, shape (N, 3, 32, 32), in [0, 1].
        seconds: Wall-clock time of drawing all of them.
        steps: Steps for each image.
    """

    images: Tensor
    seconds: float
    steps: int


@dataclass
class _WarmStartImages(TrainerCallback):
    """Draws images with the policy before its first update: what the warm start alone achieves."""

    prompts: list[str]
    seed: int
    trainer: RDMTrainer | None = None
    draw: Draw | None = field(default=None)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Draw the images."""
        if self.trainer is not None:
            start = time.perf_counter()
            images = self.trainer.generate(self.prompts, generator=torch.Generator().manual_seed(self.seed))
            self.draw = Draw(images=images, seconds=time.perf_counter() - start, steps=args.num_inference_steps)


def training_prompts() -> list[dict[str, Any]]:
    """Every phrasing of every digit, as rows with ``prompt`` and ``digit``.

    Returns:
        120 rows.

    Example:
        >>> training_prompts()[0]
        {'prompt': 'a handwritten zero', 'digit': 0}
    """
    return [{"prompt": prompt, "digit": digit} for digit in range(10) for prompt in digit_prompts(digit)]


def demo_config(num_inference_steps: int, output_dir: str | Path, seed: int = 0, **overrides: Any) -> RDMConfig:
    """The demo's settings for a student.

    Args:
        num_inference_steps: Steps K of the student; other numbers than 4 and 1 take the settings of the nearer one.
        output_dir: Where the run writes.
        seed: Seed of the run.
        overrides: Settings that replace the demo's.

    Returns:
        The settings.

    Example:
        >>> demo_config(1, "out").num_inference_steps
        1
    """
    own = STUDENT_SETTINGS[1 if num_inference_steps == 1 else 4]
    fixed = {"output_dir": str(output_dir), "seed": seed, "use_cpu": True, "save_strategy": "no", "report_to": "none"}
    return RDMConfig(**{"num_inference_steps": num_inference_steps, **COMMON_SETTINGS, **own, **fixed, **overrides})


def demo_trainer(args: RDMConfig, callbacks: list[TrainerCallback] | None = None) -> RDMTrainer:
    """A trainer of the embedded teacher's student.

    Args:
        args: The settings.
        callbacks: Callbacks.

    Returns:
        The trainer, ready to train.
    """
    lora = LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK)
    return RDMTrainer(str(TEACHER_FOLDER), "rdm", args, training_prompts(), peft_config=lora, callbacks=callbacks or [])


def load_teacher() -> StableDiffusionPipeline:
    """The embedded teacher as the plain pipeline it is, without progress bars."""
    pipeline: StableDiffusionPipeline = StableDiffusionPipeline.from_pretrained(TEACHER_FOLDER)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw_images(pipeline: StableDiffusionPipeline, prompts: list[str], steps: int, seed: int) -> Draw:
    """Images of a pipeline at guidance 1.0.

    Args:
        pipeline: The pipeline.
        prompts: The prompts.
        steps: Steps for each image.
        seed: Seed of the noise.

    Returns:
        The images, in batches of at most 250.
    """
    start, parts = time.perf_counter(), []
    generator = torch.Generator().manual_seed(seed)
    for first in range(0, len(prompts), 250):
        output = pipeline(
            prompts[first : first + 250],
            num_inference_steps=steps,
            guidance_scale=1.0,
            generator=generator,
            output_type="pt",
        )
        parts.append(output.images)
    return Draw(images=torch.cat(parts), seconds=time.perf_counter() - start, steps=steps)


def stock_schedulers(pipeline: StableDiffusionPipeline) -> dict[str, Any]:
    """The few-step schedulers that diffusers offers without any training, set up as their users do."""
    config = pipeline.scheduler.config
    return {
        "DDIM": DDIMScheduler.from_config(config, timestep_spacing="trailing"),
        "DPM++": DPMSolverMultistepScheduler.from_config(config, timestep_spacing="trailing"),
        "LCM": LCMScheduler.from_config(config),
    }


def run_demo(output_dir: str | Path, *, seed: int = 0, students: tuple[int, ...] = (4, 1), **overrides: Any) -> Path:
    """Distil the embedded teacher, judge the students as plain diffusers loads them, and write the report.

    Args:
        output_dir: Where everything goes; files of an earlier demo are overwritten.
        seed: Seed of training and of the judged images.
        students: Steps of the students.
        overrides: Settings that replace the demo's, for both students.

    Returns:
        The report, ``report.html``.
    """
    start, folder = time.perf_counter(), Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    judged, reference = evaluation_seeds(seed)
    prompts, labels = balanced_prompts(NUM_IMAGES)
    teacher = load_teacher()
    draws: dict[str, Draw] = {}
    bar = tqdm(total=2 + 3, desc="teacher: images")
    reference_images = draw_images(teacher, prompts, TEACHER_STEPS, reference).images
    bar.update()
    draws[f"teacher, {TEACHER_STEPS} steps"] = draw_images(teacher, prompts, TEACHER_STEPS, judged)
    bar.update()
    for name, scheduler in stock_schedulers(teacher).items():
        teacher.scheduler = scheduler
        draws[f"teacher, 4 steps, {name}"] = draw_images(teacher, prompts, 4, judged)
        bar.update()
    bar.close()

    histories, settings = {}, {}
    for steps in students:
        print(f"\nStudent with {steps} step{'s' * (steps > 1)}: warm start, then distribution matching", flush=True)
        # The solutions from pure noise serve every student.
        cache = {"warm_start_cache_dir": str(folder / "teacher-solutions")}
        args = demo_config(steps, folder / f"run-{steps}step", seed, **{**cache, **overrides})
        before = _WarmStartImages(prompts=prompts, seed=judged)
        before.trainer = trainer = demo_trainer(args, [before])
        trainer.train()
        trainer.save_model(folder / f"student-{steps}step")
        histories[f"K={steps}"] = trainer.state.log_history
        settings[f"student with {steps} steps"] = {
            name: getattr(args, name) for name in {**COMMON_SETTINGS, **STUDENT_SETTINGS[4], **overrides}
        } | {"lora_rank": LORA_RANK}
        if before.draw is not None:
            draws[f"warm start, {steps} step{'s' * (steps > 1)}"] = before.draw
        pipeline, saved_steps = load_student(folder / f"student-{steps}step", TEACHER_FOLDER)
        draws[f"student, {steps} step{'s' * (steps > 1)}"] = draw_images(pipeline, prompts, saved_steps, judged)

    rows = judge_all(draws, labels, reference_images, seed)
    report = write_report(
        folder,
        Report(
            rows=rows,
            pictures={name: first_of_each(draw.images, labels) for name, draw in draws.items()},
            histories=histories,
            settings=settings,
            seeds={"training": seed, "judged images": judged, "reference images of the teacher": reference},
            command=f"rdm-rl demo --output_dir {folder.name} --seed {seed}",
            seconds=time.perf_counter() - start,
        ),
    )
    print("\n" + format_table(rows))
    print(f"\nThe students are the averaged (EMA) policies. {time.perf_counter() - start:.0f} s. Open {report}")
    return report


def judge_all(draws: dict[str, Draw], labels: Tensor, reference: Tensor, seed: int) -> list[SamplerMetrics]:
    """The measurements of every sampler on network B and held-out images, after those of real training images.

    Args:
        draws: Images by the sampler's name.
        labels: The prompted digits, shape (N,), int64.
        reference: Other images of the teacher, shape (N, 3, 32, 32).
        seed: Which training images stand for real ones.

    Returns:
        A row for each.
    """
    data, train = load_digits("held_out").images, load_digits("train")
    chosen = torch.randperm(len(train.labels), generator=seeded_generator(seed, "demo/real"))[: len(labels)]
    real = judge(
        train.images[chosen],
        train.labels[chosen],
        name="real training images",
        kind="data",
        data_images=data,
        teacher_images=reference,
    )
    return [real] + [
        judge(
            draw.images,
            labels,
            name=name,
            kind=_KINDS[name.replace(",", "").split()[0]],
            data_images=data,
            teacher_images=reference,
            num_inference_steps=draw.steps,
            network_evaluations=draw.steps,
            seconds_per_image=draw.seconds / len(labels),
        )
        for name, draw in draws.items()
    ]


def evaluate_students(folders: Sequence[Path], seeds: Sequence[int], output_dir: Path | None = None) -> None:
    """Judge saved students of the embedded teacher beside it, print the table, and write a report if asked.

    Args:
        folders: What ``save_model`` wrote, for each student.
        seeds: One repetition for each seed.
        output_dir: Where a report goes, or None.
    """
    prompts, labels = balanced_prompts(NUM_IMAGES)
    pipelines = {f"teacher, {TEACHER_STEPS} steps": (load_teacher(), TEACHER_STEPS)}
    pipelines |= {f"student {folder}": load_student(folder, TEACHER_FOLDER) for folder in folders}
    rows: list[SamplerMetrics] = []
    draws: dict[str, Draw] = {}
    for seed in tqdm(seeds, desc="repetitions"):
        judged, reference = evaluation_seeds(seed)
        references = draw_images(load_teacher(), prompts, TEACHER_STEPS, reference).images
        draws = {name: draw_images(pipe, prompts, steps, judged) for name, (pipe, steps) in pipelines.items()}
        rows += judge_all(draws, labels, references, seed)
    rows.sort(key=lambda row: [*dict.fromkeys(one.name for one in rows)].index(row.name))
    if output_dir is not None:
        pictures = {name: first_of_each(draw.images, labels) for name, draw in draws.items()}
        write_report(output_dir, Report(rows=rows, pictures=pictures, seeds={"repetitions": seeds}))
    print(format_table(rows))


def evaluation_seeds(seed: int) -> tuple[int, int]:
    """The seeds of the judged images and of the teacher's reference images, which never meet."""
    generator = seeded_generator(seed, "demo/evaluation")
    judged, reference = torch.randint(2**31, (2,), generator=generator).tolist()
    return judged, reference
