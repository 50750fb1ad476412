"""The laboratory: distillation of teachers whose score is known exactly, every arm with 20 seeds.

    python benchmarks/lab/run.py                       # what is missing, then the tables: an hour on 2 cores
    python benchmarks/lab/run.py --problems mixture-2 --steps 4 --arms dmd none
    python benchmarks/lab/run.py --table

Every (problem, K, arm) is a JSON file with its settings, seeds and commit, so an interrupted run goes on where it was,
and several may run side by side. Arms are compared with ``dmd`` at equal network evaluations, paired by seed.
"""

import argparse
import json
import statistics
import subprocess
from dataclasses import asdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from arms import ARMS, CORE, SEVERAL_STEPS
from problems import PROBLEMS
from replicates import Replicates
from scipy import stats

SEEDS = range(9000, 9020)  # Settings were chosen on the seeds 0 to 7.
BUDGETS = (250, 1000)  # In updates of an arm with one update of the fake score.
LONG = 4  # Drift is looked for in runs so many times as long.


def marks_of(arm, steps, long):
    """After how many updates an arm is measured: at the network evaluations of each budget, and at its updates."""
    base = ARMS["dmd"].evaluations(steps)
    budgets = (*BUDGETS, LONG * BUDGETS[-1]) if long else BUDGETS
    equal = {f"budget {updates}": round(updates * base / arm.evaluations(steps)) for updates in budgets}
    return {"start": 0, **equal, f"updates {BUDGETS[-1]}": BUDGETS[-1]}


def run_arm(problem, steps, name, seeds, folder, long):
    arm, file = (ARMS | SEVERAL_STEPS)[name], folder / f"{problem} K={steps} {name}.json"
    marks = marks_of(arm, steps, long)
    if file.exists() and marks.keys() <= json.loads(file.read_text())["results"].keys():
        return
    replicates = Replicates(problem, seeds, arm, steps, folder / "pretrained")
    results, done = {}, 0
    for mark, updates in sorted(marks.items(), key=lambda item: item[1]):
        for _ in range(updates - done):
            replicates.update()
        done, results[mark] = updates, replicates.measure()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    config = {"problem": problem, "steps": steps, "arm": asdict(arm), "seeds": [*seeds], "commit": commit}
    file.write_text(json.dumps({**config, "updates": marks, "results": results}))
    print(f"{file.stem}: {statistics.mean(results['budget 1000']['energy']):.4f}", flush=True)


def paired(values, others):
    """The mean of paired differences and half of its 95 % interval."""
    differences = [value - other for value, other in zip(values, others, strict=True)]
    error = statistics.stdev(differences) / len(differences) ** 0.5
    return statistics.mean(differences), stats.t.ppf(0.975, len(differences) - 1) * error


def difference(values, others):
    """Paired differences as cells of a table: the mean, the number of seeds that are better, p of a paired t-test."""
    mean, half = paired(values, others)
    better = sum(value < other for value, other in zip(values, others, strict=True))
    return f"{mean:+.4f} ± {half:.4f} | {better} | {stats.ttest_rel(values, others).pvalue:.0e}"


def read(problem, steps, folder):
    """What was measured of each arm."""
    files = {name: folder / f"{problem} K={steps} {name}.json" for name in ARMS | SEVERAL_STEPS}
    return {name: json.loads(file.read_text()) for name, file in files.items() if file.exists()}


