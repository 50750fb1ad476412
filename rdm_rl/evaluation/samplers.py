"""Samplers of a small teacher side by side: each answers the same prompts from the same noise, and all are judged.

An embedded problem says what is asked and who judges: :class:`Evaluation` is subclassed for the digits and the scenes.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from math import nan
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, LCMScheduler, StableDiffusionPipeline
from torch import Tensor
from tqdm import tqdm

from rdm_rl.evaluation.sampler_metrics import Kind, SamplerMetrics
from rdm_rl.randomness import seeded_generator

TEACHER_STEPS = 50
# A sampler's first word says what it is to the report.
_KINDS: dict[str, Kind] = {"teacher": "teacher", "warm": "baseline"}

Sample = Callable[[list[str], torch.Generator], Tensor]


@dataclass(frozen=True, kw_only=True)
class Draw:
    """Images that one sampler drew for the evaluation's prompts.

    Args:
        images: Images, shape (N, 3, H, W), in [0, 1].
        steps: Steps for each image.
        guidance_scale: The scale that they were drawn with; any but 1 takes two network calls in a step.
        seconds_per_image: Wall-clock time of one on one thread, from the quickest of up to five batches of 20, as many
            as are begun within a second; NaN before it was measured.
    """

    images: Tensor
    steps: int
    guidance_scale: float = 1.0
    seconds_per_image: float = nan

    @property
    def network_evaluations(self) -> int:
        """Network calls for each image."""
        return self.steps if self.guidance_scale == 1.0 else 2 * self.steps


class Evaluation(ABC):
    """One repetition: the prompts, the noise that every sampler gets, and what their images are compared with.

    A subclass sets the class attributes and ``prompts``, and says how one sampler's images are judged.

    Args:
        seed: Which repetition. The judged images and the teacher's reference images have seeds that never meet.
    """

    teacher_folder: ClassVar[Path]
    guidance_scale: ClassVar[float]
    num_images: ClassVar[int]
    teacher_steps: ClassVar[int] = TEACHER_STEPS
    prompts: list[str]

    def __init__(self, seed: int) -> None:
        """Choose the seeds."""
        self.seed = seed
        generator = seeded_generator(seed, "demo/evaluation")
        self.judged_seed, self.reference_seed = torch.randint(2**31, (2,), generator=generator).tolist()

    @abstractmethod
    def judge_images(self, images: Tensor, **row: Any) -> SamplerMetrics:
        """The measurements of one sampler's images; ``row`` holds what is known of the sampler."""

    @abstractmethod
    def real_images(self) -> Tensor:
        """Real images that answer the prompts: what no sampler is expected to beat."""

    @abstractmethod
    def pictured(self) -> tuple[list[int], list[str]]:
        """Which images a report shows, and the caption of each."""

    @classmethod
    def load_teacher(cls) -> StableDiffusionPipeline:
        """The teacher as the plain pipeline it is, without progress bars."""
        pipeline: StableDiffusionPipeline = StableDiffusionPipeline.from_pretrained(cls.teacher_folder)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    @cached_property
    def reference(self) -> Tensor:
        """The teacher's images that all others are compared with, drawn when they are first asked for."""
        return self.draw(self.load_teacher(), self.teacher_steps, self.reference_seed, self.guidance_scale).images

    def draw(
        self, pipeline: StableDiffusionPipeline, steps: int, seed: int | None = None, guidance_scale: float = 1.0
    ) -> Draw:
        """Images of a pipeline, from the noise of the judged images unless a seed is given."""
        drawn = self.collect(pipeline_sampler(pipeline, steps, guidance_scale), steps, seed)
        return replace(drawn, guidance_scale=guidance_scale)

    def collect(self, sample: Sample, steps: int, seed: int | None = None) -> Draw:
        """Images of any sampler, in batches of 250 from one generator, so that all samplers get the same noise.

        Args:
            sample: Makes images of some prompts, shape (M, 3, H, W), in [0, 1].
            steps: Steps for each image.
            seed: Seed of the noise; None for that of the judged images.
        """
        generator = torch.Generator().manual_seed(self.judged_seed if seed is None else seed)
        return Draw(images=sample_in_batches(sample, self.prompts, generator, 250), steps=steps)

    def draw_teacher(self, step_counts: Sequence[int]) -> dict[str, Draw]:
        """The teacher's images with all of its steps, and with few under each stock scheduler, by name."""
        teacher, steps = self.load_teacher(), self.teacher_steps
        plan = {f"teacher, {steps_text(steps)}": (teacher.scheduler, steps)} | few_step_teachers(teacher, step_counts)
        draws = {}
        for name, (scheduler, steps) in tqdm(plan.items(), desc="images of the teacher"):
            teacher.scheduler = scheduler
            draws[name] = self.draw(teacher, steps, guidance_scale=self.guidance_scale)
        return draws

    def timed(self, draw: Draw, pipeline: StableDiffusionPipeline) -> Draw:
        """A draw with the time that its pipeline takes, as little as may be of what else the machine does."""
        sample = pipeline_sampler(pipeline, draw.steps, draw.guidance_scale)
        times: list[float] = []
        with _one_thread():
            while len(times) < 5 and sum(times) < 1:
                start = time.perf_counter()
                sample(self.prompts[:20], torch.Generator().manual_seed(0))
                times.append(time.perf_counter() - start)
        return replace(draw, seconds_per_image=min(times) / 20)

    def timed_teacher(self, draws: Mapping[str, Draw]) -> dict[str, Draw]:
        """The draws of :meth:`draw_teacher` with the time that each sampler takes."""
        teacher = self.load_teacher()
        few = few_step_teachers(teacher, sorted({draw.steps for draw in draws.values()}))
        stock, timed = teacher.scheduler, {}
        for name, draw in draws.items():
            teacher.scheduler = few.get(name, (stock, None))[0]
            timed[name] = self.timed(draw, teacher)
        return timed

    def judge(self, draws: Mapping[str, Draw]) -> list[SamplerMetrics]:
        """The measurements of every sampler, after those of real images."""
        rows = [self.judge_images(self.real_images(), name="real images", kind="data")]
        for name, draw in draws.items():
            row = self.judge_images(
                draw.images,
                name=name,
                kind=_KINDS.get(name.replace(",", "").split()[0], "student"),
                num_inference_steps=draw.steps,
                network_evaluations=draw.network_evaluations,
                seconds_per_image=draw.seconds_per_image,
            )
            rows.append(row)
        return rows

    def picture(self, draws: Mapping[str, Draw]) -> tuple[dict[str, Tensor], list[str]]:
        """What the report shows of each sampler, and the captions."""
        shown, captions = self.pictured()
        return {name: draw.images[shown] for name, draw in draws.items()}, captions


