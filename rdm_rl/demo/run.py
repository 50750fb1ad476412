"""``rdm-rl demo``: the embedded 50-step teacher becomes 1-step students, and a report says what each part brings."""

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm
from transformers.trainer_callback import ProgressCallback

from rdm_rl.demo.report import Report, write_report
from rdm_rl.demo.side_by_side import side_by_side
from rdm_rl.digits.students import DigitsEvaluation
from rdm_rl.evaluation.sampler_metrics import SamplerMetrics, format_rows
from rdm_rl.evaluation.samplers import Draw, Evaluation
from rdm_rl.scenes.students import COMMON_SETTINGS, LORA_RANK, ScenesEvaluation, scenes_config, scenes_trainer
from rdm_rl.student import base_of, load_student
from rdm_rl.trainers.callbacks import QuietProgressCallback, StopAtOnce
from rdm_rl.trainers.methods import method_settings
from rdm_rl.trainers.rdm_trainer import RDMTrainer

EVALUATIONS: dict[str, type[Evaluation]] = {"digits": DigitsEvaluation, "scenes": ScenesEvaluation}
WARM_START = "warm start"
FEW_STEPS = (1, 4)


@dataclass(frozen=True, kw_only=True)
class Student:
    """A student of the demo.

    Args:
        method: What it is trained with, see :data:`rdm_rl.trainers.methods.METHODS`.
        rewards: Its rewards.
        settings: What differs from the settings of the scenes' students beside the method's.
    """

    method: str
    rewards: tuple[str, ...] = ("rdm",)
    settings: Mapping[str, Any]


# All continue the student that the warm start made.
STUDENTS = {
    "DMD": Student(method="dmd", settings={"dm_scale_floor": 0.1}),
    "GNDM": Student(method="gndm", settings={}),
    "GNDMR": Student(
        method="gndmr",
        rewards=("rdm", "scene_logprob"),
        # Chosen on network A and a development seed, as the smallest that shows.
        settings={"reward_weights": [1.0, 3.0], "reward_start_step": 8},
    ),
}


def warm_start(folder: Path, seed: int, overrides: Mapping[str, Any]) -> Path:
    """Write the student that all others begin with, the teacher's 1-step regression on its own solutions.

    Returns:
        Its checkpoint, which has the fake score, too, after its warm-up.
    """
    args = scenes_config(folder / "run-warm-start", seed, **overrides)
    trainer = scenes_trainer(args, callbacks=[StopAtOnce()])
    _train(trainer, folder / _folder(WARM_START))
    return trainer.save_checkpoint()


def train_student(
    folder: Path, name: str, start: Path, seed: int, overrides: Mapping[str, Any]
) -> list[dict[str, float]]:
    """Train one student on from the warm start's checkpoint and save it; its log."""
    student = STUDENTS[name]
    settings = {**method_settings(student.method), **student.settings, **overrides, "allow_config_change": True}
    args = scenes_config(folder / f"run-{name.lower()}", seed, **settings)
    return _train(scenes_trainer(args, list(student.rewards)), folder / _folder(name), start)


def _train(trainer: RDMTrainer, folder: Path, start: Path | None = None) -> list[dict[str, float]]:
    """Train, from a checkpoint if there is one, with a quiet progress bar, save the student and return the log."""
    if not trainer.args.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(QuietProgressCallback)
    trainer.train(resume_from_checkpoint=start)
    trainer.save_model(folder)
    history: list[dict[str, float]] = trainer.state.log_history
    return history


def _folder(name: str) -> str:
    return f"student-{name.lower().replace(' ', '-')}"


def _teacher_images(evaluation: ScenesEvaluation) -> tuple[Tensor, dict[str, Draw]]:
    """The reference images, and what the teacher draws with many steps and few."""
    return evaluation.reference, evaluation.draw_teacher(FEW_STEPS)


