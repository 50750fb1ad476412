"""Fidelity against reward on the embedded digits: adaptive weights (GNDMR) and constant ones (DMDR), from one start.

    python benchmarks/reward_front.py                        # 5 seeds: an hour on one core
    python benchmarks/reward_front.py --seeds 9000 9001      # a part of them, e.g. on another core
    python benchmarks/reward_front.py --report               # only write the table and the picture again

One-step students. All arms of a seed continue the same GNDM checkpoint for the same number of updates, with the same
prompts and noise. ``ink`` is hackable: a page full of ink has the highest value. ``digit_logprob`` is recognition by a
network that judges nothing here. The constant weights were chosen on a development seed so that their forces span those
of the adaptive arms. They carry the reward's units: the arms whose reward is multiplied by 1024, or divided by it, show
what that means. Every arm is judged once, on network B and held-out images, with noise that nothing was chosen on.
Every result is one JSON file, so an interrupted run goes on where it was.
"""

import json
import statistics

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from digits import benchmark_command, mean_and_spread, results_table
from peft import LoraConfig

from rdm_rl import RDMConfig, RDMTrainer
from rdm_rl.digits.data import TEACHER_FOLDER
from rdm_rl.digits.rewards import DigitLogProb, ink, named_digit, symmetry
from rdm_rl.digits.students import COMMON_SETTINGS, DigitsEvaluation, training_prompts
from rdm_rl.trainers.methods import method_settings

START_UPDATES, UPDATES = 40, 40
FIGURES = ("distance_to_teacher", "distance_to_data", "recall", "precision", "accuracy")
MEASURED = ("ink", "digit_logprob", "symmetry")
REWARDS = {"ink": ink, "digit_logprob": DigitLogProb()}
WEIGHTS = {
    "adaptive, cold start": (0.1, 0.3, 0.9, 2.7),
    "adaptive, online": (0.1, 0.3, 0.9),
    "fixed": (0.46875, 1.3671875, 4.6875),
}
SCALES = {"adaptive, cold start": (0.3, (1024.0,)), "fixed": (0.5859375, (1024.0, 1 / 1024))}


def scaled(reward, factor):
    """The reward in other units."""

    def values(images, prompts):
        return [None if value is None else factor * value for value in reward(images, prompts)]

    values.differentiable = True
    return values


def settings_of(method):
    if method == "fixed":
        return method_settings("dmdr")
    return {
        **method_settings("gndmr"),
        "dm_normalization": "group",
        "adaptive_reference": "online" if "online" in method else "cold_start",
    }


def arms():
    """Name, reward, its factor, and settings of every arm."""
    yield "none, GNDM", None, 1.0, {"dm_normalization": "group"}
    for method, weights in WEIGHTS.items():
        for reward in REWARDS:
            for weight in weights:
                yield (
                    f"{reward}, {method}, {weight:g}",
                    reward,
                    1.0,
                    settings_of(method) | {"reward_weights": [1.0, weight]},
                )
    for method, (weight, factors) in SCALES.items():
        for factor in factors:
            sign = "×1024" if factor > 1 else "÷1024"
            settings = settings_of(method) | {"reward_weights": [1.0, weight]}
            yield f"ink {sign}, {method}, {weight:g}", "ink", factor, settings


def make_trainer(folder, seed, reward_funcs, **settings):
    args = RDMConfig(
        output_dir=str(folder),
        seed=seed,
        use_cpu=True,
        save_strategy="no",
        allow_config_change=True,  # The arms begin with one checkpoint.
        disable_tqdm=True,
        num_inference_steps=1,
        **{
            **COMMON_SETTINGS,
            "per_device_train_batch_size": 32,
            "learning_rate": 1e-4,
            "lr_scheduler_type": "constant",
            "reward_start_step": START_UPDATES,
            "warm_start_cache_dir": str(folder / "solutions"),
            "decode_batch_size": 32,
            **settings,
        },
    )
    lora = LoraConfig(r=16, lora_alpha=16)
    return RDMTrainer(str(TEACHER_FOLDER), reward_funcs, args, training_prompts(), peft_config=lora)


@torch.no_grad()
def measure_rewards(images, prompts):
    named = [index for index, prompt in enumerate(prompts) if named_digit(prompt) is not None]
    known = DigitLogProb()(images[named], [prompts[index] for index in named])
    return {
        "ink": ink(images, prompts).mean().item(),
        "symmetry": symmetry(images, prompts).mean().item(),
        "digit_logprob": statistics.fmean(value.item() for value in known),
    }


def judge(file, evaluation, drawn, kind):
    _, row = evaluation.judge({kind: drawn})
    figures = {name: getattr(row, name) for name in FIGURES} | measure_rewards(drawn.images, evaluation.prompts)
    file.write_text(json.dumps(figures))
    print(f"{file.stem}: {json.dumps({name: round(value, 3) for name, value in figures.items()})}", flush=True)


def judge_student(file, evaluation, trainer):
    drawn = evaluation.collect(lambda prompts, noise: trainer.generate(prompts, generator=noise), 1)
    judge(file, evaluation, drawn, "student")


def file_of(folder, name, seed):
    safe = name.replace(", ", "-").replace(" ", "_").replace("×", "x").replace("÷", "over")
    return folder / f"{safe}-{seed}.json"


