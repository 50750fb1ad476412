"""Images as 8-bit pictures, and such pictures as images."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def to_pixels(images: Tensor) -> Tensor:
    """Images as bytes, rounded to the nearest of 256 levels.

    Args:
        images: Images, shape (..., 3, H, W), in [0, 1]; values outside are clamped.

    Returns:
        The pixels, shape (..., H, W, 3), uint8, on the CPU.

    Raises:
        ValueError: If a value is NaN or infinite, which no pixel can show.

    Example:
        >>> to_pixels(torch.full((1, 3, 1, 1), 0.5)).tolist()
        [[[[128, 128, 128]]]]
    """
    if not bool(images.isfinite().all()):
        raise ValueError(
            "An image holds NaN or infinite values, which no pixel can show: it is not finite. Look for a network or a "
            "decoder that overflowed (fp16?), and run it in bfloat16 or float32."
        )
    levels = images.detach().float().clamp(0, 1).mul(255).round().to(torch.uint8)
    return levels.movedim(-3, -1).contiguous().cpu()


def to_pil(images: Tensor) -> list[Image.Image]:
    """Images as RGB pictures.

    Args:
        images: Images as in :func:`to_pixels`, shape (N, 3, H, W).

    Returns:
        The pictures, length N.

    Example:
        >>> to_pil(torch.full((1, 3, 2, 2), 0.5))[0].getpixel((0, 0))
        (128, 128, 128)
    """
    return [Image.fromarray(pixels) for pixels in to_pixels(images).numpy()]


def read_image(file: Path) -> Tensor:
    """An image file, shape (3, H, W), float32 in [0, 1]."""
    with Image.open(file) as image:
        pixels = np.asarray(image.convert("RGB"), dtype=np.float32) / 255
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
