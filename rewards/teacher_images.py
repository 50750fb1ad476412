"""The teacher's images from a rollout's own noise and prompts, kept on disk from one run to the next.

A reward may compare the student's image with what the teacher makes of the same prompt and the same initial noise. The
teacher takes many steps and never changes, so an image that was made once is not made again: within a batch, within a
run, or in another run with the same teacher.

A teacher image always has 8 bits per channel, with a cache or without: a file holds no more, and an image that is read
back must be the image that was made, or a run with a warm cache would differ from one with a cold cache.
"""

import hashlib
import json
import logging
import math
import os
import re
import secrets
import time
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngImageFile, PngInfo
from torch import Tensor

from rdm_rl.noise_schedule import NoiseSchedule
from rdm_rl.policy import X0Predictor, ode_solution
from rdm_rl.records import Conditioning, Rollout
from rdm_rl.rewards.images import ImageDecoder

logger = logging.getLogger(__name__)

# Only files of these names are ever removed: the folder may hold others.
_PICTURE = re.compile(r"[0-9a-f]{62}\.png")
_TEMPORARY = re.compile(r"[0-9a-f]{62}\.png\.\d+-[0-9a-f]{16}\.tmp")
_STALE_AFTER_SECONDS = 3600
# A full cache is emptied to this share of its limit, so that not every new image starts another scan.
_KEPT_SHARE = 0.9
# Other processes write, too: the folder is looked at again after so large a share of the limit was written by this one.
_SHARE_BETWEEN_SCANS = 1 / 16


class TeacherCache:
    """Teacher images in a folder, one PNG file for each teacher, prompt and initial noise.

    Any number of processes may use one folder. A file appears whole or not at all, so a process that is killed while it
    writes does no harm; what it leaves behind is removed when a cache is opened an hour later. A file says for which
    teacher, prompt and seed it is and holds a checksum of its pixels. One that does not fit, or cannot be read, counts
    as missing: a warning is logged, and the next image of that name replaces it.

    Args:
        folder: Where the files are; made if it does not exist.
        key: A short name for all that an image depends on besides its prompt and its noise: the teacher's weights,
            sampler, steps and guidance, the text encoder, the decoder, the latent shape, the precision.
        size_limit: Bytes that the images of all keys may take together; None for no limit. Above it, those that were
            used longest ago are removed until a tenth is free. Several processes may together exceed it for a while,
            by a sixteenth each. A limit below the size of one image keeps nothing, with a warning.

    Raises:
        ValueError: If ``size_limit`` is not above 0.
        OSError: If the folder cannot be written to.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     cache = TeacherCache(folder, "a teacher")
        ...     cache.put("a red square", 7, torch.tensor([1.0, 0.0, 0.0])[:, None, None].expand(3, 8, 8))
        ...     cache.get("a red square", 8) is None, cache.get("a red square", 7)[:, 0, 0]
        (True, tensor([1., 0., 0.]))
    """

    def __init__(self, folder: str | Path, key: str, size_limit: float | None = None) -> None:
        """Check that files can be written, and remove what is too old or too much."""
        if size_limit is not None and not size_limit > 0:
            raise ValueError(
                f"The teacher cache's size limit is {size_limit} bytes. Set one above 0, or None for none."
            )
        self.folder, self.key, self.size_limit = Path(folder), key, size_limit
        self._warned = False
        probe = _temporary(self.folder / "00" / f"{'0' * 62}.png")
        try:
            probe.parent.mkdir(parents=True, exist_ok=True)
            probe.write_bytes(b"probe")
            probe.unlink()
        except OSError as error:
            raise OSError(
                f"Teacher images cannot be kept in {str(folder)!r}: {error}. Set teacher_cache_dir to a folder that "
                "this user may write to, or to None to keep none."
            ) from error
        self._make_room()

    def get(self, prompt: str, noise_seed: int) -> Tensor | None:
        """The image that was kept for a prompt and a noise.

        Args:
            prompt: The prompt.
            noise_seed: The seed of the initial noise.

        Returns:
            The image, shape (3, H, W), float32 in [0, 1] on the CPU, bit for bit what the 8 bits that :meth:`put` kept
            stand for; None if there is none.
        """
        file = self._file(prompt, noise_seed)
        try:
            with PngImageFile(file) as picture:
                pixels = torch.from_numpy(np.array(picture)).movedim(-1, 0).contiguous()
                # The pixels are checked, too: Pillow may have been told to accept part of a file
                # (LOAD_TRUNCATED_IMAGES).
                right = picture.text == self._labels(prompt, noise_seed, pixels)
        except FileNotFoundError:
            return None
        except Exception as error:  # Pillow has errors of many kinds for damaged files.
            logger.warning("The teacher image %s cannot be read (%s). It is made again.", file, error)
            return None
        if not right:
            logger.warning("The file %s is not the teacher image that its name says. It is made again.", file)
            return None
        with suppress(OSError):  # Another process may have removed it since, or own it.
            os.utime(file)
        return _images(pixels)

    def put(self, prompt: str, noise_seed: int, image: Tensor) -> None:
        """Keep an image, in the place of any other for the same prompt and noise.

        A failure to write (a full disk, say) is logged once, and the image is not kept: the run can do without.

        Args:
            prompt: The prompt.
            noise_seed: The seed of the initial noise.
            image: The image, shape (3, H, W), in [0, 1]. It is rounded to 8 bits per channel.

        Raises:
            ValueError: If the image has another shape or is not finite.
        """
        if image.ndim != 3 or len(image) != 3:
            raise ValueError(f"A teacher image has shape (3, H, W); got {tuple(image.shape)}.")
        pixels = _pixels(image)
        text = PngInfo()
        for name, value in self._labels(prompt, noise_seed, pixels).items():
            text.add_text(name, value)
        file = self._file(prompt, noise_seed)
        temporary = _temporary(file)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("xb") as handle:
                Image.fromarray(pixels.movedim(0, -1).contiguous().numpy()).save(handle, "PNG", pnginfo=text)
                size = handle.tell()
            if self.size_limit is not None and size > self.size_limit:
                self._not_kept(f"one takes {size} bytes, but teacher_cache_gib allows {self.size_limit:.0f} bytes")
                return
            os.replace(temporary, file)
        except OSError as error:
            self._not_kept(str(error))
            return
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
        self._left -= size
        if self._left < 0:
            self._make_room()

    def _file(self, prompt: str, noise_seed: int) -> Path:
        digest = hashlib.sha256(json.dumps([self.key, prompt, int(noise_seed)]).encode()).hexdigest()
        return self.folder / digest[:2] / f"{digest[2:]}.png"

    def _labels(self, prompt: str, noise_seed: int, pixels: Tensor) -> dict[str, str]:
        """The text that a file carries beside its picture."""
        return {
            "prompt": prompt.encode(errors="replace").decode(),
            "noise_seed": str(int(noise_seed)),
            "teacher": self.key,
            "sha256": hashlib.sha256(f"{list(pixels.shape)}".encode() + pixels.numpy().tobytes()).hexdigest(),
        }

    def _not_kept(self, reason: str) -> None:
        if not self._warned:
            logger.warning("Teacher images are not kept in %s: %s. This is said once.", self.folder, reason)
        self._warned = True

    def _make_room(self) -> None:
        """Look through the folder: remove what killed writers left, and the images used longest ago if it is full."""
        pictures, now = [], time.time()
        for file in self.folder.glob("[0-9a-f][0-9a-f]/*"):
            try:
                facts = file.stat()
            except OSError:
                continue  # Another process removed it, or gave it its final name.
            if _PICTURE.fullmatch(file.name):
                pictures.append((facts.st_mtime_ns, facts.st_size, file))
            elif _TEMPORARY.fullmatch(file.name) and now - facts.st_mtime > _STALE_AFTER_SECONDS:
                with suppress(OSError):
                    file.unlink(missing_ok=True)
        self._left = math.inf
        if self.size_limit is not None:
            total = sum(size for _, size, _ in pictures)
            if total > self.size_limit:
                pictures.sort()
                # The newest image stays if the limit allows for it at all.
                target = min(self.size_limit, max(_KEPT_SHARE * self.size_limit, pictures[-1][1]))
                for _, size, file in pictures:
                    if total <= target:
                        break
                    with suppress(OSError):
                        file.unlink(missing_ok=True)  # Another process may have been faster.
                        total -= size
            self._left = min(self.size_limit - total, _SHARE_BETWEEN_SCANS * self.size_limit)


