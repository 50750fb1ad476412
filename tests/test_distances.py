"""Distances between sets of features have their known answers."""

import math
from math import nan

import numpy as np
import pytest
import torch
from scipy import linalg
from sklearn.metrics import pairwise_distances
from sklearn.metrics.pairwise import cosine_distances, paired_cosine_distances, polynomial_kernel
from sklearn.neighbors import NearestNeighbors

from rdm_rl.evaluation.distances import (
    diversity,
    frechet_distance,
    kernel_distance,
    manifold_metrics,
    paired_distance,
    set_distances,
)
from rdm_rl.evaluation.intervals import by_halves, mean_by_prompt, paired_difference


def gaussian(count: int = 400, size: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def whitened(count: int = 400, size: int = 6) -> torch.Tensor:
    """Features whose empirical mean is 0 and whose empirical covariance is the identity, exactly."""
    x = gaussian(count, size)
    x = x - x.mean(0)
    values, vectors = torch.linalg.eigh(torch.cov(x.T).reshape(size, size))
    return x @ vectors @ torch.diag(values.rsqrt()) @ vectors.T


def test_equal_sets_are_at_distance_zero_whatever_their_order() -> None:
    x = gaussian()
    assert frechet_distance(x, x.flip(0)) == pytest.approx(0, abs=1e-9)


def test_a_shift_costs_its_squared_length() -> None:
    x, shift = gaussian(), torch.tensor([3.0, -4.0, 0, 0, 0, 0], dtype=torch.float64)
    assert frechet_distance(x, x + shift) == pytest.approx(25)


def test_a_scale_costs_the_squared_difference_of_standard_deviations() -> None:
    x = whitened()
    assert frechet_distance(x, 3 * x) == pytest.approx(6 * (3 - 1) ** 2)


def test_commuting_covariances_have_the_closed_form() -> None:
    x = whitened(size=3)
    first, second = torch.tensor([1.0, 2.0, 3.0]).double(), torch.tensor([2.0, 5.0, 3.0]).double()
    assert frechet_distance(x * first, x * second) == pytest.approx(float((first - second).square().sum()))


def test_it_is_symmetric_and_does_not_change_under_a_rotation() -> None:
    x, y = gaussian(seed=0), gaussian(300, seed=1) * torch.tensor([1, 2, 3, 0.5, 1, 1]).double() + 0.3
    rotation = torch.linalg.qr(gaussian(6, 6, seed=2)).Q
    expected = frechet_distance(x, y)
    assert frechet_distance(y, x) == pytest.approx(expected)
    assert frechet_distance(x @ rotation, y @ rotation) == pytest.approx(expected)


def test_degenerate_covariances_are_allowed() -> None:
    x = gaussian(20)
    flat = torch.cat([x, torch.zeros(20, 3).double()], 1)
    assert frechet_distance(flat, flat) == pytest.approx(0, abs=1e-9)
    # A collapsed sampler: one point, at the mean of the data. What is missing is all of the data's variance.
    collapsed = x.mean(0).expand(20, -1)
    assert frechet_distance(collapsed, x) == pytest.approx(float(torch.cov(x.T).trace()))
    # Fewer samples than features.
    assert frechet_distance(gaussian(3), gaussian(4, seed=1)) > 0


def test_one_feature_is_enough() -> None:
    x = whitened(size=1)
    assert frechet_distance(x, 2 * x + 1) == pytest.approx(2)


def test_single_precision_is_no_worse_than_the_features_themselves() -> None:
    x, y = gaussian(), gaussian(seed=1) + 1
    assert frechet_distance(x.float(), y.float()) == pytest.approx(frechet_distance(x, y), rel=1e-5)


@pytest.mark.parametrize("shapes", [((5, 3), (5, 4)), ((5,), (5,)), ((1, 3), (5, 3))])
def test_frechet_distance_refuses_what_has_no_covariance(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    with pytest.raises(ValueError, match=r"Features must be|at least two"):
        frechet_distance(*(torch.zeros(shape) for shape in shapes))


def test_equal_sets_overlap_completely() -> None:
    x = gaussian()
    result = manifold_metrics(x, x)
    assert (result.precision, result.recall, result.coverage) == (1, 1, 1)
    # Every ball holds its own centre and k neighbours.
    assert result.density == pytest.approx((3 + 1) / 3)


def test_two_draws_of_one_distribution_have_density_near_one() -> None:
    result = manifold_metrics(gaussian(1000, 4, seed=0), gaussian(1000, 4, seed=1), k=5)
    assert result.density == pytest.approx(1, abs=0.1)
    # Naeem et al. give the expected coverage of equal distributions in closed form, about 1 - 2^-k.
    assert result.coverage == pytest.approx(1 - 2**-5, abs=0.03)


def test_disjoint_sets_do_not_overlap() -> None:
    result = manifold_metrics(gaussian(), gaussian(seed=1) + 1000)
    assert (result.precision, result.recall, result.density, result.coverage) == (0, 0, 0, 0)


def test_dropping_a_mode_lowers_recall_and_coverage_but_not_precision() -> None:
    data = torch.cat([gaussian(200, 2), gaussian(200, 2, seed=1) + 100])
    both = torch.cat([gaussian(200, 2, seed=2), gaussian(200, 2, seed=3) + 100])
    one = gaussian(400, 2, seed=4)
    complete, dropped = manifold_metrics(both, data), manifold_metrics(one, data)
    assert complete.recall > 0.8
    assert dropped.recall <= 0.5
    assert dropped.coverage <= 0.5
    assert dropped.precision > 0.8


def test_junk_beside_good_samples_lowers_precision_but_not_recall() -> None:
    data = gaussian(200, 2)
    good = gaussian(200, 2, seed=1)
    # Isolated and far away, but not with a neighbourhood so wide that it swallows the data.
    junk = 1000 + torch.arange(200).double()[:, None].expand(-1, 2)
    mixed = manifold_metrics(torch.cat([good, junk]), data)
    assert mixed.precision == pytest.approx(manifold_metrics(good, data).precision / 2)
    assert mixed.recall == manifold_metrics(good, data).recall


def test_a_collapsed_sampler_has_precision_without_recall() -> None:
    data = gaussian(200, 4)
    result = manifold_metrics(data[:1].expand(50, -1), data)
    assert result.precision == 1
    assert result.recall <= 1 / 200 + 1e-9


def test_manifold_metrics_refuses_sets_without_a_kth_neighbour() -> None:
    with pytest.raises(ValueError, match="k=3 needs more than 3"):
        manifold_metrics(torch.zeros(3, 2), torch.zeros(10, 2))


def test_results_are_plain_finite_floats() -> None:
    result = manifold_metrics(gaussian(20), gaussian(20, seed=1))
    values = (result.precision, result.recall, result.density, result.coverage)
    assert all(isinstance(value, float) and math.isfinite(value) for value in values)


# The same from another library.


@pytest.mark.parametrize(("count", "size"), [(60, 5), (8, 12)])
def test_scipy_and_scikit_learn_agree(count: int, size: int) -> None:
    x, y = gaussian(count, size), 1.3 * gaussian(count + 3, size, seed=1) + 0.2
    covariances = torch.cov(x.T), torch.cov(y.T)
    root = torch.from_numpy(linalg.sqrtm((covariances[0] @ covariances[1]).numpy()).real)
    expected = (x.mean(0) - y.mean(0)).square().sum() + (covariances[0] + covariances[1] - 2 * root).trace()
    assert frechet_distance(x, y) == pytest.approx(float(expected), rel=1e-4)

    within = [polynomial_kernel(points, gamma=1 / size, coef0=1)[~np.eye(len(points), dtype=bool)] for points in (x, y)]
    between = polynomial_kernel(x, y, gamma=1 / size, coef0=1)
    assert kernel_distance(x, y) == pytest.approx(within[0].mean() + within[1].mean() - 2 * between.mean())

    near = [NearestNeighbors(n_neighbors=3).fit(points) for points in (x, y)]
    radii = [each.kneighbors()[0][:, -1] for each in near]  # Without arguments, a point is not its own neighbour.
    distances = pairwise_distances(x, y)
    inside = distances <= radii[1]
    overlap = manifold_metrics(x, y)
    assert overlap.precision == pytest.approx(inside.any(1).mean())
    assert overlap.recall == pytest.approx((distances <= radii[0][:, None]).any(0).mean())
    assert overlap.density == pytest.approx(inside.sum(1).mean() / 3)
    assert overlap.coverage == pytest.approx(inside.any(0).mean())

    assert paired_distance(x, y[:count]).numpy() == pytest.approx(paired_cosine_distances(x, y[:count]))
    pairs = cosine_distances(x[:4])[~np.eye(4, dtype=bool)]
    assert diversity(x[:4][None]).item() == pytest.approx(pairs.mean())


def test_the_kernel_distance_of_equal_distributions_is_zero_on_average_however_small_the_sets() -> None:
    draws = [kernel_distance(gaussian(10, 2, seed=seed), gaussian(10, 2, seed=seed + 100)) for seed in range(100)]
    mean, error = np.mean(draws), np.std(draws) / 10
    assert abs(mean) < 3 * error
    assert min(draws) < 0
    # A shift by s along one of F features: E k differs by a polynomial in s, here for two points of no spread.
    points = torch.zeros(5, 2)
    assert kernel_distance(points + 1, points) == pytest.approx((1 + 1) ** 3 + 1 - 2)


def test_one_image_of_a_prompt_has_no_diversity() -> None:
    with pytest.raises(ValueError, match="draw with more seeds"):
        diversity(torch.zeros(3, 1, 2))


def test_all_distances_at_once_are_those_of_the_single_functions() -> None:
    x, y, rows = gaussian(40), gaussian(30, seed=1) + 0.5, torch.arange(0, 40, 2)
    measured = set_distances(x.float(), y.float())(rows)
    expected = {
        "frechet": frechet_distance(x[rows], y),
        "kernel": kernel_distance(x[rows], y),
        **vars(manifold_metrics(x[rows], y)),
    }
    assert measured == pytest.approx(expected, rel=1e-4)


# Intervals


@pytest.mark.parametrize("kind", ["bootstrap", "halves"])
def test_intervals_of_a_mean_are_as_long_as_theory_says_and_hold_the_truth(kind: str) -> None:
    lengths, hits = [], 0
    for seed in range(40):
        values = gaussian(60, 2, seed=seed)
        flat = values.flatten()
        if kind == "bootstrap":
            estimate = mean_by_prompt(values)
        else:
            estimate = by_halves(lambda numbers, flat=flat: {"mean": float(flat[numbers].mean())}, (60, 2))["mean"]
        assert estimate.value == pytest.approx(float(values.mean()))
        lengths.append(estimate.half_width)
        hits += estimate.low < 0 < estimate.high
    assert np.mean(lengths) == pytest.approx(1.96 / (60 * 2) ** 0.5, rel=0.1)
    assert hits >= 33  # Of 40; 38 are expected.


def test_hard_prompts_cancel_in_a_paired_difference() -> None:
    hard = 10 * gaussian(50, 1)
    first, second = hard + gaussian(50, 2, seed=1), hard + gaussian(50, 2, seed=2) - 1
    difference = paired_difference(first, second)
    assert difference.excludes_zero
    assert difference.value == pytest.approx(1, abs=0.5)
    assert difference.half_width < mean_by_prompt(first).half_width / 5


def test_what_has_no_value_is_left_out_and_few_prompts_have_no_interval() -> None:
    values = torch.tensor([[1.0, nan], [nan, nan], [3.0, 5.0]])
    estimate = mean_by_prompt(values)
    assert estimate.value == 2.5
    assert math.isnan(estimate.low)
    assert not estimate.excludes_zero
    assert math.isnan(mean_by_prompt(torch.full((5, 1), nan)).value)
    assert math.isnan(by_halves(lambda numbers: {"n": len(numbers)}, (7, 1))["n"].high)
