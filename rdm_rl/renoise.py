"""At which times the distributions are compared: the re-noising distribution of distribution matching."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from rdm_rl.randomness import Generators, uniform
from rdm_rl.rdm import Normalization
from rdm_rl.settings import Finite, Share, Size, Whole, setting

RenoiseDistribution = Literal["uniform", "beta", "annealed_beta"]

# DMDR's DynaRS starts biased to high noise and anneals to uniform (its public code: Beta(4, 1.5) to Beta(1, 1)).
HIGH_NOISE_BETA = (4.0, 1.5)


def anneal_progress(step: int, anneal_steps: int | None) -> float:
    """How far an annealed distribution is at an update, in [0, 1]; 1 if nothing is annealed.

    Example:
        >>> anneal_progress(500, 2000), anneal_progress(500, None)
        (0.25, 1.0)
    """
    return min(step / anneal_steps, 1.0) if anneal_steps else 1.0


def beta_parameters(distribution: RenoiseDistribution, progress: float) -> tuple[float, float]:
    """Parameters of the Beta distribution that t is drawn from.

    References:
        | DMDR: Distribution Matching Distillation Meets Reinforcement Learning (2025), DynaRS
        | https://arxiv.org/abs/2511.13649

    Args:
        distribution: ``uniform`` is Beta(1, 1), ``beta`` is Beta(4, 1.5), ``annealed_beta`` goes from the second to the
            first along a half cosine.
        progress: How far the annealing is, in [0, 1].

    Returns:
        The two parameters.

    Raises:
        ValueError: If the name is unknown.

    Example:
        >>> beta_parameters("annealed_beta", 1.0)
        (1.0, 1.0)
    """
    match distribution:
        case "uniform":
            share = 0.0
        case "beta":
            share = 1.0
        case "annealed_beta":
            share = 0.5 * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))
        case _:
            raise ValueError(f"renoise_distribution={distribution!r}: use 'uniform', 'beta' or 'annealed_beta'.")
    first, second = HIGH_NOISE_BETA
    return 1 + share * (first - 1), 1 + share * (second - 1)


def renoise_times(
    count: int,
    generator: Generators,
    *,
    distribution: RenoiseDistribution = "uniform",
    interval: Sequence[float] = (0.02, 0.98),
    progress: float = 1.0,
) -> Tensor:
    """Times to re-noise at, shape (count,), float32, on the CPU.

    Args:
        count: How many.
        generator: One generator, or one for each time.
        distribution: The distribution, see :func:`beta_parameters`.
        interval: The lowest and the highest time; the distribution is stretched over it.
        progress: How far an annealed distribution is, in [0, 1].

    Returns:
        The times.

    Example:
        >>> t = renoise_times(1000, torch.Generator().manual_seed(0))
        >>> bool((t >= 0.02).all() and (t <= 0.98).all())
        True
    """
    low, high = interval
    first, second = beta_parameters(distribution, progress)
    draws = uniform(count, generator)
    if (first, second) != (1.0, 1.0):
        # torch samples no Beta from an explicit generator, so each uniform number seeds a NumPy generator.
        seeds = (draws.double() * 2**24).long().tolist()
        draws = torch.tensor([np.random.default_rng(seed).beta(first, second) for seed in seeds], dtype=torch.float32)
    return low + (high - low) * draws


def group_times(
    group_ids: Tensor,
    generator: Generators,
    *,
    distribution: RenoiseDistribution = "uniform",
    interval: Sequence[float] = (0.02, 0.98),
    progress: float = 1.0,
) -> Tensor:
    """One time for each group, given to all of its samples: a common scale needs a common time.

    Args:
        group_ids: Group of each sample, shape (N,), int64.
        generator: One generator, or one for each sample; a group uses that of its first sample.
        distribution: As in :func:`renoise_times`.
        interval: As in :func:`renoise_times`.
        progress: As in :func:`renoise_times`.

    Returns:
        The times, shape (N,), on the device of ``group_ids``.

    Example:
        >>> t = group_times(torch.tensor([0, 0, 1]), torch.Generator().manual_seed(0))
        >>> bool(t[0] == t[1]), bool(t[0] == t[2])
        (True, False)
    """
    groups, inverse = group_ids.cpu().unique(return_inverse=True)
    if not isinstance(generator, torch.Generator):
        firsts = [int((inverse == index).nonzero()[0]) for index in range(len(groups))]
        generator = [generator[first] for first in firsts]
    times = renoise_times(len(groups), generator, distribution=distribution, interval=interval, progress=progress)
    return times[inverse].to(group_ids.device)


@dataclass
class DistributionMatchingSettings:
    """Distribution matching."""

    teacher_guidance_scale: Finite | None = setting(
        None, "Guidance of the teacher, baked into the student. Default: the family's published value."
    )
    dm_normalization: Normalization = setting(
        "group_rms",
        "What the direction of `rdm` is divided by: `group_rms` (GNDM), `sample` (DMD), `group` or `none`.",
    )
    dm_scale_floor: Size = setting(0.1, "The smallest scale that the direction is divided by; 1e-6 for `dmd`.")
    renoise_distribution: RenoiseDistribution = setting(
        "uniform",
        "Distribution of the re-noising time: `uniform`, `beta` (biased to high noise), or `annealed_beta` (from the "
        "second to the first, as DMDR's DynaRS). The fake score's times have the same one, over (0.001, 1).",
    )
    renoise_range: list[Share] = setting(
        lambda: [0.02, 0.98], "The lowest and the highest re-noising time of distribution matching."
    )
    renoise_anneal_steps: Whole | None = setting(
        None, "Policy updates over which `annealed_beta` anneals. Default: 2,000 for it."
    )
    first_step_anchor: Size = setting(
        0.0,
        "Weight of the teacher's own first steps (5 of 30) as the aim of the student's first step, where distribution "
        "matching then does not act (DP-DMD, which sets 0.05). 0: it acts there too.",
    )
