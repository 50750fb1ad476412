"""Networks that wait on the CPU while they are not used."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from rdm_rl.settings import Folder, setting

AdapterPass = Literal["beside", "added"]


class OffloadedNetwork:
    """A frozen network whose weights wait on the CPU and come to the device whenever it runs.

    They stay there until :meth:`release`, so that many forward passes after each other move them once. Nothing is moved
    back: the weights on the CPU are the network's own, and what is on the device is a copy.

    Args:
        network: The network.
        device: Where it runs.

    Raises:
        ValueError: If a weight is trained, as a copy would be.

    Example:
        >>> teacher = OffloadedNetwork(nn.Linear(2, 2).requires_grad_(False), torch.device("cpu"))
        >>> teacher.is_present
        False
        >>> teacher.network(torch.zeros(1, 2)).shape, teacher.is_present
        (torch.Size([1, 2]), True)
    """

    def __init__(self, network: nn.Module, device: torch.device) -> None:
        """Move the network to the CPU."""
        if any(parameter.requires_grad for parameter in network.parameters()):
            raise ValueError("Only a frozen network can be offloaded; this one is trained.")
        self.network, self.device = network, device
        self.is_present = False
        self._waiting = []
        for tensor in (*network.parameters(), *network.buffers()):
            weights = tensor.data.cpu()
            # Pinned memory is copied to a GPU several times as fast.
            self._waiting.append((tensor, weights.pin_memory() if device.type == "cuda" else weights))
        self.release()
        network.register_forward_pre_hook(self._fetch)

    def _fetch(self, *_: Any) -> None:
        if not self.is_present:
            for tensor, weights in self._waiting:
                tensor.data = weights.to(self.device, non_blocking=True, copy=True)
            self.is_present = True

    def release(self) -> None:
        """The end of one use: let the copy on the device go. No backward pass may be outstanding."""
        for tensor, weights in self._waiting:
            tensor.data = weights
        self.is_present = False


@dataclass
class MemorySettings:
    """Memory and processes."""

    offload: list[Literal["text_encoders", "rewards", "teacher"]] = setting(
        list,
        "What waits on the CPU while it is not used: `text_encoders`, `rewards` (those with a network), and, when full "
        "copies are trained, the `teacher`.",
    )
    prompt_cache_dir: Folder | None = setting(
        None,
        "Where encoded prompts are kept: each is encoded once, and the text encoders then leave the GPU. Default: "
        "nowhere, and each batch is encoded anew.",
    )
    adapter_pass: AdapterPass = setting(
        "beside",
        "How a pass takes adapters along: `beside` their layers, as PEFT does, or `added` to the weights, which is "
        "faster in a small network in float32, and takes a copy of the adapted weights.",
    )
    shard: bool = setting(False, "Divide the frozen networks, or the full copies, among the processes (FSDP2).")
