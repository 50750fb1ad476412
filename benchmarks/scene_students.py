"""Few-step students of the scenes' teacher: the arms of distribution matching at equal network evaluations.

    python benchmarks/scene_students.py --steps 4                # 5 seeds: about an hour and a half on one core
    python benchmarks/scene_students.py --steps 2
    python benchmarks/scene_students.py --steps 1
    python benchmarks/scene_students.py --steps 1 --study rewards
    python benchmarks/scene_students.py --steps 1 --study length
    python benchmarks/scene_students.py --steps 1 --study groups
    python benchmarks/scene_students.py --steps 4 --study warm
    python benchmarks/scene_students.py --steps 1 --study thorough
    python benchmarks/scene_students.py --steps 4 --study random_times
    python benchmarks/scene_students.py --steps 2 --study black_boxes
    python benchmarks/scene_students.py --steps 4 --table        # only print the table again
    python benchmarks/scene_students.py --steps 4 --development --seeds 11    # network A, for choosing

Four steps begin with the teacher's weights, one and two after a warm start. All arms of a seed continue one checkpoint,
taken after the fake score's warm-up, and go through the same prompts and noise; arms with groups of another size have a
checkpoint and prompts of their own. The averaged policy is judged on 300 prompts that nothing was trained on: Fréchet
distance on network B to the teacher's images of the same prompts (other noise), less that between two draws of the
teacher (``excess``); the share of images that show all that was asked for, by network C; recall. ``--study rewards``
adds the reward ``scene_logprob`` by adaptive and by constant weights, and measures it, too; ``--study length`` trains
four times as long; ``--study groups`` has 16 prompts x 2 in an update beside 4 x 8; ``--study warm`` begins with a warm
start for four steps, too; ``--study thorough`` has a warm start ten times as long, larger batches and three times the
updates; ``--study random_times`` has it for students that keep their noise, and learn at random times;
``--study black_boxes`` hands over the reward as plain numbers, too, and leaves out distribution matching.
Network evaluations are counted as in ``reuse.py``.
Every arm is one JSON file, so an interrupted run goes on where it was.
"""

import argparse
import json
import statistics
from functools import partial
from math import nan
from pathlib import Path

import torch
from peft import LoraConfig
from policy_gradient import WITHOUT_RDM
from reuse import MeasuredTrainer, begin, file_of, read
from scales import at
from scenes import draw, measure, samplers
from scipy import stats

from rdm_rl import RDMConfig
from rdm_rl.evaluation.pictures import image_grid
from rdm_rl.evaluation.samplers import TEACHER_STEPS, sample_in_batches, steps_text
from rdm_rl.randomness import seeded_generator
from rdm_rl.scenes.data import (
    GUIDANCE_SCALE,
    TEACHER_FOLDER,
    compose,
    load_handwriting,
    random_attributes,
    scene_prompts,
)
from rdm_rl.scenes.rewards import SceneLogProb
from rdm_rl.scenes.students import LORA_RANK, ScenesEvaluation, training_prompts
from rdm_rl.trainers.callbacks import StopAtOnce
from rdm_rl.trainers.methods import method_settings

