"""``rdm-rl demo``: the embedded 50-step teacher becomes a 4-step and a 1-step student, and a report says how well."""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import nan
from pathlib import Path
from statistics import median
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
from transformers.trainer_callback import ProgressCallback, TrainerCallback

from rdm_rl.demo.data import TEACHER_FOLDER, digit_prompts, load_digits, mixed_prompts
from rdm_rl.demo.judge import judge
from rdm_rl.demo.metrics import Kind, SamplerMetrics, format_rows
from rdm_rl.demo.report import Report, write_report
from rdm_rl.demo.side_by_side import side_by_side
from rdm_rl.randomness import seeded_generator
from rdm_rl.student import SavedStudent, load_student
from rdm_rl.trainers.callbacks import QuietProgressCallback
from rdm_rl.trainers.rdm_config import RDMConfig
from rdm_rl.trainers.rdm_trainer import RDMTrainer

TEACHER_STEPS = 50
NUM_IMAGES = 500

# Chosen on network A, training images and development seeds, for one scale of a prompt and five updates of the fake
# score: after this warm start no other scale can be told from it. What both students share:
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
# A sampler's first word says what it is to the report.
_KINDS: dict[str, Kind] = {"teacher": "teacher", "warm": "baseline", "student": "student"}


@dataclass(frozen=True, kw_only=True)
class Draw:
    """Images that one sampler drew for the evaluation's prompts.

    Args:
        images: Images, shape (N, 3, 32, 32), in [0, 1].
        steps: Steps for each image.
        seconds_per_image: Wall-clock time of one, the median of three batches of 20; NaN before it was measured.
    """

    images: Tensor
    steps: int
    seconds_per_image: float = nan


class Evaluation:
    """One repetition: the prompts, the noise that every sampler gets, and what their images are compared with.

    Args:
        seed: Which repetition. The judged images and the teacher's reference images have seeds that never meet.
    """

    def __init__(self, seed: int) -> None:
        """Choose prompts and seeds."""
        self.seed, self.teacher_steps = seed, TEACHER_STEPS
        generator = seeded_generator(seed, "demo/evaluation")
        self.judged_seed, self.reference_seed = torch.randint(2**31, (2,), generator=generator).tolist()
        self.prompts, self.wanted = mixed_prompts(NUM_IMAGES)

    @cached_property
    def reference(self) -> Tensor:
        """The teacher's images that all others are compared with, drawn when they are first asked for."""
        return self.draw(load_teacher(), self.teacher_steps, self.reference_seed).images

    def draw(
        self, pipeline: StableDiffusionPipeline, steps: int, seed: int | None = None, guidance_scale: float = 1.0
    ) -> Draw:
        """Images of a pipeline, from the noise of the judged images unless a seed is given."""
        return self.collect(_sampler(pipeline, steps, guidance_scale), steps, seed)

    def collect(
        self, sample: Callable[[list[str], torch.Generator], Tensor], steps: int, seed: int | None = None
    ) -> Draw:
        """Images of any sampler, in batches of 250 from one generator, so that all samplers get the same noise.

        Args:
            sample: Makes images of some prompts, shape (M, 3, 32, 32), in [0, 1].
            steps: Steps for each image.
            seed: Seed of the noise; None for that of the judged images.
        """
        generator = torch.Generator().manual_seed(self.judged_seed if seed is None else seed)
        batches = [self.prompts[first : first + 250] for first in range(0, len(self.prompts), 250)]
        return Draw(images=torch.cat([sample(batch, generator) for batch in batches]), steps=steps)

    def timed(self, draw: Draw, pipeline: StableDiffusionPipeline, guidance_scale: float = 1.0) -> Draw:
        """A draw with the time that its pipeline takes, which should be asked for while nothing else runs."""
        sample, times = _sampler(pipeline, draw.steps, guidance_scale), []
        for _ in range(3):
            start = time.perf_counter()
            sample(self.prompts[:20], torch.Generator().manual_seed(0))
            times.append((time.perf_counter() - start) / 20)
        return replace(draw, seconds_per_image=median(times))

    def judge(self, draws: Mapping[str, Draw]) -> list[SamplerMetrics]:
        """The measurements of every sampler on network B and held-out images, after those of real training images."""
        common: dict[str, Any] = {"data_images": load_digits("held_out").images, "teacher_images": self.reference}
        train = load_digits("train")
        chosen = torch.randperm(len(train.labels), generator=seeded_generator(self.seed, "demo/real"))[:NUM_IMAGES]
        rows = [judge(train.images[chosen], train.labels[chosen], name="real training images", kind="data", **common)]
        for name, draw in draws.items():
            row = judge(
                draw.images,
                self.wanted,
                name=name,
                kind=_KINDS[name.replace(",", "").split()[0]],
                num_inference_steps=draw.steps,
                network_evaluations=draw.steps,
                seconds_per_image=draw.seconds_per_image,
                **common,
            )
            rows.append(row)
        return rows

    def picture(self, draws: Mapping[str, Draw]) -> tuple[dict[str, Tensor], list[str]]:
        """What the report shows of each sampler: the first image of each named digit, and six of the empty prompt."""
        shown = [2 * digit for digit in range(10)] + [2 * index + 1 for index in range(6)]
        captions = [str(digit) for digit in range(10)] + ["any"] * 6
        return {name: draw.images[shown] for name, draw in draws.items()}, captions


