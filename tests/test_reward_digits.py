"""The rewards of the embedded digits, and the network behind one of them, which takes no part in evaluation."""

import hashlib
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from rdm_rl.digits.data import NETWORKS_FILE, Digits, digit_prompts, load_digits
from rdm_rl.digits.recognisers import WIDTHS, digit_features, load_network
from rdm_rl.digits.rewards import (
    REWARD_NETWORK_FILE,
    REWARD_NETWORK_WIDTH,
    DigitLogProb,
    ink,
    named_digit,
    symmetry,
)
from rdm_rl.digits.students import training_prompts
from rdm_rl.rewards.protocol import RewardInfo

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "train_digits_teacher.py"
TRAIN = load_digits("train")


def log_probabilities(digits: Digits, shift: int = 0) -> Tensor:
    """What the reward says of real images when each prompt names their digit plus ``shift``."""
    prompts = [f"the digit {(label + shift) % 10}" for label in digits.labels.tolist()]
    rewards = DigitLogProb()(digits.images, prompts)
    return torch.stack([reward for reward in rewards if reward is not None])


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_digits_teacher", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Which digit is meant


def test_only_whole_words_name_a_digit_and_only_one() -> None:
    for digit in range(10):
        assert {named_digit(prompt) for prompt in digit_prompts(digit)} == {digit}
    for prompt in ("", "a bone of someone", "the number 10", "two or three"):
        assert named_digit(prompt) is None
    for prompt in ("Seven.", "seven, the digit 7"):
        assert named_digit(prompt) == 7


def test_half_of_the_demos_prompts_name_a_digit() -> None:
    digits = [named_digit(row["prompt"]) for row in training_prompts()]
    assert digits == [digit for digit in range(10) for _ in range(12)] + [None] * 120


# digit_logprob


def test_the_log_probability_is_the_networks_own() -> None:
    images, labels = TRAIN.images[:40], TRAIN.labels[:40]
    prompts = ["" if index % 2 else digit_prompts(label)[0] for index, label in enumerate(labels.tolist())]
    reward = DigitLogProb()
    values = reward(images, prompts)
    assert [value is None for value in values] == [False, True] * 20
    expected = reward.load()(images).softmax(1)[torch.arange(40), labels].log()
    named = torch.stack([value for value in values if value is not None])
    assert named.ndim == 1
    torch.testing.assert_close(named, expected[::2])
    assert reward(TRAIN.images[:2], ["", "a bone"]) == [None, None]


def test_real_digits_get_more_than_wrong_prompts() -> None:
    right, wrong = log_probabilities(TRAIN), log_probabilities(TRAIN, shift=1)
    assert -0.12 < right.min() and right.max() < 0
    assert wrong.max() < -3


def test_a_gradient_step_on_the_images_raises_the_reward_and_leaves_the_network_alone() -> None:
    images = TRAIN.images[:20].clone().requires_grad_()
    prompts = [f"a handwritten {digit}" for digit in ((TRAIN.labels[:20] + 3) % 10).tolist()]
    prompts[0] = ""
    reward = DigitLogProb()
    assert reward.differentiable
    before = reward(images, prompts)
    torch.stack(before[1:]).sum().backward()
    assert images.grad is not None
    lengths = images.grad.flatten(1).norm(dim=1)
    assert lengths[0] == 0
    assert lengths[1:].min() > 0.01
    with torch.no_grad():
        after = reward(images + 0.1 * images.grad / lengths.clamp_min(1e-9)[:, None, None, None], prompts)
    assert all(new > old for old, new in zip(before[1:], after[1:], strict=True))
    assert reward._network is not None
    assert not any(weight.requires_grad or weight.grad is not None for weight in reward._network.parameters())


def test_half_precision_is_close_and_gives_float32() -> None:
    images, prompts = TRAIN.images[:10], ["the digit 3"] * 10
    exact = torch.stack(DigitLogProb()(images, prompts))
    rough = torch.stack(DigitLogProb(dtype="bfloat16")(images, prompts))
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, rtol=0.05, atol=0.05)


