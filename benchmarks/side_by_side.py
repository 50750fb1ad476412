"""An update beside what a user would pick instead, with the same networks, batch and machine, in one run.

    python benchmarks/side_by_side.py              # time: the embedded digits, 64 samples, K=4
    python benchmarks/side_by_side.py --memory     # peak memory: a U-Net of 48 M parameters, 2 samples, K=4
    PYTHONPATH=FOLDER python benchmarks/side_by_side.py    # with modelopt, after: pip install --target FOLDER \\
                                                           #   --no-deps nvidia-modelopt omegaconf ... (what it misses)

*Textbook* is DMD2's loop as its paper has it: student, teacher and fake score are three networks, the fake score is
trained a few times, and then the student; with all weights or with adapters in both trained networks. *modelopt* is
NVIDIA's ``modelopt.torch.fastgen``, driven by the loop of its documentation; it is for rectified flow, so the network
is told another schedule, at the same cost, and each update of its fake score is on new samples. *LCM* is the step of
diffusers' script for latent consistency, the least that a distillation by the teacher's predictions costs. None of the
three uses this library.

Passes count a forward pass of the batch as 1, and 3 if a backward pass follows. Ratios are within a round.

Memory is what processes of their own take: once with what is freed given back, which is what a loop holds and
``rdm-rl plan`` counts, and once with the C library as it comes, which keeps part of what is freed.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
from functools import partial
from typing import get_args

import psutil
import torch
from contenders import ConsistencyScript, Contender, Modelopt, Textbook
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from step_cost import in_turns, make_trainer, middle, ratios

from rdm_rl.cli.plan.report import make_plan
from rdm_rl.cli.plan.skeleton import read_blueprint
from rdm_rl.cli.train import TrainArguments
from rdm_rl.digits.data import TEACHER_FOLDER
from rdm_rl.digits.students import LORA_RANK
from rdm_rl.networks.roles import Role

GIB = 2**30
# The C library's own threshold at the start, above which what is freed goes back to the system. Set, it stays; else it
# grows to 32 MiB, and smaller tensors lie on a heap that keeps the holes between them.
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "131072"}
LARGE, SMALL = ("5.5", "32"), ("1", "8")  # The U-Net's width and the latents' side.


def ours(pipeline, batch, lora, steps=4, fake_updates=2, **settings):
    """This library's trainer, with its default number of updates of the fake score."""
    settings |= {"per_device_train_batch_size": batch, "num_generations": min(batch, 8), "num_inference_steps": steps}
    settings["fake_score_updates_per_policy_update"] = fake_updates
    return make_trainer("unused", rank=LORA_RANK if lora else 0, model=pipeline, **settings)


# What is made, how, and what it is compared with. The first of each group is this library's.
GROUPS = {
    "adapters, the same passes": {
        "ours": partial(ours, lora=True),
        "textbook": partial(Textbook, lora=True),
        "modelopt": partial(Modelopt, lora=True),
        "LCM, the floor": partial(ConsistencyScript, lora=True),
    },
    "all weights, the same passes": {
        "ours": partial(ours, lora=False),
        "textbook": partial(Textbook, lora=False),
        "modelopt": partial(Modelopt, lora=False),
        "LCM, the floor": partial(ConsistencyScript, lora=False),
    },
    "adapters, each at its defaults": {
        "ours": partial(ours, lora=True),
        "textbook, 5 fake-score updates, each on new samples": partial(Textbook, lora=True, fake_updates=5, anew=True),
    },
    "adapters, one step, each at its defaults": {
        "ours": partial(ours, lora=True, steps=1),
        "modelopt, 4 fake-score updates": partial(Modelopt, lora=True, steps=1, fake_updates=4),
    },
}
# Of a larger network, adapters stay beside the layers, as is the default.
MEMORY = {
    "adapters": {**GROUPS["adapters, the same passes"], "ours": partial(ours, lora=True, adapter_pass="beside")},
    "all weights": {
        **GROUPS["all weights, the same passes"],
        "ours, without an averaged student, as the others": partial(ours, lora=False, ema_decay=0.0),
    },
}


def without_missing(group):
    """The contenders that are installed here."""
    try:
        import modelopt.torch.fastgen  # noqa: F401
    except ImportError:
        return {name: make for name, make in group.items() if not name.startswith("modelopt")}
    return group


