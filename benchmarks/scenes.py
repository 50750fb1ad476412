"""How much room the scenes leave to few-step distillation: the teacher with many steps and few, beside real images.

    python benchmarks/scenes.py                        # 5 seeds: half an hour on one core
    python benchmarks/scenes.py --seeds 0 1            # a part of them, e.g. on another core
    python benchmarks/scenes.py --report               # only write the tables and the picture again

For each seed 300 prompts are drawn. Real images are scenes of held-out handwriting that answer the same prompts. The
teacher answers them twice with 50 steps, from noise that is never shared: the second draw is what every row's distance
is measured to. Few-step samplers start from the noise of the first draw. This decided what the problem is, so it is
measured on the development network A and seeds of its own; nothing that is reported of a student may be chosen on B.
Every result is one JSON file, so an interrupted benchmark goes on where it was.
"""

import json
import statistics

import torch
from digits import benchmark_command, read, results_table
from torch import Tensor

from rdm_rl.evaluation.distances import frechet_distance, manifold_metrics
from rdm_rl.evaluation.pictures import image_grid
from rdm_rl.evaluation.samplers import (
    TEACHER_STEPS,
    few_step_teachers,
    pipeline_sampler,
    sample_in_batches,
    steps_text,
)
from rdm_rl.randomness import seeded_generator
from rdm_rl.scenes.data import GUIDANCE_SCALE, compose, load_handwriting, random_attributes, scene_prompts
from rdm_rl.scenes.recognisers import fulfilled, scene_features
from rdm_rl.scenes.students import ScenesEvaluation

NUM_IMAGES = 300
STEPS = (1, 2, 4, 8)
GUIDANCE_SCALES = (1.0, GUIDANCE_SCALE)
SEEDS = [0, 1, 2, 3, 4]
FIGURES = ("to_teacher", "to_real", "recall", "asked", "digits", "inks", "arrangement", "ground")
REAL = ("real images", "real images, encoded and decoded")
SHOWN = 12


def draw(teacher, scheduler, prompts, steps, guidance_scale, generator):
    """Images of the teacher, in batches of 100."""
    teacher.scheduler = scheduler
    return sample_in_batches(pipeline_sampler(teacher, steps, guidance_scale), prompts, generator, 100)


@torch.no_grad()
def decoded(teacher, images):
    """Images after the teacher's autoencoder: no image of the teacher can be better."""
    latents = teacher.vae.encode(images * 2 - 1).latent_dist.mean
    return (teacher.vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)


def samplers(teacher):
    """Name, scheduler and number of steps of every few-step sampler; a single step is the same with all of them."""
    for steps in STEPS:
        for name, (scheduler, _) in few_step_teachers(teacher, [steps]).items():
            yield (name.removeprefix("teacher, ") if steps > 1 else steps_text(steps)), scheduler, steps


def measure(images: Tensor, prompts, reference: Tensor, real: Tensor, network="A"):
    """The figures of one set of images on a network, and, by network C, the shares that show what was asked for."""
    features, reference, real = (scene_features(network, pictures) for pictures in (images, reference, real))
    shown = fulfilled(images, prompts)
    shares = {
        "asked": shown.all(1),
        "digits": shown[:, [0, 2]].all(1),
        "inks": shown[:, [1, 3]].all(1),
        "arrangement": shown[:, 4],
        "ground": shown[:, 5],
    }
    return {
        "to_teacher": frechet_distance(features, reference),
        "to_real": frechet_distance(features, real),
        "recall": manifold_metrics(features, reference).recall,
        **{name: share.double().mean().item() for name, share in shares.items()},
    }


def row_name(sampler, guidance_scale):
    return f"guidance {guidance_scale:g}, {sampler}"


def file_of(folder, name, seed):
    return folder / f"{name}-{seed}.json"