def _sampler(
    pipeline: StableDiffusionPipeline, steps: int, guidance_scale: float
) -> Callable[[list[str], torch.Generator], Tensor]:
    """Makes images of some prompts with a pipeline, shape (M, 3, 32, 32), in [0, 1]."""
    call: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": guidance_scale, "output_type": "pt"}
    return lambda prompts, noise: pipeline(prompts, generator=noise, **call).images


@dataclass
class _WarmStartImages(TrainerCallback):
    """Draws images with the policy before its first update: what the warm start alone achieves."""

    evaluation: Evaluation
    trainer: RDMTrainer | None = None
    draw: Draw | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Draw the images."""
        if self.trainer is not None:
            generate = self.trainer.generate
            self.draw = self.evaluation.collect(
                lambda prompts, noise: generate(prompts, generator=noise), len(self.trainer.times)
            )


def training_prompts() -> list[dict[str, Any]]:
    """The 240 prompts that students are trained on: as often one that names a digit as the empty one.

    Example:
        >>> training_prompts()[0]
        {'prompt': 'a handwritten zero'}
    """
    named = [prompt for digit in range(10) for prompt in digit_prompts(digit)]
    return [{"prompt": prompt} for prompt in named + [""] * len(named)]


def demo_config(num_inference_steps: int, output_dir: str | Path, seed: int = 0, **overrides: Any) -> RDMConfig:
    """The demo's settings for a student.

    Args:
        num_inference_steps: Steps K of the student; more than 4 and 3 take the settings of the next smaller number.
        output_dir: Where the run writes.
        seed: Seed of the run.
        overrides: Settings that replace the demo's.

    Example:
        >>> demo_config(1, "out").num_inference_steps
        1
    """
    chosen = STUDENT_SETTINGS[max(steps for steps in STUDENT_SETTINGS if steps <= num_inference_steps)]
    fixed: dict[str, Any] = {
        "output_dir": str(output_dir),
        "seed": seed,
        "use_cpu": True,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": False,  # Left open, it would follow transformers' log level, which the command line lowers.
    }
    return RDMConfig(**{"num_inference_steps": num_inference_steps, **COMMON_SETTINGS, **chosen, **fixed, **overrides})


def demo_trainer(args: RDMConfig, callbacks: list[TrainerCallback] | None = None) -> RDMTrainer:
    """A trainer of the embedded teacher's student."""
    lora = LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK)
    trainer = RDMTrainer(
        str(TEACHER_FOLDER), "rdm", args, training_prompts(), peft_config=lora, callbacks=callbacks or []
    )
    if not args.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(QuietProgressCallback)
    return trainer


