"""Explicit randomness: each sample has its own generators, so a run does not depend on how its batches are cut.

A generator is made from (seed, stream, update, sample) when it is needed and thrown away afterwards. So there is no
generator state to save: an update draws the same numbers in an uninterrupted and in a resumed run, in one process or
many, with a batch of 64 or four accumulated batches of 16. The global random state is never touched.
"""

from collections.abc import Iterable, Sequence
from zlib import crc32

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

Generators = torch.Generator | list[torch.Generator]


def seeded_generator(seed: int, stream: str, *path: int) -> torch.Generator:
    """A CPU generator that is a function of its arguments alone.

    Torch's CPU generator reads 32 bits of a seed, so of 200,000 generators about five pairs draw the same numbers.

    Args:
        seed: The run's seed, at least 0.
        stream: What the numbers are for, so that two uses never share them.
        path: Further non-negative coordinates, such as the update and the sample.

    Returns:
        The generator.

    Example:
        >>> a, b = seeded_generator(0, "rollout", 3, 1), seeded_generator(0, "rollout", 3, 1)
        >>> torch.equal(torch.rand(4, generator=a), torch.rand(4, generator=b))
        True
    """
    state = np.random.SeedSequence((seed, crc32(stream.encode()), *path)).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(state[0]) << 31 ^ int(state[1]))


def drawn_index(count: int, seed: int, stream: str, update: int) -> int:
    """One of so many, a function of its arguments alone: the same on every process.

    Args:
        count: How many there are.
        seed: As in :func:`seeded_generator`.
        stream: As in :func:`seeded_generator`.
        update: The update that it is drawn for.

    Example:
        >>> [drawn_index(3, 0, "train/resolution", update) for update in range(6)]
        [2, 2, 2, 1, 2, 1]
    """
    return int(torch.randint(count, (1,), generator=seeded_generator(seed, stream, update)))


def seeded_generators(seed: int, stream: str, update: int, sample_ids: Iterable[int]) -> list[torch.Generator]:
    """One generator for each sample of a batch; the arguments are those of :func:`seeded_generator`."""
    return [seeded_generator(seed, stream, update, sample) for sample in sample_ids]


def normal(shape: Sequence[int], generator: Generators, device: torch.device | str = "cpu") -> Tensor:
    """Standard normal noise, drawn on the generator's device in float32, as diffusers pipelines draw theirs.

    Args:
        shape: Shape of the result, (N, ...).
        generator: One generator, or a list of N of them, one for each row.
        device: Where the result goes.

    Returns:
        The noise, float32.
    """
    device = torch.device(device)
    noise: Tensor = randn_tensor(tuple(shape), generator=generator, device=device, dtype=torch.float32)
    return noise


def uniform(count: int, generator: Generators) -> Tensor:
    """Uniform numbers in [0, 1), shape (count,), float32, on the CPU.

    Args:
        count: How many.
        generator: One generator, or a list of ``count`` of them, one for each number.

    Returns:
        The numbers.
    """
    if isinstance(generator, torch.Generator):
        return torch.rand(count, generator=generator)
    return torch.cat([torch.rand(1, generator=sample_generator) for sample_generator in generator])