NUM_IMAGES = 300
SEEDS = [9200, 9201, 9202, 9203, 9204]  # No setting was chosen on these.
REFERENCES = {
    **dict.fromkeys(["scales", "warm", "thorough", "random_times"], "dmd"),
    "length": "group_rms",
    "groups": "group_rms, 4 x 8",
    "rewards": "gndm",
    "black_boxes": "gndm, 4 x 8",
}
FIGURES = {
    **dict.fromkeys(REFERENCES, ("excess", "asked", "recall")),
    **dict.fromkeys(["rewards", "black_boxes"], ("reward", "asked", "excess")),
}
COMMON = {
    "per_device_train_batch_size": 32,
    "num_generations": 8,
    "adam_beta1": 0.0,
    "teacher_guidance_scale": GUIDANCE_SCALE,
    "dm_scale_floor": 0.1,
    "lr_scheduler_type": "linear",
    "fake_score_learning_rate": 1e-3,
    "fake_score_warmup_steps": 60,
}
FROM_TEACHER = {"warm_start": "none", "learning_rate": 1e-3}
FROM_WARM_START = {
    "warm_start_steps": 200,
    "warm_start_learning_rate": 1e-3,
    "warm_start_num_states": 512,
    "learning_rate": 3e-4,
}
THOROUGH = {
    "per_device_train_batch_size": 64,
    "num_generations": 2,
    "warm_start_steps": 2000,
    "warm_start_num_states": 4096,
    "learning_rate": 1e-4,
}
KEEPS_NOISE = {"sampler": "ddim", "eta": 0.0}
FEW = {4: 2, 2: 2, 1: 1}  # Updates of the fake score, as benchmarks/lab/lab.md recommends.
UPDATES = 48
SCALES = {"dmd": "sample", "group": "group", "group_rms": "group_rms", "none": "none"}
GROUPS = {"4 x 8": 8, "16 x 2": 2}  # Prompts of an update, and samples of each.
# The constants are what the adaptive weights came to on a development seed.
REWARD_WEIGHTS = {1: 0.04, 3: 0.125, 10: 0.42}
PAIRS = {
    "black_boxes": [(f"policy gradient, {size}", f"gndm, {size}") for size in GROUPS],
    "rewards": [(f"gndmr, {adaptive}", f"dmdr, {constant}") for adaptive, constant in REWARD_WEIGHTS.items()],
    "groups": [(f"group_rms, {size}", f"dmd, {size}") for size in GROUPS],
}


gradient = SceneLogProb()


def black_box(images, prompts):
    """``scene_logprob`` as plain numbers: nothing to differentiate."""
    with torch.no_grad():
        return gradient(images, prompts).tolist()


# The arms of each study: their name, how many updates they make, and their settings.


def scales(few, steps):
    yield "dmd, 5 fake updates", {4: 31, 2: 30, 1: 22}[steps], {"dm_normalization": "sample"}  # As many evaluations.
    for name in SCALES:
        yield name, UPDATES, matching(name, few)
        if steps > 1 and name == "group_rms":
            yield f"{name}, anchor", UPDATES, {**matching(name, few), "first_step_anchor": 0.05}


def two_scales(few, steps, updates):
    for name in ("dmd", "group_rms"):
        yield name, updates, matching(name, few)


def random_times(few, steps):
    for name in ("dmd", "group_rms"):
        yield name, 3 * UPDATES, {**KEEPS_NOISE, **matching(name, few), "random_times": 28}
    yield "group_rms, own times", 3 * UPDATES, {**KEEPS_NOISE, **matching("group_rms", few)}


def lengths(few, steps):
    for name in ("group_rms", "dmd"):
        yield name, UPDATES, matching(name, few)
        yield f"{name}, four times as long", 4 * UPDATES, matching(name, few)


def groups(few, steps):
    for size, generations in GROUPS.items():
        for name in ("group_rms", "dmd"):
            yield f"{name}, {size}", UPDATES, {**matching(name, few), "num_generations": generations}


def rewards(few, steps):
    rdm = {"fake_score_updates_per_policy_update": few}
    yield "gndm", UPDATES, matching("group_rms", few)
    rewarded = {**rdm, "reward_funcs": ["rdm", "scene_logprob"], "reward_start_step": 8}
    for adaptive, constant in REWARD_WEIGHTS.items():
        settings = {**method_settings("gndmr"), **rewarded, "reward_weights": [1, adaptive]}
        yield f"gndmr, {adaptive}", UPDATES, settings
        settings = {**method_settings("dmdr"), **rewarded, "dm_scale_floor": COMMON["dm_scale_floor"]}
        yield f"dmdr, {constant}", UPDATES, {**settings, "reward_weights": [1, constant]}


