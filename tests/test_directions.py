"""The distribution-matching direction: it is DMD where it should be, and its group statistics are what they say."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rdm_rl.rdm import distribution_matching, group_mean, normalize_rewards, policy_loss
from rdm_rl.records import Direction
from rdm_rl.weighting import remove_opposition
from tests.helpers import latents

NORMALIZATIONS = ["sample", "group", "group_rms", "none"]
GROUP_IDS = torch.tensor([7, 7, 7, 2, 2, 5])


def networks_disagree(count: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """x_0 and two predictions near it, with samples of very different scale."""
    scale = torch.logspace(-2, 1, count).reshape(-1, 1, 1, 1)
    x_0 = latents(count, 4, 3, 3)
    teacher, fake = (x_0 + scale * latents(count, 4, 3, 3, seed=seed) for seed in (1, 2))
    return x_0, teacher, fake


def released_dmd_loss(x_0: Tensor, mu_real: Tensor, mu_fake: Tensor) -> Tensor:
    """The distribution-matching loss as the released code of DMD2 computes it."""
    p_real = x_0 - mu_real
    p_fake = x_0 - mu_fake
    grad = (p_real - p_fake) / p_real.abs().mean(dim=[1, 2, 3], keepdim=True)
    grad = torch.nan_to_num(grad)
    return 0.5 * F.mse_loss(x_0, (x_0 - grad).detach(), reduction="mean")


def test_sample_normalization_is_the_released_dmd() -> None:
    x_0, teacher, fake = networks_disagree()
    ours, theirs = x_0.clone().requires_grad_(), x_0.clone().requires_grad_()
    values = distribution_matching(x_0, teacher, fake, GROUP_IDS, "sample")
    loss = policy_loss(ours, Direction(values=values, applicable=torch.ones(6, dtype=torch.bool))).loss
    expected = released_dmd_loss(theirs, teacher, fake)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    # The differences cancel in another order, so the last bits may differ.
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-8)


def test_group_of_one_equals_sample_exactly() -> None:
    x_0, teacher, fake = networks_disagree()
    alone = torch.tensor([3, 9, 1, 0, 4, 8])
    group = distribution_matching(x_0, teacher, fake, alone, "group")
    assert torch.equal(group, distribution_matching(x_0, teacher, fake, alone, "sample"))
    assert not torch.allclose(group, distribution_matching(x_0, teacher, fake, GROUP_IDS, "group"))


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_scale_of_a_group_by_hand(normalization: str) -> None:
    x_0, teacher, fake = networks_disagree()
    values = distribution_matching(x_0, teacher, fake, GROUP_IDS, normalization)
    for rows in ([0, 1, 2], [3, 4], [5]):
        away, gap = x_0[rows] - teacher[rows], teacher[rows] - fake[rows]
        scale = {
            "sample": away.abs().mean((1, 2, 3), keepdim=True),
            "group": away.abs().mean(),
            "group_rms": gap.square().mean().sqrt(),
            "none": torch.tensor(1.0),
        }[normalization]
        torch.testing.assert_close(values[rows], gap / scale)


def test_group_rms_has_unit_size() -> None:
    values = distribution_matching(*networks_disagree(), GROUP_IDS, "group_rms")
    torch.testing.assert_close(group_mean(values.square().flatten(1).mean(1), GROUP_IDS), torch.ones(6))


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_permuting_samples_permutes_the_directions(normalization: str) -> None:
    x_0, teacher, fake = networks_disagree()
    order = torch.tensor([4, 0, 5, 2, 3, 1])
    straight = distribution_matching(x_0, teacher, fake, GROUP_IDS, normalization)
    permuted = distribution_matching(x_0[order], teacher[order], fake[order], GROUP_IDS[order], normalization)
    torch.testing.assert_close(permuted, straight[order], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_a_common_scale_cancels_except_without_normalization(normalization: str) -> None:
    x_0, teacher, fake = networks_disagree()
    values = distribution_matching(x_0, teacher, fake, GROUP_IDS, normalization)
    # A power of two is exact.
    scaled = distribution_matching(8 * x_0, 8 * teacher, 8 * fake, GROUP_IDS, normalization)
    torch.testing.assert_close(scaled, 8 * values if normalization == "none" else values)


def test_groups_do_not_touch_each_other() -> None:
    x_0, teacher, fake = networks_disagree()
    before = distribution_matching(x_0, teacher, fake, GROUP_IDS, "group")
    teacher[3:] += 100
    after = distribution_matching(x_0, teacher, fake, GROUP_IDS, "group")
    assert torch.equal(before[:3], after[:3])
    assert not torch.equal(before[3:5], after[3:5])


def test_the_shared_part_of_a_direction_is_kept() -> None:
    """Centring a dense direction over its group would make this 0."""
    x_0 = torch.zeros(4, 1, 1, 1)
    values = distribution_matching(x_0, torch.ones_like(x_0), x_0, torch.zeros(4, dtype=torch.long), "group")
    assert torch.equal(values, torch.ones_like(x_0))


@pytest.mark.parametrize("normalization", ["sample", "group", "group_rms"])
def test_floor_clamps_and_is_not_added(normalization: str) -> None:
    x_0 = torch.zeros(2, 1, 1, 1)
    far, near = torch.full_like(x_0, 0.5), torch.full_like(x_0, 0.001)
    ids = torch.tensor([0, 1])
    # Above the floor it does nothing at all; below it, it is the scale.
    assert torch.equal(distribution_matching(x_0, far, x_0, ids, normalization, scale_floor=0.1), torch.ones_like(x_0))
    torch.testing.assert_close(
        distribution_matching(x_0, near, x_0, ids, normalization, scale_floor=0.1), torch.full_like(x_0, 0.01)
    )


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_no_direction_where_the_networks_agree(normalization: str) -> None:
    x_0, teacher, _ = networks_disagree()
    values = distribution_matching(x_0, teacher, teacher, GROUP_IDS, normalization)
    assert torch.equal(values, torch.zeros_like(x_0))
    at_home = distribution_matching(x_0, x_0, x_0, GROUP_IDS, normalization)
    assert torch.equal(at_home, torch.zeros_like(x_0))


def test_half_precision_is_normalised_in_float32() -> None:
    x_0, teacher, fake = (value.half() for value in networks_disagree())
    values = distribution_matching(x_0, teacher, fake, GROUP_IDS, "group")
    assert values.dtype == torch.float32


def test_an_unknown_scale_is_refused() -> None:
    with pytest.raises(ValueError, match="normalization='grouped' is unknown"):
        distribution_matching(*networks_disagree(), GROUP_IDS, "grouped")


def test_shapes_that_do_not_fit_are_refused() -> None:
    x_0, teacher, fake = networks_disagree()
    cut = ((x_0[:5], teacher, fake, GROUP_IDS), (x_0, teacher, fake, GROUP_IDS[:5]))
    for wrong in (*cut, (x_0, teacher[None], fake[None], GROUP_IDS)):
        with pytest.raises(ValueError, match="Shapes do not fit"):
            distribution_matching(*wrong)


def test_group_mean_by_hand() -> None:
    values = torch.tensor([[1.0, 2.0, 6.0, 10.0, 20.0, 5.0], [0.0, 0.0, 3.0, 1.0, 1.0, -1.0]])
    expected = torch.tensor([[3.0, 3.0, 3.0, 15.0, 15.0, 5.0], [1.0, 1.0, 1.0, 1.0, 1.0, -1.0]])
    assert torch.equal(group_mean(values, GROUP_IDS), expected)


# ----- directions that oppose another -----


def test_opposition_is_taken_out_sample_by_sample() -> None:
    values, reference = latents(8, 4, 3, 3), latents(8, 4, 3, 3, seed=1)
    product = (values * reference).flatten(1).sum(1)
    assert (product < 0).any()
    assert (product > 0).any()
    made = remove_opposition(values, reference)
    assert torch.equal(made[product >= 0], values[product >= 0])
    left = (made * reference).flatten(1).sum(1)
    torch.testing.assert_close(left[product < 0], torch.zeros_like(left[product < 0]), rtol=0, atol=1e-5)
    # What is taken out lies along the reference, so what is left is the nearest direction that does not oppose.
    removed = (values - made)[product < 0].flatten(1)
    along = torch.nn.functional.cosine_similarity(removed, reference[product < 0].flatten(1))
    torch.testing.assert_close(along, -torch.ones_like(along))
    for row in range(8):
        assert torch.equal(made[row], remove_opposition(values[[row]], reference[[row]])[0])


def test_opposition_has_no_units() -> None:
    values, reference = latents(8, 4, 3, 3), latents(8, 4, 3, 3, seed=1)
    made = remove_opposition(values, reference)
    assert torch.equal(remove_opposition(2.0**20 * values, reference), 2.0**20 * made)
    assert torch.equal(remove_opposition(values, 2.0**-20 * reference), made)


def test_nothing_opposes_what_is_not_there() -> None:
    values = latents(3, 2, 2, 2)
    assert torch.equal(remove_opposition(values, torch.zeros_like(values)), values)
    assert torch.equal(remove_opposition(torch.zeros_like(values), values), torch.zeros_like(values))
    assert torch.equal(remove_opposition(-values, values), torch.zeros_like(values))


# ----- scalar rewards -----

REWARDS = torch.tensor([1.0, 2.0, 6.0, -4.0, -2.0, 10.0])


def test_rewards_are_compared_within_their_group() -> None:
    centred = torch.tensor([-2.0, -1.0, 3.0, -1.0, 1.0, 0.0])
    assert torch.equal(normalize_rewards(REWARDS, GROUP_IDS, "none"), centred)
    torch.testing.assert_close(normalize_rewards(REWARDS, GROUP_IDS, "batch", spread=4.0), centred / 4)
    deviation = torch.tensor([(14 / 3) ** 0.5] * 3 + [1.0] * 3)
    made = normalize_rewards(REWARDS, GROUP_IDS, "group", spread=4.0)
    torch.testing.assert_close(made, centred / deviation, rtol=1e-3, atol=0)
    assert made[5] == 0, "alone in its group"


def test_samples_without_a_value_take_no_part() -> None:
    rewards, applicable = REWARDS.clone(), torch.tensor([True, False, True, True, True, False])
    rewards[~applicable] = torch.nan
    for scale in ("none", "batch", "group"):
        made = normalize_rewards(rewards, GROUP_IDS, scale, spread=2.0)
        rows = applicable.nonzero().flatten()
        alone = normalize_rewards(rewards[rows], GROUP_IDS[rows], scale, spread=2.0)
        torch.testing.assert_close(made[rows], alone)
        assert not made[~applicable].any()
    centred = normalize_rewards(rewards, GROUP_IDS, "none")
    torch.testing.assert_close(centred, torch.tensor([-2.5, 0, 2.5, -1, 1, 0]))


@pytest.mark.parametrize("scale", ["none", "batch", "group"])
def test_units_and_origin_of_a_reward_cancel(scale: str) -> None:
    spread = REWARDS.std(correction=0).item()
    made = normalize_rewards(REWARDS, GROUP_IDS, scale, spread=spread)
    units = 1.0 if scale != "none" else 1024.0
    scaled = normalize_rewards(1024 * REWARDS, GROUP_IDS, scale, spread=1024 * spread)
    torch.testing.assert_close(scaled, units * made, rtol=1e-6, atol=0)
    shifted = normalize_rewards(REWARDS + 100, GROUP_IDS, scale, spread=spread)
    torch.testing.assert_close(shifted, made, rtol=1e-4, atol=1e-4)


def test_a_small_difference_in_a_group_is_not_blown_up() -> None:
    """The epsilon follows the reward's spread over whole batches."""
    rewards = torch.tensor([0.0, 1e-5, 1e-5, -1.0, 1.0, 0.0])
    made = normalize_rewards(rewards, GROUP_IDS, "group", spread=1.0)
    assert made[:3].abs().max() < 0.1
    assert made[4] == pytest.approx(1, rel=1e-3)


EQUAL = [(3, 1000.1), (3, -0.9), (6, 0.3), (7, 0.1), (4, 0.1), (2, 1e6)]


def test_equal_rewards_have_no_advantage() -> None:
    for count, value in EQUAL:
        rewards, groups = torch.full((count,), value), torch.zeros(count, dtype=torch.long)
        for scale, spread in (("none", 1.0), ("group", 0.0), ("group", 1e-3 * abs(value)), ("batch", 0.0)):
            made = normalize_rewards(rewards, groups, scale, spread=spread)
            assert torch.equal(made, torch.zeros(count)), (count, value, scale, spread)


def test_equal_rewards_far_from_zero_have_no_advantage_beside_others() -> None:
    """Three samples of one prompt with the reward 1000.1; those of the other prompt scatter by 0.01."""
    rewards = torch.tensor([1000.1, 1000.1, 1000.1, 1000.11, 1000.1, 1000.09])
    groups = torch.tensor([0, 0, 0, 1, 1, 1])
    made = normalize_rewards(rewards, groups, "group", spread=rewards.std(correction=0).item())
    assert made[3] > 0.5
    assert made[:3].tolist() == [0, 0, 0]
