"""What a reward is given, and what it gives."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from torch import Tensor

from rdm_rl.randomness import Generators
from rdm_rl.records import Direction, Rollout

if TYPE_CHECKING:
    from rdm_rl.networks.roles import Networks
    from rdm_rl.rewards.images import ImageDecoder
    from rdm_rl.trainers.rdm_config import RDMConfig


@dataclass(frozen=True, kw_only=True)
class RewardInfo:
    """Facts about a reward, for people.

    Args:
        description: What it rewards, in one line.
        paper: Title, authors, year and address; empty if there is none.
        units: Units of the value.
        expected_range: Values that ordinary images get, in words, with the source of the figure.
        license: Licence of the weights and of the code they come from; empty if nothing is downloaded.
        weights: Hub name of the default weights; empty if nothing is downloaded.
        memory: Memory of the weights, and how the figure was obtained.
        columns: Columns of the data set that it reads.

    Example:
        >>> RewardInfo(description="Mean brightness of the image.", units="grey level", expected_range="0 to 1").paper
        ''
    """

    description: str
    paper: str = ""
    units: str = ""
    expected_range: str = ""
    license: str = ""
    weights: str = ""
    memory: str = ""
    columns: tuple[str, ...] = ()


class RewardError(RuntimeError):
    """A reward raised, hung, or gave an answer that is none."""


@dataclass(frozen=True, kw_only=True)
class RewardContext:
    """What a reward that needs the run is given, once, before training.

    Args:
        networks: The policy, the teacher and the fake score.
        args: The run's settings.
        teacher_guidance_scale: Guidance of the teacher: the setting, or the family's published value.
        global_step: Gives the number of policy updates made so far.
        decoder: Makes images of latents.
        teacher_images: Gives the teacher's images from the noise and the prompts of a rollout, (N, 3, H', W').
        last_checkpoint: Gives the folder of the last checkpoint, or None.
        distribution_matching: Makes R_dm's direction of the predictions of policy, teacher and fake score (see
            :meth:`rdm_rl.RDMTrainer.compute_distribution_matching`).
    """

    networks: "Networks"
    args: "RDMConfig"
    teacher_guidance_scale: float
    global_step: Callable[[], int]
    decoder: "ImageDecoder"
    teacher_images: Callable[[Rollout], Tensor]
    last_checkpoint: Callable[[], Path | None]
    distribution_matching: Callable[..., Tensor]


@runtime_checkable
class DirectionReward(Protocol):
    """A reward that gives its own direction."""

    def direction(self, rollout: Rollout, step: int, *, generator: Generators) -> Direction:
        """Where the prediction of x_0 at a recorded step should move, shape (N, C, H, W).

        Args:
            rollout: The recorded chains of N samples.
            step: Index of the step that will be replayed with gradients.
            generator: The reward's randomness: one generator, or one for each sample.
        """
        ...


@runtime_checkable
class BindableReward(Protocol):
    """A reward that needs the run."""

    def bind(self, context: RewardContext) -> None:
        """Take what the trainer gives before training."""
        ...
