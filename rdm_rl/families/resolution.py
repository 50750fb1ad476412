"""Sizes of images in pixels, as people write them: ``1024``, or ``832x1216`` for width and height."""

import re
from collections.abc import Sequence
from typing import NamedTuple


class Resolution(NamedTuple):
    """Height and width of an image in pixels, in the order of tensors; as text the width comes first.

    Example:
        >>> str(Resolution(height=1216, width=832)), str(Resolution(512, 512))
        ('832x1216', '512')
    """

    height: int
    width: int

    def __str__(self) -> str:
        """``832x1216`` is 832 wide; a square is one number."""
        return f"{self.width}" if self.width == self.height else f"{self.width}x{self.height}"


def read_resolution(value: int | str | Resolution) -> Resolution:
    """A resolution from what a user writes.

    Args:
        value: A number, for a square, or width and height, ``"832x1216"``.

    Raises:
        ValueError: If it is neither, or not at least 1.

    Example:
        >>> read_resolution("832x1216")
        Resolution(height=1216, width=832)
    """
    if isinstance(value, Resolution):
        return value
    match = re.fullmatch(r"(\d+)(?:[xX](\d+))?", str(value))
    width, height = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if width < 1 or height < 1:
        raise ValueError(
            f"resolution={value!r} is no size in pixels, which is at least 1. Write 1024 for a square, or 832x1216 for "
            "width and height."
        )
    return Resolution(height, width)


def read_resolutions(values: Sequence[int | str] | None) -> list[Resolution]:
    """The resolutions of a run, each once; none if nothing is set."""
    return [*dict.fromkeys(map(read_resolution, values or ()))]