def passes_of(networks, batch, work):
    """What a call costs in forward passes of the batch."""
    seen = []

    def count(module, inputs, named):
        x = inputs[0] if inputs else named["hidden_states"]
        seen.append((3 if torch.is_grad_enabled() else 1) * len(x) / batch)

    hooks = [network.register_forward_pre_hook(count, with_kwargs=True) for network in networks]
    work()
    for hook in hooks:
        hook.remove()
    return sum(seen)


def times(batch, rounds):
    """The table of each group, as Markdown."""
    print("| group | update of | passes | s | ours / it |\n|---|---|---|---|---|")
    for title, group in GROUPS.items():
        made = {name: make(load(), batch) for name, make in without_missing(group).items()}
        counts = {name: [] for name in made}

        def counted(name, contender, counts=counts):
            counts[name].append(passes_of(networks_of(contender), batch, contender.update))

        taken = in_turns({name: partial(counted, name, contender) for name, contender in made.items()}, rounds)
        for name, turns in taken.items():
            passes = statistics.mean(counts[name][1:])
            print(
                f"| {title} | {name} | {passes:.3g} | {middle(turns, 2)} | {middle(ratios(taken['ours'], turns), 2)} |"
            )


def networks_of(contender):
    """The modules of a contender's roles, each once."""
    if isinstance(contender, Contender):
        return contender.networks
    return dict.fromkeys(contender.networks.module(role) for role in get_args(Role))


def widened(config, width, sample_size):
    """A U-Net's configuration, so many times as wide."""
    channels = [round(width * channels / 8) * 8 for channels in config["block_out_channels"]]
    return {**config, "sample_size": sample_size, "block_out_channels": channels}


def load(width=1, sample_size=None):
    """The digits' pipeline, or one with a random U-Net that is so many times as wide."""
    pipeline = StableDiffusionPipeline.from_pretrained(TEACHER_FOLDER)
    if width != 1:
        pipeline.unet = UNet2DConditionModel.from_config(widened(pipeline.unet.config, width, sample_size))
    return pipeline


def peak(title, name, width, sample_size, batch):
    """The most that this process has in memory after two updates, less what it had before, and what the plan says."""
    width, sample_size = float(width), int(sample_size)
    before = psutil.Process().memory_info().rss
    contender = MEMORY[title][name](load(width, sample_size), int(batch))
    for _ in range(2):
        contender.update()
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    return most, 0 if isinstance(contender, Contender) else planned(title, contender.args, width, sample_size)


def planned(title, args, width, sample_size):
    """What ``rdm-rl plan`` says of our trainer's settings."""
    model = read_blueprint(TEACHER_FOLDER)
    arguments = {"model_name_or_path": "", "dataset": "digits", "lora_r": LORA_RANK, "full": title == "all weights"}
    model["unet"] = widened(model["unet"], width, sample_size)
    return make_plan(model, TrainArguments(**arguments), args).peak


def peak_of_process(*arguments, gives_back=True):
    """:func:`peak` in a process of its own."""
    process = [sys.executable, __file__, "--peak", *arguments]
    environment = os.environ | (GIVES_BACK if gives_back else {})
    return json.loads(subprocess.run(process, check=True, stdout=subprocess.PIPE, env=environment).stdout)


def memory(batch):
    """The peak of each contender less its peak with the digits' own U-Net (code, mostly), as Markdown."""
    print("| group | update of | peak, GiB | ours / it | plan / it | with holes, GiB |\n|---|---|---|---|---|---|")
    for title, group in MEMORY.items():
        peaks = {}
        for name in without_missing(group):
            (least, small_plan), (most, large_plan) = (
                peak_of_process(title, name, *size, str(batch)) for size in (SMALL, LARGE)
            )
            holes, _ = peak_of_process(title, name, *LARGE, str(batch), gives_back=False)
            peaks[name], plan = most - least, large_plan - small_plan
            print(
                f"| {title} | {name} | {peaks[name] / GIB:.2f} | {peaks['ours'] / peaks[name]:.2f} "
                f"| {f'{plan / peaks[name]:.3f}' if plan else ''} | {(holes - least) / GIB:.2f} |",
                flush=True,
            )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, help="samples: 64, and 2 for memory, if it is not said")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--peak", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.peak:
        print(json.dumps(peak(*options.peak)))
    elif options.memory:
        memory(options.batch or 2)
    else:
        times(options.batch or 64, options.rounds)


if __name__ == "__main__":
    main()
