"""Reuse of rollouts in distribution matching (GNDM) on the embedded digits: what it costs to reach the same distance.

    python benchmarks/reuse.py                        # 5 seeds: 40 minutes on one core
    python benchmarks/reuse.py --seeds 9000 9001      # a part of them
    python benchmarks/reuse.py --report               # only write the tables and the picture again
    python benchmarks/reuse.py --development --seeds 11 --arms "M=1"    # network A and training images: for choosing

Students of 4 steps, without a warm start: after the demo's, little is left to gain, and no arm could be told from
another. All arms of a seed continue one checkpoint, taken after the fake score's warm-up, and go through the same
prompts and noise in the same order. The averaged policy, which ``save_model`` would save, is judged every few updates
on network B and held-out images, with noise that nothing was chosen on. The question is how much each arm has spent
when it first comes as close to the data as the arm without reuse (M=1) ends.

Network evaluations are counted where they happen: one for each sample of a forward pass, three if it is made with
gradients and therefore followed by a backward pass. Seconds are those of the processor while updates are made, on one
thread, without judging. Every arm is one JSON file, so an interrupted run goes on where it was.
"""

import argparse
import json
import statistics
import time
from collections import Counter
from functools import partial
from itertools import pairwise
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from digits import SEEDS, decimals_of, mean_and_spread, read_results
from peft import LoraConfig

from rdm_rl import RDMConfig, RDMTrainer
from rdm_rl.digits.data import TEACHER_FOLDER, load_digits
from rdm_rl.digits.judge import judge
from rdm_rl.digits.students import COMMON_SETTINGS, LORA_RANK, DigitsEvaluation, training_prompts
from rdm_rl.trainers.callbacks import StopAtOnce

LEARNING_RATE = 2e-4
TWICE = {"learning_rate": 2 * LEARNING_RATE}
REFERENCE, JUDGED_EVERY = "M=1", 8
ENOUGH, MOST = 32, 48  # Cheap arms make more updates, so that one that needs more of them can get there.
ARMS = {
    REFERENCE: {},
    "M=2, ratio": {"num_iterations": 2},
    "M=2, ratio of samples": {"num_iterations": 2, "importance_sampling_level": "sample"},
    "M=2, no ratio": {"num_iterations": 2, "importance_weight_clip": 0.0},
    "M=4, ratio": {"num_iterations": 4},
    "M=4, no ratio": {"num_iterations": 4, "importance_weight_clip": 0.0},
    "M=1, 2 fake-score updates": {"fake_score_updates_per_policy_update": 2},
    "M=1, 1 fake-score update": {"fake_score_updates_per_policy_update": 1},
    "M=1, twice the learning rate": TWICE,
    "M=1, 1 fake-score update, twice the learning rate": {"fake_score_updates_per_policy_update": 1, **TWICE},
}
FIGURES = ("distance_to_data", "distance_to_teacher", "recall", "precision")
JUDGED, BUDGET = "distance_to_data", 0.6
SPENT = ("updates", "rollouts", "evaluations", "seconds")
RATIOS = ("log_ratio_mean", "log_ratio_min", "log_ratio_max", "clip_fraction", "effective_sample_size")


class MeasuredTrainer(RDMTrainer):
    """A trainer that counts what its updates cost, and looks at the student every few of them.

    Args:
        look: Called with the trainer before the first update and after every so many.
        every: How many; after the last one, too.
    """

    def __init__(self, *args, look=None, every=JUDGED_EVERY, **kwargs):
        super().__init__(*args, **kwargs)
        self.look, self.every, self.counting, self.by_role = look, every, False, Counter()
        self.spent = dict.fromkeys(SPENT, 0)
        self.ratios = {name: [] for name in RATIOS}
        forward = self.family.forward

        def counted(network, x_t, t, *told):
            if self.counting:
                self.by_role[self.networks._current] += len(x_t) * (3 if torch.is_grad_enabled() else 1)
            return forward(network, x_t, t, *told)

        self.family.forward = counted

    def training_step(self):
        if self.state.global_step == 0 and self.look:
            self.look(self)
        fresh, self.counting, start = self.rollout_is_used_up, True, time.process_time()
        metrics = super().training_step()
        self.counting = False
        self.spent["seconds"] += time.process_time() - start
        self.spent["updates"] += 1
        self.spent["rollouts"] += fresh
        self.spent["evaluations"] = self.by_role.total()
        if not fresh:
            for name, values in self.ratios.items():
                values.append(metrics[f"rewards/rdm/{name}"])
        last = self.state.global_step + 1 == self.state.max_steps
        if self.look and (last or self.spent["updates"] % self.every == 0):
            self.look(self)
        return metrics


