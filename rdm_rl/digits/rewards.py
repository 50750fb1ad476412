"""Rewards for the embedded digits: ``digit_logprob``, and two that are easily gamed, :func:`ink` and :func:`symmetry`.

The recogniser behind ``digit_logprob`` is network D, which exists only to reward. The networks that judge students (A,
B and C in :mod:`rdm_rl.digits.recognisers`) are never rewards, and D judges nothing: a student that has learnt to
please a network looks good to that network whatever it draws.
"""

import re
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from rdm_rl.digits.data import DIGIT_WORDS, NETWORKS_FILE
from rdm_rl.digits.recognisers import DigitNetwork
from rdm_rl.rewards.model import RewardModel
from rdm_rl.rewards.protocol import RewardInfo

REWARD_NETWORK_FILE = NETWORKS_FILE.with_name("reward_network.safetensors")
REWARD_NETWORK_WIDTH = 28

_DIGIT = re.compile(rf"\b(?:{'|'.join(DIGIT_WORDS)}|\d)\b", re.IGNORECASE)


def named_digit(prompt: str) -> int | None:
    """The digit that a prompt names, as a whole word ("seven") or a numeral ("7"); None if it names none or several.

    Example:
        >>> named_digit("a drawing of a seven"), named_digit("the digit 7"), named_digit("a bone")
        (7, 7, None)
    """
    names = {match.lower() for match in _DIGIT.findall(prompt)}
    digits = {int(name) if name.isdigit() else DIGIT_WORDS.index(name) for name in names}
    return digits.pop() if len(digits) == 1 else None


class DigitLogProb(RewardModel):
    """``digit_logprob``: the log-probability that network D gives to the digit that the prompt names.

    Prompts that name no digit, such as the empty one, get None.

    Args:
        model: A safetensors file with weights for the same layers; None for the shipped ones.
        device, dtype, offload: As in :class:`RewardModel`.

    Example:
        >>> DigitLogProb()(torch.zeros(2, 3, 32, 32), ["the digit seven", ""])[1] is None
        True
    """

    info: ClassVar[RewardInfo] = RewardInfo(
        description="Log-probability that a small recogniser gives to the digit named in the prompt.",
        units="nats",
        expected_range=(
            "-0.1 to -0.02 for the embedded training images, -7.4 to -3.3 where the prompt names the next digit "
            "instead (measured here). Training with smoothed labels keeps it from 0."
        ),
        memory="0.29 MB in float32: computed from 72,210 parameters",
    )

    def load(self) -> nn.Module:
        """Network D."""
        network = DigitNetwork(REWARD_NETWORK_WIDTH)
        network.load_state_dict(load_file(self.model or REWARD_NETWORK_FILE))
        return network

    def rewards(self, network: nn.Module, images: Tensor, prompts: list[str], **columns: Any) -> Tensor:
        """The log-probabilities, shape (N,), at most 0, for prompts that each name a digit.

        Raises:
            ValueError: If the images have another size.
        """
        if images.shape[1:] != (3, 32, 32):
            raise ValueError(
                f"digit_logprob got images of shape {tuple(images.shape)}, but its network reads (N, 3, 32, 32), the "
                "embedded digits. It suits their teacher only: use another reward for other models."
            )
        digits = torch.tensor([named_digit(prompt) for prompt in prompts], dtype=torch.int64, device=images.device)
        logits: Tensor = network(images.to(self.dtype))
        return logits.float().log_softmax(1).gather(1, digits[:, None])[:, 0]

    def __call__(self, images: Tensor, prompts: list[str], **columns: Any) -> list[Tensor | None]:
        """N scalars, with a graph if the images have one, or None where the prompt names no digit."""
        named = [index for index, prompt in enumerate(prompts) if named_digit(prompt) is not None]
        values = self.evaluate(images[named], [prompts[index] for index in named])
        rewards: list[Tensor | None] = [None] * len(prompts)
        for index, value in zip(named, values, strict=True):
            rewards[index] = value
        return rewards


def ink(images: Tensor, prompts: list[str]) -> Tensor:
    """Mean grey level of each image, shape (N,), in [0, 1]: the more ink, the higher, whatever is drawn.

    Example:
        >>> ink(torch.ones(1, 3, 4, 4), [""])
        tensor([1.])
    """
    return images.mean((1, 2, 3))


def symmetry(images: Tensor, prompts: list[str]) -> Tensor:
    """Minus the mean absolute difference between each image and its mirror image, shape (N,): a blank page is perfect.

    Example:
        >>> symmetry(torch.eye(2).expand(1, 3, 2, 2), [""])
        tensor([-1.])
    """
    return -(images - images.flip(-1)).abs().mean((1, 2, 3))


# Set in this way because a function's type has no such attributes.
vars(ink).update(
    differentiable=True,
    info=RewardInfo(
        description="Mean grey level of the image. Gamed by bright pictures that show nothing.",
        units="grey level",
        expected_range="0.25 to 0.39 for 98 % of the embedded training images; measured here",
    ),
)
vars(symmetry).update(
    differentiable=True,
    info=RewardInfo(
        description="Likeness of the image to its left-right mirror image. Gamed by a blank page.",
        units="minus grey level",
        expected_range="-0.34 to -0.06 for 98 % of the embedded training images; measured here",
    ),
)
