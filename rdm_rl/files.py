"""Files that several processes may write: named by what is in them, and there whole or not at all."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from torch.distributed.tensor import DTensor


@contextmanager
def written_whole(file: Path) -> Iterator[Path]:
    """Write a file whole or not at all, also when the process is killed or another one writes the same.

    Args:
        file: What shall be there; its folder is made.

    Returns:
        Where to write, in the same folder. It becomes the file at the end of the context.

    Example:
        >>> from tempfile import mkdtemp
        >>> file = Path(mkdtemp()) / "a" / "note.txt"
        >>> with written_whole(file) as partial:
        ...     _ = partial.write_text("all of it")
        >>> file.read_text()
        'all of it'
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
    try:
        yield partial
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


@torch.no_grad()
def fingerprint(network: nn.Module | None, **settings: object) -> str:
    """A short name for a network's weights and some settings: files made with others never mix.

    Args:
        network: The network, or None; a sample of each of its weights is read, and of a teacher's adapter.
        settings: Anything that JSON can hold.

    Returns:
        16 hexadecimal digits.
    """
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, parameter in () if network is None else network.named_parameters():
        if "lora_" not in name or ".teacher." in name:  # Those of policy and fake score are trained.
            whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            flat = whole.flatten()
            part = flat[:: max(1, flat.numel() // 64)].float().cpu().numpy()
            # Adapters wrap a layer as base_layer; the weights are the same.
            digest.update(name.replace(".base_layer", "").encode() + part.tobytes())
    return digest.hexdigest()[:16]
