"""Train the embedded teacher of the digits: a tiny text-to-image Stable Diffusion of handwritten digits, from scratch.

    python examples/train_digits_teacher.py --output_dir rdm_rl/digits

It writes what the package ships: ``digits.npz`` (made from scikit-learn's copy of the data, the only place where
scikit-learn is needed), ``networks.safetensors`` (the evaluation networks A, B and C), ``reward_network.safetensors``
(network D, which rewards and never evaluates; A, B and C never reward) and ``teacher/`` (a plain
``StableDiffusionPipeline`` folder). Cost: about half an hour on one CPU core with bf16 instructions, several times that
without. Every stage is skipped when its file exists, so a single one is rebuilt by deleting its file; with
another number of threads the rebuilt recognisers differ by rounding (3e-6 seen). ``--report`` prints the quality
figures of what is there.

The recipe: images 8x8 enlarged to 32x32; an autoencoder to 4x8x8 latents; a U-Net that predicts v under a
variance-preserving schedule with zero terminal signal-to-noise ratio (so that the first student step, which starts
from pure noise, sees exactly what the network was trained on); a CLIP text encoder trained jointly, with a vocabulary
of whole words for the known phrasings and single characters for anything else; 10 % of prompts are emptied for
classifier-free guidance; the averaged weights are kept.
"""

import argparse
import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from tqdm import trange
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from rdm_rl.digits.data import (
    DIGIT_WORDS,
    PROMPT_TEMPLATES,
    Digits,
    balanced_prompts,
    digit_prompts,
    load_digits,
)
from rdm_rl.digits.recognisers import WIDTHS, DigitNetwork, digit_accuracy, digit_features
from rdm_rl.digits.rewards import REWARD_NETWORK_WIDTH
from rdm_rl.evaluation.distances import frechet_distance, manifold_metrics

HELD_OUT_PER_DIGIT = 50
PROMPT_LENGTH = 16
EMPTY_PROMPT_SHARE = 0.1


def build_data(file: Path) -> None:
    """Write the images, labels and a stratified split (50 held-out images of each digit) from scikit-learn's copy."""
    from sklearn.datasets import load_digits as load_original

    original = load_original()
    generator = np.random.default_rng(0)
    held_out = np.zeros(len(original.target), dtype=bool)
    for digit in range(10):
        held_out[generator.permutation(np.flatnonzero(original.target == digit))[:HELD_OUT_PER_DIGIT]] = True
    np.savez_compressed(
        file, images=original.images.astype(np.uint8), labels=original.target.astype(np.uint8), held_out=held_out
    )


def jitter(images: Tensor, generator: torch.Generator) -> Tensor:
    """Randomly shifted, turned and scaled copies, so that the recognisers learn digits and not single images."""
    count = len(images)
    angle, scale = (torch.randn(count, generator=generator) * 0.08, 1 + torch.randn(count, generator=generator) * 0.06)
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = scale * angle.cos()
    theta[:, 0, 1], theta[:, 1, 0] = -scale * angle.sin(), scale * angle.sin()
    theta[:, :, 2] = torch.randn(count, 2, generator=generator) * 0.06
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def train_network(name: str, index: int, width: int, digits: Digits, steps: int) -> dict[str, Tensor]:
    """Train one recogniser with the seeds of its index and return its weights."""
    torch.manual_seed(100 + index)
    generator = torch.Generator().manual_seed(200 + index)
    network = DigitNetwork(width)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.05)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in trange(steps, desc=f"network {name}"):
        chosen = torch.randint(len(digits.labels), (64,), generator=generator)
        logits = network(jitter(digits.images[chosen], generator))
        F.cross_entropy(logits, digits.labels[chosen], label_smoothing=0.05).backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    return {key: value.contiguous() for key, value in network.state_dict().items()}


def train_evaluation_networks(file: Path, digits: Digits, steps: int = 3000) -> None:
    """Train A, B and C independently, each with its own seed and width."""
    state = {}
    for index, (name, width) in enumerate(WIDTHS.items()):
        weights = train_network(name, index, width, digits, steps)
        state |= {f"{name}.{key}": value for key, value in weights.items()}
    save_file(state, file)


def train_reward_network(file: Path, digits: Digits, steps: int = 3000) -> None:
    """Train D like the others, but with a seed, a width and a file of its own: it judges no student."""
    save_file(train_network("D", len(WIDTHS), REWARD_NETWORK_WIDTH, digits, steps), file)


