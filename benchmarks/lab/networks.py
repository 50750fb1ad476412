"""Small networks of S replicates, computed side by side: every weight has the replicate in front."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rdm_rl.randomness import seeded_generator

TIME_FEATURES = 8


class Networks(nn.Module):
    """S independent perceptrons that predict x_0 of noisy samples, through the velocity of flow matching.

    Args:
        seeds: Seed of each replicate's weights.
        dimensions: D.
        prompts: P.
        width: Units of each of the two hidden layers.
    """

    def __init__(self, seeds: Sequence[int], dimensions: int, prompts: int, width: int = 64) -> None:
        super().__init__()
        sizes = [(dimensions + TIME_FEATURES + prompts, width), (width, width), (width, dimensions + 1)]
        generators = [seeded_generator(seed, "lab/weights") for seed in seeds]
        self.weights = nn.ParameterList(
            torch.stack([torch.randn(*size, generator=draw) for draw in generators]) / math.sqrt(size[0])
            for size in sizes
        )
        self.biases = nn.ParameterList(torch.zeros(len(seeds), 1, size[1]) for size in sizes)

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Predictions of x_0; x_t (S, P, G, D), t (S, P, G)."""
        prompts = torch.eye(x_t.shape[1])[None, :, None].expand(*x_t.shape[:3], -1)
        alpha, sigma = 1 - t[..., None], t[..., None]
        norm = (alpha.square() + sigma.square()).sqrt()
        scaled = x_t / norm
        angles = t[..., None] * math.pi * 2.0 ** torch.arange(-1, TIME_FEATURES // 2 - 1)
        hidden = torch.cat([scaled, angles.sin(), angles.cos(), prompts], -1).flatten(1, 2)
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            hidden = torch.baddbmm(bias, nn.functional.silu(hidden) if layer else hidden, weight)
        hidden = hidden.view(*x_t.shape[:3], -1)
        return alpha / norm * scaled + sigma / norm * (hidden[..., :-1] + hidden[..., -1:] * scaled)


@torch.no_grad()
def move_towards(target: nn.Module, source: nn.Module, share: float) -> None:
    """Move the weights of one network a share of the way to those of another."""
    for moved, goal in zip(target.parameters(), source.parameters(), strict=True):
        moved.lerp_(goal, share)
