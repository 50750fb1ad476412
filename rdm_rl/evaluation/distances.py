"""Distances between two sets of images, measured on feature vectors, shapes (N, F) and (M, F).

Nothing here knows where the features come from: pass those of a recogniser, of an Inception network, or plain pixels.
A Fréchet distance is only comparable between sets of the same size seen by the same feature network.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


def frechet_distance(features: Tensor, reference: Tensor) -> float:
    r"""The Fréchet distance between Gaussians fitted to two sets of features.

    .. math:: \|m_1 - m_2\|^2 + \mathrm{tr}(S_1 + S_2 - 2 (S_1 S_2)^{1/2})

    Computed in float64. The square root's trace comes from the eigenvalues of the symmetric
    :math:`S_1^{1/2} S_2 S_1^{1/2}`, which are those of :math:`S_1 S_2`.

    References:
        | GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium (Heusel et al., 2017), eq. 6
        | https://arxiv.org/abs/1706.08500

    Returns:
        The distance, in squared feature units; 0 for equal sets.

    Raises:
        ValueError: If the feature sizes differ or a set has fewer than two members.

    Example:
        >>> x = torch.randn(100, 4, generator=torch.Generator().manual_seed(0))
        >>> round(frechet_distance(x, x + 1.0), 6)
        4.0
    """
    if features.ndim != 2 or reference.ndim != 2 or features.shape[1] != reference.shape[1]:
        raise ValueError(
            f"Features must be (N, F) and (M, F); got {tuple(features.shape)} and {tuple(reference.shape)}."
        )
    if min(len(features), len(reference)) < 2:
        raise ValueError("A Fréchet distance needs at least two samples in each set.")
    first, second = features.double(), reference.double()
    shift = first.mean(0) - second.mean(0)
    cov_1, cov_2 = (torch.atleast_2d(torch.cov(points.T)) for points in (first, second))
    values, vectors = torch.linalg.eigh(cov_1)
    root = vectors @ torch.diag(values.clamp_min(0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_2 @ root).clamp_min(0).sqrt().sum()
    return float((shift @ shift + cov_1.trace() + cov_2.trace() - 2 * cross).clamp_min(0))


@dataclass(frozen=True, kw_only=True)
class ManifoldMetrics:
    """How two sets of images overlap; every value is in [0, 1] except density, which may exceed 1.

    Args:
        precision: Share of samples that lie within the reference set's neighbourhoods: are they plausible?
        recall: Share of reference images that lie within the samples' neighbourhoods: is everything covered?
        density: How many reference neighbourhoods hold a sample, on average, over k. Robust to outliers.
        coverage: Share of reference images with a sample in their neighbourhood. Robust to outliers.
    """

    precision: float
    recall: float
    density: float
    coverage: float


def _distances(first: Tensor, second: Tensor) -> Tensor:
    """Euclidean distances, shape (N, M), equal from both sides to the last bit."""
    # The default multiplies matrices, whose rounding puts neighbours that lie exactly on a ball outside of it.
    return torch.cdist(first, second, compute_mode="donot_use_mm_for_euclid_dist")


def manifold_metrics(features: Tensor, reference: Tensor, *, k: int = 3) -> ManifoldMetrics:
    """Precision, recall, density and coverage from k-nearest-neighbour balls.

    References:
        | Improved Precision and Recall Metric for Assessing Generative Models (Kynkäänniemi et al., 2019), eq. 1-2
        | https://arxiv.org/abs/1904.06991
        | Reliable Fidelity and Diversity Metrics for Generative Models (Naeem et al., 2020), section 3
        | https://arxiv.org/abs/2002.09797

    Args:
        features: Features of the samples, shape (N, F).
        reference: Features of the reference images, shape (M, F).
        k: Which neighbour sets the radius of a ball.

    Raises:
        ValueError: If a set has k or fewer members.

    Example:
        >>> x = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
        >>> manifold_metrics(x, x).recall
        1.0
    """
    if min(len(features), len(reference)) <= k:
        raise ValueError(f"k={k} needs more than {k} samples in each set; got {len(features)} and {len(reference)}.")
    samples, real = features.double(), reference.double()
    # The k-th neighbour of a point within its own set: index k, because index 0 is the point itself.
    real_radius = _distances(real, real).kthvalue(k + 1).values
    sample_radius = _distances(samples, samples).kthvalue(k + 1).values
    distances = _distances(samples, real)
    inside_real = distances <= real_radius
    return ManifoldMetrics(
        precision=float(inside_real.any(1).double().mean()),
        recall=float((distances <= sample_radius[:, None]).any(0).double().mean()),
        density=float(inside_real.double().sum(1).mean() / k),
        coverage=float(inside_real.any(0).double().mean()),
    )