class TeacherImages:
    """The teacher's images from the noise and the prompts of a rollout: what each sample would have become.

    Images always have 8 bits per channel, with a cache or without, so that a kept image is the made image.

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
        """The images, kept until another rollout is asked about.

        Args:
            rollout: The recorded chains of N samples.

        Returns:
            Images, shape (N, 3, H', W'), float32 in [0, 1].

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
                image = self.cache.get(*pair)
                if image is not None:
                    images[pair] = image
        missing: dict[Hashable, int] = {}
        for row, name in enumerate(names):
            if name not in images:
                missing.setdefault(name, row)
        if self.anywhere(bool(missing)):
            rows = list(missing.values()) or [0]
            for row, image in zip(rows, self._compute(rollout, rows), strict=True):
                images[names[row]] = image
                if self.cache is not None and pairs:
                    self.cache.put(*pairs[row], image)
        return torch.stack([images[name] for name in names]).to(rollout.states.device)

    def _compute(self, rollout: Rollout, rows: list[int]) -> Tensor:
        """The images of some samples, on the CPU."""
        conditioning = Conditioning(
            tensors={name: value[rows] for name, value in rollout.batch.conditioning.tensors.items()}
        )
        noise, start = rollout.states[0][rows], float(rollout.times[0])
        solutions = ode_solution(self.teacher, noise, start, conditioning, self.schedule, self.steps)
        pixels = [_pixels(self.decoder.decode(part)) for part in solutions.split(self.decoder.batch_size)]
        self.computed += len(rows)
        return _images(torch.cat(pixels))


def _temporary(file: Path) -> Path:
    """A name beside a file that no other process and no other call uses."""
    return file.with_name(f"{file.name}.{os.getpid()}-{secrets.token_hex(8)}.tmp")


def _pixels(images: Tensor) -> Tensor:
    """The 8-bit values of images in [0, 1], on the CPU."""
    if not bool(images.isfinite().all()):
        raise ValueError(
            "A teacher image is not finite. Look for a network or a decoder that overflowed (fp16?), and run it in "
            "bfloat16 or float32."
        )
    return (images.detach().float().clamp(0, 1) * 255).round().to(torch.uint8).cpu()


def _images(pixels: Tensor) -> Tensor:
    """Float32 images of 8-bit values. Always made on the CPU: GPUs may divide with another last bit."""
    return pixels.float() / 255
