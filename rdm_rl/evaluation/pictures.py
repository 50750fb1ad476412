"""Pictures for people: grids of samples, images of shape (N, 3, H, W) in [0, 1]."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn.functional import pad

from rdm_rl.pixels import to_pixels


@dataclass(frozen=True, kw_only=True)
class Theme:
    """The colours of a picture.

    Args:
        background: Behind everything.
        ink: Text and axes.
        faint: Grid lines.
        lines: One colour for each run, distinguishable with the common kinds of colour blindness.
    """

    background: str
    ink: str
    faint: str
    lines: tuple[str, ...]


LIGHT = Theme(
    background="#ffffff", ink="#30343b", faint="#e3e6ea", lines=("#0072b2", "#d55e00", "#008a63", "#a8508a", "#7a6a00")
)
DARK = Theme(
    background="#1b1e24", ink="#c9ced6", faint="#333842", lines=("#56b4e9", "#f0924a", "#3fc79a", "#d98fc0", "#d8c34a")
)


def tiled(images: Tensor, *, gap: int = 0) -> Image.Image:
    """Images side by side and row upon row, one image pixel to a pixel.

    Args:
        images: Images, shape (R, M, 3, H, W), in [0, 1]; values outside are clamped.
        gap: Transparent pixels between neighbours; with them, the picture has an alpha channel.

    Example:
        >>> tiled(torch.zeros(2, 5, 3, 8, 8)).size
        (40, 16)
    """
    pixels = to_pixels(images.nan_to_num(0))  # A student that diverged is shown, black where it is NaN.
    if gap:
        opaque = torch.full_like(pixels[..., :1], 255)
        pixels = pad(torch.cat([pixels, opaque], -1), (0, 0, 0, gap, 0, gap))
    rows, columns, height, width, channels = pixels.shape
    joined = pixels.transpose(1, 2).reshape(rows * height, columns * width, channels)
    return Image.fromarray(joined[: rows * height - gap, : columns * width - gap].contiguous().numpy())


def image_grid(
    rows: Mapping[str, Tensor],
    labels: Sequence[str] | None = None,
    *,
    scale: int | None = None,
    theme: Theme = LIGHT,
) -> Image.Image:
    """A captioned grid of images, enlarged by whole pixels, so that nothing is smoothed away.

    Args:
        rows: For each caption, such as "teacher, 50 steps", images of shape (M, 3, H, W), or several lines of them of
            shape (R, M, 3, H, W), in [0, 1]. All of the same M, H and W.
        labels: A caption for each of the M columns, such as its prompt, or None. Long ones are broken at spaces.
        scale: How many pixels wide and high a pixel becomes; None chooses it for small images to become 64 pixels wide.
        theme: The colours.

    Raises:
        ValueError: If there is nothing to draw or the shapes differ.

    Example:
        >>> image_grid({"noise": torch.rand(10, 3, 32, 32)}, [str(digit) for digit in range(10)]).height
        103
    """
    blocks = {name: images[None] if images.ndim == 4 else images for name, images in rows.items()}
    shapes = {block.shape[1:] for block in blocks.values()}
    if len(shapes) != 1 or any(block.ndim != 5 or block.shape[2] != 3 for block in blocks.values()):
        shapes_by_name = {name: tuple(images.shape) for name, images in rows.items()}
        raise ValueError(
            f"A grid needs rows of shape (M, 3, H, W) or (R, M, 3, H, W), equal but for R; got {shapes_by_name}."
        )
    columns, _, height, width = shapes.pop()
    if labels is not None and len(labels) != columns:
        raise ValueError(f"{len(labels)} column captions for {columns} columns.")

    scale = scale or max(1, 64 // width)
    margin, gap, block_gap, font, small = 12, 2, 10, _font(15), _font(11)
    cell_width, cell_height = width * scale + gap, height * scale + gap
    captions = [_break_text(str(label), small, width * scale) for label in labels or ()]
    first_x = margin + max(int(font.getlength(name)) for name in blocks) + margin
    first_y = margin + 15 * max((len(caption) for caption in captions), default=0)
    lines = sum(len(block) for block in blocks.values())
    size = (
        first_x + columns * cell_width - gap + margin,
        first_y + lines * cell_height - gap * len(blocks) + block_gap * (len(blocks) - 1) + margin,
    )
    picture = Image.new("RGB", size, theme.background)
    draw = ImageDraw.Draw(picture)
    for column, caption in enumerate(captions):
        centre = first_x + column * cell_width + width * scale // 2
        for line, text in enumerate(reversed(caption)):
            draw.text((centre, first_y - 6 - 15 * line), text, fill=theme.ink, font=small, anchor="ms")
    y = first_y
    for name, block in blocks.items():
        block_height = len(block) * cell_height - gap
        draw.text((first_x - margin, y + block_height // 2), name, fill=theme.ink, font=font, anchor="rm")
        for line in range(len(block)):
            for column in range(columns):
                tile = tiled(block[line : line + 1, column : column + 1])
                tile = tile.resize((width * scale, height * scale), Image.Resampling.NEAREST)
                picture.paste(tile, (first_x + column * cell_width, y + line * cell_height))
        y += block_height + block_gap
    return picture


@lru_cache(maxsize=4)
def _font(size: int) -> ImageFont.FreeTypeFont:
    """The font that matplotlib brings along: the same on every system, and it knows more than ASCII."""
    import matplotlib as mpl  # Most of a second that a run without labels need not wait.

    return ImageFont.truetype(Path(mpl.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)


def _break_text(text: str, font: ImageFont.FreeTypeFont, width: int, most_lines: int = 4) -> list[str]:
    """The text in lines of at most that many pixels; what does not fit is cut off."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    if len(lines) > most_lines:
        lines = [*lines[: most_lines - 1], lines[most_lines - 1] + "…"]
    for index, line in enumerate(lines):
        while len(line) > 1 and font.getlength(line) > width:
            line = line.rstrip("…")[:-1] + "…"
        lines[index] = line
    return lines