def build_tokenizer(folder: Path, words: Sequence[str]) -> CLIPTokenizer:
    """A CLIP tokenizer whose merges spell the given words; other text falls back to characters.

    The merges of a word come before those of the words after it: one that has the beginning of another inside goes
    first.
    """
    characters = [chr(code) for code in range(33, 127)]
    tokens = characters + [character + "</w>" for character in characters]
    merges: list[str] = []
    for word in (word for word in words if len(word) > 1):
        pieces = [*word[:-1], word[-1] + "</w>"]
        for end in range(1, len(pieces)):
            beginning, last = "".join(pieces[:end]), pieces[end]
            if f"{beginning} {last}" not in merges:
                merges.append(f"{beginning} {last}")
                tokens.append(beginning + last)
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {
        token: index for index, token in enumerate([*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"])
    }
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=PROMPT_LENGTH)


def train_autoencoder(digits: Digits, steps: int = 1500, batch: int = 64) -> AutoencoderKL:
    """Train the autoencoder; its decoder also sees slightly noisy latents, as a generated latent is never exact."""
    torch.manual_seed(1)
    generator = torch.Generator().manual_seed(11)
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=32,
        mid_block_add_attention=False,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
    )
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=1e-4)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps, pct_start=0.05)
    bar = trange(steps, desc="autoencoder")
    for _ in bar:
        images = digits.images[torch.randint(len(digits.labels), (batch,), generator=generator)] * 2 - 1
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(images).latent_dist
            latents = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=generator)
            noise = torch.randn(latents.shape, generator=generator) * 0.05
            decoded = vae.decode(latents + noise).sample.float()
        error = F.mse_loss(decoded, images)
        loss = error + 0.1 * F.l1_loss(decoded, images) + 1e-4 * posterior.kl().float().mean() / latents[0].numel()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        bar.set_postfix(mse=f"{error.item():.5f}", refresh=False)
    vae.eval().requires_grad_(False)
    with torch.no_grad():
        deviation = vae.encode(digits.images * 2 - 1).latent_dist.mean.std().item()
    vae.register_to_config(scaling_factor=1 / deviation)
    return vae


def build_text_encoder(vocabulary: int, heads: int) -> CLIPTextModel:
    """A text encoder with random weights, to be trained."""
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=heads,
        max_position_embeddings=PROMPT_LENGTH,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1,
    )
    return CLIPTextModel(config).train()