def load_teacher() -> StableDiffusionPipeline:
    """The embedded teacher as the plain pipeline it is, without progress bars."""
    pipeline: StableDiffusionPipeline = StableDiffusionPipeline.from_pretrained(TEACHER_FOLDER)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def stock_schedulers(pipeline: StableDiffusionPipeline) -> dict[str, Any]:
    """The few-step schedulers that diffusers offers without any training, set up as their users do."""
    config = pipeline.scheduler.config
    return {
        "DDIM": DDIMScheduler.from_config(config, timestep_spacing="trailing"),
        "DPM++": DPMSolverMultistepScheduler.from_config(config, timestep_spacing="trailing"),
        "LCM": LCMScheduler.from_config(config),
    }


def steps_text(count: int) -> str:
    """The number of steps in words of a table.

    Example:
        >>> steps_text(1), steps_text(4)
        ('1 step', '4 steps')
    """
    return f"{count} step{'s' if count > 1 else ''}"


def few_step_teachers(teacher: StableDiffusionPipeline, students: Sequence[int]) -> dict[str, tuple[Any, int]]:
    """The stock schedulers with the students' steps: name, scheduler and number of steps."""
    return {
        f"teacher, {steps_text(steps)}, {name}": (scheduler, steps)
        for name, scheduler in stock_schedulers(teacher).items()
        for steps in students
        if steps > 1 or name == "DDIM"  # In a single step from pure noise all schedulers do the same.
    }


def draw_teacher(evaluation: Evaluation, students: Sequence[int]) -> dict[str, Draw]:
    """The teacher's images with all of its steps, and with the students' steps under each stock scheduler, by name."""
    teacher, steps = load_teacher(), evaluation.teacher_steps
    plan = {f"teacher, {steps_text(steps)}": (teacher.scheduler, steps)} | few_step_teachers(teacher, students)
    draws = {}
    for name, (scheduler, steps) in tqdm(plan.items(), desc="images of the teacher"):
        teacher.scheduler = scheduler
        draws[name] = evaluation.draw(teacher, steps)
    return draws


def _teacher_images(evaluation: Evaluation, students: Sequence[int]) -> tuple[Tensor, dict[str, Draw]]:
    """The reference images, and those of :func:`draw_teacher`."""
    return evaluation.reference, draw_teacher(evaluation, students)


def train_student(
    evaluation: Evaluation, folder: Path, steps: int, overrides: Mapping[str, Any]
) -> tuple[Draw | None, list[dict[str, float]]]:
    """Distil one student into ``student-{steps}step``.

    Returns:
        What the warm start alone draws, and the log.
    """
    args = demo_config(steps, folder / f"run-{steps}step", evaluation.seed, **overrides)
    before = _WarmStartImages(evaluation=evaluation)
    before.trainer = trainer = demo_trainer(args, [before])
    trainer.train()
    trainer.save_model(folder / f"student-{steps}step")
    return before.draw, trainer.state.log_history


