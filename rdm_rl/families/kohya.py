"""An adapter as the programs that people draw with read it: ComfyUI, A1111 and Forge, and kohya's scripts.

They know a U-Net's layers by kohya's names, and the scale of a layer by an ``alpha`` beside its tensors: a file
without it is taken to have alpha = rank. A transformer's layers ComfyUI knows by diffusers' names. Of those diffusers
reads no alpha, so the scale is in the weights.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

_HALVES = ("lora_A.weight", "lora_B.weight")
# Layers of a U-Net outside its blocks, and inside a block of convolutions: diffusers' names and those of the SGM code.
_SGM_OUTSIDE = {
    **{"conv_in": "input_blocks.0.0", "conv_out": "out.2"},
    **{"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"},
    **{"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"},
}
_SGM_RESNET = {
    **{"conv1": "in_layers.2", "conv2": "out_layers.3"},
    **{"time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"},
}
_BLOCK = re.compile(
    r"(?P<side>down_blocks|mid_block|up_blocks)\.((?P<block>\d+)\.)?"
    r"(?P<kind>resnets|attentions|downsamplers|upsamplers)\.(?P<place>\d+)\.(?P<rest>.+)"
)


def check_layers(state: Iterable[str], known: str, network: str) -> None:
    """Raise where a tensor of an adapter would reach no layer in ComfyUI, which drops it and draws on.

    Args:
        state: Names of the tensors, of PEFT.
        known: Pattern of the layers that ComfyUI knows, by their names in the network; nothing if it has no such model.
        network: The network's class, for the error.

    Raises:
        ValueError: If there is such a tensor.
    """
    if not known:
        raise ValueError(
            f"ComfyUI has no model of the class {network}, and neither have A1111 and kohya's scripts, so no file of "
            "theirs can hold this student. Draw with diffusers, or with `rdm-rl sample`."
        )
    for name in state:
        layer, half = _parted(name)
        if half not in _HALVES or not re.fullmatch(known, layer):
            raise ValueError(
                f"The adapter has {name!r}, which ComfyUI would drop: it knows no such tensor of a {network}. Draw "
                "with diffusers, or train with target_modules that it knows, such as the family's own."
            )


def kohya_tensors(
    state: Mapping[str, Tensor], scales: Mapping[str, float], name: Callable[[str], str]
) -> dict[str, Tensor]:
    """An adapter's tensors under kohya's names, and beside those of each layer its alpha, a float32 of shape ().

    All layers have the same alpha, the most frequent one, and where another is due the second tensor makes up for it:
    diffusers (0.42) forgets an attention layer's alpha that differs from the others'.

    Args:
        state: The tensors under PEFT's names.
        scales: What the product of its two tensors is multiplied by, of each layer: alpha / rank.
        name: From a layer's name in the network to kohya's.

    Example:
        >>> state = {"to_q.lora_A.weight": torch.ones(4, 2), "to_q.lora_B.weight": torch.ones(2, 4)}
        >>> tensors = kohya_tensors(state, {"to_q": 0.5}, "lora_unet_{}".format)
        >>> {key: tuple(value.shape) for key, value in tensors.items()}
        {'lora_unet_to_q.lora_down.weight': (4, 2), 'lora_unet_to_q.lora_up.weight': (2, 4), 'lora_unet_to_q.alpha': ()}
        >>> tensors["lora_unet_to_q.alpha"]
        tensor(2.)
    """
    alphas = {layer: scales[layer] * state[f"{layer}.lora_A.weight"].shape[0] for layer, _ in map(_parted, state)}
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    tensors: dict[str, Tensor] = {}
    for layer, due in alphas.items():
        down, up = (state[f"{layer}.{half}"] for half in _HALVES)
        tensors[f"{name(layer)}.lora_down.weight"] = down
        tensors[f"{name(layer)}.lora_up.weight"] = up if due == alpha else up * (due / alpha)
        tensors[f"{name(layer)}.alpha"] = torch.tensor(alpha, dtype=torch.float32)
    return tensors


def scaled_tensors(state: Mapping[str, Tensor], scales: Mapping[str, float], prefix: str) -> dict[str, Tensor]:
    """An adapter's tensors under PEFT's names behind a prefix, each layer's scale in its second tensor.

    Args:
        state: The tensors under PEFT's names.
        scales: As in :func:`kohya_tensors`.
        prefix: What goes before the names, with its dot.

    Example:
        >>> scaled_tensors({"to_q.lora_B.weight": torch.ones(1, 2)}, {"to_q": 0.5}, "transformer.")
        {'transformer.to_q.lora_B.weight': tensor([[0.5000, 0.5000]])}
    """
    scaled = {}
    for key, value in state.items():
        layer, half = _parted(key)
        scaled[prefix + key] = value * scales[layer] if half == "lora_B.weight" else value
    return scaled


def sgm_name(layer: str, layers_per_block: int, up_block_types: Sequence[str]) -> str:
    """What the code that SDXL was published with calls a layer of a U-Net.

    Args:
        layer: Its name in diffusers.
        layers_per_block: Of the U-Net's configuration.
        up_block_types: Of the U-Net's configuration.

    Example:
        >>> sgm_name("down_blocks.1.attentions.0.proj_in", 2, [])
        'input_blocks.4.1.proj_in'
    """
    match = _BLOCK.fullmatch(layer)
    if match is None:
        return _SGM_OUTSIDE[layer]
    side, kind, place, rest = match["side"], match["kind"], int(match["place"]), match["rest"]
    if kind == "resnets":
        rest = _SGM_RESNET[rest]
    if side == "mid_block":
        return f"middle_block.{1 if kind == 'attentions' else 2 * place}.{rest}"
    block, inside = int(match["block"]), int(kind == "attentions")
    if side == "down_blocks":  # The first of them is conv_in.
        first = 1 + block * (layers_per_block + 1)
        if kind == "downsamplers":
            return f"input_blocks.{first + layers_per_block}.0.op"
        return f"input_blocks.{first + place}.{inside}.{rest}"
    first = block * (layers_per_block + 1)
    if kind == "upsamplers":  # It comes after the last layer of convolutions and, if there is one, of attention.
        return f"output_blocks.{first + layers_per_block}.{1 + ('CrossAttn' in up_block_types[block])}.{rest}"
    return f"output_blocks.{first + place}.{inside}.{rest}"


def _parted(name: str) -> tuple[str, str]:
    """A tensor's layer, and what it is in it, such as ``lora_A.weight``."""
    layer, separator, half = name.rpartition(".lora_")
    return layer, f"{separator[1:]}{half}"