def black_boxes(few, steps):
    rdm = {**matching("group_rms", few), "num_replayed_steps": steps}
    rewarded = {**rdm, "reward_weighting": "adaptive", "reward_start_step": 8}
    plain = {**rewarded, "reward_funcs": ["rdm", black_box], "reward_weights": [1, 20]}
    for size, generations in GROUPS.items():
        yield f"gndm, {size}", UPDATES, {**rdm, "num_generations": generations}
        yield f"policy gradient, {size}", UPDATES, {**plain, "num_generations": generations}
    hybrid = {"reward_funcs": ["rdm", black_box, gradient], "reward_weights": [1, 5, 1]}
    yield "hybrid, 4 x 8", UPDATES, {**rewarded, **hybrid}
    yield "gradient, 4 x 8", UPDATES, {**rewarded, "reward_funcs": ["rdm", gradient], "reward_weights": [1, 3]}
    yield "gradient without rdm, 4 x 8", UPDATES, {**rdm, **WITHOUT_RDM, "reward_funcs": [gradient]}
    yield "policy gradient without rdm, 4 x 8", UPDATES, {**rdm, **WITHOUT_RDM, "reward_funcs": [black_box]}


STUDIES = {
    "scales": scales,
    "warm": partial(two_scales, updates=UPDATES),
    "thorough": partial(two_scales, updates=3 * UPDATES),
    "random_times": random_times,
    "length": lengths,
    "groups": groups,
    "rewards": rewards,
    "black_boxes": black_boxes,
}


def matching(name, few):
    """The settings of distribution matching with a scale and few updates of the fake score."""
    return {"dm_normalization": SCALES[name], "fake_score_updates_per_policy_update": few}


def make_trainer(folder, seed, steps, max_steps, callbacks=(), look=None, reward_funcs="rdm", **settings):
    args = RDMConfig(
        output_dir=str(folder),
        seed=seed,
        use_cpu=True,
        save_strategy="no",
        allow_config_change=True,  # The arms begin with one checkpoint.
        logging_strategy="no",  # What is only measured for the log would count, and take time.
        disable_tqdm=True,
        max_steps=max_steps,
        num_inference_steps=steps,
        **{**COMMON, **settings},
    )
    lora = LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK)
    return MeasuredTrainer(
        str(TEACHER_FOLDER),
        reward_funcs,
        args,
        training_prompts(),
        peft_config=lora,
        callbacks=list(callbacks),
        look=look,
        every=16,
    )


class Judge:
    """What the students of one seed are compared with.

    Args:
        folder: Where the teacher's images are kept.
        seed: Which prompts and noise.
        development: Judge with network A.
    """

    def __init__(self, folder, seed, development):
        self.network, self.noise_seed = "A" if development else "B", seed
        attributes = random_attributes(NUM_IMAGES, seeded_generator(seed, "benchmark/scene_students/judged"))
        self.prompts = scene_prompts(attributes, seeded_generator(seed, "benchmark/scene_students/phrasing"))
        real = seeded_generator(seed, "benchmark/scene_students/real")
        self.real = compose(attributes, load_handwriting("held_out"), real)
        file = folder / f"teacher-{seed}.pt"
        if not file.exists():
            teacher = ScenesEvaluation.load_teacher()
            draws = [self.of_teacher(teacher, teacher.scheduler, TEACHER_STEPS, index) for index in range(2)]
            torch.save(draws, file)
        self.reference, self.second = torch.load(file)
        self.floor = measure(self.second, self.prompts, self.reference, self.real, self.network)["to_teacher"]

    def of_teacher(self, teacher, scheduler, steps, index=1):
        noise = seeded_generator(self.noise_seed, "benchmark/scene_students/noise", index)
        return draw(teacher, scheduler, self.prompts, steps, GUIDANCE_SCALE, noise)

    def of_student(self, trainer):
        noise = seeded_generator(self.noise_seed, "benchmark/scene_students/noise", 1)
        return sample_in_batches(
            lambda prompts, generator: trainer.generate(prompts, generator=generator), self.prompts, noise, 100
        )

    def figures(self, images):
        figures = measure(images, self.prompts, self.reference, self.real, self.network)
        reward = SceneLogProb()(images, self.prompts).mean().item()
        return {"excess": figures["to_teacher"] - self.floor, "reward": reward, **figures}


