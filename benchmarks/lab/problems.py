"""Teachers whose score is known exactly: the only unknown in distribution matching is then the fake score.

A problem holds one teacher for each replicate, drawn from the replicate's seed. All tensors lead with (S, P): S
replicates, which are computed side by side, and P prompts; D dimensions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rdm_rl.digits.data import DATA_FILE
from rdm_rl.noise_schedule import FlowMatching
from rdm_rl.randomness import seeded_generator

SCHEDULE = FlowMatching()
NUM_PROMPTS = 4


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """For each prompt a mixture of Gaussians with a common standard deviation.

    Args:
        centres: Means of the modes, shape (S, P, M, D).
        weights: Their weights, shape (S, P, M), which sum to 1.
        std: Standard deviation of each mode.
    """

    centres: Tensor
    weights: Tensor
    std: float

    def denoise(self, x_t: Tensor, t: Tensor) -> Tensor:
        """The exact posterior mean of x_0, the optimal denoiser.

        Args:
            x_t: Noisy samples, shape (S, P, G, D).
            t: Their times, shape (S, P, G).
        """
        alpha, sigma = SCHEDULE.alpha(t)[..., None], SCHEDULE.sigma(t)[..., None]
        variance = (alpha * self.std).square() + sigma.square()
        # The distances to the scaled centres, shape (S, P, G, M); what all modes share cancels in the softmax.
        products = x_t @ self.centres.mT
        squares = self.centres.square().sum(-1)[:, :, None]
        logits = self.weights.log()[:, :, None] + (alpha * products - 0.5 * alpha.square() * squares) / variance
        centre = logits.softmax(-1) @ self.centres
        return centre + alpha * self.std**2 / variance * (x_t - alpha * centre)

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Samples for every prompt, shape (S, P, count, D)."""
        shape = self.centres.shape
        modes = torch.multinomial(self.weights.flatten(0, 1), count, replacement=True, generator=generator)
        modes = modes.reshape(*shape[:2], count, 1).expand(-1, -1, -1, shape[-1])
        noise = torch.randn(*shape[:2], count, shape[-1], generator=generator)
        return self.centres.gather(2, modes) + self.std * noise


def gaussian_mixture(seeds: Sequence[int], dimensions: int, modes: int = 6) -> Mixture:
    """Modes at random places with weights from 1 : 1 to 1 : 6, well apart, of about unit variance together."""
    spread, std = (1.0, 0.15) if dimensions == 2 else (0.7, 0.5)
    generators = [seeded_generator(seed, "lab/mixture") for seed in seeds]
    centres = torch.stack([torch.randn(NUM_PROMPTS, modes, dimensions, generator=draw) for draw in generators])
    order = torch.stack([torch.rand(NUM_PROMPTS, modes, generator=draw).argsort(-1) for draw in generators])
    weights = (1.0 + order) / (1.0 + order).sum(-1, keepdim=True)
    return Mixture(centres=spread * centres, weights=weights, std=std)


def digit_images(seeds: Sequence[int], images: int = 120) -> Mixture:
    """A little noise around some of the 8x8 digits of the demo, D = 64, in [-1, 1]; a prompt is one of four digits."""
    with np.load(DATA_FILE) as data:
        labels = torch.from_numpy(data["labels"])
        pixels = torch.from_numpy(data["images"]).float().flatten(1) / 8 - 1

    def some(label: Tensor, generator: torch.Generator) -> Tensor:
        rows = (labels == label).nonzero().flatten()
        return pixels[rows[torch.randperm(len(rows), generator=generator)[:images]]]

    generators = [seeded_generator(seed, "lab/digits") for seed in seeds]
    chosen = [torch.randperm(10, generator=draw)[:NUM_PROMPTS] for draw in generators]
    centres = torch.stack(
        [torch.stack([some(label, draw) for label in row]) for row, draw in zip(chosen, generators, strict=True)]
    )
    return Mixture(centres=centres, weights=torch.full(centres.shape[:3], 1 / images), std=0.2)


PROBLEMS = {
    **{
        f"mixture-{dimensions}": lambda seeds, dimensions=dimensions: gaussian_mixture(seeds, dimensions)
        for dimensions in (2, 16, 64, 128, 512)
    },
    "digits": digit_images,
}


# ----- distances to the truth -----


def energy_distance(first: Tensor, second: Tensor) -> Tensor:
    """The energy distance between samples, shape (..., N, D) each, in units of the mean distance within the second.

    Without bias: 0 on average for samples of one distribution (and so sometimes below).

    References:
        | Energy statistics (Szekely and Rizzo, 2013)
        | https://doi.org/10.1016/j.jspi.2013.03.018
    """
    within = [
        torch.cdist(each, each).sum((-1, -2)) / (each.shape[-2] * (each.shape[-2] - 1)) for each in (first, second)
    ]
    between = torch.cdist(first, second).mean((-1, -2))
    return (2 * between - within[0] - within[1]) / within[1]


def mode_shares(samples: Tensor, problem: Mixture) -> Tensor:
    """The share of samples, shape (S, P, N, D), that is nearest to each mode, shape (S, P, M)."""
    nearest = torch.cdist(samples, problem.centres).argmin(-1)
    counts = torch.zeros_like(problem.weights).scatter_add_(-1, nearest, torch.ones_like(nearest, dtype=torch.float32))
    return counts / samples.shape[2]