def run_demo(output_dir: str | Path, *, seed: int = 0, **overrides: Any) -> Path:
    """Distil the embedded teacher, judge the students as plain diffusers loads them, and write ``report.html``.

    While the teacher draws the images that all are compared with, the warm start makes a first student; the others go
    on from it side by side, each in a process of its own: a script that calls this needs the line
    ``if __name__ == "__main__":``.

    Args:
        output_dir: Where everything goes; files of an earlier demo are overwritten.
        seed: Seed of training and of the judged images.
        overrides: Settings that replace the demo's, for all students.
    """
    start, folder = time.perf_counter(), Path(output_dir)
    evaluation = ScenesEvaluation(seed)
    overrides = {"disable_tqdm": False, **overrides}  # Left open, it follows transformers' log level.
    with side_by_side(len(STUDENTS)) as run:
        print(
            f"1 of 2: a warm start, and beside it the teacher draws with {evaluation.teacher_steps} steps", flush=True
        )
        made = run({WARM_START: (warm_start, (folder, seed, overrides)), "teacher": (_teacher_images, (evaluation,))})
        print(f"2 of 2: from there, students with {', '.join(STUDENTS)}", flush=True)
        arguments = {name: (folder, name, made[WARM_START], seed, overrides) for name in STUDENTS}
        # The last has the most to do, and the third process is yet to start.
        histories = run({name: (train_student, arguments[name]) for name in reversed(STUDENTS)})
    evaluation.reference, draws = made["teacher"]
    draws = evaluation.timed_teacher(draws)
    for name in (WARM_START, *STUDENTS):
        pipeline = load_student(folder / _folder(name), evaluation.teacher_folder).pipeline
        draws[f"{name}, 1 step"] = evaluation.timed(evaluation.draw(pipeline, 1), pipeline)
    rows = evaluation.judge(draws)
    pictures, captions = evaluation.picture(draws)
    report = Report(
        rows=rows,
        pictures=pictures,
        picture_labels=captions,
        histories={name: histories[name] for name in STUDENTS},
        settings={
            "all": {**COMMON_SETTINGS, "LoRA rank": LORA_RANK, "weights": "averaged over training (EMA)", **overrides},
            **{name: {"rewards": student.rewards, **student.settings} for name, student in STUDENTS.items()},
        },
        seeds={"training": seed, "judged images": evaluation.judged_seed, "reference": evaluation.reference_seed},
        command=f"rdm-rl demo --output_dir {folder.name} --seed {seed}",
        seconds=time.perf_counter() - start,
    )
    file = write_report(folder, report)
    print(f"\n{format_rows(rows)}\n\nThe students are the averaged (EMA) policies.")
    print(f"{report.seconds:.0f} s on {os.cpu_count()} cores. Open {file}")
    return file


def evaluate_students(folders: Sequence[Path], seeds: Sequence[int], output_dir: Path | None = None) -> None:
    """Judge saved students of one embedded teacher beside it, print the table, and write a report if asked.

    There is a repetition for each seed.

    Raises:
        ValueError: If they are not students of one embedded teacher.
    """
    bases = {str(folder): base_of(folder) for folder in folders}
    if len({*bases.values()}) > 1 or not EVALUATIONS.keys() >= {*bases.values()}:
        raise ValueError(
            f"The demo judges students of one embedded teacher ({' or '.join(EVALUATIONS)}), but these are of "
            f"{', '.join(f'{folder}: {base}' for folder, base in bases.items())}. For any other model there is "
            "`rdm-rl evaluate`."
        )
    evaluation_of = EVALUATIONS[str(bases[str(folders[0])])]
    students = {str(folder): load_student(folder, evaluation_of.teacher_folder) for folder in folders}
    rows: list[SamplerMetrics] = []
    for seed in tqdm(seeds, desc="repetitions"):
        evaluation = evaluation_of(seed)
        draws = evaluation.timed_teacher(evaluation.draw_teacher([]))
        for name, student in students.items():
            scale = student.call["guidance_scale"]
            drawn = evaluation.draw(student.pipeline, student.num_inference_steps, guidance_scale=scale)
            draws[f"student {name}"] = evaluation.timed(drawn, student.pipeline)
        rows += evaluation.judge(draws)
        pictures, captions = evaluation.picture(draws)
    order = [*dict.fromkeys(row.name for row in rows)]
    rows.sort(key=lambda row: order.index(row.name))
    if output_dir is not None:
        report = Report(
            rows=rows,
            pictures=pictures,
            picture_labels=captions,
            seeds={"repetitions": list(seeds)},
            title=f"Students of the embedded {bases[str(folders[0])]}",
            summary="Every sampler answered the same prompts from the same noise, and recognisers that took no part in "
            "training compared the images with real ones and with the teacher's.",
        )
        write_report(output_dir, report)
    print(format_rows(rows))