def run_demo(output_dir: str | Path, *, seed: int = 0, students: Sequence[int] = (4, 1), **overrides: Any) -> Path:
    """Distil the embedded teacher, judge the students as plain diffusers loads them, and write ``report.html``.

    The students are trained side by side while the teacher draws, each in a process of its own: a script that calls
    this needs the line ``if __name__ == "__main__":``.

    Args:
        output_dir: Where everything goes; files of an earlier demo are overwritten.
        seed: Seed of training and of the judged images.
        students: Steps of the students.
        overrides: Settings that replace the demo's, for all students.
    """
    start, folder = time.perf_counter(), Path(output_dir)
    counts = " and ".join(map(steps_text, students))
    print(f"Students of {counts}: warm start, then distribution matching; beside them the teacher draws", flush=True)
    evaluation = Evaluation(seed)
    # The students share the teacher's solutions from pure noise.
    changed = {"warm_start_cache_dir": str(folder / "teacher-solutions"), **overrides}
    made = side_by_side(
        {steps_text(steps): (train_student, (evaluation, folder, steps, changed)) for steps in students}
        | {"teacher": (_teacher_images, (evaluation, students))}
    )
    evaluation.reference, draws = made["teacher"]
    draws = _timed_teacher(evaluation, students, draws)
    histories, settings = {}, {}
    for steps in students:
        name, (before, histories[f"K={steps}"]) = steps_text(steps), made[steps_text(steps)]
        pipeline = load_student(folder / f"student-{steps}step", TEACHER_FOLDER).pipeline
        drawn = evaluation.timed(evaluation.draw(pipeline, steps), pipeline)
        if before is not None:  # As fast as the student that it became.
            draws[f"warm start, {name}"] = replace(before, seconds_per_image=drawn.seconds_per_image)
        draws[f"student, {name}"] = drawn
        args = demo_config(steps, folder / f"run-{steps}step", seed, **changed)
        names = {**COMMON_SETTINGS, **STUDENT_SETTINGS[4], **overrides}
        settings[f"student, {name}"] = {name: getattr(args, name) for name in names}

    rows = evaluation.judge(draws)
    pictures, captions = evaluation.picture(draws)
    report = Report(
        rows=rows,
        pictures=pictures,
        picture_labels=captions,
        histories=histories,
        settings=settings | {"LoRA rank": LORA_RANK, "weights": "averaged over training (EMA)"},
        seeds={"training": seed, "judged images": evaluation.judged_seed, "reference": evaluation.reference_seed},
        command=f"rdm-rl demo --output_dir {folder.name} --seed {seed}",
        seconds=time.perf_counter() - start,
    )
    file = write_report(folder, report)
    print(f"\n{format_rows(rows)}\n\nThe students are the averaged (EMA) policies.")
    print(f"{report.seconds:.0f} s on {os.cpu_count()} cores. Open {file}")
    return file


def _timed_teacher(evaluation: Evaluation, students: Sequence[int], draws: Mapping[str, Draw]) -> dict[str, Draw]:
    """The teacher's draws with the time that each sampler takes."""
    teacher = load_teacher()
    schedulers = {name: scheduler for name, (scheduler, _) in few_step_teachers(teacher, students).items()}
    stock, timed = teacher.scheduler, {}
    for name, draw in draws.items():
        teacher.scheduler = schedulers.get(name, stock)
        timed[name] = evaluation.timed(draw, teacher)
    return timed


def evaluate_students(folders: Sequence[Path], seeds: Sequence[int], output_dir: Path | None = None) -> None:
    """Judge saved students of the embedded teacher beside it, print the table, and write a report if asked.

    There is a repetition for each seed.
    """
    teacher_call = {"num_inference_steps": TEACHER_STEPS, "guidance_scale": 1.0}
    pipelines = {f"teacher, {steps_text(TEACHER_STEPS)}": SavedStudent(load_teacher(), teacher_call)}
    pipelines |= {f"student {folder}": load_student(folder, TEACHER_FOLDER) for folder in folders}
    rows: list[SamplerMetrics] = []
    for seed in tqdm(seeds, desc="repetitions"):
        evaluation = Evaluation(seed)
        draws = {}
        for name, student in pipelines.items():
            guidance_scale = student.call["guidance_scale"]
            draw = evaluation.draw(student.pipeline, student.num_inference_steps, guidance_scale=guidance_scale)
            draws[name] = evaluation.timed(draw, student.pipeline, guidance_scale)
        rows += evaluation.judge(draws)
        pictures, captions = evaluation.picture(draws)
    order = [*dict.fromkeys(row.name for row in rows)]
    rows.sort(key=lambda row: order.index(row.name))
    if output_dir is not None:
        report = Report(rows=rows, pictures=pictures, picture_labels=captions, seeds={"repetitions": list(seeds)})
        write_report(output_dir, report)
    print(format_rows(rows))