def test_other_images_are_refused() -> None:
    for shape in ((1, 3, 64, 64), (1, 1, 32, 32)):
        with pytest.raises(ValueError, match=r"reads \(N, 3, 32, 32\)"):
            DigitLogProb()(torch.zeros(shape), ["the digit 3"])


# The two that are easily gamed


def test_ink_and_its_gradient() -> None:
    images = torch.rand(2, 3, 4, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    values = ink(images, ["", ""])
    torch.testing.assert_close(values, torch.stack([image.sum() / 72 for image in images]))
    torch.testing.assert_close(torch.autograd.grad(values.sum(), images)[0], torch.full((2, 3, 4, 6), 1 / 72))
    assert ink(torch.tensor([0.0, 0.25, 1.0]).view(3, 1, 1, 1).expand(3, 3, 5, 5), [""] * 3).tolist() == [0, 0.25, 1]


def test_symmetry_and_its_gradient() -> None:
    images = torch.rand(2, 3, 4, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    values = symmetry(images, ["", ""])
    difference = images.detach() - images.detach()[..., [5, 4, 3, 2, 1, 0]]
    torch.testing.assert_close(values, -difference.abs().sum((1, 2, 3)) / 72)
    # Each pixel stands in two of the 72 terms: its own and its mirror pixel's.
    torch.testing.assert_close(torch.autograd.grad(values.sum(), images)[0], -2 * difference.sign() / 72)


def test_symmetry_of_known_pictures() -> None:
    left = torch.zeros(1, 3, 4, 4)
    left[..., :1] = 1
    assert symmetry(left, [""]).item() == -0.5
    assert symmetry(left + left.flip(-1), [""]).item() == 0
    assert symmetry(left.transpose(2, 3), [""]).item() == 0  # up and down does not count


def test_rewards_say_what_they_are() -> None:
    for reward in (ink, symmetry, DigitLogProb()):
        assert reward.differentiable is True
        assert isinstance(reward.info, RewardInfo)
    count = sum(weight.numel() for weight in DigitLogProb().load().parameters())
    assert f"{count:,} parameters" in DigitLogProb.info.memory
    assert DigitLogProb.info.memory.startswith(f"{4 * count / 1e6:.2f} MB in float32")


# Rewards and evaluation stay apart


def test_the_evaluation_networks_are_the_ones_that_were_always_shipped() -> None:
    digest = hashlib.sha256(NETWORKS_FILE.read_bytes()).hexdigest()
    assert digest == "5730bb24a272dcb8a18b9716fbec6992dff0bc45e855495fc0144e564fbc493e"


def test_the_rewards_network_is_none_of_the_evaluations() -> None:
    assert REWARD_NETWORK_WIDTH not in WIDTHS.values()
    own = load_file(REWARD_NETWORK_FILE)
    for name in WIDTHS:
        other = load_network(name).state_dict()
        assert own.keys() == other.keys()
        same_shape = [key for key in own if own[key].shape == other[key].shape]
        assert "head.1.weight" in same_shape
        assert all((own[key] - other[key]).abs().max() > 0.01 for key in same_shape)


def test_neither_side_loads_the_others_network() -> None:
    with pytest.raises(ValueError, match="'D' is no evaluation network; use one of A, B, C"):
        digit_features("D", TRAIN.images[:1])  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="Missing key"):
        DigitLogProb(model=NETWORKS_FILE)(TRAIN.images[:1], ["the digit 3"])


def test_the_rewards_network_has_not_seen_the_held_out_images() -> None:
    # Trained on both splits with the same recipe, it is as sure of the one as of the other.
    seen, unseen = log_probabilities(TRAIN), log_probabilities(load_digits("held_out"))
    assert unseen.mean() < 1.3 * seen.mean()
    assert unseen.min() < 5 * seen.min()


def test_the_script_writes_the_rewards_network(script: ModuleType, tmp_path: Path) -> None:
    for name in ("one", "two"):
        script.train_reward_network(tmp_path / name, TRAIN, steps=2)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    written, shipped = load_file(tmp_path / "one"), load_file(REWARD_NETWORK_FILE)
    assert {key: value.shape for key, value in written.items()} == {key: v.shape for key, v in shipped.items()}
