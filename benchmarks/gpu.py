"""Full-size dry runs on a GPU: time, memory against the plan, finite losses in bfloat16, an adapter that loads again.

    python benchmarks/gpu.py                               # SD1.5, SDXL, SD3.5-Medium and FLUX.1-dev, 10 updates each
    python benchmarks/gpu.py --models sd15 sdxl            # some of them
    python benchmarks/gpu.py --tiny --output_dir /tmp/out  # the same path with tiny networks, on the CPU as well

What is real: the classes and sizes of denoising network and decoder (rdm_rl.cli.plan.model_sizes), the trainer with all
of its phases (rollout, fake score, teacher with guidance, a reward's gradient through the decoder, policy), adapters,
optimisers, the average, activation checkpointing, saving, and loading with stock diffusers. What is not: the weights
are random, so images and losses mean nothing; there are no text encoders, and each prompt is a random embedding of the
right shape (in a real run they are in the prompt cache); the reward is the mean brightness, so no reward model takes
memory.

On the CPU torch's profiler says what was allocated and freed; the run is then in float32.
"""

import argparse
import gc
import json
import math
import statistics
import time
from contextlib import contextmanager
from datetime import date
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory
from zlib import crc32

import torch
from peft import LoraConfig, get_peft_model_state_dict
from torch.profiler import ProfilerActivity, profile

from rdm_rl import RDMConfig, RDMTrainer
from rdm_rl.cli.plan.memory import GIB
from rdm_rl.cli.plan.model_sizes import MODELS
from rdm_rl.cli.plan.passes import encoded_prompts
from rdm_rl.cli.plan.report import make_plan
from rdm_rl.cli.plan.skeleton import make_skeleton
from rdm_rl.cli.train import TrainArguments
from rdm_rl.families import FAMILIES, load_family, register_family
from rdm_rl.records import Conditioning

# Older transformers know the second name only.
CHECKPOINTING = (
    "activation_checkpointing" if hasattr(RDMConfig, "activation_checkpointing") else "gradient_checkpointing"
)
RANK = 64
# Samples at once: what fits an 80 GB card with room to spare.
BATCH = {"sd15": 8, "sdxl": 4, "sd35-medium": 4, "flux-dev": 2}
REPORT = Path(__file__).with_suffix(".md")
TABLE = ("<!-- table -->", "<!-- end of table -->")
WARM_UP = 2  # Updates that the step time leaves out.
# Phases of the plan by what is measured.
MEASURED = {
    "rollout": ("rollout",),
    "fake-score update": ("fake-score update", "optimiser step"),
    "rewards": ("teacher and fake score", "reward images", "reward gradient"),
    "policy update": ("policy update", "optimiser step"),
}

