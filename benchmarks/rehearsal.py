"""A full-size rehearsal without a GPU: Stable Diffusion 1.5 with random weights, from the script to stock diffusers.

    python benchmarks/rehearsal.py --folder rehearsal          # 859 M parameters, 256 px: minutes an update
    python benchmarks/rehearsal.py --folder rehearsal --quick  # the same steps with a tiny pipeline: seconds

It makes the pipeline and its folder, runs ``examples/sd15_gndmr.py`` for 2 updates on the CPU in float32, writes the
student also in kohya's form with ``rdm-rl export``, loads both into a stock pipeline, checks that they change what the
network predicts, both alike, and compares the run's peak with what ``rdm-rl plan`` says of the same settings. (In
bfloat16 a processor without its instructions takes a hundred times as long.)

The run's peak is the most that its process had in memory, less what it had after the imports; the plan counts what the
allocator gives, so that the two agree only about: read from disk, the weights may be in memory twice for a moment.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from transformers import CLIPTokenizer

from rdm_rl.cli.plan.memory import GIB
from rdm_rl.cli.plan.model_sizes import MODELS, Blueprint
from rdm_rl.cli.plan.skeleton import make_skeleton

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = (
    "--reward_funcs rdm symmetry --reward_weights 1 0.2 --reward_start_step 0 "
    "--num_inference_steps 2 --teacher_guidance_scale 1 "
    "--lora_r 16 --per_device_train_batch_size 2 --num_generations 2 --gradient_accumulation_steps 1 --max_steps 2 "
    "--fake_score_updates_per_policy_update 1 --fake_score_warmup_steps 0 --warm_start none --bf16 false "
    "--activation_checkpointing false --eval_strategy no --eval_on_start false --save_strategy no --logging_steps 1 "
    "--sanity_check false --disable_tqdm true"
).split()
# Runs a script with its arguments, and says what its process had in memory: after the imports, and at most.
MEASURED = """
import json, psutil, resource, runpy, sys
import rdm_rl.trainers.rdm_trainer, rdm_rl.cli.train, diffusers
diffusers.StableDiffusionPipeline, diffusers.UNet2DConditionModel, diffusers.AutoencoderKL
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
imports, report, sys.argv = psutil.Process().memory_info().rss, sys.argv[1], sys.argv[2:]  # Its peak is the parent's.
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    json.dump({"imports": imports, "peak": peak()}, open(report, "w"))
"""


def tiny() -> Blueprint:
    """A blueprint of the same classes, small."""
    blocks = {
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    }
    vae = {
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "block_out_channels": [8, 16],
    }
    sd15 = MODELS["sd15"]
    return {
        **sd15,
        "unet": {**sd15["unet"], **blocks, "sample_size": 8, "block_out_channels": [32, 64], "cross_attention_dim": 32}
        | {"attention_head_dim": 2, "layers_per_block": 1},
        "vae": {**sd15["vae"], **vae, "norm_num_groups": 8},
        "text_encoder": {**sd15["text_encoder"], "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
        | {"num_hidden_layers": 2, "projection_dim": 32},
    }


def tokenizer(folder: Path) -> CLIPTokenizer:
    """A tokenizer of characters with CLIP's special tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    characters = [chr(code) for code in range(33, 127)]
    words = [*characters, *(f"{character}</w>" for character in characters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)


def make_base(folder: Path, blueprint: Blueprint) -> None:
    """Save a pipeline with random weights."""
    torch.manual_seed(0)
    pipeline = make_skeleton(blueprint, device="cpu")
    pipeline.tokenizer = tokenizer(folder / "words")
    pipeline.save_pretrained(folder / "base")


def run(*words: object) -> None:
    """Run a command of this interpreter, with its output shown."""
    print("$ python", *(word for word in words if "\n" not in str(word)), flush=True)
    subprocess.run([sys.executable, *map(str, words)], check=True, cwd=ROOT)


@torch.no_grad()
def prediction(base: Path, adapter: Path | None) -> torch.Tensor:
    """What a stock pipeline's network predicts, with an adapter or without."""
    pipeline = DiffusionPipeline.from_pretrained(base)
    if adapter is not None:
        pipeline.load_lora_weights(str(adapter.parent), weight_name=adapter.name)
    config = pipeline.unet.config
    noise = torch.randn(1, config.in_channels, 32, 32, generator=torch.Generator().manual_seed(0))
    return pipeline.unet(noise, 500, torch.ones(1, 77, config.cross_attention_dim)).sample


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where everything is written; must be new or empty")
    parser.add_argument("--quick", action="store_true", help="a tiny pipeline instead of the full size")
    options = parser.parse_args()
    folder: Path = options.folder.resolve()
    if folder.is_dir() and any(folder.iterdir()):
        parser.error(f"--folder {folder} is not empty.")
    base, student, kohya = folder / "base", folder / "student", folder / "kohya.safetensors"
    make_base(folder, tiny() if options.quick else MODELS["sd15"])
    size = ["--resolution", "16" if options.quick else "256"]
    script, config = ROOT / "examples" / "sd15_gndmr.py", ROOT / "examples" / "sd15_gndmr.yaml"
    words = [*SETTINGS, *size, "--output_dir", student]
    run("-c", MEASURED, folder / "memory.json", script, "--model_name_or_path", base, "--use_cpu", "true", *words)
    run("-m", "rdm_rl.cli.main", "export", student, "--model", base, "--format", "kohya", "--output", kohya)
    plan = folder / "plan.json"
    run("-m", "rdm_rl.cli.main", "plan", "--model", base, "--config", config, "--json", plan, *words)

    plain = prediction(base, None)
    drawn = [prediction(base, file) for file in (student / "pytorch_lora_weights.safetensors", kohya)]
    change, difference = (plain - drawn[0]).abs().max().item(), (drawn[0] - drawn[1]).abs().max().item()
    print(f"\nIn stock diffusers the student changes the prediction by at most {change:.2g}; kohya's form differs from")
    print(f"it by at most {difference:.2g}.")
    memory = json.loads((folder / "memory.json").read_text())
    used, planned = memory["peak"] - memory["imports"], json.loads(plan.read_text())["peak"]
    print(f"Peak of the run {used / GIB:.2f} GiB beside {memory['imports'] / GIB:.2f} GiB of imports; planned")
    print(f"{planned / GIB:.2f} GiB: {used / planned:.2f} of the plan.")
    if not change > 0 or difference > 1e-4 * plain.abs().max().item():
        sys.exit("The files do not hold one student that does something.")


if __name__ == "__main__":
    main()