def make_trainer(folder, seed, max_steps, callbacks=(), look=None, **settings):
    args = RDMConfig(
        output_dir=str(folder),
        seed=seed,
        use_cpu=True,
        save_strategy="no",
        allow_config_change=True,  # The arms begin with one checkpoint.
        logging_strategy="no",  # What is only measured for the log would count, and take time.
        disable_tqdm=True,
        max_steps=max_steps,
        **{
            **COMMON_SETTINGS,
            "num_inference_steps": 4,
            "warm_start": "none",
            "per_device_train_batch_size": 32,
            "learning_rate": LEARNING_RATE,
            "lr_scheduler_type": "constant",
            "fake_score_warmup_steps": 60,
            **settings,
        },
    )
    lora = LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK)
    return MeasuredTrainer(
        str(TEACHER_FOLDER), "rdm", args, training_prompts(), peft_config=lora, callbacks=list(callbacks), look=look
    )


def measure(trainer, evaluation, development):
    """The figures of the student as it is now."""
    images = evaluation.collect(
        lambda prompts, noise: trainer.generate(prompts, generator=noise), len(trainer.times)
    ).images
    row = judge(
        images,
        evaluation.wanted,
        name="student",
        data_images=load_digits("train" if development else "held_out").images,
        teacher_images=evaluation.reference,
        network="A" if development else "B",
    )
    return {name: getattr(row, name) for name in FIGURES}


def file_of(folder, name, seed):
    return folder / f"{name.replace(', ', '-').replace(' ', '_')}-{seed}.json"


def begin(work, make_start, judged):
    """The checkpoint that arms begin with, made where it is missing, and the figures of its student."""
    figures, checkpoint = work / "start.json", work / "checkpoint-0"
    if not figures.exists() or not (checkpoint / "trainer_state.json").exists():
        start = make_start()
        start.train()
        start.save_checkpoint()
        figures.write_text(json.dumps(judged(start)))
        print(f"start in {work}: {figures.read_text()}", flush=True)
    return checkpoint, json.loads(figures.read_text())


def run_seed(folder, seed, arms, updates, development, settings):
    """The arms of one seed that have no file yet, each with its number of updates."""
    files = {name: file_of(folder, name, seed) for name in arms}
    if all(file.exists() for file in files.values()):
        return
    evaluation, work = DigitsEvaluation(seed), folder / "work" / str(seed)
    start = partial(make_trainer, work, seed, 1, [StopAtOnce()], **settings)
    for name, file in files.items():
        if file.exists():
            continue
        rows = []
        checkpoint, begun = begin(work, start, partial(measure, evaluation=evaluation, development=development))

        def look(trainer, rows=rows, begun=begun):
            # All arms begin with the same student, so that it is judged once.
            figures = measure(trainer, evaluation, development) if trainer.spent["updates"] > 0 else begun
            rows.append({**trainer.spent, **figures})

        trainer = make_trainer(work, seed, updates[name], look=look, **{**settings, **arms[name]})
        trainer.train(resume_from_checkpoint=checkpoint)
        ratios = {ratio: statistics.fmean(values) for ratio, values in trainer.ratios.items() if values}
        file.write_text(json.dumps({"curve": rows, "ratios": ratios, "evaluations": trainer.by_role}))
        curve = " ".join(f"{row['distance_to_data']:.2f}" for row in rows)
        print(f"{file.stem}: {curve}; {rows[-1]['evaluations']} evaluations, {rows[-1]['seconds']:.0f} s", flush=True)


def read(folder, name, seeds):
    return read_results({seed: file_of(folder, name, seed) for seed in seeds})


def first_reached(curve, goal):
    """What was spent when the distance first fell to the goal, in proportion between two looks; None if it did not."""
    for before, after in pairwise(curve):
        if after[JUDGED] <= goal:
            share = (before[JUDGED] - goal) / (before[JUDGED] - after[JUDGED])
            return {name: before[name] + share * (after[name] - before[name]) for name in SPENT}
    return None


