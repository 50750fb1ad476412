"""The scales of distribution matching on the embedded digits where there is room, at equal network evaluations.

    python benchmarks/scales.py              # 5 seeds: half an hour on one core
    python benchmarks/scales.py --table      # only print the table again

Students of 4 steps without a warm start, as in ``reuse.py``, whose trainer and judge these are: after the demo's warm
start nothing can be told apart. All arms of a seed continue one checkpoint and go through the same prompts and noise.
Each is judged every few updates on network B and held-out images, and compared with DMD at DMD's evaluations.
"""

import argparse
import json
import statistics
from pathlib import Path

import numpy as np
from reuse import read, run_seed
from scipy import stats

FEW = {"fake_score_updates_per_policy_update": 2}
ARMS = {
    "dmd, 5 fake updates": {"dm_normalization": "sample"},
    "dmd": {"dm_normalization": "sample", **FEW},
    "group": {"dm_normalization": "group", **FEW},
    "group_rms": {"dm_normalization": "group_rms", **FEW},
    "none": {"dm_normalization": "none", **FEW},
}
UPDATES = {"dmd, 5 fake updates": 32} | dict.fromkeys([*ARMS][1:], 48)
SEEDS = [9100, 9101, 9102, 9103, 9104]  # No setting was chosen on these.
FIGURES = ("distance_to_data", "distance_to_teacher", "recall")


def at(curve, evaluations, figure):
    """A figure at a number of evaluations, in proportion between two looks."""
    return float(np.interp(evaluations, *([row[axis] for row in curve] for axis in ("evaluations", figure))))


def table(folder, seeds):
    """Every arm at the evaluations of ``dmd`` after 48 updates, and its difference to it within the seeds."""
    curves = {name: {seed: run["curve"] for seed, run in read(folder, name, seeds).items()} for name in ARMS}
    heads = [f"{figure} | minus `dmd`" for figure in FIGURES]
    lines = [f"| arm | seeds | {' | '.join(heads)} |", f"|---|---|{'---|' * (2 * len(FIGURES))}"]
    starts = [curve[0] for curve in curves["dmd"].values()]
    lines.append(
        f"| (start) | | {' | '.join(f'{statistics.mean(row[name] for row in starts):.3g} | ' for name in FIGURES)} |"
    )
    for name, runs in curves.items():
        both = sorted(runs.keys() & curves["dmd"].keys())
        cells = []
        for figure in FIGURES if len(both) > 1 else ():
            ends = {seed: curves["dmd"][seed][-1] for seed in both}
            values = [at(runs[seed], ends[seed]["evaluations"], figure) for seed in both]
            differences = [value - ends[seed][figure] for value, seed in zip(values, both, strict=True)]
            mean, spread = statistics.mean(differences), statistics.stdev(differences)
            compared = f"{mean:+.3f} ± {spread:.3f} (p = {stats.ttest_1samp(differences, 0).pvalue:.2g})"
            cells += [f"{statistics.mean(values):.3g}", "" if name == "dmd" else compared]
        if cells:
            lines.append(f"| {name} | {len(both)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("benchmark-output/scales"))
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--development", action="store_true", help="judge with network A on training images")
    parser.add_argument("--settings", type=json.loads, default={}, help="JSON: settings of all arms, to choose them")
    parser.add_argument("--table", action="store_true", help="only print the table")
    options = parser.parse_args()
    options.output_dir.mkdir(parents=True, exist_ok=True)
    if not options.table:
        for seed in options.seeds:
            run_seed(options.output_dir, seed, ARMS, UPDATES, options.development, options.settings)
    print(table(options.output_dir, options.seeds))


if __name__ == "__main__":
    main()
