"""The embedded data set: 1,797 handwritten digits, their prompts, and the split that keeps evaluation honest.

The images are the test part of the "Optical Recognition of Handwritten Digits" data set (Alpaydin and Kaynak, 1998,
UCI Machine Learning Repository, CC BY 4.0), as shipped with scikit-learn: 8x8 pixels with 17 grey levels. They are
enlarged to 32x32 RGB here. ``digits.npz`` holds the 8x8 originals, the labels and the split.
"""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

DATA_FILE = Path(__file__).parent / "digits.npz"
TEACHER_FOLDER = Path(__file__).parent / "teacher"
NETWORKS_FILE = Path(__file__).parent / "networks.safetensors"

DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PROMPT_TEMPLATES = (
    "a handwritten {}",
    "the digit {}",
    "the number {}",
    "a picture of the digit {}",
    "a drawing of a {}",
    "{}",
)


@dataclass(frozen=True, kw_only=True)
class Digits:
    """Images of handwritten digits and their labels.

    Args:
        images: Images, shape (N, 3, 32, 32), float32 in [0, 1]; the three channels are equal.
        labels: The digit each image shows, shape (N,), int64 in 0..9.
    """

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        """Check that images and labels belong together."""
        if self.images.shape[0] != self.labels.shape[0]:
            raise ValueError(f"{self.images.shape[0]} images but {self.labels.shape[0]} labels.")


def enlarge(pixels: Tensor) -> Tensor:
    """The 8x8 grey images, shape (N, 8, 8), in [0, 1], as RGB images, shape (N, 3, 32, 32).

    Example:
        >>> enlarge(torch.zeros(2, 8, 8)).shape
        torch.Size([2, 3, 32, 32])
    """
    images = F.interpolate(pixels[:, None], size=(32, 32), mode="bicubic", align_corners=False)
    return images.clamp(0, 1).expand(-1, 3, -1, -1).contiguous()


@lru_cache(maxsize=2)
def load_digits(split: Literal["train", "held_out"]) -> Digits:
    """The images of one split.

    ``"train"`` (1,297 images) trained the digits' teacher and the evaluation networks. ``"held_out"`` (500 images,
    50 of each digit) was seen by none of them and is kept for reporting.

    Raises:
        ValueError: If the split is unknown.

    Example:
        >>> load_digits("held_out").images.shape
        torch.Size([500, 3, 32, 32])
    """
    if split not in ("train", "held_out"):
        raise ValueError(f"split={split!r} is unknown; use 'train' or 'held_out'.")
    with np.load(DATA_FILE) as data:
        chosen = data["held_out"] if split == "held_out" else ~data["held_out"]
        pixels = torch.from_numpy(data["images"][chosen]).float() / 16
        labels = torch.from_numpy(data["labels"][chosen]).long()
    return Digits(images=enlarge(pixels), labels=labels)


def digit_prompts(digit: int) -> list[str]:
    """Every phrasing that the digits' teacher knows for one digit: each template with the word and the numeral.

    Example:
        >>> digit_prompts(7)[:3]
        ['a handwritten seven', 'a handwritten 7', 'the digit seven']
    """
    names = (DIGIT_WORDS[digit], str(digit))
    return [template.format(name) for template in PROMPT_TEMPLATES for name in names]


def mixed_prompts(count: int) -> tuple[list[str], Tensor]:
    """Prompts of which every second names a digit, and the others are empty; and which digits answer each, (count, 10).

    The teacher was trained with empty prompts too, as classifier-free guidance needs it. Then any digit will do, so
    the distribution for one prompt has many modes, which is what a few-step student finds hard.

    Example:
        >>> prompts, wanted = mixed_prompts(4)
        >>> prompts
        ['a handwritten zero', '', 'a handwritten one', '']
        >>> wanted.sum(1).tolist()
        [1, 10, 1, 10]
    """
    named, digits = balanced_prompts((count + 1) // 2)
    prompts = [named[index // 2] if index % 2 == 0 else "" for index in range(count)]
    wanted = torch.ones(count, 10, dtype=torch.bool)
    wanted[::2] = F.one_hot(digits, 10).bool()
    return prompts, wanted


def balanced_prompts(count: int) -> tuple[list[str], Tensor]:
    """Prompts that go through the digits in turn and through the phrasings as they repeat; and their digits, (count,).

    Example:
        >>> prompts, digits = balanced_prompts(11)
        >>> prompts[0], prompts[10], digits[10].item()
        ('a handwritten zero', 'a handwritten 0', 0)
    """
    labels = [index % 10 for index in range(count)]
    choices = [digit_prompts(digit) for digit in range(10)]
    prompts = [choices[digit][(index // 10) % len(choices[digit])] for index, digit in enumerate(labels)]
    return prompts, torch.tensor(labels, dtype=torch.int64)
