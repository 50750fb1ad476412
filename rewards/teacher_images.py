"""The teacher's images from a rollout's own noise and prompts, kept on disk from one run to the next.

A reward may compare the student's image with what the teacher makes of the same prompt and the same initial noise. The
teacher takes many steps and never changes, so an image that was made once is not made again: within a batch, within a
run, or in another run with the same teacher.

A teacher image always has 8 bits per channel, with a cache or without: a file holds no more, and an image that is read
back must be the image that was made, or a run with a warm cache would differ from one with a cold cache.
"""

import logging
import os
import time
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngImageFile, PngInfo
from torch import Tensor

from rdm_rl.files import fingerprint, written_whole
from rdm_rl.noise_schedule import NoiseSchedule
from rdm_rl.pixels import to_pixels
from rdm_rl.policy import X0Predictor, ode_solution
from rdm_rl.records import Conditioning, Rollout
from rdm_rl.rewards.images import ImageDecoder

logger = logging.getLogger(__name__)

_STALE_AFTER_SECONDS = 3600
# A full cache is emptied to this share of its limit, and the folder is looked at again after this process wrote what is
# missing from it, or as much of the limit: not every new image starts a search.
_KEPT_SHARE = 0.9


class TeacherCache:
    """Teacher images in a folder, one PNG file for each teacher, prompt and initial noise.

    A subclass may keep images of anything else that a prompt and a seed determine.

    Any number of processes may use one folder, and be killed while they write. A file says for which teacher, prompt
    and seed it is and holds a checksum of its pixels. One that does not fit, or cannot be read, counts as missing: a
    warning is logged, and the next image of that name replaces it.

    Args:
        folder: Where the files are; made if it does not exist.
        key: A short name for all that an image depends on besides its prompt and its noise
            (:func:`rdm_rl.files.cache_key`).
        size_limit: Bytes that the images of all keys may take together; None for no limit. Above it, those that were
            used longest ago are removed until a tenth is free. Several processes may together exceed it for a while,
            by a tenth each.

    Raises:
        OSError: If the folder cannot be written to.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     cache = TeacherCache(folder, "a teacher")
        ...     cache.put("a red square", 7, torch.tensor([255, 0, 0], dtype=torch.uint8).expand(8, 8, 3))
        ...     cache.get("a red square", 8) is None, cache.get("a red square", 7)[0, 0]
        (True, tensor([255,   0,   0], dtype=torch.uint8))
    """

    what: ClassVar[str] = "teacher image"
    """What it keeps. Files are named by it, and none of another name is ever removed: the folder may hold others."""

    setting: ClassVar[str] = "teacher_cache_dir"
    """What the user set to the folder."""

    def __init__(self, folder: str | Path, key: str, size_limit: float | None = None) -> None:
        """Check that files can be written, and remove what is too old or too much."""
        self.folder, self.key, self.size_limit = Path(folder), key, size_limit
        self._warned = False
        try:
            with written_whole(self.folder / f"{self._stem}-probe") as probe:
                probe.touch()
            _remove(self.folder / f"{self._stem}-probe")
        except OSError as error:
            raise OSError(
                f"{self.what.capitalize()}s cannot be kept in {str(folder)!r}: {error}. Set {self.setting} to a folder "
                "that this user may write to, or to None to keep none."
            ) from error
        self._make_room()

    def get(self, prompt: str, noise_seed: int) -> Tensor | None:
        """The image that was kept for a prompt and the seed of a noise; None if there is none.

        It is of shape (H, W, 3), uint8, on the CPU.
        """
        file = self._file(prompt, noise_seed)
        try:
            with PngImageFile(file) as picture:
                pixels = torch.from_numpy(np.array(picture))
                # Of the pixels, too: Pillow may have been told to accept part of a file (LOAD_TRUNCATED_IMAGES).
                right = picture.text == self._labels(prompt, noise_seed, pixels)
        except FileNotFoundError:
            return None
        except Exception as error:  # Pillow has errors of many kinds for damaged files.
            logger.warning("The %s %s cannot be read (%s). It is made again.", self.what, file, error)
            return None
        if not right:
            logger.warning("The file %s is not the %s that its name says. It is made again.", file, self.what)
            return None
        with suppress(OSError):  # Another process may have removed it since, or own it.
            os.utime(file)
        return pixels

    def put(self, prompt: str, noise_seed: int, pixels: Tensor) -> None:
        """Keep an image, shape (H, W, 3), uint8, in the place of any other for the same prompt and seed.

        A failure to write (a full disk, say) is logged once, and the image is not kept: the run can do without.
        """
        text = PngInfo()
        for name, value in self._labels(prompt, noise_seed, pixels).items():
            text.add_text(name, value)
        try:
            with written_whole(self._file(prompt, noise_seed)) as file:
                Image.fromarray(pixels.numpy()).save(file, "PNG", pnginfo=text)
                self._room -= file.stat().st_size
        except OSError as error:
            if not self._warned:
                logger.warning(
                    "%ss are not kept in %s: %s. This is said once.", self.what.capitalize(), self.folder, error
                )
            self._warned = True
        if self._room < 0:
            self._make_room()

    @property
    def _stem(self) -> str:
        return self.what.replace(" ", "-")

    def _file(self, prompt: str, noise_seed: int) -> Path:
        name = fingerprint(None, key=self.key, prompt=prompt, noise_seed=noise_seed)
        return self.folder / name[:2] / f"{self._stem}-{name}.png"

    def _labels(self, prompt: str, noise_seed: int, pixels: Tensor) -> dict[str, str]:
        """The text that a file carries beside its picture."""
        return {
            "prompt": prompt.encode(errors="replace").decode(),
            "noise_seed": str(noise_seed),
            "teacher": self.key,
            "sha256": sha256(f"{list(pixels.shape)}".encode() + pixels.numpy().tobytes()).hexdigest(),
        }

    def _make_room(self) -> None:
        """Remove what killed writers left, and the images used longest ago if there are too many."""
        for file in self.folder.glob(f"*/{self._stem}-*.png.*.partial"):
            if _facts(file)[0] < (time.time() - _STALE_AFTER_SECONDS) * 1e9:
                _remove(file)
        self._room = float("inf")
        if self.size_limit is not None:
            pictures = sorted((*_facts(file), file) for file in self.folder.glob(f"*/{self._stem}-*.png"))
            total = sum(size for _, size, _ in pictures)
            allowed = self.size_limit
            if total > allowed:  # The newest image stays if the limit allows for it at all.
                allowed = min(allowed, max(_KEPT_SHARE * allowed, pictures[-1][1]))
            for _, size, file in pictures:
                if total <= allowed:
                    break
                _remove(file)
                total -= size
            self._room = min(self.size_limit - total, (1 - _KEPT_SHARE) * self.size_limit)


