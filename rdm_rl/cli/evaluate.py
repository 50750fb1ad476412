"""``rdm-rl evaluate`` and ``rdm-rl compare``: students, models and folders of images side by side, and a report."""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from rdm_rl.cli.embedded import EMBEDDED, embedded_prompts, named_model, spare_threads
from rdm_rl.cli.main import base_model
from rdm_rl.cli.train import make_rewards
from rdm_rl.evaluation.comparison import compare
from rdm_rl.evaluation.curves import History
from rdm_rl.evaluation.features import find_features
from rdm_rl.evaluation.images import ImageFolder, Model, open_folder
from rdm_rl.evaluation.report import format_results, write_report
from rdm_rl.evaluation.results import read_results
from rdm_rl.evaluation.run import Settings, evaluate
from rdm_rl.families.adapters import DIFFUSERS_LORA
from rdm_rl.families.loading import load_family
from rdm_rl.files import read_json
from rdm_rl.rewards.registry import load_rewards
from rdm_rl.student import (
    SavedStudent,
    base_of,
    call_of,
    load_student,
    model_config_of,
    rewards_of,
    set_decoder_precision,
    training_facts,
)
from rdm_rl.trainers.prompt_files import read_prompts


def evaluate_command(options: argparse.Namespace, command: str) -> None:
    """Evaluate what the options name, print the tables and write the report.

    Args:
        options: The options of ``rdm-rl evaluate``.
        command: The whole command, for the report.

    Raises:
        ValueError: If something cannot be evaluated.
        OSError: If something cannot be loaded.
    """
    sources = dict(_named(words, options.students) for words in options.students)
    if len(sources) < len(options.students):
        raise ValueError("Two students have one name: call them name=path.")
    models = [_source(name, path, options) for name, path in sources.items()]
    students = {name: path for name, path in sources.items() if _is_student(path)}
    adapters = [path for path in students.values() if base_of(path)]
    if options.teacher is not None:
        teacher = named_model(options.teacher)
    else:
        teacher = base_model(adapters[0], options.model) if adapters else "none"
    spare_threads(teacher)
    if teacher != "none":
        first = next(iter(students.values()), None)
        models.insert(0, Model(name="teacher", load=partial(_load_teacher, teacher, first, options)))
    elif options.teacher is None and options.reference is None:
        raise ValueError(
            "None of the students says which model it was distilled from: give its --teacher, or another --reference, "
            "or --teacher none to compare with nothing."
        )
    rows = [{"prompt": prompt} for prompt in options.prompt or ()]
    if options.prompts:
        named = options.prompts in EMBEDDED
        rows += embedded_prompts(options.prompts) if named else [dict(row) for row in read_prompts(options.prompts)]
    if not rows:
        raise ValueError("There is nothing to draw: give --prompts FILE, or --prompt TEXT.")
    rewards = load_rewards(make_rewards(options.rewards, options.reward_options)) if options.rewards else {}
    results, pictures = evaluate(
        models,
        rows[: options.num_prompts],
        Settings(
            cache_dir=options.cache_dir or options.output_dir / "images",
            device=options.device,
            batch_size=options.batch_size,
        ),
        reference=options.reference or ("teacher" if teacher != "none" else None),
        features=[find_features(source, options.device) for source in options.features],
        rewards=rewards,
        real_images=options.real_images,
        seeds=options.seeds,
        facts={"precision": options.dtype, "device": options.device, "teacher steps": options.teacher_steps},
    )
    logs = {name: log for name, path in students.items() if (log := _log(path))}
    file = write_report(options.output_dir, results, pictures, histories=logs, command=command)
    print(f"{format_results(results)}\n\n{file}")


def compare_command(options: argparse.Namespace, command: str) -> None:
    """Put evaluations side by side, print the tables, and write a report if asked.

    Args:
        options: The options of ``rdm-rl compare``.
        command: The whole command, for the report.

    Raises:
        ValueError: If they share nothing.
        FileNotFoundError: If a folder holds no results.
    """
    runs = {name: read_results(path) for name, path in (_named(words, options.runs) for words in options.runs)}
    results = compare(runs, options.baseline)
    print(format_results(results))
    if options.output_dir:
        print(f"\n{write_report(options.output_dir, results, command=command)}")


def _named(words: str, all_words: Sequence[str]) -> tuple[str, Path]:
    """A name and a path from ``name=path``; a path alone is called by as much of its end as no other has."""
    name, equals, path = words.partition("=")
    if equals:
        return name, Path(path)
    parts = Path(words).resolve().parts
    others = [Path(other.partition("=")[2] or other).resolve().parts for other in all_words if other != words]
    length = next((n for n in range(1, len(parts)) if all(other[-n:] != parts[-n:] for other in others)), len(parts))
    return "/".join(parts[-length:]), Path(words)


def _is_student(path: Path) -> bool:
    return (path / DIFFUSERS_LORA).is_file() or (path / "model_index.json").is_file()


def _source(name: str, path: Path, options: argparse.Namespace) -> Model | ImageFolder:
    """What stands at a path."""
    if not path.is_dir():
        raise FileNotFoundError(f"{str(path)!r} is no folder. Give a student that save_model wrote, or images.")
    if not _is_student(path):
        images = ImageFolder(name=name, folder=path)
        open_folder(images, 0)  # A folder without images is refused before anything is loaded.
        return images
    return Model(name=name, load=partial(_load_student, path, options), trained_on=rewards_of(path))


def _load_student(path: Path, options: argparse.Namespace) -> SavedStudent:
    base = base_model(path, options.model) if (path / DIFFUSERS_LORA).is_file() else ""
    config = options.model_config or model_config_of(path)
    return load_student(path, base, getattr(torch, options.dtype), config)


def _load_teacher(base: str, student: Path | None, options: argparse.Namespace) -> SavedStudent:
    """The model that students are compared with: guidance and size as in their training."""
    facts: dict[str, Any] = {} if student is None else training_facts(student)
    config = options.model_config or (None if student is None else model_config_of(student))
    dtype: torch.dtype = getattr(torch, options.dtype)
    family = load_family(base, dtype=dtype, model_config=config)
    set_decoder_precision(family.pipeline, dtype)
    family.pipeline.set_progress_bar_config(disable=True)
    guidance = options.teacher_guidance_scale
    if guidance is None:
        guidance = facts.get("teacher_guidance_scale", family.teacher_guidance_scale)
    call = {"num_inference_steps": options.teacher_steps, "guidance_scale": family.pipeline_guidance(guidance)}
    size = {} if student is None else call_of(student)
    call |= {side: size[side] for side in ("height", "width") if side in size}
    return SavedStudent(family.pipeline, call)


def _log(student: Path) -> History:
    """The log of a student's training, if its run's checkpoints are beside it."""
    states = sorted(student.glob("checkpoint-*/trainer_state.json"), key=lambda file: file.stat().st_mtime)
    log: History = read_json(states[-1])["log_history"] if states else []
    return log
