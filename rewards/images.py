r"""From latents to images for rewards, and from a gradient at the images back to the latents, within bounded memory.

A reward's gradient at :math:`\hat x_0` is :math:`J^T \nabla_{image} r` with J the Jacobian of the decoder. The images
are decoded without a graph, all rewards look at them, and then each small batch of latents is decoded again to pull its
image gradient back. So the graph of the decoder and that of a reward never exist together, and neither the decoder's
weights nor the reward's ever get a gradient.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderTiny
from torch import Tensor

from rdm_rl.families.hub import one_line_errors
from rdm_rl.records import Rollout


class ImageDecoder:
    """Decodes the predictions of rollouts, a few samples at a time.

    Args:
        decode: Images, shape (N, 3, H', W'), in [0, 1], of latents of shape (N, C, H, W); differentiable.
        batch_size: Samples decoded at once.
    """

    def __init__(self, decode: Callable[[Tensor], Tensor], batch_size: int) -> None:
        """Keep the decoder."""
        self.decode = decode
        self.batch_size = batch_size
        self._last: tuple[Rollout, int, Tensor] | None = None

    @torch.no_grad()
    def images(self, rollout: Rollout, step: int = -1) -> Tensor:
        """A step's images, shape (N, 3, H', W'), in [0, 1], without a graph, kept until others are asked for.

        Args:
            rollout: The recorded chains.
            step: Index of the step; -1 is the last.
        """
        step %= len(rollout.times)
        if self._last is None or self._last[0] is not rollout or self._last[1] != step:
            images = torch.cat([self.decode(part) for part in rollout.x_0[step].split(self.batch_size)])
            self._last = rollout, step, images
        return self._last[2]

    def pull_back(self, x_0: Tensor, image_gradient: Tensor) -> Tensor:
        r"""The gradient at the latents that belongs to one at the images, :math:`J^T g`, shape (N, C, H, W), float32.

        The map is linear, so each sample's gradient passes scaled by a power of two to about 1: a decoder in half
        precision would round gradients of single pixels to 0.

        Args:
            x_0: Latents, shape (N, C, H, W).
            image_gradient: Gradient at their images, shape (N, 3, H', W').
        """
        parts = []
        for latents, gradient in zip(x_0.split(self.batch_size), image_gradient.split(self.batch_size), strict=True):
            leaf = latents.detach().requires_grad_(True)
            with torch.enable_grad():
                images = self.decode(leaf)
            size = gradient.float().abs().amax((1, 2, 3), keepdim=True)
            size = torch.where(size > 0, torch.exp2(torch.frexp(size).exponent - 1.0), 1.0)
            slope = torch.autograd.grad(images, leaf, (gradient.float() / size).to(images))[0]
            parts.append(slope.float() * size)
        return torch.cat(parts)


class TinyDecoder:
    """A function like ``Family.decode``, made of a tiny autoencoder."""

    def __init__(self, network: AutoencoderTiny) -> None:
        """Keep the network."""
        self.network = network

    def __call__(self, x_0: Tensor) -> Tensor:
        """Images, shape (N, 3, H', W'), in [0, 1], of latents of shape (N, C, H, W)."""
        images: Tensor = self.network.decode(x_0.to(self.network.dtype), return_dict=False)[0]
        return (images * 0.5 + 0.5).clamp(0, 1).float()


def load_tiny_decoder(
    model: str | Path, latent_channels: int, device: torch.device, *, checkpointing: bool = False
) -> TinyDecoder:
    """The decoder of a tiny autoencoder (TAESD and its kin) for the same latents, many times cheaper than the VAE's.

    References:
        | Tiny AutoEncoder for Stable Diffusion (Bohan, 2023)
        | https://github.com/madebyollin/taesd

    Args:
        model: A folder or hub name of an ``AutoencoderTiny``.
        latent_channels: Channels C of the latents.
        device: Where it runs.
        checkpointing: Recompute its activations in the backward pass.

    Raises:
        OSError: If it cannot be had.
        ValueError: If it is made for latents with another number of channels.
    """
    with one_line_errors("reward_decoder", str(model)):
        network = AutoencoderTiny.from_pretrained(str(model))
    if network.config.latent_channels != latent_channels:
        raise ValueError(
            f"reward_decoder={str(model)!r} decodes latents with {network.config.latent_channels} channels, but the "
            f"model's have {latent_channels}. Choose the tiny autoencoder of the same model family."
        )
    network.requires_grad_(False)
    network.eval().to(device)
    if checkpointing:
        network.enable_gradient_checkpointing()
    return TinyDecoder(network)
