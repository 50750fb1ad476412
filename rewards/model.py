"""The base of rewards that hold a network.

Wherever a reward is asked, ``images`` are of shape (N, 3, H, W), float32 in [0, 1], ``prompts`` are theirs, and the
values are of shape (N,). A ``network`` is what :meth:`RewardModel.load` returned, on the images' device.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from rdm_rl.families.hub import one_line_errors
from rdm_rl.rewards.protocol import RewardInfo

Loaded = TypeVar("Loaded")


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The weights in a file of safetensors, or of torch, which runs no code of the file."""
    if Path(path).suffix == ".safetensors":
        return load_file(path)
    content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return content


class RewardModel(ABC):
    """A reward with a network, loaded at the first call and frozen.

    The network lives where the images are unless ``device`` says otherwise. With ``offload`` it waits on the CPU
    between uses: whoever calls the reward says when one is over, because a backward pass still needs the weights (see
    :meth:`release`).

    Args:
        model: A folder, or a hub name; None for the published weights (``info.weights``).
        device: Where it runs; None for where the images are.
        dtype: Precision of its weights, as a ``torch.dtype`` or its name. Values are float32 whatever it is. Gradients
            at pixels are small enough to vanish in float16: take bfloat16 for a reward with a weight.
        offload: Keep the network on the CPU between uses.

    Raises:
        ValueError: If ``dtype`` is no floating-point type of torch.
    """

    info: ClassVar[RewardInfo]
    differentiable: ClassVar[bool] = True

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = torch.float32,
        offload: bool = False,
    ) -> None:
        """Remember what to load; nothing is loaded yet."""
        self.model = str(model or self.info.weights)
        self.device = None if device is None else torch.device(device)
        kind = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
        if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
            raise ValueError(f"dtype={dtype!r} is no floating-point type; use 'float32', 'bfloat16' or 'float16'.")
        self.dtype = kind
        self.offload = offload
        self._network: nn.Module | None = None

    @abstractmethod
    def load(self) -> nn.Module:
        """Load the network, and whatever else the reward needs (tokenizer, settings), on the CPU."""

    def fetch(self, option: str, source: str, load: Callable[[str], Loaded]) -> Loaded:
        """What a function loads from a folder or from the hub; for use in :meth:`load`.

        Args:
            option: The option of the reward that says where it is.
            source: The folder or hub name.
            load: The function.

        Returns:
            What it returns.

        Raises:
            OSError: If it cannot be had: one line with the reward's name, the option, and what to do.
        """
        with one_line_errors(f"The reward {getattr(self, 'name', type(self).__name__)!r}: {option}", source):
            return load(source)

    @abstractmethod
    def rewards(self, network: nn.Module, images: Tensor, prompts: list[str], **columns: Any) -> Tensor:
        """The values of some images, shape (N,).

        Args:
            network: The loaded network, on the images' device.
            images: Images, shape (N, 3, H, W), float32 in [0, 1].
            prompts: Their prompts, length N.
            columns: Further columns of the data set, for rewards that read any.
        """

    def __call__(
        self, images: Tensor, prompts: list[str], **columns: Any
    ) -> Tensor | list[Tensor | None] | list[float | None]:
        """The values of :meth:`evaluate`; a reward that does not apply to every sample returns a list with None."""
        return self.evaluate(images, prompts, **columns)

    def prepare(self) -> None:
        """Load the network, on the CPU, if it is not loaded yet. The trainer does this before training.

        Loading within the first call would come after the warm start, where a wrong folder costs the whole of it, and
        would run beside the training thread, whose default types transformers changes while it loads.
        """
        if self._network is None:
            self._network = self.load().to(self.dtype).eval().requires_grad_(False)

    def evaluate(self, images: Tensor, prompts: list[str], **columns: Any) -> Tensor:
        """The values, shape (N,), float32, on the images' device, with a graph if the images have one."""
        self.prepare()
        if self._network is None:
            raise RuntimeError(f"{type(self).__name__}.prepare() loaded nothing.")
        device = self.device or images.device
        self._network.to(device)
        with torch.autocast(device.type, enabled=False):
            values = self.rewards(self._network, images.to(device), list(prompts), **columns)
        return values.float().to(images.device)

    def release(self) -> None:
        """The end of one use: move the network away if ``offload`` is set. No backward pass may be outstanding."""
        if self.offload and self._network is not None:
            self._network.to("cpu")
