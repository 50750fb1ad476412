"""Random numbers are a function of seed, stream and coordinates, and of nothing else."""

import torch

from rdm_rl.randomness import normal, seeded_generator, seeded_generators, uniform


def numbers(*arguments) -> torch.Tensor:
    return torch.rand(8, generator=seeded_generator(*arguments))


def test_same_arguments_same_numbers() -> None:
    assert torch.equal(numbers(0, "rollout", 3, 1), numbers(0, "rollout", 3, 1))


def test_every_coordinate_matters() -> None:
    coordinates = [
        (seed, stream, *path) for seed in (0, 1) for stream in "ab" for path in ((0, 1), (1, 0), (1, 1), (10, 0))
    ]
    first = {numbers(*one)[0].item() for one in coordinates}
    assert len(first) == len(coordinates)


def test_known_numbers() -> None:
    """A change of these breaks every resumed run: mention it in the changelog."""
    assert seeded_generator(7, "train/rollout", 3, 11).initial_seed() == 6421192481691585772


def test_samples_look_independent() -> None:
    noise = normal((2000, 4), seeded_generators(0, "rollout", 0, range(2000)))
    assert noise.mean().abs() < 0.05
    assert abs(noise.std().item() - 1) < 0.05
    assert torch.corrcoef(noise.T).fill_diagonal_(0).abs().max() < 0.1
    assert len(noise[:, 0].unique()) == 2000


def test_list_of_generators_draws_row_by_row() -> None:
    rows = normal((3, 2, 2), seeded_generators(0, "x", 0, [4, 5, 6]))
    assert torch.equal(rows[1], torch.randn(1, 2, 2, generator=seeded_generator(0, "x", 0, 5))[0])
    draws = uniform(3, seeded_generators(0, "x", 0, [4, 5, 6]))
    assert torch.equal(draws[2:], torch.rand(1, generator=seeded_generator(0, "x", 0, 6)))


def test_one_generator_draws_as_a_pipeline_does() -> None:
    assert torch.equal(
        normal((3, 2, 2), torch.Generator().manual_seed(1)),
        torch.randn(3, 2, 2, generator=torch.Generator().manual_seed(1)),
    )
    assert torch.equal(
        uniform(3, torch.Generator().manual_seed(1)), torch.rand(3, generator=torch.Generator().manual_seed(1))
    )


def test_global_state_is_left_alone() -> None:
    before = torch.get_rng_state()
    normal((3, 2), seeded_generators(0, "x", 0, range(3)))
    uniform(3, seeded_generator(0, "x"))
    assert torch.equal(torch.get_rng_state(), before)
