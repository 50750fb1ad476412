"""A black-box reward on the embedded digits: policy gradient and hybrid beside distribution matching, and RL alone.

    python benchmarks/policy_gradient.py                        # 5 seeds: half an hour on one free core
    python benchmarks/policy_gradient.py --seeds 9000 9001      # a part of them, e.g. on another core
    python benchmarks/policy_gradient.py --report               # only write the tables and the picture again

The reward is recognition by network D, which judges nothing here. As a black box it is a function that returns floats:
it acts through the likelihood of the one random step of a two-step student. The hybrid has the same reward a second
time, differentiable, on the last step. All arms of a seed continue one GNDM checkpoint for the same number of policy
updates, with the same prompts and noise; each is judged after every 15 updates, on network B and held-out images, with
noise that nothing was chosen on. Every result is one JSON file, so an interrupted run goes on where it was.
"""

import json
import statistics
import time

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from digits import benchmark_command, decimals_of, mean_and_spread, read_results, results_table
from peft import LoraConfig
from transformers.trainer_callback import TrainerCallback

from rdm_rl import RDMConfig, RDMTrainer
from rdm_rl.digits.data import TEACHER_FOLDER, balanced_prompts
from rdm_rl.digits.rewards import DigitLogProb, ink, symmetry
from rdm_rl.digits.students import COMMON_SETTINGS, DigitsEvaluation, training_prompts
from rdm_rl.trainers.methods import method_settings

START_UPDATES, UPDATES, LOOK_EVERY = 15, 45, 15
FIGURES = ("distance_to_teacher", "distance_to_data", "recall", "precision", "accuracy")
MEASURED = ("digit_logprob", "ink", "symmetry")
COSTS = ("network_evaluations", "cpu_seconds")
WITHOUT_RDM = {
    "reward_weighting": "fixed",
    "fake_score_updates_per_policy_update": 0,
    "fake_score_warmup_steps": 0,
    "reward_start_step": 0,
}

NAMED, _ = balanced_prompts(500)

gradient = DigitLogProb()


def black_box(images, prompts):
    """The reward as floats: nothing to differentiate."""
    with torch.no_grad():
        return [None if value is None else value.item() for value in gradient(images, prompts)]


# Rewards and settings of every arm. Weights are in units of the force of distribution matching (adaptive).
ARMS = {
    "GNDM goes on": ("rdm", {}),
    "policy gradient": (["rdm", black_box], {"reward_weights": [1.0, 20.0]}),
    "hybrid": (["rdm", black_box, gradient], {"reward_weights": [1.0, 5.0, 1.0]}),
    "RL alone": ([black_box], WITHOUT_RDM),
}


class Trainer(RDMTrainer):
    """Counts samples that pass through the network."""

    evaluations = 0

    def count_evaluations(self):
        def count(module, inputs, output):
            self.evaluations += len(output[0])

        self.family.network.register_forward_hook(count)


class Look(TrainerCallback):
    """Judges the student every so many updates; what that costs is not counted."""

    def __init__(self, folder, name, seed, evaluation):
        self.folder, self.name, self.seed, self.evaluation = folder, name, seed, evaluation

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.count_evaluations()
        self.seconds, self.since = 0.0, time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        done = state.global_step - START_UPDATES
        if done % LOOK_EVERY == 0:
            self.seconds += time.process_time() - self.since
            evaluations = self.trainer.evaluations
            cost = {"network_evaluations": evaluations, "cpu_seconds": self.seconds}
            judge_student(file_of(self.folder, self.name, done, self.seed), self.evaluation, self.trainer, cost)
            self.trainer.evaluations, self.since = evaluations, time.process_time()


def make_trainer(folder, seed, reward_funcs, **settings):
    args = RDMConfig(
        output_dir=str(folder),
        seed=seed,
        use_cpu=True,
        save_strategy="no",
        allow_config_change=True,  # The arms begin with one checkpoint.
        logging_strategy="no",
        disable_tqdm=True,
        num_inference_steps=2,
        **{
            **method_settings("hybrid"),
            **COMMON_SETTINGS,
            "per_device_train_batch_size": 32,
            "learning_rate": 3e-4,
            "lr_scheduler_type": "constant",
            "ema_decay": 0.95,
            "warm_start_steps": 60,
            "warm_start_num_states": 500,
            "warm_start_ode_steps": 12,
            "fake_score_warmup_steps": 40,
            "reward_start_step": START_UPDATES,
            "warm_start_cache_dir": str(folder / "solutions"),
            "decode_batch_size": 32,
            **settings,
        },
    )
    lora = LoraConfig(r=16, lora_alpha=16)
    return Trainer(str(TEACHER_FOLDER), reward_funcs, args, training_prompts(), peft_config=lora)