def run_stock(folder, seed, steps, judge):
    """The teacher with many steps, and with as few as the student under each stock scheduler."""
    teacher = ScenesEvaluation.load_teacher()
    few = [(name, scheduler) for name, scheduler, count in samplers(teacher) if count == steps]
    for name, scheduler in few:
        file = file_of(folder, f"stock {name}", seed)
        if not file.exists():
            file.write_text(json.dumps(judge.figures(judge.of_teacher(teacher, scheduler, steps))))
    file_of(folder, "teacher", seed).write_text(json.dumps(judge.figures(judge.second)))


def run_seed(folder, seed, steps, study, development, settings, only):
    plan = [(name, *rest) for name, *rest in STUDIES[study](FEW[steps], steps) if not only or name in only]
    if all(file_of(folder, name, seed).exists() for name, *_ in plan):
        return
    judge = Judge(folder.parent, seed, development)
    run_stock(folder, seed, steps, judge)
    begins_anew = study in ("warm", "thorough", "random_times")
    common = FROM_TEACHER if steps == 4 and not begins_anew else FROM_WARM_START
    if study in ("thorough", "random_times"):
        # With guidance, what is solved again at each of four steps is no longer the teacher's.
        common = {**common, **THOROUGH, "warm_start": "denoise" if steps == 4 else "ode"}
    if study == "random_times":
        common |= KEEPS_NOISE  # The warm start's, too.
    settings = {**common, **settings}
    work = (folder if begins_anew else folder.parent / f"K{steps}") / "work" / str(seed)
    if settings.get("warm_start") != "none":
        settings["warm_start_cache_dir"] = str(work / "solutions")
    for name, updates, changed in plan:
        file, rows = file_of(folder, name, seed), []
        if file.exists():
            continue
        common_size = settings.get("num_generations", COMMON["num_generations"])
        size = changed.get("num_generations", common_size)
        its_work = work if size == common_size else work / f"groups-of-{size}"
        start = partial(make_trainer, its_work, seed, steps, 1, [StopAtOnce()], **{**settings, "num_generations": size})
        checkpoint, begun = begin(its_work, start, lambda trainer: judge.figures(judge.of_student(trainer)))

        def look(trainer, rows=rows, begun=begun):
            # Arms that begin with the same student have it judged once.
            figures = judge.figures(judge.of_student(trainer)) if trainer.spent["updates"] > 0 else begun
            rows.append({**trainer.spent, **figures})

        trainer = make_trainer(its_work, seed, steps, updates, look=look, **{**settings, **changed})
        trainer.train(resume_from_checkpoint=checkpoint)
        file.write_text(json.dumps({"curve": rows, "settings": {**COMMON, **settings, **changed}}, default=repr))
        curve = " ".join(f"{row['excess']:.2f}/{row['asked']:.2f}" for row in rows)
        print(f"{file.stem}: {curve}; {rows[-1]['evaluations']} evaluations, {rows[-1]['seconds']:.0f} s", flush=True)
        shown = {"student": judge.of_student(trainer)[:12]}
        image_grid(shown, judge.prompts[:12]).save(file.with_suffix(".png"))


