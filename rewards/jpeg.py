"""Size of an image as a JPEG file: rewards that need no network.

They are cheap and exact, and say nothing about quality: good for trying out a training loop.
"""

import io
from typing import ClassVar

from torch import Tensor

from rdm_rl.pixels import to_pil
from rdm_rl.rewards.protocol import RewardInfo

_PAPER = "Training Diffusion Models with Reinforcement Learning (Black et al., 2023), https://arxiv.org/abs/2305.13301"
_RANGE = (
    "{sign}5 for a grey square of 512 x 512, {sign}76 and {sign}120 for two photographs at that size, {sign}308 for "
    "uniform noise. Ours, measured with Pillow 13.0 (libjpeg-turbo 3.2): the squares cut from the middle of "
    "scikit-learn's two sample images and resized."
)


def jpeg_sizes(images: Tensor, quality: int = 95) -> list[float]:
    """Sizes of N images as JPEG files, in kB (1000 bytes).

    The size grows with the resolution, so compare images of one size only. It also depends a little on the JPEG library
    that Pillow was built with, and on its settings (we keep Pillow's: colour is stored at half the resolution).

    Args:
        images: Images, shape (N, 3, H, W), in [0, 1].
        quality: JPEG quality, from 1 to 100.

    Example:
        >>> import torch
        >>> flat, noise = jpeg_sizes(torch.stack([torch.full((3, 64, 64), 0.5), torch.rand(3, 64, 64)]))
        >>> flat < noise
        True
    """
    sizes = []
    for picture in to_pil(images):
        file = io.BytesIO()
        picture.save(file, format="JPEG", quality=quality)
        sizes.append(len(file.getvalue()) / 1000)
    return sizes


class JpegIncompressibility:
    """The size of the image as a JPEG file, in kB: rewards detail and noise. Not differentiable.

    What the size depends on, see :func:`jpeg_sizes`.

    References:
        | Training Diffusion Models with Reinforcement Learning (Black et al., 2023)
        | https://arxiv.org/abs/2305.13301; quality 95 is that of https://github.com/kvablack/ddpo-pytorch

    Args:
        quality: JPEG quality, from 1 to 100.

    Raises:
        ValueError: If ``quality`` is outside that range.

    Example:
        >>> import torch
        >>> reward = JpegIncompressibility()
        >>> reward(torch.zeros(1, 3, 64, 64), ["a cat"])[0] < reward(torch.rand(1, 3, 64, 64), ["a cat"])[0]
        True
    """

    differentiable: ClassVar[bool] = False
    info: ClassVar[RewardInfo] = RewardInfo(
        description="The size of the image as a JPEG file.",
        paper=_PAPER,
        units="kB (1000 bytes)",
        expected_range=_RANGE.format(sign=""),
    )

    def __init__(self, quality: int = 95) -> None:
        """Check the quality."""
        if not 1 <= quality <= 100:
            raise ValueError(
                f"quality={quality} is no JPEG quality; use a number from 1 to 100. The paper's code uses 95."
            )
        self.quality = quality

    def __call__(self, images: Tensor, prompts: list[str]) -> list[float]:
        """The sizes of images of shape (N, 3, H, W) in [0, 1]: N values, above 0."""
        return jpeg_sizes(images, self.quality)


class JpegCompressibility(JpegIncompressibility):
    """Minus the size, in kB: rewards flat, smooth images. Otherwise as :class:`JpegIncompressibility`.

    Example:
        >>> import torch
        >>> reward = JpegCompressibility()
        >>> reward(torch.zeros(1, 3, 64, 64), ["a cat"])[0] > reward(torch.rand(1, 3, 64, 64), ["a cat"])[0]
        True
    """

    info: ClassVar[RewardInfo] = RewardInfo(
        description="Minus the size of the image as a JPEG file.",
        paper=_PAPER,
        units="kB (1000 bytes)",
        expected_range=_RANGE.format(sign="-"),
    )

    def __call__(self, images: Tensor, prompts: list[str]) -> list[float]:
        """Minus the sizes: N values, below 0."""
        return [-size for size in super().__call__(images, prompts)]
