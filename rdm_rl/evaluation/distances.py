"""Distances between two sets of images, measured on feature vectors, shapes (N, F) and (M, F).

Nothing here knows where the features come from: pass those of a recogniser, of an Inception network, or plain pixels.
A Fréchet distance is only comparable between sets of the same size seen by the same feature network.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize


def frechet_distance(features: Tensor, reference: Tensor) -> float:
    r"""The Fréchet distance between Gaussians fitted to two sets of features.

    .. math:: \|m_1 - m_2\|^2 + \mathrm{tr}(S_1 + S_2 - 2 (S_1 S_2)^{1/2})

    Computed in float64. The square root's trace is the sum of the singular values of :math:`A_1 A_2^T` for any
    :math:`A_i` with :math:`A_i^T A_i = S_i`: of the centred features themselves where they are few, of the roots of the
    covariances where they are many.

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
    _check_sets(features, reference)
    first, second = features.double(), reference.double()
    shift = first.mean(0) - second.mean(0)
    first, second = (
        (points - points.mean(0)) / (len(points) - 1) ** 0.5 for points in (first, second)
    )  # Now their covariances are their own products.
    if min(len(first), len(second)) < first.shape[1]:
        cross = torch.linalg.svdvals(first @ second.T).sum()
    else:
        cross = torch.linalg.svdvals(_root(first.T @ first) @ _root(second.T @ second)).sum()
    return float((shift @ shift + first.square().sum() + second.square().sum() - 2 * cross).clamp_min(0))


def _root(covariance: Tensor) -> Tensor:
    """A square root of a covariance, shape (F, F)."""
    values, vectors = torch.linalg.eigh(covariance)
    root: Tensor = vectors @ torch.diag(values.clamp_min(0).sqrt()) @ vectors.T
    return root


def kernel_distance(features: Tensor, reference: Tensor) -> float:
    r"""The kernel distance between two sets of features, without bias: the squared maximum mean discrepancy.

    .. math::
        \mathbb{E}\,k(x, x') + \mathbb{E}\,k(y, y') - 2\,\mathbb{E}\,k(x, y), \quad
        k(a, b) = (a \cdot b / F + 1)^3

    Unlike a Fréchet distance it does not grow as the sets get smaller; for equal distributions it scatters around 0, so
    it may be below. The paper averages over blocks to save memory; this takes all pairs at once.

    References:
        | Demystifying MMD GANs (Binkowski et al., 2018), section 4, KID
        | https://arxiv.org/abs/1801.01401

    Raises:
        ValueError: If the feature sizes differ or a set has fewer than two members.

    Example:
        >>> x = torch.randn(100, 4, generator=torch.Generator().manual_seed(0))
        >>> abs(kernel_distance(x[:50], x[50:])) < 0.1 < kernel_distance(x[:50], x[50:] + 1.0)
        True
    """
    _check_sets(features, reference)
    first, second = features.double(), reference.double()
    return _discrepancy(_kernel(first, first), _kernel(second, second), _kernel(first, second))


def _kernel(first: Tensor, second: Tensor) -> Tensor:
    """The polynomial kernel of all pairs, shape (N, M)."""
    return (first @ second.T / first.shape[1] + 1) ** 3


def _discrepancy(first: Tensor, second: Tensor, between: Tensor) -> float:
    """The squared discrepancy from the kernels within both sets and between them."""
    within = [(values.sum() - values.trace()) / (len(values) * (len(values) - 1)) for values in (first, second)]
    return float(within[0] + within[1] - 2 * between.mean())


def _check_sets(features: Tensor, reference: Tensor) -> None:
    if features.ndim != 2 or reference.ndim != 2 or features.shape[1] != reference.shape[1]:
        raise ValueError(
            f"Features must be (N, F) and (M, F); got {tuple(features.shape)} and {tuple(reference.shape)}."
        )
    if min(len(features), len(reference)) < 2:
        raise ValueError("A distance between distributions needs at least two samples in each set.")


