"""The three small networks that judge scenes.

A and B give features for Fréchet distances; C names what a scene shows. They were trained independently (own seed, own
width) on scenes of the training handwriting, by ``examples/train_scenes_teacher.py``. Settings, and the problem itself,
are chosen on A; results are reported on B. None of them is ever a reward.

Images are of shape (N, 3, 24, 24), in [0, 1], of any floating type and on any device; answers are on the CPU.
"""

from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from rdm_rl.digits.recognisers import network_weights
from rdm_rl.scenes.data import ATTRIBUTES, NETWORKS_FILE, OPEN, wanted_attributes

WIDTHS = {"A": 20, "B": 24, "C": 28}
_SIZES = [len(values) for values in ATTRIBUTES.values()]


class SceneNetwork(nn.Module):
    """A convolutional recogniser of scenes with a 64-dimensional feature layer.

    Args:
        width: Channels of the first convolution.
    """

    def __init__(self, width: int) -> None:
        """Build the layers."""
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(3, width, 5, stride=2, padding=2),
            nn.SiLU(),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(2 * width, 2 * width, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(2 * width, 3 * width, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(3 * width * 9, 64),
        )
        self.head = nn.Sequential(nn.SiLU(), nn.Linear(64, sum(_SIZES)))

    def features(self, images: Tensor) -> Tensor:
        """Features of images, shape (N, 64)."""
        features: Tensor = self.trunk(images * 2 - 1)
        return features

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Logits of each attribute's values: six tensors, shapes (N, 10), (N, 5), (N, 10), (N, 5), (N, 2), (N, 3)."""
        return tuple(self.head(self.features(images)).split(_SIZES, dim=1))


@lru_cache(maxsize=3)
def load_network(name: Literal["A", "B", "C"], file: Path = NETWORKS_FILE) -> SceneNetwork:
    """One of the shipped networks, frozen, in evaluation mode, on the CPU.

    Raises:
        ValueError: If the name is unknown.

    Example:
        >>> load_network("A").features(torch.zeros(2, 3, 24, 24)).shape
        torch.Size([2, 64])
    """
    if name not in WIDTHS:
        raise ValueError(f"network {name!r} is unknown; use one of {', '.join(WIDTHS)}.")
    network = SceneNetwork(WIDTHS[name])
    network.load_state_dict(network_weights(name, file))
    return network.eval().requires_grad_(False)


@torch.no_grad()
def scene_features(name: Literal["A", "B"], images: Tensor) -> Tensor:
    """Features of scenes in one shipped network, shape (N, 64), float32.

    Example:
        >>> scene_features("A", torch.zeros(2, 3, 24, 24)).shape
        torch.Size([2, 64])
    """
    return load_network(name).features(images.float().cpu())


@torch.no_grad()
def recognised_attributes(images: Tensor) -> Tensor:
    """What network C sees in each image, shape (N, 6), int64: the columns are ATTRIBUTES.

    Example:
        >>> recognised_attributes(torch.zeros(2, 3, 24, 24)).shape
        torch.Size([2, 6])
    """
    return torch.stack([logits.argmax(1) for logits in load_network("C")(images.float().cpu())], 1)


def fulfilled(images: Tensor, prompts: list[str]) -> Tensor:
    """Which attributes of each image are, to network C, what its prompt asks for, shape (N, 6), bool.

    What a prompt leaves open is fulfilled. ``fulfilled(images, prompts).all(1)`` are the images that show all that was
    asked for.

    Raises:
        ValueError: If there is not one prompt for each image, or a prompt describes no scene.

    Example:
        >>> fulfilled(torch.zeros(1, 3, 24, 24), [""]).all().item()
        True
    """
    if len(images) != len(prompts):
        raise ValueError(f"{len(images)} images but {len(prompts)} prompts.")
    wanted = wanted_attributes(prompts)
    return (recognised_attributes(images) == wanted) | (wanted == OPEN)
