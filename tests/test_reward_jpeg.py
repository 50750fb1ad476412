"""Rewards that are the size of a JPEG file."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from rdm_rl.rewards.jpeg import JpegCompressibility, JpegIncompressibility, jpeg_sizes


def test_sizes_are_those_of_files_that_pillow_writes() -> None:
    levels = np.random.default_rng(0).integers(0, 256, (2, 24, 40, 3), dtype=np.uint8)
    expected = []
    for array in levels:
        file = io.BytesIO()
        Image.fromarray(array).save(file, format="JPEG", quality=95)
        expected.append(len(file.getvalue()) / 1000)
    images = torch.from_numpy(levels).permute(0, 3, 1, 2) / 255
    assert JpegIncompressibility()(images, ["", ""]) == expected
    assert JpegCompressibility()(images, ["", ""]) == [-size for size in expected]


def test_more_detail_and_more_pixels_are_a_larger_file() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(1, 3, 64, 64, generator=generator)
    smooth = torch.nn.functional.avg_pool2d(noise, 9, 1, 4)
    flat = torch.full_like(noise, 0.5)
    sizes = jpeg_sizes(torch.cat([flat, smooth, noise]))
    assert sizes[0] < sizes[1] < sizes[2]
    assert all(low < high for low, high in zip(jpeg_sizes(noise, 20), jpeg_sizes(noise, 95), strict=True))
    small, large = (jpeg_sizes(torch.full((1, 3, side, side), 0.5))[0] for side in (64, 128))
    assert small < large


def test_images_with_a_graph_or_in_bfloat16_are_fine() -> None:
    images = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert jpeg_sizes(images.clone().requires_grad_()) == jpeg_sizes(images)
    assert jpeg_sizes(images.bfloat16()) == jpeg_sizes(images.bfloat16().float())


def test_what_is_refused_and_what_is_claimed() -> None:
    with pytest.raises(ValueError, match="NaN"):
        JpegCompressibility()(torch.full((1, 3, 4, 4), float("nan")), [""])
    for reward in (JpegCompressibility, JpegIncompressibility):
        assert not reward.differentiable
        for quality in (0, 101):
            with pytest.raises(ValueError, match=f"quality={quality}"):
                reward(quality)