def table(problem, steps, folder):
    """The arms of one problem at equal evaluations, against ``dmd``, as Markdown."""
    results = read(problem, steps, folder)
    if "dmd" not in results:
        return ""
    base = results["dmd"]["results"]
    lines = [
        "| arm | updates | energy distance | modes' weights | missed modes | energy minus that of `dmd` | better | p |",
        "|---|---|---|---|---|---|---|---|",
        f"| (start) | 0 | {cells(base['start'])} | | | |",
    ]
    for name, result in results.items():
        row, updates = result["results"]["budget 1000"], result["updates"]["budget 1000"]
        against = difference(row["energy"], base["budget 1000"]["energy"]) if name != "dmd" else " | | "
        lines.append(f"| {name} | {updates} | {cells(row)} | {against} |")
    if steps > 1:  # Students that keep their noise begin elsewhere.
        marks = ["start", f"budget {BUDGETS[0]}", f"budget {BUDGETS[-1]}"]
        lines += ["", "| energy distance | start | a quarter of the evaluations | the end |", "|---|---|---|---|"]
        for name, result in results.items():
            energies = " | ".join(f"{statistics.mean(result['results'][mark]['energy']):.4f}" for mark in marks)
            lines.append(f"| {name} | {energies} |")
    long = [
        (name, result["results"])
        for name, result in results.items()
        if f"budget {LONG * BUDGETS[-1]}" in result["results"]
    ]
    if long:
        lines += ["", "| arm | after 1,000 | after 4,000 | difference | better | p |", "|---|---|---|---|---|---|"]
        for name, rows in long:
            late, early = (rows[f"budget {updates}"]["energy"] for updates in (LONG * BUDGETS[-1], BUDGETS[-1]))
            lines.append(
                f"| {name} | {statistics.mean(early):.4f} | {statistics.mean(late):.4f} | {difference(late, early)} |"
            )
    return f"### {problem}, K = {steps}\n\n" + "\n".join(lines) + "\n"


def cells(row):
    return " | ".join(
        f"{statistics.mean(row[name]):.{digits}f}" for name, digits in (("energy", 4), ("weights", 3), ("missed", 3))
    )


def picture(problems, steps, folder, file):
    """The energy distance of each arm in that of ``dmd``, at equal evaluations, with the 95 % interval of the mean."""
    results = {problem: read(problem, steps, folder) for problem in problems}
    names = [name for name in ARMS | SEVERAL_STEPS if name != "dmd" and any(name in arms for arms in results.values())]
    figure, axes = plt.subplots(1, len(problems), figsize=(5 * len(problems), 6), layout="constrained", sharey=True)
    for axis, (problem, arms) in zip([axes] if len(problems) == 1 else axes, results.items(), strict=True):
        base = arms["dmd"]["results"]["budget 1000"]["energy"]
        for name in [name for name in names if name in arms]:
            gap = paired(arms[name]["results"]["budget 1000"]["energy"], base)
            mean, half = (100 * value / statistics.mean(base) for value in gap)
            color = "C2" if mean + half < 0 else "C3" if mean - half > 0 else "grey"
            axis.errorbar(100 + mean, names.index(name), xerr=half, fmt="o", color=color, capsize=3)
        axis.set_yticks(range(len(names)), names)
        axis.set_xscale("log")
        axis.set_xticks([10, 20, 50, 80, 100, 150, 200, 300, 500, 1000])
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter("")
        axis.axvline(100, color="black", linewidth=0.8)
        axis.autoscale(axis="x")
        axis.set(title=f"{problem}, K = {steps}", xlabel="energy distance, % of DMD's")
        axis.grid(alpha=0.3)
    axis.invert_yaxis()  # They share it.
    figure.savefig(file, dpi=100)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("benchmark-output/lab"))
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=["mixture-64", "digits"])
    parser.add_argument("--steps", type=int, default=1, help="K of the student")
    parser.add_argument("--arms", nargs="+", choices=[*ARMS, *SEVERAL_STEPS, "core"], help="default: all of them")
    parser.add_argument("--seeds", type=int, nargs="+", default=[*SEEDS], help="computed together: one result each")
    parser.add_argument("--long", action="store_true", help=f"go on to {LONG} times as many updates")
    parser.add_argument("--table", action="store_true", help="only print the tables")
    options = parser.parse_args()
    torch.set_num_threads(1)  # The networks are small: a second thread gains less than a second process.
    options.output_dir.mkdir(parents=True, exist_ok=True)
    every = [*ARMS] if options.steps == 1 else [*ARMS, *SEVERAL_STEPS]
    names = [*CORE] if options.arms == ["core"] else options.arms or every
    if not options.table:
        for name in names:
            for problem in options.problems:
                run_arm(problem, options.steps, name, options.seeds, options.output_dir, options.long)
    print("\n".join(table(problem, options.steps, options.output_dir) for problem in options.problems))
    picture(options.problems, options.steps, options.output_dir, options.output_dir / f"lab-K{options.steps}.png")


if __name__ == "__main__":
    main()
