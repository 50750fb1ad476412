"""From images, shape (N, 3, H, W), in [0, 1], to what an image encoder reads, with gradients."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional
from transformers import ImageProcessingMixin

# What OpenAI's CLIP was trained with; most of its descendants keep it.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

Filter = Literal["bilinear", "bicubic"]

# Numbers by which the saved settings name Pillow's filters.
_FILTERS: dict[int, Filter] = {2: "bilinear", 3: "bicubic"}


def resize(images: Tensor, size: int | tuple[int, int], *, mode: Filter = "bicubic") -> Tensor:
    """Images at another size, resampled as Pillow does: with antialiasing, rows first, clamped after each pass.

    Pillow rounds 8-bit images after each pass, and we do not. Measured on photo-like, noise and black-and-white images
    of 50 to 1024 pixels on the CPU, this is the only difference: at most 1.1 grey levels of 255, and 0.36 on average;
    against Pillow without rounding, at most 0.01. Since version 13, Pillow resizes columns first where the height
    shrinks more than the width. We keep the order that the published weights were trained with.

    Where the filter overshoots and the clamp acts, no gradient passes.

    Args:
        images: Images, shape (N, 3, H, W), in [0, 1].
        size: Length of the shorter side, which keeps the aspect ratio (the longer side is rounded down), or the height
            and the width, which does not.
        mode: The filter.

    Example:
        >>> resize(torch.rand(2, 3, 48, 64), 24).shape
        torch.Size([2, 3, 24, 32])
    """
    height, width = images.shape[-2:]
    if isinstance(size, int):
        short = min(height, width)
        size = (size * height // short, size * width // short)
    for step in ((height, size[1]), size):
        if step != images.shape[-2:]:
            images = functional.interpolate(images, size=step, mode=mode, antialias=True).clamp(0, 1)
    return images


def center_crop(images: Tensor, size: tuple[int, int]) -> Tensor:
    """The middle of images, of a height and a width.

    Raises:
        ValueError: If an image is smaller than that.

    Example:
        >>> center_crop(torch.arange(5.0).expand(1, 3, 1, 5), (1, 3))[0, 0]
        tensor([[1., 2., 3.]])
    """
    first_row, first_column = ((have - want) // 2 for have, want in zip(images.shape[-2:], size, strict=True))
    if first_row < 0 or first_column < 0:
        raise ValueError(f"Images of {tuple(images.shape[-2:])} are smaller than a crop of {size}. Resize them first.")
    return images[..., first_row : first_row + size[0], first_column : first_column + size[1]]


def fit_square(images: Tensor, size: int, *, mode: Filter = "bicubic") -> Tensor:
    """Images fitted into a square of ``size``, with black bars beside the shorter side.

    Example:
        >>> fit_square(torch.ones(1, 3, 4, 2), 4)[0, 0, 0]
        tensor([0., 1., 1., 0.])
    """
    scale = size / max(images.shape[-2:])
    height, width = (round(side * scale) for side in images.shape[-2:])
    above, beside = (size - height) // 2, (size - width) // 2
    bars = (beside, size - width - beside, above, size - height - above)
    return functional.pad(resize(images, (height, width), mode=mode), bars)


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """Resize, crop the centre, normalise: an image encoder's input, with a graph to the images.

    Args:
        size: Length of the shorter side, or height and width; see :func:`resize`.
        crop: Height and width of the centre that is kept; None for all.
        mean: Mean that is subtracted from each channel.
        std: Standard deviation that divides each channel.
        mode: The filter of the resize.

    Example:
        >>> Preprocessing(size=32, crop=(32, 32))(torch.rand(2, 3, 48, 64)).shape
        torch.Size([2, 3, 32, 32])
    """

    size: int | tuple[int, int]
    crop: tuple[int, int] | None = None
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    mode: Filter = "bicubic"

    @classmethod
    def from_pretrained(cls, model: str | Path) -> "Preprocessing":
        """The settings saved with a checkpoint (``preprocessor_config.json``) in a folder or on the hub.

        Raises:
            ValueError: If the settings ask for something that is not supported.
            OSError: If there are no settings.
        """
        settings, _ = ImageProcessingMixin.get_image_processor_dict(str(model))
        return cls.from_settings(settings)

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> "Preprocessing":
        """The settings as transformers saves them.

        Args:
            settings: Content of ``preprocessor_config.json``. CLIP resizes the shorter side and crops; SigLIP resizes
                to a square whatever the aspect ratio.

        Raises:
            ValueError: If the settings ask for something that is not supported.

        Example:
            >>> Preprocessing.from_settings({"size": {"height": 384, "width": 384}, "resample": 2}).size
            (384, 384)
        """
        size: Any = settings.get("size")
        resample = settings.get("resample", 3)
        if isinstance(size, dict):
            size = size.get("shortest_edge") or (size.get("height"), size.get("width"))
        if not settings.get("do_resize", True) or size in (None, (None, None)):
            raise ValueError(
                f"Cannot resize images as the checkpoint's preprocessor_config.json says: do_resize="
                f"{settings.get('do_resize', True)}, size={settings.get('size')}. Use a checkpoint with a fixed size."
            )
        if resample not in _FILTERS:
            raise ValueError(f"resample={resample} is not supported; use 2 (bilinear) or 3 (bicubic).")
        crop = settings.get("crop_size") if settings.get("do_center_crop", "crop_size" in settings) else None
        if crop is not None:
            crop = (crop, crop) if isinstance(crop, int) else (crop["height"], crop["width"])
        normalize = settings.get("do_normalize", True)
        return cls(
            size=size,
            crop=crop,
            mean=tuple(settings.get("image_mean", CLIP_MEAN)) if normalize else (0.0, 0.0, 0.0),
            std=tuple(settings.get("image_std", CLIP_STD)) if normalize else (1.0, 1.0, 1.0),
            mode=_FILTERS[resample],
        )

    def __call__(self, images: Tensor) -> Tensor:
        """What the image encoder reads, shape (N, 3, height, width), float32, normalised."""
        images = resize(images, self.size, mode=self.mode)
        if self.crop is not None:
            images = center_crop(images, self.crop)
        mean, std = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (self.mean, self.std))
        return (images - mean) / std
