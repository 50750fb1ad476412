"""Memory and time of a reward's gradient at the latents, through a decoder of Stable Diffusion's size.

    python benchmarks/reward_gradient.py                     # about 5 minutes on 2 cores
    python benchmarks/reward_gradient.py --device cuda --size 64 --samples 16

The decoder has random weights, which change neither figure. Every arm runs in a process of its own; its figure is the
peak above what the process held with the decoder loaded. All arms must give the same gradient, except the tiny decoder,
which is another network.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from diffusers import AutoencoderKL, AutoencoderTiny

from rdm_rl.records import Conditioning, PromptBatch, Rollout
from rdm_rl.rewards.images import ImageDecoder, load_tiny_decoder
from rdm_rl.trainers.loop import peak_memory_gib

ARMS = {
    "all at once": {"at_once": 0},
    "2 at a time": {"at_once": 2},
    "1 at a time": {"at_once": 1},
    "1 at a time, checkpointing": {"at_once": 1, "checkpointing": True},
    "tiny decoder, all at once": {"at_once": 0, "tiny": True},
}


def make_decoder(tiny, checkpointing, device):
    torch.manual_seed(0)
    if tiny:
        with TemporaryDirectory() as folder:
            AutoencoderTiny().save_pretrained(folder)
            return load_tiny_decoder(folder, 4, device, checkpointing=checkpointing)
    channels = (128, 256, 512, 512)
    vae = AutoencoderKL(
        block_out_channels=channels,
        layers_per_block=2,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
    )
    vae = vae.eval().requires_grad_(False).to(device)
    if checkpointing:
        vae.enable_gradient_checkpointing()
    return lambda x_0: (vae.decode(x_0, return_dict=False)[0] * 0.5 + 0.5).clamp(0, 1)


def run_arm(options):
    device = torch.device(options.device)
    settings = {"at_once": 0, "tiny": False, "checkpointing": False} | ARMS[options.arm]
    decode = make_decoder(settings["tiny"], settings["checkpointing"], device)
    decoder = ImageDecoder(decode, settings["at_once"] or options.samples)
    generator = torch.Generator().manual_seed(1)
    x_0 = torch.randn(options.samples, 4, options.size, options.size, generator=generator).to(device)
    batch = PromptBatch(
        prompts=["a"] * options.samples,
        conditioning=Conditioning(),
        group_ids=torch.zeros(options.samples, dtype=torch.int64),
        sample_ids=range(options.samples),
    )
    rollout = Rollout(batch=batch, times=torch.ones(1), states=x_0[None], x_0=x_0[None])
    before, start = peak_memory_gib(device), time.perf_counter()
    images = decoder.images(rollout)
    gradient = decoder.pull_back(x_0, torch.full_like(images, 1 / images[0].numel()))  # Of the images' mean.
    seconds = time.perf_counter() - start
    return {
        "gib": peak_memory_gib(device) - before,
        "seconds": seconds,
        "gradient": gradient.double().norm().item(),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", type=int, default=24, help="height and width of the latents; images are 8 times that")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--arm", choices=sorted(ARMS), help="run one arm and print its figures as JSON")
    options = parser.parse_args()
    if options.arm:
        print(json.dumps(run_arm(options)))
        return
    figures = {}
    for arm in ARMS:
        command = [sys.executable, str(Path(__file__)), "--arm", arm, "--device", options.device]
        command += ["--size", str(options.size), "--samples", str(options.samples)]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        figures[arm] = json.loads(output.splitlines()[-1])
    first = figures["all at once"]
    print(f"{options.samples} latents of {options.size} x {options.size} on {options.device}\n")
    print("| decoding | peak memory | ratio | time ratio | gradient's norm |\n|---|---|---|---|---|")
    for arm, figure in figures.items():
        ratios = f"{figure['gib'] / first['gib']:.2f} | {figure['seconds'] / first['seconds']:.2f}"
        print(f"| {arm} | {figure['gib']:.2f} GiB | {ratios} | {figure['gradient']:.6g} |")


if __name__ == "__main__":
    main()