_TINY_VAE = {
    **{"block_out_channels": [8, 16], "norm_num_groups": 8, "layers_per_block": 1},
    **{"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2},
}
_TINY_CLIP = {
    **{"vocab_size": 100, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1},
    **{"num_attention_heads": 2, "projection_dim": 32},
}
_TINY_T5 = {"vocab_size": 100, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
# What --tiny changes: sizes, nothing else.
TINY = {
    "sd15": {
        "unet": {
            **{"sample_size": 8, "block_out_channels": [16, 32], "layers_per_block": 1, "cross_attention_dim": 32},
            **{"attention_head_dim": 2, "norm_num_groups": 8},
            **{"down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"]},
            **{"up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"]},
        },
        "vae": _TINY_VAE,
        "text_encoder": _TINY_CLIP,
    },
    "sdxl": {
        "unet": {
            **{"sample_size": 8, "block_out_channels": [16, 32], "layers_per_block": 1, "cross_attention_dim": 64},
            **{"attention_head_dim": [2, 4], "transformer_layers_per_block": [1, 2], "norm_num_groups": 8},
            **{"down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"]},
            **{"up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"]},
            **{"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 6 * 8 + 32},
        },
        "vae": _TINY_VAE,
        "text_encoder": _TINY_CLIP,
        "text_encoder_2": _TINY_CLIP,
    },
    "sd35-medium": {
        "transformer": {
            **{"sample_size": 8, "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2},
            **{"joint_attention_dim": 32, "caption_projection_dim": 32, "pooled_projection_dim": 64},
            **{"pos_embed_max_size": 12, "dual_attention_layers": [0]},
        },
        "vae": _TINY_VAE,
        "text_encoder": _TINY_CLIP,
        "text_encoder_2": _TINY_CLIP,
        "text_encoder_3": _TINY_T5,
    },
    "flux-dev": {
        "transformer": {
            **{"num_layers": 1, "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2},
            **{"joint_attention_dim": 32, "pooled_projection_dim": 32, "axes_dims_rope": [4, 6, 6]},
        },
        "vae": _TINY_VAE,
        "text_encoder": _TINY_CLIP,
        "text_encoder_2": _TINY_T5,
    },
}


def brightness(images, prompts):
    """The mean grey level."""
    return images.mean((1, 2, 3))


brightness.differentiable = True


def blueprint_of(name, tiny):
    """What the model is made of."""
    changes = TINY[name] if tiny else {}
    return {
        key: {**entry, **changes.get(key, {})} if isinstance(entry, dict) else entry
        for key, entry in MODELS[name].items()
    }


def without_text_encoders(blueprint):
    """The blueprint without them, and its family with random embeddings of the right shapes for encoded prompts."""
    kind = FAMILIES[blueprint["_class_name"]]
    shapes = encoded_prompts(load_family(make_skeleton(blueprint, torch.bfloat16)), 1).tensors

    def encode_prompts(self, prompts):
        rows = {name: [] for name in shapes}
        for prompt in prompts:
            generator = torch.Generator().manual_seed(crc32(prompt.encode()))
            for name, like in shapes.items():
                rows[name].append(torch.randn(like.shape[1:], generator=generator))
        return Conditioning(
            tensors={name: torch.stack(row).to(self.device, shapes[name].dtype) for name, row in rows.items()}
        )

    changed = type(kind.__name__, (kind,), {"text_encoder_names": (), "encode_prompts": encode_prompts})
    rest = {key: entry for key, entry in blueprint.items() if not key.startswith("text_encoder")}
    return rest, changed


def random_pipeline(blueprint, device, seed=0):
    """The pipeline with random weights, made where they are used."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        return make_skeleton(blueprint, torch.bfloat16 if device.type == "cuda" else torch.float32, device)


def live_tensors():
    """All tensors of this process."""
    return [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)]


@contextmanager
def allocated():
    """The most that the CPU's allocator held at once beside what was there, in a list, after the context."""
    most = []
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield most
    with TemporaryDirectory() as folder:
        profiler.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text(encoding="utf-8"))["traceEvents"]
    sizes = [(event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]"]
    most.append(max(accumulate(size for _, size in sorted(sizes)), default=0))


class Meter:
    """The peak memory of phases, in bytes: what was there before, and the most beside it.

    On a CPU, ``others`` are tensors that do not belong to the run.
    """

    def __init__(self, device, others):
        self.device, self.phases, self.others = device, {}, others

    @contextmanager
    def phase(self, name):
        """Measure what happens within."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            yield
            torch.cuda.synchronize(self.device)
            working = torch.cuda.max_memory_allocated(self.device) - before
        else:
            existing, foreign = live_tensors(), {tensor.data_ptr() for tensor in self.others}
            sizes = {tensor.data_ptr(): tensor.untyped_storage().nbytes() for tensor in existing}
            before = sum(size for place, size in sizes.items() if place not in foreign)
            with allocated() as most:
                yield
            working = most[0]
        known = self.phases.get(name, (0, 0))
        self.phases[name] = max(known[0], before), max(known[1], working)


class MeasuredTrainer(RDMTrainer):
    """A trainer that measures its phases and its updates."""

    others = ()

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.meter, self.seconds, self.numbers = Meter(self.device, self.others), [], []

    def generate_rollout(self, batch):
        with self.meter.phase("rollout"):
            return super().generate_rollout(batch)

    def compute_rewards(self, rollout, step):
        with self.meter.phase("rewards"):
            return super().compute_rewards(rollout, step)

    def _update_fake_score(self, *args):
        with self.meter.phase("fake-score update"):
            return super()._update_fake_score(*args)

    def _update_policy(self):
        with self.meter.phase("policy update"):
            return super()._update_policy()

    def training_step(self):
        start = time.perf_counter()
        metrics = super().training_step()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds.append(time.perf_counter() - start)
        if len(self.seconds) == 1:  # The first update also makes the optimisers' state, which then stays.
            self.meter.phases.clear()
        self.numbers.append(metrics)
        return metrics


def settings_of(folder, *, tiny, updates, count, use_cpu):
    return RDMConfig(
        output_dir=str(folder),
        use_cpu=use_cpu,
        bf16=not use_cpu,
        **{CHECKPOINTING: True},
        resolution=16 if tiny else None,
        max_steps=updates,
        per_device_train_batch_size=count,
        num_generations=count // 2,
        decode_batch_size=1,
        fake_score_updates_per_policy_update=2,
        fake_score_warmup_steps=0,
        sanity_check=False,
        teacher_guidance_scale=3.0,
        warm_start="none",
        pathwise_steps="any",
        learning_rate=1e-4,
        reward_start_step=2,
        reward_weights=[1.0, 0.3],
        logging_steps=updates,
        save_strategy="no",
        disable_tqdm=True,
        offload=["text_encoders"],
    )


def dry_run(name, *, tiny, updates, folder, use_cpu):
    """One model's figures."""
    full = blueprint_of(name, tiny)
    blueprint, family = without_text_encoders(full)
    count = 4 if tiny else BATCH[name]
    args = settings_of(folder / name, tiny=tiny, updates=updates, count=count, use_cpu=use_cpu)
    rewards = ["rdm", f"{__file__}:brightness"]
    arguments = TrainArguments(model_name_or_path="", dataset="", reward_funcs=rewards, lora_r=RANK)
    plan = make_plan(full, arguments, args)

    known = FAMILIES[blueprint["_class_name"]]
    register_family(blueprint["_class_name"], family)
    try:
        device = args.device
        MeasuredTrainer.others = live_tensors() if tiny else ()
        trainer = MeasuredTrainer(
            random_pipeline(blueprint, device),
            rewards,
            args,
            [{"prompt": f"prompt {number}"} for number in range(16)],
            peft_config=LoraConfig(r=RANK, lora_alpha=RANK),
        )
        trainer.train()
        trainer.save_model()
        losses = [step[key] for step in trainer.numbers for key in ("policy/loss", "fake_score/loss")]
        with trainer.averaged_policy():  # What save_model wrote.
            saved = {key: value.to("cpu", copy=True) for key, value in trainer.networks.export()[0].items()}
        phases, seconds = trainer.meter.phases, trainer.seconds[WARM_UP:] or trainer.seconds
        moved = any(value.any() for key, value in saved.items() if "lora_B" in key)
        del trainer
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        reloads = loads_again(random_pipeline(blueprint, device), family.network_name, folder / name, saved)
    finally:
        MeasuredTrainer.others = ()
        register_family(blueprint["_class_name"], known)
    return {
        "model": name,
        "samples": count,
        "image": plan.title.split("images of ")[1].split(",")[0],
        "seconds": statistics.median(seconds),
        "finite": all(map(math.isfinite, losses)),
        "moved": moved,
        "reloads": reloads,
        "phases": {phase: measured_and_planned(phases[phase], plan, parts) for phase, parts in MEASURED.items()},
    }


def measured_and_planned(measured, plan, parts):
    planned = [plan.phases[part] for part in parts if part in plan.phases]
    return {
        "before": measured[0],
        "working": measured[1],
        "planned_before": max(phase.stays for phase in planned),
        "planned_working": max(phase.working for phase in planned),
    }


def loads_again(pipeline, network_name, folder, saved):
    """Whether stock diffusers gives a fresh pipeline the adapter that was saved, weight by weight."""
    pipeline.load_lora_weights(str(folder), weight_name="pytorch_lora_weights.safetensors", adapter_name="student")
    weights = get_peft_model_state_dict(getattr(pipeline, network_name), adapter_name="student")
    return weights.keys() == saved.keys() and all(
        torch.equal(value.cpu(), saved[key].to(value.dtype)) for key, value in weights.items()
    )


def report(results, device):
    """The table, as Markdown."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU, float32, by torch's profiler"
    lines = [
        f"Measured on {date.today().isoformat()}, {gpu}, torch {torch.__version__}. Memory in GiB; "
        "*plan* is `rdm-rl plan` for the same settings.",
        "",
        "| model | images | samples | s per update | peak | plan | peak / plan | finite losses | adapter loads |",
        "|---|---|---:|---:|---:|---:|---:|---|---|",
    ]
    details = ["", "| model | phase | before | plan | working | plan |", "|---|---|---:|---:|---:|---:|"]
    for result in results:
        measured = max(phase["before"] + phase["working"] for phase in result["phases"].values())
        planned = max(phase["planned_before"] + phase["planned_working"] for phase in result["phases"].values())
        lines.append(
            f"| {result['model']} | {result['image']} | {result['samples']} | {result['seconds']:.2f} "
            f"| {measured / GIB:.2f} | {planned / GIB:.2f} | {measured / planned:.2f} "
            f"| {'yes' if result['finite'] else 'NO'} | {'yes' if result['reloads'] else 'NO'} |"
        )
        for name, phase in result["phases"].items():
            figures = (phase[key] / GIB for key in ("before", "planned_before", "working", "planned_working"))
            details.append(f"| {result['model']} | {name} | " + " | ".join(f"{value:.2f}" for value in figures) + " |")
    return "\n".join([*lines, *details])


def main(words=None):
    """Run, print, and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--models", nargs="+", choices=list(BATCH), default=list(BATCH))
    parser.add_argument("--updates", type=int, default=10)
    parser.add_argument("--tiny", action="store_true", help="tiny networks; the report is only printed")
    parser.add_argument("--output_dir", type=Path, default=Path("gpu-dry-runs"))
    options = parser.parse_args(words)
    use_cpu = not torch.cuda.is_available()
    if use_cpu and not options.tiny:
        raise SystemExit("There is no GPU here. --tiny goes through the same code with tiny networks on the CPU.")
    options.output_dir.mkdir(parents=True, exist_ok=True)
    results = []
    for name in options.models:
        torch.manual_seed(0)
        results.append(
            dry_run(name, tiny=options.tiny, updates=options.updates, folder=options.output_dir, use_cpu=use_cpu)
        )
        (options.output_dir / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        table = report(results, torch.device("cpu" if use_cpu else "cuda"))
        print(table, flush=True)
        if not options.tiny:
            text = REPORT.read_text(encoding="utf-8")
            first, _, rest = text.partition(TABLE[0])
            REPORT.write_text(
                f"{first}{TABLE[0]}\n\n{table}\n\n{TABLE[1]}{rest.partition(TABLE[1])[2]}", encoding="utf-8"
            )
    return results


if __name__ == "__main__":
    main()
