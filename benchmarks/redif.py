"""ReDiF on the embedded digits: how near a five-step student comes to the teacher's own image of the same noise.

    python benchmarks/redif.py                        # 5 seeds: half an hour on one core
    python benchmarks/redif.py --seeds 9000 9001      # a part of them, e.g. on another core
    python benchmarks/redif.py --report               # only write the tables and the picture again

Every arm of a seed begins with the same student, and stops after the update in which it has used up the same number of
network evaluations. They are counted where networks are called: a sample's forward pass is 1, with a backward pass it
is 3, and an image that the teacher makes is 50. ReDiF and the DRaFT arm are rewarded by ``teacher_mse``, GNDM by
distribution matching. Judged are pairs of prompts and noises that nobody was trained on, without randomness in the
sampler: the reward itself, and three measures of the same kind that no arm was trained on. Every result is one JSON
file, so an interrupted run goes on where it was.
"""

import json
import math
import shutil
import statistics
import time

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from digits import benchmark_command, decimals_of, mean_and_spread, read_results, results_table
from peft import LoraConfig
from torch.nn.functional import cosine_similarity
from transformers.trainer_callback import TrainerCallback

from rdm_rl import RDMConfig, RDMTrainer, ReDiFConfig, ReDiFTrainer
from rdm_rl.digits.data import TEACHER_FOLDER, digit_prompts, load_digits, mixed_prompts
from rdm_rl.digits.judge import judge
from rdm_rl.digits.recognisers import digit_features
from rdm_rl.digits.students import DigitsEvaluation, training_prompts
from rdm_rl.evaluation.samplers import TEACHER_STEPS
from rdm_rl.networks.roles import Networks
from rdm_rl.randomness import seeded_generators
from rdm_rl.rewards.teacher_match import TeacherHistogram, TeacherMSE

STEPS, GROUP = 5, 8
HELD_OUT = "the number "  # Prompts that begin so are not trained on.
COMMON = {
    "use_cpu": True,
    "save_strategy": "no",
    "disable_tqdm": True,
    "report_to": "none",
    "logging_strategy": "no",
    "num_inference_steps": STEPS,
    "num_generations": GROUP,
    "per_device_train_batch_size": 32,
    "teacher_guidance_scale": 1.0,
    "lr_scheduler_type": "constant",
    "adam_beta1": 0.0,
    "decode_batch_size": 32,
    "warm_start": "none",
    "max_steps": 100_000,  # The budget ends a run.
}
JUDGED, REFERENCE, REFERENCE_SEED = 200, 250, 8999
BUDGET = 8_000
MATCHES = ("mse", "histogram", "features", "cosine")
FIGURES = ("distance_to_teacher", "distance_to_data", "recall", "precision", "accuracy")
GNDM = {
    **{"learning_rate": 1e-4, "dm_scale_floor": 0.1, "fake_score_learning_rate": 1e-3},
    **{"dm_normalization": "group", "fake_score_updates_per_policy_update": 5},
}
REDIF = {"learning_rate": 3e-4, "eta": 0.15}
DRAFT = {
    **{"learning_rate": 3e-4, "reward_gradient": "pathwise", "eta": 0.0},
    # Without randomness a group would be copies of one sample; one noise for each prompt keeps teacher images few.
    **{"num_generations": 1, "noise_pool": 1},
}
# Name, kind, budget and settings; those without a budget are starts. Chosen on a development seed.
ARMS = {
    "start": ("redif", 0, {}),
    "ReDiF": ("redif", BUDGET, REDIF),
    "DRaFT": ("redif", BUDGET, DRAFT),
    "GNDM, DDIM": ("gndm", BUDGET, {**GNDM, "sampler": "ddim", "eta": 0.0}),
    "ReDiF, eta 0.4": ("redif", BUDGET, REDIF | {"eta": 0.4}),
    "start, re-noising": ("gndm", 0, GNDM),
    "GNDM": ("gndm", BUDGET, GNDM),
    "ReDiF, 3 times": ("redif", 3 * BUDGET, REDIF),
    "DRaFT, 3 times": ("redif", 3 * BUDGET, DRAFT),
    # What a policy gradient wants: many samples in an update, and small updates.
    "ReDiF, large batches": (
        "redif",
        22 * BUDGET,
        {"learning_rate": 1e-4, "eta": 0.15, "per_device_train_batch_size": 128, "noise_pool": 1},
    ),
}
STARTS = {name: "start" for name in ARMS if "start" not in name} | {"GNDM": "start, re-noising"}
MATCH = {"guidance_scale": 1.0, "teacher_num_inference_steps": TEACHER_STEPS}


