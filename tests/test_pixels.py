"""Images as 8-bit pictures."""

import numpy as np
import pytest
import torch

from rdm_rl.pixels import to_pil, to_pixels


@pytest.mark.parametrize(
    ("value", "level"), [(0.0, 0), (1.0, 255), (0.4 / 255, 0), (0.6 / 255, 1), (-1.0, 0), (2.0, 255)]
)
def test_levels_are_rounded_and_clamped(value: float, level: int) -> None:
    assert to_pixels(torch.full((3, 1, 1), value)).tolist() == [[[level] * 3]]


def test_every_level_survives_and_pictures_keep_rows_columns_and_channels() -> None:
    levels = torch.arange(256, dtype=torch.uint8).reshape(8, 32)
    pixels = torch.stack([levels, levels.flip(0), 255 - levels.flip(1)], -1)
    images = (pixels.movedim(-1, 0) / 255)[None].requires_grad_()
    assert torch.equal(to_pixels(images)[0], pixels)
    np.testing.assert_array_equal(np.asarray(to_pil(images)[0]), pixels.numpy())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_has_no_pixels(value: float) -> None:
    with pytest.raises(ValueError, match="not finite"):
        to_pixels(torch.full((1, 3, 4, 4), value))
