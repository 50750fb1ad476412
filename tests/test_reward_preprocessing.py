"""Images are prepared for a network as the processors of transformers prepare them, but differentiably."""

import json

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from rdm_rl.rewards.preprocessing import Preprocessing, center_crop, fit_square, resize

SIZES = [(512, 512), (300, 500), (333, 501), (501, 333), (96, 128), (50, 50), (64, 224), (224, 224)]


def image(kind, height, width):
    """An 8-bit image: waves, noise, or noise of black and white, which makes the filter overshoot."""
    if kind == "waves":
        y, x = np.mgrid[0:height, 0:width]
        return np.stack([127 + 120 * np.sin(x / 9 + y / 17 + channel) for channel in range(3)], -1).astype(np.uint8)
    noise = np.random.default_rng(0).integers(0, 256 if kind == "noise" else 2, (height, width, 3), dtype=np.uint8)
    return noise if kind == "noise" else noise * 255


def as_tensor(array):
    return torch.from_numpy(array).permute(2, 0, 1)[None].float() / 255


def pil_processor(name, **settings):
    """The image processor of transformers that works with Pillow: version 5 names it otherwise than version 4."""
    new = getattr(transformers, f"{name}Pil", None)
    return (new or getattr(transformers, name))(**settings)


def pillow_passes(array, size, mode, *, rounded):
    """Pillow's resize in two calls, rows first; without rounding in float32, which Pillow clamps nowhere."""
    kind = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}[mode]
    channels = []
    for channel in range(3):
        values = array[..., channel] if rounded else array[..., channel].astype(np.float32)
        for shape in ((array.shape[0], size[1]), size):
            values = np.clip(np.asarray(Image.fromarray(values).resize(shape[::-1], kind)), 0, 255)
        channels.append(torch.from_numpy(values.astype(np.float32)))
    return torch.stack(channels)[None]


@pytest.mark.parametrize("kind", ["waves", "noise", "black and white"])
def test_equals_the_processor_of_clip(kind):
    processor = pil_processor("CLIPImageProcessor")
    preprocessing = Preprocessing.from_settings(processor.to_dict())
    for size in SIZES:
        array = image(kind, *size)
        expected = processor(Image.fromarray(array), return_tensors="pt")["pixel_values"]
        difference = (preprocessing(as_tensor(array)) - expected).abs() * torch.tensor(preprocessing.std).view(3, 1, 1)
        assert difference.max() * 255 < 1.2 and difference.mean() * 255 < 0.4, size


@pytest.mark.parametrize("resample", [2, 3])
def test_equals_the_processor_of_siglip(resample):
    processor = pil_processor("SiglipImageProcessor", resample=resample)
    preprocessing = Preprocessing.from_settings(processor.to_dict())
    for size in ((300, 500), (96, 128), (200, 200)):  # Pillow 13 changed the order for tall images
        array = image("black and white", *size)
        expected = processor(Image.fromarray(array), return_tensors="pt")["pixel_values"]
        values = preprocessing(as_tensor(array))
        assert values.shape == expected.shape == (1, 3, 224, 224)
        assert (values - expected).abs().max() * 0.5 * 255 < 1.2, size


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
def test_what_differs_from_pillow_is_rounding(mode):
    for size in SIZES:
        array = image("black and white", *size)
        ours = resize(as_tensor(array), (224, 160), mode=mode) * 255
        assert (ours - pillow_passes(array, (224, 160), mode, rounded=False)).abs().max() < 0.02, size
        assert (ours - pillow_passes(array, (224, 160), mode, rounded=True)).abs().max() < 1.2, size


def test_the_gradient_is_the_finite_difference():
    generator = torch.Generator().manual_seed(0)
    # Far from 0 and 1 nothing is clamped, so the path is linear and differentiable everywhere.
    images = 0.4 + 0.2 * torch.rand(2, 3, 10, 13, generator=generator, dtype=torch.float64)
    preprocessing = Preprocessing(size=6, crop=(6, 6))
    assert torch.autograd.gradcheck(preprocessing, images.requires_grad_())


def test_gradient_reaches_all_that_the_crop_keeps_and_nothing_else():
    images = torch.full((1, 3, 8, 16), 0.5, requires_grad=True)
    (gradient,) = torch.autograd.grad(Preprocessing(size=8, crop=(8, 8))(images).sum(), images)
    assert (gradient[..., 4:12] > 0).all()
    assert (gradient[..., :4] == 0).all() and (gradient[..., 12:] == 0).all()


def test_settings_of_a_folder(tmp_path):
    pil_processor(
        "CLIPImageProcessor", size={"shortest_edge": 40}, crop_size=32, image_mean=[0.1, 0.2, 0.3]
    ).save_pretrained(tmp_path)
    preprocessing = Preprocessing.from_pretrained(tmp_path)
    assert (preprocessing.size, preprocessing.crop, preprocessing.mean) == (40, (32, 32), (0.1, 0.2, 0.3))


def test_settings_as_old_versions_saved_them(tmp_path):
    old = {"size": 224, "crop_size": 224, "do_center_crop": True, "resample": 3, "image_mean": [0, 0, 0]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(old))
    preprocessing = Preprocessing.from_pretrained(tmp_path)
    assert (preprocessing.size, preprocessing.crop) == (224, (224, 224))
    assert preprocessing(torch.rand(1, 3, 300, 230)).shape == (1, 3, 224, 224)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"size": {"longest_edge": 980}}, "longest_edge"),
        ({"do_resize": False, "size": 224}, "do_resize=False"),
        ({"size": 224, "resample": 1}, "resample=1"),
    ],
)
def test_settings_that_are_not_supported(settings, named):
    with pytest.raises(ValueError, match=named):
        Preprocessing.from_settings(settings)


def test_a_crop_needs_enough_pixels():
    with pytest.raises(ValueError, match="smaller than a crop"):
        center_crop(torch.zeros(1, 3, 8, 8), (9, 8))


@pytest.mark.parametrize(
    ("size", "inner"), [((30, 100), (slice(14, 26), slice(0, 40))), ((60, 31), (slice(0, 40), slice(9, 30)))]
)
def test_fit_square_keeps_the_whole_image_between_bars(size, inner):
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    square = fit_square(images, 40)
    part = square[(..., *inner)]
    # 30 x 100 becomes 12 x 40 with bars of 14 and 14; 60 x 31 becomes 40 x 21 with bars of 9 and 10.
    assert square.shape == (2, 3, 40, 40)
    assert torch.equal(part, resize(images, tuple(part.shape[-2:])))
    assert (square > 0).sum() == part.numel()  # all else is black
