"""What an update costs, beside the passes of the networks that it must make: the embedded digits, K=4, rank 16.

    python benchmarks/step_cost.py overhead    # step time / sum of its passes, each timed alone: 10 minutes
    python benchmarks/step_cost.py scaling     # against batch size (1x to 16x) and K (1 to 16), with a picture
    python benchmarks/step_cost.py adapters    # passes with adapters beside their layers, added to the weights, none

Everything is timed in one process on one thread, in turns, in seconds of the processor: other work on the machine
disturbs the ratios of a round little. Figures are medians of the rounds, with the lowest and the highest in brackets.
"""

import argparse
import statistics
import time
from collections import Counter
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import get_args

import numpy as np
import torch
from peft import LoraConfig
from torch.utils.flop_counter import FlopCounterMode

from rdm_rl import RDMConfig, RDMTrainer
from rdm_rl.digits.data import TEACHER_FOLDER
from rdm_rl.digits.students import LORA_RANK, training_prompts
from rdm_rl.networks.roles import Role
from rdm_rl.records import Conditioning

DEFAULT_LOGGING_STEPS = 10
METHODS = (
    ("GNDM", ["rdm"], {}),
    ("GNDM, guided teacher", ["rdm"], {"teacher_guidance_scale": 3.0}),
    ("GNDMR (rdm, ink)", ["rdm", "ink"], {}),
)
SIZES = (1, 2, 4, 8, 16)
SCALES = (
    ("samples", 8, lambda samples: {"per_device_train_batch_size": samples}),
    ("K", 1, lambda steps: {"per_device_train_batch_size": 16, "num_inference_steps": steps}),
)
PICTURE = Path(__file__).parents[1] / "docs" / "images" / "step_cost.png"


def seconds(work):
    """Seconds of the processor that a call takes."""
    start = time.process_time()
    work()
    return time.process_time() - start


def in_turns(works, rounds):
    """For each name, the seconds of its call in each round, after one that does not count."""
    for work in works.values():
        work()
    taken = [{name: seconds(work) for name, work in works.items()} for _ in range(rounds)]
    return {name: [turn[name] for turn in taken] for name in works}


def middle(values, digits=3):
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def ratios(above, below):
    return [first / second for first, second in zip(above, below, strict=True)]


class SteppedTrainer(RDMTrainer):
    """A trainer that makes updates when told to, and counts the passes of the last: who, whether it learns, samples."""

    logs = False

    def begin(self):
        """Make what :meth:`train` makes before the first update."""
        self.state.max_steps = 10_000
        self.create_optimizers()
        self._start_average()
        self.passes = Counter()
        for network in {self.networks.module(role) for role in get_args(Role)}:
            network.register_forward_pre_hook(self._count)
        self.family.decoder.decoder.register_forward_pre_hook(self._count)
        return self

    def _count(self, module, inputs):
        roles = [role for role in get_args(Role) if self.networks.module(role) is module]
        who = "decoder" if not roles else roles[0] if len(roles) == 1 else self.networks._current
        self.passes[who, torch.is_grad_enabled(), len(inputs[0])] += 1

    def is_logging_step(self):
        return self.logs

    def update(self, health=False):
        """One update; ``health`` adds what a logged one measures of the fake score."""
        self.passes = Counter()
        self.logs = health
        self.training_step()
        self.state.global_step += 1

    def bare_pass(self, who, learns, samples):
        """A call that makes one pass and nothing else."""
        told = next(iter(self.prompt_batches(0))).conditioning
        tensors = {name: value.repeat(2, 1, 1)[:samples] for name, value in told.tensors.items()}
        x, t = torch.randn(samples, *self.family.latent_shape), torch.full((samples,), 0.5)
        trained = self.networks.parameters(who) if who in get_args(Role) else [x.requires_grad_(learns)]

        def work():
            with torch.set_grad_enabled(learns):
                if who == "decoder":
                    output = self.family.decode(x)
                else:
                    with self.networks.role(who):
                        output = self.family.forward(self.networks.module(who), x, t, Conditioning(tensors=tensors))
            if learns:
                torch.autograd.grad(output.mean(), trained)

        return work