def run_seed(folder, seed):
    wanted = [(file_of(folder, name, seed), *arm) for name, *arm in arms()]
    if all(file.exists() for file, *_ in wanted):
        return
    evaluation, work = DigitsEvaluation(seed), folder / "work" / str(seed)
    teacher = file_of(folder, "teacher", seed)
    if not teacher.exists():
        judge(teacher, evaluation, evaluation.draw_teacher([])["teacher, 50 steps"], "teacher")
    start = make_trainer(work, seed, "rdm", max_steps=START_UPDATES)
    checkpoint = work / f"checkpoint-{START_UPDATES}"
    if not (checkpoint / "trainer_state.json").exists():
        start.train()
        start.save_checkpoint()
        judge_student(file_of(folder, "start", seed), evaluation, start)
    for file, reward, factor, settings in wanted:
        if not file.exists():
            funcs = "rdm" if reward is None else ["rdm", scaled(REWARDS[reward], factor)]
            trainer = make_trainer(work, seed, funcs, max_steps=START_UPDATES + UPDATES, **settings)
            trainer.train(resume_from_checkpoint=checkpoint)
            judge_student(file, evaluation, trainer)


def read(folder, name, seeds):
    files = [file_of(folder, name, seed) for seed in seeds]
    return [json.loads(file.read_text()) for file in files if file.exists()]


def table(folder, seeds):
    names = ("teacher", "start", *(name for name, *_ in arms()))
    lines = results_table({name: read(folder, name, seeds) for name in names}, (*FIGURES, *MEASURED))
    return (
        "\n".join(lines) + "\n\nMean ± standard deviation over seeds; distances, precision and recall in network B.\n"
    )


def equal_reward(folder, seeds):
    """How much farther from the teacher each adaptive arm is than DMDR at the same reward, within each seed.

    Between DMDR's arms the distance is interpolated linearly in the square of the reward's change, because that is how
    it grows (a straight line in the reward itself would lie above the curve, and flatter the other method). Arms beyond
    DMDR's range are left out. DMDR with the weight 0 is the arm whose reward is divided by 1024.
    """
    lines = ["| arm | seeds | distance_to_teacher minus DMDR's | recall minus DMDR's |", "|---|---|---|---|"]
    for reward in REWARDS:
        for method in [name for name in WEIGHTS if name != "fixed"]:
            for weight in WEIGHTS[method]:
                differences = []
                for seed in seeds:
                    zero = read(folder, "ink ÷1024, fixed, 150", [seed])
                    fixed = zero + [
                        row
                        for weight in WEIGHTS["fixed"]
                        for row in read(folder, f"{reward}, fixed, {weight:g}", [seed])
                    ]
                    arm = read(folder, f"{reward}, {method}, {weight:g}", [seed])
                    if len(fixed) < 1 + len(WEIGHTS["fixed"]) or not arm:
                        continue
                    squares = [(row[reward] - zero[0][reward]) ** 2 for row in fixed]
                    here = (arm[0][reward] - zero[0][reward]) ** 2
                    if here <= max(squares):
                        expected = [
                            np.interp(here, squares, [row[figure] for row in fixed])
                            for figure in ("distance_to_teacher", "recall")
                        ]
                        differences.append(
                            (arm[0]["distance_to_teacher"] - expected[0], arm[0]["recall"] - expected[1])
                        )
                if differences:
                    cells = [mean_and_spread(list(column), 3) for column in zip(*differences, strict=True)]
                    lines.append(f"| {reward}, {method}, {weight:g} | {len(differences)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def picture(folder, seeds, file):
    """Distance to the teacher, and recall, against the reward: a line for each method, a point for each weight."""
    figure, axes = plt.subplots(2, len(REWARDS), figsize=(9, 7), layout="constrained", sharex="col")
    styles = {"adaptive, cold start": ("C0", "o"), "adaptive, online": ("C2", "s"), "fixed": ("C1", "^")}
    labels = {"fixed": "fixed (DMDR)"}
    for column, reward in enumerate(REWARDS):
        for row, figure_name in enumerate(("distance_to_teacher", "recall")):
            axis = axes[row, column]
            for method, weights in WEIGHTS.items():
                measured = [read(folder, f"{reward}, {method}, {weight:g}", seeds) for weight in weights]
                measured = [(weight, rows) for weight, rows in zip(weights, measured, strict=True) if rows]
                x = [statistics.fmean(row[reward] for row in rows) for _, rows in measured]
                y = [statistics.fmean(row[figure_name] for row in rows) for _, rows in measured]
                errors = [
                    statistics.stdev([row[figure_name] for row in rows]) if len(rows) > 1 else 0 for _, rows in measured
                ]
                color, marker = styles[method]
                axis.errorbar(
                    x, y, yerr=errors, color=color, marker=marker, capsize=2, label=labels.get(method, method)
                )
                for place, (weight, _) in zip(zip(x, y, strict=True), measured, strict=True):
                    axis.annotate(
                        f"{weight:g}", place, textcoords="offset points", xytext=(4, 4), fontsize=7, color=color
                    )
            for name, marker in (("start", "x"), ("none, GNDM", "+"), ("teacher", "*")):
                rows = read(folder, name, seeds)
                if rows:
                    point = [statistics.fmean(row[key] for row in rows) for key in (reward, figure_name)]
                    axis.plot(
                        *point, marker, color="black", label=name.replace("none, GNDM", "no reward"), linestyle="none"
                    )
            axis.set_xlabel(f"{reward}: mean over the judged images" if row else "")
            axis.set_ylabel("Fréchet distance to the teacher" if row == 0 else "recall")
            axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=8)
    figure.suptitle(
        f"One-step students after {UPDATES} updates from one GNDM checkpoint; points are labelled by weight"
    )
    figure.savefig(file, dpi=130)


if __name__ == "__main__":
    benchmark_command(__doc__, "reward_front", run_seed, (table, equal_reward), picture, "front.png")
