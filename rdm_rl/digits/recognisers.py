"""The three small recognisers that judge the embedded digits.

A and B give features for Fréchet distances and precision/recall; C names the digit. They were trained independently
(own seed, own width) on the training images, by ``examples/train_digits_teacher.py``. Settings are chosen on A;
results are reported on B and C. None of them is ever a reward. Network D, which is one, judges nothing and lives in
:mod:`rdm_rl.digits.rewards`.

Images are of shape (N, 3, 32, 32), in [0, 1], of any floating type and on any device; answers are on the CPU.
"""

from functools import lru_cache, partial
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from rdm_rl.digits.data import NETWORKS_FILE
from rdm_rl.evaluation.features import Features

WIDTHS = {"A": 16, "B": 20, "C": 24}


class DigitNetwork(nn.Module):
    """A convolutional recogniser of digits with a 32-dimensional feature layer.

    Args:
        width: Channels of the first convolution.
    """

    def __init__(self, width: int) -> None:
        """Build the layers."""
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(1, width, 5, stride=2, padding=2),
            nn.SiLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(2 * width, 2 * width, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(2 * width * 16, 32),
        )
        self.head = nn.Sequential(nn.SiLU(), nn.Linear(32, 10))

    def features(self, images: Tensor) -> Tensor:
        """Features of images, shape (N, 32)."""
        features: Tensor = self.trunk(images.mean(1, keepdim=True) * 2 - 1)
        return features

    def forward(self, images: Tensor) -> Tensor:
        """Logits of the ten digits, shape (N, 10)."""
        logits: Tensor = self.head(self.features(images))
        return logits


@lru_cache(maxsize=3)
def load_network(name: Literal["A", "B", "C"], file: Path = NETWORKS_FILE) -> DigitNetwork:
    """One of the shipped recognisers, frozen, in evaluation mode, on the CPU.

    Raises:
        ValueError: If the name is unknown, as is that of the reward's network D: it must not judge.

    Example:
        >>> load_network("C")(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """
    if name not in WIDTHS:
        raise ValueError(f"network {name!r} is no evaluation network; use one of {', '.join(WIDTHS)}.")
    network = DigitNetwork(WIDTHS[name])
    network.load_state_dict(network_weights(name, file))
    return network.eval().requires_grad_(False)


def network_weights(name: str, file: Path) -> dict[str, Tensor]:
    """The weights of one of the networks that share a file, by the names that the network has for them."""
    prefix = f"{name}."
    return {key.removeprefix(prefix): value for key, value in load_file(file).items() if key.startswith(prefix)}


@torch.no_grad()
def digit_features(name: Literal["A", "B", "C"], images: Tensor) -> Tensor:
    """Features of digit images in one shipped network, shape (N, 32), float32.

    Example:
        >>> digit_features("A", torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 32])
    """
    return load_network(name).features(images.float().cpu())


@torch.no_grad()
def recognised_digits(images: Tensor) -> Tensor:
    """The digit that network C sees in each image, shape (N,), int64 in 0..9.

    Example:
        >>> recognised_digits(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2])
    """
    logits: Tensor = load_network("C")(images.float().cpu())
    return logits.argmax(1)


FEATURES = Features("digits B", partial(digit_features, "B"))
"""The features that results are reported in, for :func:`rdm_rl.evaluation.evaluate`."""


def digit_accuracy(images: Tensor, labels: Tensor) -> float:
    """Share of images that network C recognises as the digit they were asked to show, shape (N,).

    Raises:
        ValueError: If there is not one label for each image.

    Example:
        >>> from rdm_rl.digits.data import load_digits
        >>> held_out = load_digits("held_out")
        >>> digit_accuracy(held_out.images, held_out.labels) > 0.99
        True
    """
    if len(images) != len(labels):
        raise ValueError(f"{len(images)} images but {len(labels)} labels.")
    return float((recognised_digits(images) == labels.cpu()).double().mean())