@torch.no_grad()
def judge_student(file, evaluation, trainer, cost):
    def draw(prompts, noise):
        return trainer.generate(prompts, generator=noise)

    drawn = evaluation.collect(draw, len(trainer.times))
    _, row = evaluation.judge({"student": drawn})
    # A few misread digits make most of the mean reward: it is measured on more images than the rest.
    noise = torch.Generator().manual_seed(evaluation.judged_seed + 1)
    named = torch.cat([draw(part, noise) for part in (NAMED[:250], NAMED[250:])])
    known = [
        value.item()
        for images, prompts in ((drawn.images, evaluation.prompts), (named, NAMED))
        for value in gradient(images, prompts)
        if value is not None
    ]
    figures = {name: getattr(row, name) for name in FIGURES} | {
        "digit_logprob": statistics.fmean(known),
        "ink": ink(drawn.images, evaluation.prompts).mean().item(),
        "symmetry": symmetry(drawn.images, evaluation.prompts).mean().item(),
    }
    file.write_text(json.dumps(figures | cost))
    print(f"{file.stem}: {json.dumps({name: round(value, 3) for name, value in figures.items()})}", flush=True)


def file_of(folder, name, updates, seed):
    return folder / f"{name.replace(' ', '_')}-{updates}-{seed}.json"


def run_seed(folder, seed):
    wanted = {name: arm for name, arm in ARMS.items() if not file_of(folder, name, UPDATES, seed).exists()}
    if not wanted:
        return
    evaluation, work = DigitsEvaluation(seed), folder / "work" / str(seed)
    checkpoint = work / f"checkpoint-{START_UPDATES}"
    if not (checkpoint / "trainer_state.json").exists():
        start = make_trainer(work, seed, "rdm", max_steps=START_UPDATES)
        start.train()
        judge_student(file_of(folder, "start", 0, seed), evaluation, start, dict.fromkeys(COSTS, 0))
        start.save_checkpoint()
    for name, (rewards, settings) in wanted.items():
        look = Look(folder, name, seed, evaluation)
        trainer = make_trainer(work, seed, rewards, max_steps=START_UPDATES + UPDATES, **settings)
        look.trainer = trainer
        trainer.add_callback(look)
        trainer.train(resume_from_checkpoint=checkpoint)


def read(folder, name, updates, seeds):
    """Results by seed; no updates are the shared start."""
    return read_results({seed: file_of(folder, name if updates else "start", updates, seed) for seed in seeds})


def table(folder, seeds):
    results = {name: read(folder, name, UPDATES, seeds).values() for name in ARMS}
    results = {"start": read(folder, "start", 0, seeds).values(), **results}
    columns = (*FIGURES, *MEASURED, *COSTS)
    lines = results_table(results, columns, lambda name: 0 if name in COSTS else decimals_of(name))
    return "\n".join(lines) + "\n"


def changes(folder, seeds):
    """What each arm gained in reward, and lost of recall, within a seed."""
    lines = ["| arm | minus | seeds | digit_logprob | recall, % | lowest recall, % | distance_to_teacher |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for name in ARMS:
        for other, updates in (("start", 0), ("GNDM goes on", UPDATES)):
            first, second = read(folder, name, UPDATES, seeds), read(folder, other, updates, seeds)
            both = sorted(first.keys() & second.keys())
            if both and name != other:
                reward, distance = (
                    [first[seed][figure] - second[seed][figure] for seed in both]
                    for figure in ("digit_logprob", "distance_to_teacher")
                )
                recall = [100 * (first[seed]["recall"] / second[seed]["recall"] - 1) for seed in both]
                cells = [mean_and_spread(reward, 4), mean_and_spread(recall, 1), f"{min(recall):.1f}"]
                cells.append(mean_and_spread(distance, 2))
                lines.append(f"| {name} | {other} | {len(both)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def picture(folder, seeds, file):
    """The reward, the recall and the distance to the teacher over the updates; a line for each arm."""
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
    panels = {
        "digit_logprob": "reward (digit_logprob)",
        "recall": "recall",
        "distance_to_teacher": "Fréchet distance to the teacher",
    }
    for axis, (key, label) in zip(axes, panels.items(), strict=True):
        for index, name in enumerate(ARMS):
            points = []
            for updates in range(0, UPDATES + 1, LOOK_EVERY):
                values = [row[key] for row in read(folder, name, updates, seeds).values()]
                if values:
                    points.append(
                        (updates, statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0)
                    )
            x, mean, spread = zip(*points, strict=True)
            axis.errorbar(
                [position + 0.4 * (index - 1.5) for position in x],
                mean,
                yerr=spread,
                marker="o",
                ms=3,
                capsize=2,
                label=name,
            )
        if key == "recall":
            start = statistics.fmean(row[key] for row in read(folder, "start", 0, seeds).values())
            axis.axhline(0.9 * start, color="grey", lw=0.8, ls="--", label="start minus 10 %")
        axis.set_xlabel("policy updates after the shared start")
        axis.set_title(label, fontsize=10)
        axis.grid(alpha=0.3)
    handles, labels = axes[1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncol=len(labels), fontsize=8)
    figure.savefig(file, dpi=100)


if __name__ == "__main__":
    benchmark_command(__doc__, "policy_gradient", run_seed, (table, changes), picture, "policy_gradient.png")
