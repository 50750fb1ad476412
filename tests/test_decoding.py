"""Latents to images and image gradients back: as the pipeline decodes, in small batches, and no weight is touched."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AsymmetricAutoencoderKL, AutoencoderTiny, StableDiffusionXLPipeline

from rdm_rl import RDMTrainer
from rdm_rl.families import load_family
from rdm_rl.rewards.images import ImageDecoder, load_tiny_decoder
from tests.helpers import (
    QUICK,
    StepAway,
    batches_of,
    count_convolutions,
    latents,
    one_rollout,
    quick_trainer,
    snapshot,
    stock_images,
)
from tests.tiny_pipelines import tiny_autoencoder, tiny_sdxl


@pytest.fixture
def trainer(base: Path, tmp_path: Path) -> RDMTrainer:
    """Of a student with two steps and batches of four."""
    return quick_trainer(base, tmp_path, StepAway(), **{**QUICK, "num_inference_steps": 2})


def test_images_are_those_of_the_pipeline(trainer: RDMTrainer) -> None:
    rollout, pipeline = one_rollout(trainer), trainer.family.pipeline
    decoder = ImageDecoder(trainer.family.decode, 3)
    for step in (0, 1, -1):
        with batches_of(pipeline.vae.decoder) as sizes:
            images = decoder.images(rollout, step)
        assert sizes == ([3, 1] if step != -1 else []), "the last step's images are kept"
        assert images.shape == (4, 3, 16, 16)
        assert not images.requires_grad
        torch.testing.assert_close(images, stock_images(pipeline, pipeline.vae, rollout.x_0[step]))
    assert not torch.allclose(decoder.images(rollout, 0), decoder.images(rollout, 1))


def test_images_of_another_rollout_are_made_anew(trainer: RDMTrainer) -> None:
    batches = [next(trainer.prompt_batches(update)) for update in range(2)]
    first, second = (trainer.generate_rollout(batch) for batch in batches)
    decoder = ImageDecoder(trainer.family.decode, 4)
    images = [decoder.images(one).clone() for one in (first, second, first)]
    assert torch.equal(images[0], images[2])
    assert not torch.allclose(images[0], images[1])
    torch.testing.assert_close(images[1], trainer.family.decode(second.sample))


@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_a_gradient_is_pulled_back_through_the_decoder(batch_size: int, trainer: RDMTrainer) -> None:
    vae = trainer.family.pipeline.vae
    before = snapshot(vae)
    x_0, pattern = 0.5 * latents(4, 4, 8, 8), latents(4, 3, 16, 16, seed=1)
    leaf = x_0.clone().requires_grad_()
    (expected,) = torch.autograd.grad((trainer.family.decode(leaf) * pattern).sum(), leaf)
    with batches_of(vae.decoder) as sizes, torch.no_grad():
        gradient = ImageDecoder(trainer.family.decode, batch_size).pull_back(x_0, pattern)
    assert sizes == {1: [1, 1, 1, 1], 3: [3, 1], 4: [4]}[batch_size]
    assert expected.norm() > 1
    assert (gradient - expected).norm() < 1e-5 * expected.norm()
    assert not gradient.requires_grad
    assert not x_0.requires_grad
    assert all(parameter.grad is None for parameter in vae.parameters())
    assert all(torch.equal(value, before[name]) for name, value in vae.state_dict().items())


# ----- a tiny decoder -----


def test_a_tiny_decoder_makes_the_images_of_the_stock_pipeline(base: Path, tmp_path: Path) -> None:
    folder = tiny_autoencoder(tmp_path / "tiny")
    decode = load_tiny_decoder(folder, 4, torch.device("cpu"))
    x_0 = latents(2, 4, 8, 8)
    pipeline = load_family(base).pipeline
    images = decode(x_0)
    torch.testing.assert_close(images, stock_images(pipeline, AutoencoderTiny.from_pretrained(folder), x_0))
    assert images.shape == (2, 3, 16, 16)
    assert images.dtype == torch.float32
    leaf = x_0.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(decode(leaf).sum(), leaf)
    assert (gradient.flatten(1).norm(dim=1) > 0).all()


@pytest.mark.parametrize("kind", ["tiny", "asymmetric"])
def test_sdxl_with_another_decoder_makes_the_images_of_the_stock_pipeline(kind: str, tmp_path: Path) -> None:
    pipeline = tiny_sdxl(tmp_path / "source")
    if kind == "tiny":
        vae: Any = AutoencoderTiny.from_pretrained(tiny_autoencoder(tmp_path / "vae"))
    else:
        blocks: Any = {"down_block_out_channels": (8, 16), "up_block_out_channels": (8, 16), "norm_num_groups": 8}
        types = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
        vae = AsymmetricAutoencoderKL(**blocks, **types, scaling_factor=0.13).eval()
    pipeline = StableDiffusionXLPipeline(**{**pipeline.components, "vae": vae}, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    x_0 = latents(1, 4, 8, 8)
    stock = pipeline("a cat", num_inference_steps=1, latents=x_0, output_type="pt").images
    ended = pipeline("a cat", num_inference_steps=1, latents=x_0, output_type="latent").images
    torch.testing.assert_close(load_family(pipeline).decode(ended), stock, rtol=1e-4, atol=1e-4)


def test_a_decoder_for_other_latents_is_refused(tmp_path: Path) -> None:
    pipeline = tiny_sdxl(tmp_path / "source")
    pipeline.vae = AutoencoderTiny.from_pretrained(tiny_autoencoder(tmp_path / "vae", latent_channels=16))
    with pytest.raises(ValueError, match="AutoencoderTiny decodes latents of 16 channels, but the network's have 4"):
        load_family(pipeline)


def test_a_tiny_decoder_for_other_latents_is_refused(tmp_path: Path) -> None:
    folder = tiny_autoencoder(tmp_path / "tiny", latent_channels=16)
    with pytest.raises(ValueError, match="16 channels, but the model's have 4"):
        load_tiny_decoder(folder, 4, torch.device("cpu"))


def test_a_tiny_decoder_may_recompute(tmp_path: Path) -> None:
    folder = tiny_autoencoder(tmp_path / "tiny")
    x_0, pattern = latents(3, 4, 8, 8), latents(3, 3, 16, 16, seed=1)
    gradients = []
    for checkpointing in (False, True):
        decode = load_tiny_decoder(folder, 4, torch.device("cpu"), checkpointing=checkpointing)
        calls = count_convolutions(
            lambda decode=decode: gradients.append(ImageDecoder(decode, 2).pull_back(x_0, pattern))
        )
        if not checkpointing:
            plain = calls
    assert calls > 1.5 * plain, "the forward pass is repeated in the backward pass"
    torch.testing.assert_close(gradients[0], gradients[1])


def test_tiny_gradients_survive_a_decoder_in_half_precision() -> None:
    """A single pixel's share of a mean over 512 x 512 is below what float16 can hold."""
    x_0, weight = latents(2, 4, 8, 8), latents(3, 4, seed=1).half()

    def decode(latent: torch.Tensor) -> torch.Tensor:
        return torch.einsum("oc,nchw->nohw", weight, latent.half()).float()

    gradient = torch.full((2, 3, 8, 8), 1e-9)
    gradient[1] *= 2.0**20
    found = ImageDecoder(decode, 2).pull_back(x_0, gradient)
    expected = torch.einsum("oc,nohw->nchw", weight.float(), gradient)
    torch.testing.assert_close(found, expected, rtol=5e-3, atol=0)


def test_pulling_back_is_exact_in_single_precision() -> None:
    x_0, gradient = latents(2, 4, 8, 8), 1e-6 * latents(2, 3, 8, 8, seed=2)
    leaf = x_0.clone().requires_grad_(True)

    def decode(latent: torch.Tensor) -> torch.Tensor:
        return latent[:, :3].sin() * latent[:, 1:].cos()

    expected = torch.autograd.grad(decode(leaf), leaf, gradient)[0]
    assert torch.equal(ImageDecoder(decode, 2).pull_back(x_0, gradient), expected)