def table(folder, seeds, steps, study):
    """Every arm at the evaluations of the reference at its end, and its difference to it within the seeds.

    Lengths are compared at their own ends.
    """
    figures, first = FIGURES[study], REFERENCES[study]
    heads = " | ".join(f"{figure} | minus `{first}`" for figure in figures)
    lines = [f"| arm | seeds | {heads} |", f"|---|---|{'---|' * (2 * len(figures))}"]
    still = {"teacher, 50 steps": read(folder, "teacher", seeds)}
    for name, _, count in samplers(ScenesEvaluation.load_teacher()):
        if count == steps:
            still[f"stock, {name}"] = read(folder, f"stock {name}", seeds)
    reference = {seed: run["curve"] for seed, run in read(folder, first, seeds).items()}
    still[f"start of the students, {steps_text(steps)}"] = {seed: curve[0] for seed, curve in reference.items()}
    for name, rows in still.items():
        if rows:
            cells = [f"{statistics.mean(row.get(figure, nan) for row in rows.values()):.3g} | " for figure in figures]
            lines.append(f"| {name} | {len(rows)} | {' | '.join(cells)} |")
    for name, *_ in STUDIES[study](FEW[steps], steps):
        runs = {seed: run["curve"] for seed, run in read(folder, name, seeds).items() if seed in reference}
        cells = []
        for figure in figures if runs else ():
            ends = {seed: reference[seed][-1] for seed in runs}
            values = {
                seed: runs[seed][-1][figure] if study == "length" else at(runs[seed], end["evaluations"], figure)
                for seed, end in ends.items()
            }
            differences = [values[seed] - end[figure] for seed, end in ends.items()]
            cells += [f"{statistics.mean(values.values()):.3g}", compared(differences) if name != first else ""]
        if cells:
            lines.append(f"| {name} | {len(runs)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def in_pairs(folder, seeds, study):
    """The first arm of each pair minus the second, at their ends, and the mean of a seed over the pairs."""
    figures, pairs = FIGURES[study], PAIRS[study]
    heads = " | ".join(figures)
    lines = [f"| first minus second | {heads} |", f"|---|{'---|' * len(figures)}"]
    ends = {
        pair: [{seed: run["curve"][-1] for seed, run in read(folder, name, seeds).items()} for name in pair]
        for pair in pairs
    }
    seeds = [seed for seed in seeds if all(seed in run for both in ends.values() for run in both)]
    differences = {
        " and ".join(pair): [{figure: one[seed][figure] - two[seed][figure] for figure in figures} for seed in seeds]
        for pair, (one, two) in ends.items()
    }
    means = [
        {figure: statistics.mean(row[figure] for row in rows) for figure in figures}
        for rows in zip(*differences.values(), strict=True)
    ]
    for name, rows in {**differences, "mean of these": means}.items():
        if rows:
            cells = " | ".join(compared([row[figure] for row in rows]) for figure in figures)
            lines.append(f"| {name} | {cells} |")
    return "\n".join(lines) + "\n"


def compared(differences):
    """Mean and spread of paired differences, and the p of their t-test."""
    if len(differences) < 2:
        return f"{differences[0]:+.3g}"
    p = stats.ttest_1samp(differences, 0).pvalue
    return f"{statistics.mean(differences):+.3g} ± {statistics.stdev(differences):.2g} (p = {p:.2g})"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("benchmark-output/scene_students"))
    parser.add_argument("--steps", type=int, choices=[1, 2, 4], required=True, help="steps K of the students")
    parser.add_argument("--study", choices=STUDIES, default="scales")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--arms", nargs="+", default=[], help="only these")
    parser.add_argument("--development", action="store_true", help="judge with network A")
    parser.add_argument("--settings", type=json.loads, default={}, help="JSON: settings of all arms, to choose them")
    parser.add_argument("--table", action="store_true", help="only print the table")
    options = parser.parse_args()
    study = "" if options.study == "scales" else f"-{options.study}"
    folder = options.output_dir / f"K{options.steps}{study}"
    folder.mkdir(parents=True, exist_ok=True)
    if not options.table:
        for seed in options.seeds:
            run_seed(folder, seed, options.steps, options.study, options.development, options.settings, options.arms)
    print(table(folder, options.seeds, options.steps, options.study))
    if options.study in PAIRS:
        print(in_pairs(folder, options.seeds, options.study))


if __name__ == "__main__":
    main()