def run_seed(folder, seed):
    """Everything of one seed, at every guidance scale."""
    attributes = random_attributes(NUM_IMAGES, seeded_generator(seed, "benchmark/scenes/prompts"))
    prompts = scene_prompts(attributes, seeded_generator(seed, "benchmark/scenes/phrasing"))
    held_out = load_handwriting("held_out")
    real, other_real = (
        compose(attributes, held_out, seeded_generator(seed, "benchmark/scenes/real", draw)) for draw in range(2)
    )
    teacher = ScenesEvaluation.load_teacher()
    stock = teacher.scheduler
    for guidance_scale in GUIDANCE_SCALES:
        plan = [(steps_text(TEACHER_STEPS), stock, TEACHER_STEPS), *samplers(teacher)]
        files = {name: file_of(folder, row_name(name, guidance_scale), seed) for name, *_ in plan}
        files |= {name: file_of(folder, row_name(name, guidance_scale), seed) for name in REAL}
        if all(file.exists() for file in files.values()):
            continue
        noise = seeded_generator(seed, "benchmark/scenes/reference")
        reference = draw(teacher, stock, prompts, TEACHER_STEPS, guidance_scale, noise)
        drawn = dict(zip(REAL, (other_real, decoded(teacher, other_real)), strict=True))
        for name, scheduler, steps in plan:
            noise = seeded_generator(seed, "benchmark/scenes/judged")
            drawn[name] = draw(teacher, scheduler, prompts, steps, guidance_scale, noise)
        for name, images in drawn.items():
            files[name].write_text(json.dumps(measure(images, prompts, reference, real)))
            print(f"{files[name].stem}: {files[name].read_text()}", flush=True)
        shown = {name: images[:SHOWN].clone() for name, images in drawn.items()}
        torch.save((prompts[:SHOWN], shown), folder / f"guidance {guidance_scale:g}-{seed}.pt")


def names(guidance_scale):
    few = [name for name, *_ in samplers(ScenesEvaluation.load_teacher())]
    return [row_name(name, guidance_scale) for name in (*REAL, steps_text(TEACHER_STEPS), *few)]


def figures_table(folder, seeds):
    rows = {name: read(folder, name, seeds).values() for scale in GUIDANCE_SCALES for name in names(scale)}
    decimals = {"to_teacher": 2, "to_real": 2}
    return "\n".join(results_table(rows, FIGURES, lambda figure: decimals.get(figure, 3), first="images")) + "\n"


def room_table(folder, seeds):
    """What few steps lose: the distance to the teacher beyond that of its own second draw, in that one's spread."""
    lines = ["| guidance | two draws | spread s | sampler | excess | in s |", "|---|---|---|---|---|---|"]
    for scale in GUIDANCE_SCALES:
        teacher_name, *few = names(scale)[len(REAL) :]
        teacher = read(folder, teacher_name, seeds)
        if len(teacher) < 2:
            continue
        floor = {seed: row["to_teacher"] for seed, row in teacher.items()}
        mean, spread = statistics.mean(floor.values()), statistics.stdev(floor.values())
        for name in few:
            excess = [row["to_teacher"] - floor[seed] for seed, row in read(folder, name, seeds).items()]
            lost = statistics.mean(excess)
            sampler = name.split(", ", 1)[1]
            lines.append(f"| {scale:g} | {mean:.2f} | {spread:.2f} | {sampler} | {lost:.2f} | {lost / spread:.0f} |")
    return "\n".join(lines) + "\n"


def picture(folder, seeds, file):
    """The first images of the first seed, a row for each sampler at the chosen guidance."""
    source = folder / f"guidance {GUIDANCE_SCALE:g}-{seeds[0]}.pt"
    if source.exists():
        prompts, shown = torch.load(source)
        image_grid(shown, prompts).save(file)


if __name__ == "__main__":
    benchmark_command(__doc__, "scenes", run_seed, (figures_table, room_table), picture, "scenes.png", SEEDS)
