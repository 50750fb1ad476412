"""Files that several processes may write: named by what is in them, and there whole or not at all."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from importlib.metadata import version
from pathlib import Path
from secrets import token_hex
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

# Not public by its name, but documented (torch's notes on extending it), and the only way to see what is in a subclass.
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from xxhash import xxh3_128

# What a saved configuration says beside what the network computes.
_NOT_COMPUTED = ("transformers_version", "dtype", "torch_dtype", "base_model_name_or_path", "inference_mode")


@contextmanager
def written_whole(file: Path) -> Iterator[Path]:
    """Where to write a file that is there whole or not at all, also when the process is killed or others write it.

    What was written becomes the file at the end of the context; its folder is made.

    Example:
        >>> from tempfile import mkdtemp
        >>> file = Path(mkdtemp()) / "a" / "note.txt"
        >>> with written_whole(file) as partial:
        ...     _ = partial.write_text("all of it")
        >>> file.read_text()
        'all of it'
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.{os.getpid()}-{token_hex(4)}.partial")
    partial.touch()
    mode = partial.stat().st_mode
    try:
        yield partial
        partial.chmod(mode)  # safetensors makes files that only their owner can read.
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def read_json(file: Path) -> Any:
    """What a JSON file holds.

    Raises:
        ValueError: If it is no JSON.

    Example:
        >>> from tempfile import mkdtemp
        >>> file = Path(mkdtemp()) / "facts.json"
        >>> _ = file.write_text('{"steps": 4}')
        >>> read_json(file)
        {'steps': 4}
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # Of what is no JSON, or no UTF-8.
        raise ValueError(f"{str(file)!r} is no JSON, or cut off: {error}. Mend it, or make or copy it again.") from None


def save_tensors(file: Path, tensors: Mapping[str, Tensor], **facts: str) -> None:
    """Write tensors whole or not at all, with some facts and a checksum that :func:`load_tensors` compares."""
    plain = {name: value.cpu().contiguous() for name, value in tensors.items()}
    with written_whole(file) as partial:
        save_file(plain, partial, {**facts, "checksum": tensors_checksum(plain)})


def load_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file, on the CPU, and its facts.

    Raises:
        ValueError: If it is not what :func:`save_tensors` wrote.
    """
    try:
        with safe_open(file, framework="pt") as content:
            tensors, facts = {name: content.get_tensor(name) for name in content.keys()}, content.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{str(file)!r} is damaged: {error}. Delete it, and it is made again.") from error
    if facts.pop("checksum", None) != tensors_checksum(tensors):
        raise ValueError(f"{str(file)!r} has changed since it was written. Delete it, and it is made again.")
    return tensors, facts


def tensors_checksum(tensors: Mapping[str, Tensor]) -> str:
    """A checksum of tensors on the CPU, with their names, types and shapes: 32 hexadecimal digits."""
    digest = xxh3_128()
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        content: Any = value.flatten().view(torch.uint8).numpy()
        digest.update(content)
    return digest.hexdigest()


@torch.no_grad()
def fingerprint(network: nn.Module | None, **facts: object) -> str:
    """A short name, 16 hexadecimal digits, for a network's weights and some facts: every value counts.

    Args:
        network: The network, or None; of adapters, only one that is called ``teacher`` counts.
        facts: What JSON can hold, tensors, sets and dataclasses of those; anything else counts as its text.
    """
    digest = xxh3_128(json.dumps(facts, sort_keys=True, default=_plain).encode())  # Models are large: faster than SHA.
    for name, weight in ({} if network is None else network.state_dict()).items():
        if "lora_" not in name or ".teacher." in name:  # Those of policy and fake score are trained.
            # Adapters wrap a layer as base_layer; the weights are the same.
            digest.update(name.replace(".base_layer", "").encode())
            whole = weight.full_tensor() if isinstance(weight, DTensor) else weight
            for part in plain_tensors(whole.cpu()):
                content: Any = part.contiguous().flatten().view(torch.uint8).numpy()
                digest.update(content)
    return digest.hexdigest()[:16]


def plain_tensors(tensor: Tensor) -> list[Tensor]:
    """The tensors that one is made of: itself, or what a quantised one keeps."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [part for name in names for part in plain_tensors(getattr(tensor, name))]


def cache_key(networks: Mapping[str, nn.Module | None], **facts: object) -> str:
    """The name under which a cache keeps what some networks make: whatever determines the content is in it.

    Args:
        networks: The networks, by their part in it: their weights, configurations and precisions count, those of an
            adapter called ``teacher``, too, and so do the versions of the libraries that they are made of.
        facts: Everything else that the content depends on, as in :func:`fingerprint`.

    Example:
        >>> key = cache_key({"teacher": nn.Linear(2, 2)}, steps=4)
        >>> len(key), key == cache_key({"teacher": nn.Linear(2, 2)}, steps=5)
        (16, False)
    """
    parts = {name: None if network is None else _network_facts(network) for name, network in networks.items()}
    versions = {library: version(library) for library in ("diffusers", "transformers")}
    return fingerprint(None, networks=parts, versions=versions, facts=facts)


def _network_facts(network: Any) -> dict[str, object]:
    """What a network computes with: its weights, its configuration, and that of its adapter ``teacher``."""
    adapter = getattr(network, "peft_config", {}).get("teacher")
    return {
        "weights": fingerprint(network),
        "precision": sorted({str(parameter.dtype) for parameter in network.parameters()}),
        "config": config_facts(getattr(network, "config", {})),
        "adapter": None if adapter is None else config_facts(adapter),
    }


def config_facts(config: Any) -> dict[str, object]:
    """What a configuration of diffusers, transformers or PEFT says, without what changes with the place and the day."""
    settings: Mapping[str, object] = config if isinstance(config, Mapping) else config.to_dict()
    return {name: value for name, value in settings.items() if name[:1] != "_" and name not in _NOT_COMPUTED}


def _plain(value: Any) -> Any:
    """What stands for a value that JSON cannot hold."""
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    if is_dataclass(value):
        return [type(value).__name__, {each.name: getattr(value, each.name) for each in fields(value)}]
    return str(value)