class Counter:
    """Network evaluations by role, counted where networks are called; it must be there before the trainer is made."""

    def __init__(self):
        self.counts = {}
        predict = Networks.predict

        def counted(networks, role, x_t, t, conditioning, guidance_scale=1.0):
            x_0 = predict(networks, role, x_t, t, conditioning, guidance_scale)
            passes = (3 if x_0.requires_grad else 1) * (1 if guidance_scale == 1 else 2)
            self.counts[role] = self.counts.get(role, 0) + passes * len(x_t)
            return x_0

        Networks.predict = counted

    @property
    def total(self):
        return sum(self.counts.values())


COUNTER = Counter()


class StopAtBudget(TrainerCallback):
    """Ends a run after the update in which so many network evaluations are used up, and remembers the way there."""

    def __init__(self, budget):
        self.budget = budget

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = control.should_training_stop or COUNTER.total >= self.budget


def prompts_for_training():
    return [row for row in training_prompts() if not row["prompt"].startswith(HELD_OUT)]


def make_trainer(folder, seed, kind, budget=math.inf, **settings):
    """A trainer that stops at its budget."""
    COUNTER.counts = {}
    config, trainer, reward = (
        (RDMConfig, RDMTrainer, "rdm") if kind == "gndm" else (ReDiFConfig, ReDiFTrainer, TeacherMSE())
    )
    values = {**COMMON, **({} if kind == "gndm" else MATCH), "output_dir": str(folder), "seed": seed, **settings}
    lora = LoraConfig(r=16, lora_alpha=16)
    stop = [StopAtBudget(budget)]
    return trainer(
        str(TEACHER_FOLDER), reward, config(**values), prompts_for_training(), peft_config=lora, callbacks=stop
    )


