"""Compare settings on the embedded digits, from one start and with the same noise.

    python benchmarks/digits.py --study normalization      # every K, 5 seeds: an hour on 2 cores
    python benchmarks/digits.py --study length --steps 1 4
    python benchmarks/digits.py --study normalization --table    # only print the tables again

``normalization`` compares ``dm_normalization`` sample, group, group_rms and none after the same number of updates;
``length`` compares the demo's number of updates with twice as many. All arms of one (K, seed) start from one
checkpoint, taken after the warm start and the fake score's warm-up. Each is judged once, on network B and held-out
images, with noise that no setting was chosen on. Every result is one JSON file, so an interrupted benchmark goes on
where it was.
"""

import argparse
import json
import statistics
from pathlib import Path

from rdm_rl.digits.students import DigitsEvaluation, digits_config, digits_trainer
from rdm_rl.trainers.callbacks import StopAtOnce


def length_arm(times):
    return lambda steps: {"max_steps": times * digits_config(steps, "unused").max_steps}


# What each arm of a study changes, given the number of student steps. Differences are shown to the first arm.
STUDIES = {
    "normalization": {
        name: lambda steps, name=name: {"dm_normalization": name, "max_steps": 30}
        for name in ("sample", "group", "group_rms", "none")
    },
    "length": {"once": length_arm(1), "twice": length_arm(2)},
}
FIGURES = ("distance_to_data", "distance_to_teacher", "precision", "recall", "accuracy")
SEEDS = [9000, 9001, 9002, 9003, 9004]  # No setting was chosen on these.


def judge_once(file, trainer, evaluation):
    drawn = evaluation.collect(lambda prompts, noise: trainer.generate(prompts, generator=noise), len(trainer.times))
    _, row = evaluation.judge({"student": drawn})
    write(file, row)


def judge_teacher(step_counts, seed, folder, evaluation):
    """The teacher with 50 steps, and with as many steps as the students under each stock scheduler."""
    for name, drawn in evaluation.draw_teacher(step_counts).items():
        _, row = evaluation.judge({name: drawn})
        write(folder / f"{name}-{seed}.json", row)


def write(file, row):
    file.write_text(json.dumps({name: getattr(row, name) for name in FIGURES}))


def run_one(study, steps, seed, folder, evaluation):
    """The shared start and the arms of one number of steps and one seed."""
    arms = {name: arm(steps) for name, arm in STUDIES[study].items()}
    files = {name: folder / f"K{steps}-{name}-{seed}.json" for name in arms}
    if all(file.exists() for file in files.values()):
        return
    work = folder / "work" / f"K{steps}-{seed}"
    settings = {"disable_tqdm": True, "warm_start_cache_dir": str(folder / "work" / f"solutions-{seed}")}
    settings["allow_config_change"] = True  # The arms begin with one checkpoint.
    shortest = min(arm["max_steps"] for arm in arms.values())
    start = digits_trainer(digits_config(steps, work, seed, **settings, max_steps=shortest), [StopAtOnce()])
    start.train()
    checkpoint = start.save_checkpoint()
    judge_once(folder / f"K{steps}-start-{seed}.json", start, evaluation)
    for name, arm in arms.items():
        trainer = digits_trainer(digits_config(steps, work / name, seed, **settings, **arm))
        trainer.train(resume_from_checkpoint=checkpoint)
        judge_once(files[name], trainer, evaluation)
        print(f"K={steps} seed={seed} {name}: {files[name].read_text()}", flush=True)


def read_results(files):
    """The results in files by seed, as far as there are any."""
    return {seed: json.loads(file.read_text()) for seed, file in files.items() if file.exists()}


def read(folder, name, seeds):
    return read_results({seed: folder / f"{name}-{seed}.json" for seed in seeds})


def mean_and_spread(values, digits):
    spread = statistics.stdev(values) if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):.{digits}f} ± {spread:.{digits}f}"


def decimals_of(figure):
    return 2 if "distance" in figure else 3


def results_table(results, columns, decimals_of=decimals_of, first="arm"):
    """The lines of a Markdown table: what each name's results are on average, if it has any."""
    lines = [f"| {first} | seeds | {' | '.join(columns)} |", f"|---|---|{'---|' * len(columns)}"]
    for name, rows in results.items():
        if rows:
            cells = [mean_and_spread([row[column] for row in rows], decimals_of(column)) for column in columns]
            lines.append(f"| {name} | {len(rows)} | {' | '.join(cells)} |")
    return lines


def tables(study, folder, step_counts, seeds):
    """Mean and standard deviation over the seeds, and of differences within a seed, as Markdown."""
    names = list(STUDIES[study])
    teachers = sorted({file.stem.rsplit("-", 1)[0] for file in folder.glob("teacher*.json")})
    arms = [f"K{steps}-{name}" for steps in step_counts for name in ("start", *names)]
    results = {name.replace("-", ", "): read(folder, name, seeds).values() for name in (*teachers, *arms)}
    lines = results_table(results, FIGURES, first="sampler")
    lines += ["", "Mean ± standard deviation over seeds; network B.", ""]
    lines += ["Differences within a seed (the arms of a seed share their start, noise and reference images):", ""]
    lines += ["| K | arm | minus | distance_to_data | distance_to_teacher | recall |", "|---|---|---|---|---|---|"]
    pairs = [(name, "start") for name in names] + [(name, names[0]) for name in names[1:]]
    for steps in step_counts:
        for name, other in pairs:
            first, second = (read(folder, f"K{steps}-{arm}", seeds) for arm in (name, other))
            both = sorted(first.keys() & second.keys())
            if both:
                cells = [
                    mean_and_spread([first[seed][figure] - second[seed][figure] for seed in both], 3)
                    for figure in ("distance_to_data", "distance_to_teacher", "recall")
                ]
                lines.append(f"| {steps} | {name} | {other} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def benchmark_command(description, name, run_seed, tables, picture, picture_file, seeds=SEEDS):
    """The command line of a benchmark that has a file for each result: run what is missing, then report.

    ``run_seed(folder, seed)`` runs; each of ``tables``, a function of (folder, seeds), is printed; and
    ``picture(folder, seeds, file)`` draws.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("benchmark-output") / name)
    parser.add_argument("--seeds", type=int, nargs="+", default=seeds)
    parser.add_argument("--report", action="store_true", help="only write the tables and the picture again")
    options = parser.parse_args()
    options.output_dir.mkdir(parents=True, exist_ok=True)
    if not options.report:
        for seed in options.seeds:
            run_seed(options.output_dir, seed)
    for table in tables:
        print(table(options.output_dir, options.seeds))
    picture(options.output_dir, options.seeds, options.output_dir / picture_file)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", choices=sorted(STUDIES), required=True)
    parser.add_argument("--output_dir", type=Path, default=Path("benchmark-output"))
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4], help="numbers of student steps K")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--table", action="store_true", help="only print the tables of the results there are")
    options = parser.parse_args()
    folder = options.output_dir / options.study
    folder.mkdir(parents=True, exist_ok=True)
    if not options.table:
        for seed in options.seeds:
            evaluation = DigitsEvaluation(seed)
            if options.study == "normalization":
                judge_teacher(options.steps, seed, folder, evaluation)
            for steps in options.steps:
                run_one(options.study, steps, seed, folder, evaluation)
    print(tables(options.study, folder, options.steps, options.seeds))


if __name__ == "__main__":
    main()
