"""How much memory a run has used."""

import resource
import sys

import torch


def peak_memory_gib(device: torch.device) -> float:
    """The highest memory use so far, in GiB: of the accelerator if there is one, else of the process.

    Args:
        device: Where the networks are.

    Returns:
        The peak, in GiB.

    Example:
        >>> peak_memory_gib(torch.device("cpu")) > 0
        True
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS and in KiB on Linux.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