class Judge:
    """Pairs of prompts and noises that nobody was trained on, with the teacher's images of them.

    Every second prompt is empty, as in the demo; the others are those that were held out, in turn. The reference images
    for the distance to the teacher are of the demo's prompts and of noise of their own, and the same for all seeds.
    """

    def __init__(self, folder, seed):
        named = [
            (prompt, digit) for digit in range(10) for prompt in digit_prompts(digit) if prompt.startswith(HELD_OUT)
        ]
        self.period = 2 * len(named)
        self.prompts = [text for index in range(JUDGED // 2) for text in (named[index % len(named)][0], "")]
        self.wanted = torch.ones(JUDGED, 10, dtype=torch.bool)
        for index in range(JUDGED // 2):
            self.wanted[2 * index] = torch.arange(10) == named[index % len(named)][1]
        self.teacher = self._teacher_images(folder / f"judged-{seed}.pt", self.prompts, seed)
        self.reference = self._teacher_images(folder / "reference.pt", mixed_prompts(REFERENCE)[0], REFERENCE_SEED)

    @staticmethod
    def _teacher_images(file, prompts, seed):
        if not file.exists():
            pipeline = DigitsEvaluation.load_teacher()
            call = {"num_inference_steps": TEACHER_STEPS, "guidance_scale": 1.0, "output_type": "pt"}
            images = collect(lambda texts, noise: pipeline(texts, generator=noise, **call).images, prompts, seed)
            torch.save(images, file)
        return torch.load(file)

    def alignment(self, images):
        """How near images are to the teacher's, pair by pair; and how near to those of the same prompts' other noise.

        All but the cosine are distances, 0 for equal images.
        """
        figures = {}
        for name, teacher in {"": self.teacher, "_other_noise": self.teacher.roll(self.period, 0)}.items():
            features = [digit_features("B", pictures) for pictures in (images, teacher)]
            figures |= {
                f"mse{name}": -TeacherMSE()(images, self.prompts, teacher).mean().item(),
                f"histogram{name}": -TeacherHistogram()(images, self.prompts, teacher).mean().item(),
                f"features{name}": (features[0] - features[1]).square().sum(1).mean().item(),
                f"cosine{name}": cosine_similarity(*features).mean().item(),
            }
        return figures

    def judge(self, file, images, **facts):
        data = load_digits("held_out").images
        row = judge(images, self.wanted, name="student", data_images=data, teacher_images=self.reference)
        figures = self.alignment(images) | {name: getattr(row, name) for name in FIGURES} | facts
        file.write_text(json.dumps(figures))
        shown = {name: round(figures[name], 5) for name in (*MATCHES, *FIGURES)}
        print(f"{file.stem}: {json.dumps(shown)} {facts}", flush=True)


def collect(sample, prompts, seed):
    """Images of any sampler; the noise of each depends on the seed and its number alone."""
    noise = seeded_generators(seed, "benchmark/redif", 0, range(len(prompts)))
    parts = [slice(first, first + 50) for first in range(0, len(prompts), 50)]
    return torch.cat([sample(prompts[part], noise[part]) for part in parts])


def file_of(folder, name, seed):
    return folder / f"{name.replace(', ', '-').replace(' ', '_')}-{seed}.json"


def run_seed(folder, seed):
    todo = {name: arm for name, arm in ARMS.items() if not file_of(folder, name, seed).exists()}
    if not todo:
        return
    judged = Judge(folder, seed)
    teacher = file_of(folder, "teacher, 50 steps", seed)
    if not teacher.exists():
        judged.judge(teacher, judged.teacher)
    for name, (kind, budget, settings) in todo.items():
        began, work = time.process_time(), folder / "work" / f"{name.replace(' ', '_')}-{seed}"
        trainer = make_trainer(work, seed, kind, budget, **settings)
        if budget:
            trainer.train()
        facts = {"updates": trainer.state.global_step, "evaluations": dict(COUNTER.counts)}
        facts["cpu_seconds"] = round(time.process_time() - began, 1)
        images = collect(
            lambda texts, noise, trainer=trainer: trainer.generate(texts, generator=noise), judged.prompts, seed
        )
        judged.judge(file_of(folder, name, seed), images, **facts)
        shutil.rmtree(work, ignore_errors=True)


def read(folder, name, seeds):
    return read_results({seed: file_of(folder, name, seed) for seed in seeds})


def table(folder, seeds):
    decimals = {"mse": 5, "features": 2, "cosine": 4, "histogram": 4}
    results = {name: read(folder, name, seeds).values() for name in ("teacher, 50 steps", *ARMS)}
    lines = results_table(results, (*MATCHES, *FIGURES), lambda column: decimals.get(column, decimals_of(column)))
    return "\n".join(lines) + "\n\nMean ± standard deviation over seeds.\n"


def changes(folder, seeds):
    """The change that each arm made to its own start, in percent for the matches, and what it spent."""
    head = ["arm", "minus", *(f"{match}, %" for match in MATCHES[:3]), "distance_to_teacher", "recall"]
    lines = [f"| {' | '.join([*head, 'updates', 'evaluations: policy, teacher, fake score', 'CPU seconds'])} |"]
    lines.append("|---" * (len(head) + 3) + "|")
    for name, start in STARTS.items():
        after, before = read(folder, name, seeds), read(folder, start, seeds)
        both = sorted(after.keys() & before.keys())
        if both:
            cells = [
                mean_and_spread([100 * (after[seed][match] / before[seed][match] - 1) for seed in both], 1)
                for match in MATCHES[:3]
            ]
            cells += [
                mean_and_spread([after[seed][column] - before[seed][column] for seed in both], places)
                for column, places in (("distance_to_teacher", 2), ("recall", 3))
            ]
            rows = [after[seed] for seed in both]
            spent = [
                f"{statistics.fmean(row['evaluations'].get(role, 0) for row in rows):.0f}"
                for role in ("policy", "teacher", "fake_score")
            ]
            cells += [f"{statistics.fmean(row['updates'] for row in rows):.0f}", ", ".join(spent)]
            cells += [f"{statistics.fmean(row['cpu_seconds'] for row in rows):.0f}"]
            lines.append(f"| {name} | {start} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def picture(folder, seeds, file):
    """What each arm did to the distance between the images of a pair, as a share of what it began with."""
    figure, axes = plt.subplots(1, 3, figsize=(9, 2.6), layout="constrained", sharey=True)
    names = list(STARTS)
    for axis, match in zip(axes, MATCHES[:3], strict=True):
        for place, name in enumerate(names):
            after, before = read(folder, name, seeds), read(folder, STARTS[name], seeds)
            shares = [after[seed][match] / before[seed][match] for seed in after if seed in before]
            axis.plot(shares, [place] * len(shares), "o", color=f"C{place}", alpha=0.6)
            if shares:
                axis.plot(statistics.fmean(shares), place, "|", color="black", markersize=16)
        axis.axvline(1, color="grey", linewidth=1)
        axis.set_yticks(range(len(names)), names)
        axis.set_title(match + (" (the reward)" if match == "mse" else " (not trained on)"), fontsize=10)
        axis.grid(alpha=0.3, axis="x")
    axes[0].invert_yaxis()
    figure.supxlabel("distance to the teacher's image of the same noise, as a share of the start's", fontsize=9)
    figure.savefig(file, dpi=100)


if __name__ == "__main__":
    benchmark_command(__doc__, "redif", run_seed, (table, changes), picture, "redif.png")
