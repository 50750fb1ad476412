"""Compare the scales of distribution matching: ``dm_normalization`` sample, group, group_rms and none.

    python benchmarks/normalization.py --output_dir benchmark-output            # every K, 5 seeds: hours on 2 cores
    python benchmarks/normalization.py --output_dir benchmark-output --table    # only write the table again

All arms of one (K, seed) start from one checkpoint, taken after the warm start and the fake score's warm-up, and make
the same number of updates with the same prompts and noise. Each is judged once, on network B and held-out images, with
noise that no setting was chosen on. Every result is one JSON file, so an interrupted benchmark goes on where it was.
"""

import argparse
import json
import statistics
from pathlib import Path

from transformers.trainer_callback import TrainerCallback

from rdm_rl.demo.run import Evaluation, demo_config, demo_trainer, draw_teacher

NORMALIZATIONS = ("sample", "group", "group_rms", "none")
FIGURES = ("distance_to_data", "distance_to_teacher", "precision", "recall", "accuracy")
SEEDS = [9000, 9001, 9002, 9003, 9004]  # No setting was chosen on these.


class StopAtOnce(TrainerCallback):
    """Ends a run before its first update, so that its checkpoint is where every arm begins."""

    def on_train_begin(self, args, state, control, **kwargs):
        control.should_training_stop = True


def judge_once(file, trainer, evaluation):
    drawn = evaluation.collect(lambda prompts, noise: trainer.generate(prompts, generator=noise), len(trainer.times))
    _, row = evaluation.judge({"student": drawn})
    write(file, row)


def judge_teacher(step_counts, seed, folder, evaluation):
    """The teacher with 50 steps, and with as many steps as the students under each stock scheduler."""
    for name, drawn in draw_teacher(evaluation, step_counts).items():
        _, row = evaluation.judge({name: drawn})
        write(folder / f"{name}-{seed}.json", row)


def write(file, row):
    file.write_text(json.dumps({name: getattr(row, name) for name in FIGURES}))


def run_one(steps, seed, updates, folder, evaluation):
    """The shared start and the four arms of one number of steps and one seed."""
    arms = [folder / f"K{steps}-{name}-{seed}.json" for name in NORMALIZATIONS]
    if all(file.exists() for file in arms):
        return
    work = folder / "work" / f"K{steps}-{seed}"
    settings = {"disable_tqdm": True, "warm_start_cache_dir": str(folder / "work" / f"solutions-{seed}")}
    start = demo_trainer(demo_config(steps, work, seed, **settings, max_steps=updates), [StopAtOnce()])
    start.train()
    checkpoint = start.save_checkpoint()
    judge_once(folder / f"K{steps}-start-{seed}.json", start, evaluation)
    for name, file in zip(NORMALIZATIONS, arms, strict=True):
        args = demo_config(steps, work / name, seed, **settings, max_steps=updates, dm_normalization=name)
        trainer = demo_trainer(args)
        trainer.train(resume_from_checkpoint=checkpoint)
        judge_once(file, trainer, evaluation)
        print(f"K={steps} seed={seed} {name}: {file.read_text()}", flush=True)


def read(folder, name, seeds):
    files = {seed: folder / f"{name}-{seed}.json" for seed in seeds}
    return {seed: json.loads(file.read_text()) for seed, file in files.items() if file.exists()}


def mean_and_spread(values, digits):
    spread = statistics.stdev(values) if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):.{digits}f} ± {spread:.{digits}f}"


def table(folder, step_counts, seeds, updates):
    """Mean and standard deviation over the seeds, and of the differences to DMD and to the start, as Markdown."""
    teachers = sorted({file.stem.rsplit("-", 1)[0] for file in folder.glob("teacher*.json")})
    arms = [f"K{steps}-{name}" for steps in step_counts for name in ("start", *NORMALIZATIONS)]
    lines = [f"| sampler | seeds | {' | '.join(FIGURES)} |", f"|---|---|{'---|' * len(FIGURES)}"]
    for name in (*teachers, *arms):
        rows = read(folder, name, seeds).values()
        if rows:
            cells = [mean_and_spread([row[one] for row in rows], 2 if "distance" in one else 3) for one in FIGURES]
            lines.append(f"| {name.replace('-', ', ')} | {len(rows)} | {' | '.join(cells)} |")
    lines += ["", f"{updates} policy updates after the start; mean ± standard deviation over seeds; network B.", ""]

    lines += ["Differences within a seed (the arms of a seed share their start, noise and reference images):", ""]
    lines += ["| K | arm | minus | distance_to_data | distance_to_teacher | recall |", "|---|---|---|---|---|---|"]
    pairs = [(name, "start") for name in NORMALIZATIONS] + [(name, "sample") for name in NORMALIZATIONS[1:]]
    for steps in step_counts:
        for name, other in pairs:
            first, second = (read(folder, f"K{steps}-{one}", seeds) for one in (name, other))
            both = sorted(first.keys() & second.keys())
            if both:
                cells = [
                    mean_and_spread([first[seed][one] - second[seed][one] for seed in both], 3)
                    for one in ("distance_to_data", "distance_to_teacher", "recall")
                ]
                lines.append(f"| {steps} | {name} | {other} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("benchmark-output"))
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4], help="numbers of student steps K")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--updates", type=int, default=30, help="policy updates of each arm")
    parser.add_argument("--table", action="store_true", help="only print the table of the results there are")
    options = parser.parse_args()
    options.output_dir.mkdir(parents=True, exist_ok=True)
    if not options.table:
        for seed in options.seeds:
            evaluation = Evaluation(seed)
            judge_teacher(options.steps, seed, options.output_dir, evaluation)
            for steps in options.steps:
                run_one(steps, seed, options.updates, options.output_dir, evaluation)
    print(table(options.output_dir, options.steps, options.seeds, options.updates))


if __name__ == "__main__":
    main()