def build_scheduler() -> DDIMScheduler:
    """The scheduler: zero terminal signal-to-noise ratio, and v-prediction."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,  # Not used with trailing spacing, but another value makes the pipeline warn.
    )


def build_unet(vocabulary: int) -> tuple[UNet2DConditionModel, CLIPTextModel, DDIMScheduler]:
    """U-Net and text encoder with random weights, and the scheduler."""
    torch.manual_seed(2)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64, 80),
        layers_per_block=1,
        cross_attention_dim=64,
        attention_head_dim=2,  # The number of heads: the argument's name is historical.
        norm_num_groups=8,
        mid_block_type="UNetMidBlock2D",
        down_block_types=("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    )
    return unet, build_text_encoder(vocabulary, heads=2), build_scheduler()


def train_unet(
    digits: Digits, vae: AutoencoderKL, tokenizer: CLIPTokenizer, steps: int, batch: int = 96
) -> tuple[UNet2DConditionModel, CLIPTextModel, DDIMScheduler]:
    """Train U-Net and text encoder on v-prediction and return them with averaged weights."""
    unet, text_encoder, scheduler = build_unet(len(tokenizer))
    generator = torch.Generator().manual_seed(22)
    with torch.no_grad():
        latents = vae.encode(digits.images * 2 - 1).latent_dist.mean * vae.config.scaling_factor
    prompts = [prompt for digit in range(10) for prompt in digit_prompts(digit)]
    per_digit = len(prompts) // 10
    tokens = tokenizer([*prompts, ""], padding="max_length", return_tensors="pt").input_ids

    parameters = [*unet.parameters(), *text_encoder.parameters()]
    ema = EMAModel(parameters, decay=0.999)
    optimizer = torch.optim.AdamW(parameters, lr=1.5e-3, betas=(0.9, 0.99), weight_decay=0.01)
    lr = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 300) * 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    bar = trange(steps, desc="teacher", mininterval=5)
    average = 1.0
    for _ in bar:
        chosen = torch.randint(len(latents), (batch,), generator=generator)
        x_0, labels = latents[chosen], digits.labels[chosen]
        phrase = labels * per_digit + torch.randint(per_digit, (batch,), generator=generator)
        phrase[torch.rand(batch, generator=generator) < EMPTY_PROMPT_SHARE] = len(prompts)
        noise = torch.randn(x_0.shape, generator=generator)
        timesteps = torch.randint(1000, (batch,), generator=generator)
        x_t, target = scheduler.add_noise(x_0, noise, timesteps), scheduler.get_velocity(x_0, noise, timesteps)
        with torch.autocast("cpu", torch.bfloat16):
            prediction = unet(x_t, timesteps, text_encoder(tokens)[0][phrase]).sample
        loss = F.mse_loss(prediction.float(), target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        lr.step()
        ema.step(parameters)
        average = 0.99 * average + 0.01 * loss.item()
        bar.set_postfix(loss=f"{average:.4f}", refresh=False)
    ema.copy_to(parameters)
    return unet.eval().requires_grad_(False), text_encoder.eval().requires_grad_(False), scheduler


def save(
    folder: Path,
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    unet: UNet2DConditionModel,
    scheduler: DDIMScheduler,
) -> None:
    """Write the pipeline of these parts so that the oldest supported transformers reads it too."""
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        image_encoder=None,
        requires_safety_checker=False,
    )
    spelling = {name: (folder / "tokenizer" / name).read_bytes() for name in ("vocab.json", "merges.txt")}
    shutil.rmtree(folder)
    pipeline.save_pretrained(folder)
    for name, content in spelling.items():  # Older tokenizers read these two; newer ones write one other file.
        (folder / "tokenizer" / name).write_bytes(content)
    # Newer text encoders save their weights without this prefix but read them with it; older ones need it.
    file = folder / "text_encoder" / "model.safetensors"
    weights = {f"text_model.{name.removeprefix('text_model.')}": value for name, value in load_file(file).items()}
    save_file(weights, file, {"format": "pt"})


def sample(pipeline: StableDiffusionPipeline, prompts: list[str], seed: int, steps: int = 50) -> Tensor:
    """Images of the teacher at guidance 1.0, shape (N, 3, 32, 32), in [0, 1]."""
    images = pipeline(
        prompts,
        num_inference_steps=steps,
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(seed),
        output_type="pt",
    ).images
    return images


def report(pipeline: StableDiffusionPipeline, seeds: range, split: str = "held_out") -> dict[str, float]:
    """Fréchet distances in A and B beside those of as many training images, and recognition by C."""
    held_out, train = load_digits(split), load_digits("train")
    count = len(load_digits("held_out").labels)
    prompts, labels = balanced_prompts(count)
    rows: dict[str, list[float]] = {}
    for seed in seeds:
        images = sample(pipeline, prompts, seed)
        chosen = torch.randperm(len(train.labels), generator=torch.Generator().manual_seed(seed))[:count]
        for name in ("A", "B"):
            reference = digit_features(name, held_out.images)
            features = digit_features(name, images)
            rows.setdefault(f"distance_{name}", []).append(frechet_distance(features, reference))
            floor = frechet_distance(digit_features(name, train.images[chosen]), reference)
            rows.setdefault(f"floor_{name}", []).append(floor)
            if name == "B":
                overlap = manifold_metrics(features, reference)
                rows.setdefault("precision_B", []).append(overlap.precision)
                rows.setdefault("recall_B", []).append(overlap.recall)
        rows.setdefault("accuracy_C", []).append(digit_accuracy(images, labels))
    result = {key: sum(values) / len(values) for key, values in rows.items()}
    return result | {"accuracy_C_held_out": digit_accuracy(held_out.images, held_out.labels)}


def main() -> None:
    """Build whatever is missing in the output folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("rdm_rl/digits"), help="where the results go")
    parser.add_argument("--steps", type=int, default=7000, help="training steps of the U-Net")
    parser.add_argument("--report", action="store_true", help="only print the quality figures of what is there")
    arguments = parser.parse_args()
    torch.use_deterministic_algorithms(True)
    data, networks, reward_network, teacher = (
        arguments.output_dir / name
        for name in ("digits.npz", "networks.safetensors", "reward_network.safetensors", "teacher")
    )
    if not arguments.report:
        if not data.exists():
            build_data(data)
        digits = load_digits("train")
        if not networks.exists():
            train_evaluation_networks(networks, digits)
        if not reward_network.exists():
            train_reward_network(reward_network, digits)
        if not (teacher / "vae").exists():
            train_autoencoder(digits).save_pretrained(teacher / "vae")
        if not (teacher / "unet").exists():
            vae = AutoencoderKL.from_pretrained(teacher / "vae").requires_grad_(False)
            words = {word for template in PROMPT_TEMPLATES for word in template.split() if word != "{}"}
            tokenizer = build_tokenizer(teacher / "tokenizer", sorted(words | set(DIGIT_WORDS)))
            unet, text_encoder, scheduler = train_unet(digits, vae, tokenizer, arguments.steps)
            save(teacher, vae, text_encoder, tokenizer, unet, scheduler)
    pipeline = StableDiffusionPipeline.from_pretrained(teacher)
    pipeline.set_progress_bar_config(disable=True)
    for key, value in report(pipeline, range(5)).items():
        print(f"{key:20} {value:.3f}")


if __name__ == "__main__":
    main()