def make_trainer(folder, rewards=("rdm",), rank=LORA_RANK, model=str(TEACHER_FOLDER), **settings):
    """A trainer of the digits without warm start and warm-up; rank 0 trains all weights."""
    usual = {
        **{"use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "eval_strategy": "no", "sanity_check": False},
        **{"warm_start": "none", "fake_score_warmup_steps": 0, "reward_start_step": 0, "pathwise_steps": "any"},
        **{"per_device_train_batch_size": 64, "num_generations": 8, "teacher_guidance_scale": 1.0},
        "adapter_pass": "added" if rank else "beside",
    }
    args = RDMConfig(output_dir=str(folder), **{**usual, **settings})
    adapters = LoraConfig(r=rank, lora_alpha=rank) if rank else None
    return SteppedTrainer(model, list(rewards), args, training_prompts(), peft_config=adapters).begin()


def overhead(folder, rounds):
    """The passes of each method, and its overhead without and with the fake score's health, as Markdown."""
    print("| method | a pass, samples | in an update | s, alone |\n|---|---|---|---|")
    lines = ["| method | update, s | overhead | with `fake_score/lag` at the default logging |", "|---|---|---|---|"]
    for title, rewards, settings in METHODS:
        trainer = make_trainer(folder, rewards, **settings)
        trainer.update()  # It makes the optimisers' state, and shows what is asked for.
        passes = trainer.passes
        works = {each: trainer.bare_pass(*each) for each in passes}
        logged = partial(trainer.update, health=True)
        taken = in_turns({"update": trainer.update, **works, "logged": logged}, rounds)
        least = [sum(passes[each] * taken[each][turn] for each in passes) for turn in range(rounds)]
        share = 1 / DEFAULT_LOGGING_STEPS
        both = zip(taken["update"], taken["logged"], strict=True)
        mixed = [(1 - share) * plain + share * logged for plain, logged in both]
        cells = (middle(taken["update"]), middle(ratios(taken["update"], least)), middle(ratios(mixed, least)))
        lines.append(f"| {title} | {' | '.join(cells)} |")
        for (who, learns, samples), number in passes.items():
            what = f"{who}, forward{' and backward' if learns else ''}, {samples}"
            print(f"| {title} | {what} | {number} | {middle(taken[who, learns, samples])} |")
        print(*lines, sep="\n", flush=True)


def scaling(folder, rounds):
    """Seconds of an update against the samples and against K, and how far they are from a line; with a picture."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
    print("| of | " + " | ".join(f"{step}x" for step in SIZES) + " | line | furthest from it |")
    print(f"|---|{'---|' * (len(SIZES) + 2)}")
    for axis, (label, first, settings) in zip(axes, SCALES, strict=True):
        trainers = {size: make_trainer(folder, **settings(size * first)) for size in SIZES}
        taken = in_turns({size: trainer.update for size, trainer in trainers.items()}, rounds)
        medians = {size * first: statistics.median(turns) for size, turns in taken.items()}
        line = np.polynomial.Polynomial.fit(*zip(*medians.items(), strict=True), 1, w=[1 / y for y in medians.values()])
        constant, slope = line.convert().coef
        away = max(abs(line(x) / y - 1) for x, y in medians.items())
        cells = " | ".join(middle(turns, 2) for turns in taken.values())
        print(f"| {label} = {first} | {cells} | {constant:.2f} + {slope:.3f} {label} | {away:.0%} |")
        axis.plot(*zip(*medians.items(), strict=True), "o")
        axis.plot(list(medians), [line(x) for x in medians], color="grey", linewidth=0.8)
        axis.set(xlabel=label, ylabel="s of an update", xlim=(0, None), ylim=(0, None))
        axis.grid(alpha=0.3)
    figure.savefig(PICTURE, dpi=80)


def adapters(folder, rounds):
    """Passes with adapters beside their layers and added to the weights, against none: time and arithmetic."""
    plain = make_trainer(folder, rank=0)
    works = {"no adapters": plain.bare_pass("teacher", False, 64)}
    for rank in (1, LORA_RANK, 64):
        for how in ("beside", "added"):
            trainer = make_trainer(folder, rank=rank, adapter_pass=how)
            works[f"rank {rank}, {how}"] = trainer.bare_pass("policy", False, 64)
            if rank == LORA_RANK:
                works[f"adapters off, {how}"] = trainer.bare_pass("teacher", False, 64)
                works[f"rank {rank}, {how}, and backward"] = trainer.bare_pass("policy", True, 64)
    counted = {}
    for name, work in works.items():
        with FlopCounterMode(display=False) as counter:
            work()
        counted[name] = counter.get_total_flops()
    taken = in_turns(works, rounds)
    print("| forward pass of 64 | s | / without | arithmetic / without |\n|---|---|---|---|")
    for name, turns in taken.items():
        arithmetic = counted[name] / counted["no adapters"]
        print(f"| {name} | {middle(turns)} | {middle(ratios(turns, taken['no adapters']), 2)} | {arithmetic:.2f} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    questions = {part.__name__: part for part in (overhead, scaling, adapters)}
    parser.add_argument("question", choices=questions)
    parser.add_argument("--rounds", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        questions[options.question](folder, options.rounds)


if __name__ == "__main__":
    main()