def _facts(file: Path) -> tuple[int, int]:
    """When a file was last used, and its size; nothing where another process has removed it."""
    try:
        facts = file.stat()
    except OSError:
        return 0, 0
    return facts.st_mtime_ns, facts.st_size


def _remove(file: Path) -> None:
    with suppress(OSError):  # Another process may have been faster, or own it.
        file.unlink()


class TeacherImages:
    """The teacher's images from the noise and the prompts of a rollout: what each sample would have become.

    If the batch says from which seed each sample's noise is (``noise_seeds``), samples of equal prompt and seed are
    computed once, and the cache is asked first. Otherwise each sample is computed, and nothing is written. Samples that
    the teacher computes in batches of other sizes can differ by rounding, as always.

    Args:
        teacher: The teacher, guidance included.
        schedule: The noise schedule.
        decoder: Makes images.
        steps: Steps of the teacher's ODE solver.
        cache: Where images are kept; None keeps those of the last rollout only.
        anywhere: Whether a condition holds on any process. A sharded teacher runs on all processes or on none, so that
            a process which finds all of its images in the cache computes one of them again if another needs any.
    """

    computed: int
    """Images that the teacher has really made."""

    def __init__(
        self,
        teacher: X0Predictor,
        schedule: NoiseSchedule,
        decoder: ImageDecoder,
        steps: int,
        cache: TeacherCache | None = None,
        anywhere: Callable[[bool], bool] = bool,
    ) -> None:
        """Keep the parts."""
        self.anywhere = anywhere
        self.teacher, self.schedule, self.decoder, self.steps, self.cache = teacher, schedule, decoder, steps, cache
        self.computed = 0
        self._last: tuple[Rollout, Tensor] | None = None

    @torch.no_grad()
    def __call__(self, rollout: Rollout) -> Tensor:
        """The images, shape (N, 3, H', W'), float32 in [0, 1], kept until another rollout is asked about.

        Raises:
            ValueError: If an image that the teacher made is not finite.
        """
        if self._last is None or self._last[0] is not rollout:
            self._last = rollout, self._images_of(rollout)
        return self._last[1]

    def _images_of(self, rollout: Rollout) -> Tensor:
        prompts, seeds = rollout.batch.prompts, rollout.batch.noise_seeds
        pairs = [] if seeds is None else list(zip(prompts, seeds, strict=True))
        names: Sequence[Hashable] = pairs or range(len(prompts))
        images: dict[Hashable, Tensor] = {}
        if self.cache is not None:
            for pair in dict.fromkeys(pairs):
                pixels = self.cache.get(*pair)
                if pixels is not None:
                    images[pair] = pixels
        missing: dict[Hashable, int] = {}
        for row, name in enumerate(names):
            if name not in images:
                missing.setdefault(name, row)
        if self.anywhere(bool(missing)):
            rows = list(missing.values()) or [0]
            for row, pixels in zip(rows, self._compute(rollout, rows), strict=True):
                images[names[row]] = pixels
                if self.cache is not None and pairs:
                    self.cache.put(*pairs[row], pixels)
        # Divided on the CPU: GPUs may do so with another last bit.
        return torch.stack([images[name].movedim(-1, 0) for name in names]).div(255).to(rollout.states.device)

    def _compute(self, rollout: Rollout, rows: list[int]) -> Tensor:
        """The pixels of some samples, shape (N, H', W', 3)."""
        conditioning = Conditioning(
            tensors={name: value[rows] for name, value in rollout.batch.conditioning.tensors.items()}
        )
        noise, start = rollout.states[0][rows], float(rollout.times[0])
        solutions = ode_solution(self.teacher, noise, start, conditioning, self.schedule, self.steps)
        pixels = [to_pixels(self.decoder.decode(part)) for part in solutions.split(self.decoder.batch_size)]
        self.computed += len(rows)
        return torch.cat(pixels)