def pixel_distance(images: Tensor, reference: Tensor) -> Tensor:
    """How far each image is from its partner in pixels: the root of the mean squared difference, shape (N,).

    Args:
        images: Images, shape (N, 3, H, W).
        reference: Their partners, shape (N, 3, H, W).

    Example:
        >>> pixel_distance(torch.zeros(2, 3, 4, 4), torch.tensor([0.0, 0.5]).view(2, 1, 1, 1).expand(2, 3, 4, 4))
        tensor([0.0000, 0.5000])
    """
    return (images - reference).square().flatten(1).mean(1).sqrt()


def paired_distance(features: Tensor, reference: Tensor) -> Tensor:
    """How far each image is from its partner: one minus the cosine of their features, shape (N,), from 0 to 2.

    Args:
        features: Features of the images, shape (N, F).
        reference: Features of their partners, shape (N, F).

    Example:
        >>> paired_distance(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[2.0, 0.0], [0.0, 3.0]]))
        tensor([0., 1.])
    """
    return 1 - cosine_similarity(features, reference, dim=1)


def diversity(features: Tensor) -> Tensor:
    """How much the images of one prompt differ: the mean of one minus the cosine over pairs, shape (P,), from 0 to 2.

    Args:
        features: Features of S images of each of P prompts, shape (P, S, F), S at least 2.

    Raises:
        ValueError: If there is one image of a prompt.

    Example:
        >>> diversity(torch.tensor([[[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]]]))
        tensor([0.6667])
    """
    count = features.shape[1]
    if count < 2:
        raise ValueError("Diversity needs at least two images of each prompt: draw with more seeds.")
    units = normalize(features, dim=2)
    total = units.sum(1).square().sum(1)  # Of the cosines of all ordered pairs, and of each image with itself.
    return 1 - (total - units.square().sum((1, 2))) / (count * (count - 1))


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
    return _overlap(_distances(samples, samples), _distances(samples, real), _radius(_distances(real, real), k), k)


def _radius(distances: Tensor, k: int) -> Tensor:
    """The distance of each point's k-th neighbour in its own set, shape (N,): index k, as 0 is the point itself."""
    return distances.kthvalue(k + 1).values


def _overlap(within: Tensor, between: Tensor, real_radius: Tensor, k: int) -> ManifoldMetrics:
    """The metrics from distances within the samples, shape (N, N), and between samples and reference, (N, M)."""
    inside_real = between <= real_radius
    return ManifoldMetrics(
        precision=float(inside_real.any(1).double().mean()),
        recall=float((between <= _radius(within, k)[:, None]).any(0).double().mean()),
        density=float(inside_real.double().sum(1).mean() / k),
        coverage=float(inside_real.any(0).double().mean()),
    )


def set_distances(features: Tensor, reference: Tensor, *, k: int = 3) -> Callable[[Tensor], dict[str, float]]:
    """All that this module says of two sets, as a function of which samples are looked at.

    What subsets share is computed once: the distances between all samples.

    Args:
        features: Features of the samples, shape (N, F).
        reference: Features of the reference images, shape (M, F).
        k: Which neighbour sets the radius of a ball.

    Returns:
        A function from rows, int64, to the values of ``frechet``, ``kernel``, ``precision``, ``recall``, ``density``
        and ``coverage``.

    Example:
        >>> x = torch.randn(60, 2, generator=torch.Generator().manual_seed(0))
        >>> measure = set_distances(x, x + 1.0)
        >>> round(measure(torch.arange(60))["frechet"], 6), measure(torch.arange(30))["precision"] <= 1
        (2.0, True)
    """
    samples, real = features.double(), reference.double()
    within, between = _distances(samples, samples), _distances(samples, real)
    kernels = _kernel(samples, samples), _kernel(real, real), _kernel(samples, real)
    radius = _radius(_distances(real, real), k)

    def measure(rows: Tensor) -> dict[str, float]:
        return {
            "frechet": frechet_distance(samples[rows], real),
            "kernel": _discrepancy(kernels[0][rows][:, rows], kernels[1], kernels[2][rows]),
            **vars(_overlap(within[rows][:, rows], between[rows], radius, k)),
        }

    return measure
