"""Adapters' files: what they hold, those of PEFT itself, and whether all of a file has reached the network."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft
from huggingface_hub import snapshot_download
from peft import PeftConfig, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils import PeftType
from safetensors.torch import load_file
from torch import Tensor, nn

DIFFUSERS_LORA = "pytorch_lora_weights.safetensors"
_PEFT_WEIGHTS, _PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"


def peft_folder(path: str, weight_name: str | None) -> Path | None:
    """The folder of an adapter that PEFT itself saved; None for an adapter in diffusers' or another format.

    Args:
        path: A folder or a hub name.
        weight_name: The adapter's file in it, or None.

    Raises:
        FileNotFoundError: If the configuration beside the weights is missing.
    """
    if weight_name is None or Path(weight_name).name != _PEFT_WEIGHTS:
        return None
    place = Path(weight_name).parent
    root = path if Path(path).is_dir() else snapshot_download(path, allow_patterns=[str(place / "adapter_*")])
    folder = Path(root) / place
    if not (folder / _PEFT_CONFIG).is_file():
        raise FileNotFoundError(
            f"{path!r} holds an {_PEFT_WEIGHTS} without the {_PEFT_CONFIG} in which PEFT keeps its alpha. Copy both."
        )
    return folder


def load_peft_folder(network: Any, folder: Path, adapter: str) -> dict[str, Tensor]:
    """Give a network the adapter that PEFT saved for it.

    Args:
        network: The network, of diffusers.
        folder: What ``PeftModel.save_pretrained`` wrote.
        adapter: What the adapter is called.

    Returns:
        The file's tensors by their names in the network.

    Raises:
        ValueError: If it is no LoRA.
    """
    config = PeftConfig.from_pretrained(folder)
    if config.peft_type != PeftType.LORA:
        raise ValueError(f"{str(folder)!r} is an adapter of type {config.peft_type}. Pass a LoRA.")
    state = {name.removeprefix("base_model.model."): value for name, value in load_file(folder / _PEFT_WEIGHTS).items()}
    network.load_lora_adapter(state, prefix=None, adapter_name=adapter, metadata=config.to_dict())
    return state


def tensors_of(
    pipeline: Any, network_name: str, path: str, **options: Any
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """An adapter's tensors by their names in the network, and its layers' alphas, if it is of kohya's form.

    Tensors of other parts keep the names of the file.

    Args:
        pipeline: The pipeline, which knows the formats that it loads.
        network_name: Its attribute that holds the network.
        path: A folder or a hub name.
        options: More arguments of ``load_lora_weights``.
    """
    config = getattr(pipeline, network_name).config
    state, alphas = pipeline.lora_state_dict(path, unet_config=config, **options), None
    if isinstance(state, tuple):
        state, alphas = state
    prefix = f"{network_name}."
    inside = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    outside = {name: value for name, value in state.items() if not name.startswith(prefix)}
    named = {name.removeprefix(prefix).removesuffix(".alpha"): value for name, value in (alphas or {}).items()}
    # The alphas of attention layers are named after their first tensor.
    by_layer = {name.split(".lora_A")[0]: value for name, value in convert_unet_state_dict_to_peft(named).items()}
    return {**convert_unet_state_dict_to_peft(inside), **outside}, by_layer


def load_with_alphas(network: Any, tensors: Mapping[str, Tensor], alphas: Mapping[str, float], adapter: str) -> None:
    """Give a network an adapter whose layers have alphas of their own.

    diffusers (0.42), given the file, forgets an attention layer's alpha that differs from the others'.

    Args:
        network: The network, of diffusers.
        tensors: The tensors by their names in the network; those of other parts are left out.
        alphas: The layers' alphas; a layer without one has its rank.
        adapter: What the adapter is called.
    """
    inside = {name: value for name, value in tensors.items() if not name.startswith("text_encoder")}
    ranks = {name.split(".lora_A")[0]: value.shape[0] for name, value in inside.items() if ".lora_A" in name}
    network.load_lora_adapter(
        {f"network.{name}": value for name, value in inside.items()},
        prefix="network",
        network_alphas={f"network.{layer}.alpha": alphas.get(layer, rank) for layer, rank in ranks.items()},
        adapter_name=adapter,
        low_cpu_mem_usage=True,
    )


def adapter_scales(network: nn.Module, adapter: str) -> dict[str, float]:
    """What an adapter's product of weights is multiplied by, of each layer that has one: for PEFT, alpha / rank.

    Args:
        network: The network with the adapter.
        adapter: What the adapter is called.
    """
    layers = ((name, module) for name, module in network.named_modules() if isinstance(module, LoraLayer))
    return {name: float(layer.scaling[adapter]) for name, layer in layers if adapter in layer.scaling}


@torch.no_grad()
def scale_adapter(network: nn.Module, adapter: str, scale: float) -> None:
    """Multiply what an adapter adds to each layer's weight.

    Args:
        network: The network with the adapter.
        adapter: What the adapter is called.
        scale: The factor.
    """
    for layer in network.modules():
        if isinstance(layer, LoraLayer) and adapter in layer.lora_B:
            layer.lora_B[adapter].weight.mul_(scale)


def check_all_loaded(network: nn.Module, adapter: str, names: Iterable[str], what: str) -> None:
    """Raise where a tensor of an adapter's file is not in the network, or one in the network not in the file.

    Args:
        network: The network that was given the adapter.
        adapter: What the adapter is called.
        names: The names of the file's tensors, as in the network.
        what: The setting and the file, for the error.

    Raises:
        ValueError: If file and network differ.
    """
    known = getattr(network, "peft_config", {})
    loaded = set(get_peft_model_state_dict(network, adapter_name=adapter)) if adapter in known else set()
    in_file, in_network = ({name.removesuffix(".weight") for name in part} for part in (names, loaded))
    foreign, unset = sorted(in_file - in_network), sorted(in_network - in_file)
    kind = type(network).__name__
    if foreign or not in_file:
        example = f", such as {foreign[0]!r}" if foreign else ""
        raise ValueError(
            f"{what} does not fit this model: {len(foreign)} of its {len(in_file)} tensors belong to no layer of the "
            f"{kind}{example}. Is it made for another base, or saved from a wrapped network?"
        )
    if unset:
        raise ValueError(
            f"{what} is incomplete: it has no tensor for {len(unset)} of the {kind}, such as {unset[0]!r}."
        )
