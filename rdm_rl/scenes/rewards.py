"""A reward for the scenes, ``scene_logprob``: how surely a network sees what the prompt asks for.

That network is D, which exists only to reward: A, B and C in :mod:`rdm_rl.scenes.recognisers` judge students and are
never rewards, as a student that has learnt to please a network looks good to that network whatever it draws.
"""

from typing import Any, ClassVar

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from rdm_rl.rewards.model import RewardModel
from rdm_rl.rewards.protocol import RewardInfo
from rdm_rl.scenes.data import IMAGE_SIZE, NETWORKS_FILE, OPEN, wanted_attributes
from rdm_rl.scenes.recognisers import SceneNetwork

REWARD_NETWORK_FILE = NETWORKS_FILE.with_name("reward_network.safetensors")
REWARD_NETWORK_WIDTH = 22


class SceneLogProb(RewardModel):
    """``scene_logprob``: the log-probability that network D gives to all that the prompt asks for.

    It is the sum over both digits, their inks, the arrangement and the ground, as far as the prompt names them; 0 for
    the empty prompt.

    Args:
        model: A safetensors file with weights for the same layers; None for the shipped ones.
        device, dtype, offload: As in :class:`RewardModel`.

    Example:
        >>> SceneLogProb()(torch.zeros(2, 3, 24, 24), ["a red 7 above a blue 2", ""])[1].item()
        0.0
    """

    info: ClassVar[RewardInfo] = RewardInfo(
        description="Log-probability that a small recogniser gives to the digits, inks and places of the prompt.",
        units="nats",
        expected_range=(
            "-2.8 to -0.1 for 98 % of scenes of training handwriting, -32 to -10 where the prompt is another scene's "
            "(measured here). Training with smoothed labels keeps it from 0."
        ),
        memory="0.38 MB in float32: computed from 94,453 parameters",
    )

    def load(self) -> nn.Module:
        """Network D."""
        network = SceneNetwork(REWARD_NETWORK_WIDTH)
        network.load_state_dict(load_file(self.model or REWARD_NETWORK_FILE))
        return network

    def rewards(self, network: nn.Module, images: Tensor, prompts: list[str], **columns: Any) -> Tensor:
        """The log-probabilities, shape (N,), at most 0.

        Raises:
            ValueError: If the images have another size, or a prompt describes no scene.
        """
        if images.shape[1:] != (3, IMAGE_SIZE, IMAGE_SIZE):
            raise ValueError(
                f"scene_logprob got images of shape {tuple(images.shape)}, but its network reads (N, 3, 24, 24), the "
                "embedded scenes. It suits their teacher only: use another reward for other models."
            )
        wanted = wanted_attributes(prompts).to(images.device)
        known = [
            logits.float().log_softmax(1).gather(1, column.clamp(min=0)[:, None])[:, 0].where(column != OPEN, 0.0)
            for logits, column in zip(network(images.to(self.dtype)), wanted.T, strict=True)
        ]
        return torch.stack(known).sum(0)