@contextmanager
def _one_thread() -> Iterator[None]:
    """Networks on one thread: a second gains small ones little, and two that wait for each other lose much."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def sample_in_batches(sample: Sample, prompts: list[str], generator: torch.Generator, batch_size: int) -> Tensor:
    """Images of any number of prompts, shape (N, 3, H, W), whose noise comes from one generator."""
    starts = range(0, len(prompts), batch_size)
    return torch.cat([sample(prompts[start : start + batch_size], generator) for start in starts])


def pipeline_sampler(pipeline: StableDiffusionPipeline, steps: int, guidance_scale: float) -> Sample:
    """Makes images of some prompts with a pipeline, shape (M, 3, H, W), in [0, 1]."""
    call: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": guidance_scale, "output_type": "pt"}
    return lambda prompts, noise: pipeline(prompts, generator=noise, **call).images


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


def few_step_teachers(teacher: StableDiffusionPipeline, step_counts: Sequence[int]) -> dict[str, tuple[Any, int]]:
    """The stock schedulers with few steps: name, scheduler and number of steps."""
    return {
        f"teacher, {steps_text(steps)}, {name}": (scheduler, steps)
        for name, scheduler in stock_schedulers(teacher).items()
        for steps in step_counts
        if steps > 1 or name == "DDIM"  # In a single step from pure noise all schedulers do the same.
    }