def effort_table(folder, seeds):
    """What each arm had spent when it was first as good as M=1 is at its end, within each seed, as Markdown.

    Who looks often and wavers is soon lucky, so the last column takes each arm at a fixed budget instead.
    """
    shares = ("evaluations", "seconds")
    columns = ["reached", *SPENT, *(f"{share}, % of M=1's" for share in shares), f"at {BUDGET:.0%} of the evaluations"]
    lines = [f"| arm | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    references = read(folder, REFERENCE, seeds)
    for name in ARMS:
        curves = {seed: run["curve"] for seed, run in read(folder, name, seeds).items() if seed in references}
        if not curves:
            continue
        ends = {seed: references[seed]["curve"][-1] for seed in curves}
        reached = {seed: first_reached(curve, ends[seed][JUDGED]) for seed, curve in curves.items()}
        reached = {seed: row for seed, row in reached.items() if row}
        cells = ["" for _ in (*SPENT, *shares)]
        if reached:
            cells = [mean_and_spread([row[unit] for row in reached.values()], 0) for unit in SPENT]
            for unit in shares:
                cells.append(mean_and_spread([100 * row[unit] / ends[seed][unit] for seed, row in reached.items()], 0))
        differences = []
        for seed, curve in curves.items():
            x, y = ([row[axis] for row in curve] for axis in ("evaluations", JUDGED))
            differences.append(np.interp(BUDGET * ends[seed]["evaluations"], x, y) - ends[seed][JUDGED])
        cells.append(mean_and_spread(differences, 2))
        lines.append(f"| {name} | {len(reached)} of {len(curves)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def end_table(folder, seeds):
    """Where every arm begins and ends, and what its ratios were, as Markdown."""
    lines = [
        f"| arm | updates | seeds | {' | '.join(FIGURES)} | evaluations per update | seconds per update |",
        f"|---|---|---|{'---|' * (len(FIGURES) + 2)}",
    ]
    for name in ARMS:
        curves = [run["curve"] for run in read(folder, name, seeds).values()]
        if not curves:
            continue
        both = [("start", [curve[0] for curve in curves])] if name == REFERENCE else []
        if curves[0][-1]["updates"] > ENOUGH:
            both.append((name, [row for curve in curves for row in curve if row["updates"] == ENOUGH]))
        for label, rows in [*both, (name, [curve[-1] for curve in curves])]:
            cells = [mean_and_spread([row[figure] for row in rows], decimals_of(figure)) for figure in FIGURES]
            updates = rows[0]["updates"]
            for unit, digits in (("evaluations", 0), ("seconds", 2)):
                cells.append(f"{statistics.fmean(row[unit] / updates for row in rows):.{digits}f}" if updates else "")
            lines.append(f"| {label} | {updates} | {len(rows)} | {' | '.join(cells)} |")
    lines += ["", f"| arm | {' | '.join(RATIOS)} |", f"|---|{'---|' * len(RATIOS)}"]
    for name in ARMS:
        ratios = [run["ratios"] for run in read(folder, name, seeds).values() if run["ratios"]]
        if ratios:
            cells = [f"{statistics.fmean(run[ratio] for run in ratios):.3g}" for ratio in RATIOS]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def picture(folder, seeds, file):
    """Of arms that have all seeds: the distance to the data against updates, and against network evaluations."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained", sharey=True)
    for name in ARMS:
        curves = [run["curve"] for run in read(folder, name, seeds).values()]
        if len(curves) < len(seeds):
            continue
        color = {"M=1": "black", "M=2": "C0", "M=4": "C1"}[name[:3]]
        if name != REFERENCE and name.startswith("M=1"):
            color = "C3" if "learning_rate" in ARMS[name] else "C2"
        style = "--" if "no ratio" in name or "1 fake" in name else ":" if "samples" in name else "-"
        y = [statistics.fmean(row[JUDGED] for row in rows) for rows in zip(*curves, strict=True)]
        for axis, unit in zip(axes, ("updates", "evaluations"), strict=True):
            x = [statistics.fmean(row[unit] for row in rows) for rows in zip(*curves, strict=True)]
            axis.plot(x, y, style, color=color, marker=".", label=name)
            if name == REFERENCE:
                axis.axhline(y[-1], color="grey", linewidth=0.8)
            axis.grid(alpha=0.3)
    axes[0].set_xlabel("policy updates")
    axes[1].set_xlabel("network evaluations")
    axes[0].set_ylabel("Fréchet distance to the data")
    axes[1].legend(fontsize=8)
    figure.suptitle(f"Students of 4 steps, mean of {len(seeds)} seeds; grey: where M=1 ends")
    figure.savefig(file, dpi=100)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("benchmark-output/reuse"))
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--development", action="store_true", help="judge with network A on training images")
    parser.add_argument("--settings", type=json.loads, default={}, help="JSON: settings of all arms, to choose them")
    parser.add_argument("--report", action="store_true", help="only write the tables and the picture again")
    options = parser.parse_args()
    folder = options.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    if not options.report:
        for seed in options.seeds:
            arms = {name: ARMS[name] for name in options.arms}
            dear = {name for name, changed in arms.items() if name == REFERENCE or "learning_rate" in changed}
            updates = {name: ENOUGH if name in dear else MOST for name in arms}
            run_seed(folder, seed, arms, updates, options.development, options.settings)
    print(effort_table(folder, options.seeds))
    print(end_table(folder, options.seeds))
    picture(folder, options.seeds, folder / "reuse.png")


if __name__ == "__main__":
    main()
