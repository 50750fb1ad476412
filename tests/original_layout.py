"""Pipelines as single files in the layout that Stable Diffusion and SDXL were published in.

diffusers only reads these files: here the way back is written down, for the tiny pipelines of the tests.
"""

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from rdm_rl.families.kohya import sgm_name

_VAE = (
    *(
        (r"down_blocks\.(\d)\.resnets", r"down.\1.block"),
        (r"downsamplers\.0", "downsample"),
        (r"\.conv_norm_out", ".norm_out"),
    ),
    *((r"up_blocks\.(\d)\.resnets", r"up.\1.block"), (r"up_blocks\.(\d)\.upsamplers\.0", r"up.\1.upsample")),
    *(
        (r"down_blocks\.(\d)", r"down.\1"),
        ("conv_shortcut", "nin_shortcut"),
        (r"mid_block\.attentions\.0", "mid.attn_1"),
    ),
    *((r"mid_block\.resnets\.0", "mid.block_1"), (r"mid_block\.resnets\.1", "mid.block_2")),
    *(
        (r"attn_1\.group_norm", "attn_1.norm"),
        (r"attn_1\.to_out\.0", "attn_1.proj_out"),
        (r"attn_1\.to_([qkv])", r"attn_1.\1"),
    ),
)
_OPEN_CLIP = (
    *((r"^text_model\.embeddings\.position_embedding\.weight", "positional_embedding"), (r"\.fc1", ".c_fc")),
    *((r"^text_model\.embeddings\.token_embedding", "token_embedding"), (r"\.fc2", ".c_proj")),
    *((r"^text_model\.final_layer_norm", "ln_final"), (r"^text_model\.encoder\.layers", "transformer.resblocks")),
    *((r"layer_norm(\d)", r"ln_\1"), ("self_attn", "attn"), (r"^text_projection\.weight", "text_projection")),
)


def _renamed(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    for old, new in rules:
        name = re.sub(old, new, name)
    return name


def unet_tensors(unet: Any) -> dict[str, Tensor]:
    """A U-Net's tensors under the names of the code of Stable Diffusion."""

    def name(key: str) -> str:
        layer, kind = key.rsplit(".", 1)
        if layer == "conv_norm_out":
            return f"out.0.{kind}"
        if ".resnets." in layer:  # Of these, sgm_name knows the layers that adapters have, and not the norms.
            as_conv = re.sub(r"norm(\d)$", r"conv\1", layer)
            original = sgm_name(as_conv, unet.config.layers_per_block, unet.config.up_block_types)
            return f"{original if as_conv == layer else re.sub(r'[23]$', '0', original)}.{kind}"
        return f"{sgm_name(layer, unet.config.layers_per_block, unet.config.up_block_types)}.{kind}"

    return {f"model.diffusion_model.{name(key)}": value for key, value in unet.state_dict().items()}


def vae_tensors(vae: Any) -> dict[str, Tensor]:
    """An autoencoder's tensors; its layers of attention are convolutions, and its blocks up are counted backwards."""
    last = len(vae.config.block_out_channels) - 1
    tensors = {}
    for key, value in vae.state_dict().items():
        counted = re.sub(r"up_blocks\.(\d)", lambda match: f"up_blocks.{last - int(match[1])}", key)
        is_attention = re.search(r"attentions\.0\.to_.*weight", key)
        tensors[f"first_stage_model.{_renamed(counted, _VAE)}"] = value[:, :, None, None] if is_attention else value
    return tensors


def clip_tensors(encoder: Any, prefix: str) -> dict[str, Tensor]:
    """A CLIP text encoder's tensors, as transformers once called them."""
    return {
        f"{prefix}text_model.{key.removeprefix('text_model.')}": value for key, value in encoder.state_dict().items()
    }


def open_clip_tensors(encoder: Any, prefix: str) -> dict[str, Tensor]:
    """A CLIP text encoder's tensors as open_clip calls them, with one tensor for queries, keys and values."""
    state, tensors = dict(encoder.state_dict()), {}
    for key, value in state.items():
        if match := re.fullmatch(r"(.*self_attn\.)q_proj\.(\w+)", key):
            whole = torch.cat([state[f"{match[1]}{part}_proj.{match[2]}"] for part in "qkv"])
            tensors[_renamed(f"{match[1]}in_proj_{match[2]}", _OPEN_CLIP)] = whole
        elif not re.search(r"self_attn\.[kv]_proj", key):
            tensors[_renamed(key, _OPEN_CLIP)] = value.T if key == "text_projection.weight" else value
    return {prefix + key: value for key, value in tensors.items()}


def original_tensors(pipeline: Any) -> dict[str, Tensor]:
    """All tensors of a Stable Diffusion or SDXL pipeline in the original layout."""
    tensors = unet_tensors(pipeline.unet) | vae_tensors(pipeline.vae)
    if getattr(pipeline, "text_encoder_2", None) is None:
        return tensors | clip_tensors(pipeline.text_encoder, "cond_stage_model.transformer.")
    tensors |= clip_tensors(pipeline.text_encoder, "conditioner.embedders.0.transformer.")
    return tensors | open_clip_tensors(pipeline.text_encoder_2, "conditioner.embedders.1.model.")


def save_single_file(tensors: dict[str, Tensor], file: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write tensors to a file, in a precision."""
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.to(dtype).contiguous() for name, value in tensors.items()}, file)
    return file
