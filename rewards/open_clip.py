"""Checkpoints of OpenCLIP as models of transformers: HPSv2 is published in OpenCLIP's layout only."""

import math
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

# Where the parts of a layer are, there and here; `attn.in_proj` holds query, key and value, and is split.
_LAYER = re.compile(
    r"(?P<visual>visual\.)?transformer\.resblocks\.(?P<number>\d+)\.(?P<part>.+)[._](?P<kind>weight|bias)"
)
_LAYER_PARTS = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_PARTS = {
    "logit_scale": "logit_scale",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "text_projection": "text_projection.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "visual.proj": "visual_projection.weight",
}
# The published weights of HPSv2 are a ViT-H/14, whose preparation is that of the model it was fine-tuned from.
VIT_H_14 = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


def open_clip_config(
    weights: Mapping[str, Tensor], *, vision_head_dim: int = 80, text_head_dim: int = 64, hidden_act: str = "gelu"
) -> CLIPConfig:
    """The architecture of OpenCLIP weights, read from their shapes.

    Args:
        weights: The weights by OpenCLIP's names: a vision transformer and a text transformer.
        vision_head_dim: Width of an attention head of the image encoder; shapes do not tell. 80 for ViT-H/14.
        text_head_dim: Width of an attention head of the text encoder.
        hidden_act: The activation; ``quick_gelu`` for models with OpenAI's weights.

    Raises:
        ValueError: If a weight that tells the architecture is missing.
    """
    try:
        width, _, patch, _ = weights["visual.conv1.weight"].shape
        places = len(weights["visual.positional_embedding"]) - 1
        vocabulary, text_width = weights["token_embedding.weight"].shape
        context = len(weights["positional_embedding"])
        projection = weights["text_projection"].shape[1]
        vision_hidden = len(weights["visual.transformer.resblocks.0.mlp.c_fc.weight"])
        text_hidden = len(weights["transformer.resblocks.0.mlp.c_fc.weight"])
    except KeyError as error:
        raise ValueError(f"These are no OpenCLIP weights of a ViT: {error.args[0]!r} is missing.") from None
    return CLIPConfig(
        projection_dim=projection,
        vision_config={
            "hidden_size": width,
            "intermediate_size": vision_hidden,
            "num_hidden_layers": sum(key.startswith("visual.") and key.endswith(".ln_1.weight") for key in weights),
            "num_attention_heads": width // vision_head_dim,
            "image_size": patch * math.isqrt(places),
            "patch_size": patch,
            "projection_dim": projection,
            "hidden_act": hidden_act,
        },
        text_config={
            "hidden_size": text_width,
            "intermediate_size": text_hidden,
            "num_hidden_layers": sum(key.startswith("trans") and key.endswith(".ln_1.weight") for key in weights),
            "num_attention_heads": text_width // text_head_dim,
            "vocab_size": vocabulary,
            "max_position_embeddings": context,
            "projection_dim": projection,
            "hidden_act": hidden_act,
            # OpenCLIP reads a text's embedding at its largest token, which is the last of the vocabulary.
            "bos_token_id": vocabulary - 2,
            "eos_token_id": vocabulary - 1,
            "pad_token_id": 0,
        },
    )


def convert_open_clip(weights: Mapping[str, Tensor], config: CLIPConfig) -> CLIPModel:
    """A model of transformers with weights of OpenCLIP, float32, on the CPU.

    Args:
        weights: The weights by OpenCLIP's names.
        config: Their architecture, see :func:`open_clip_config`.

    Raises:
        ValueError: If a weight is missing, unknown or of another shape.
    """
    converted, unknown = {}, []
    for key, value in weights.items():
        layer = _LAYER.fullmatch(key)
        if key in _PARTS:
            converted[_PARTS[key]] = value.T if key in ("visual.proj", "text_projection") else value
        elif layer and layer["part"] in ("attn.in_proj", *_LAYER_PARTS):
            prefix = f"{'vision' if layer['visual'] else 'text'}_model.encoder.layers.{layer['number']}"
            if layer["part"] == "attn.in_proj":
                for projection, piece in zip("qkv", value.chunk(3), strict=True):
                    converted[f"{prefix}.self_attn.{projection}_proj.{layer['kind']}"] = piece
            else:
                converted[f"{prefix}.{_LAYER_PARTS[layer['part']]}.{layer['kind']}"] = value
        else:
            unknown.append(key)
    model = CLIPModel(config)
    expected = model.state_dict()
    missing = sorted(expected.keys() - converted.keys())
    unknown += sorted(converted.keys() - expected.keys())
    if missing or unknown:
        raise ValueError(f"The weights do not make the model. Missing here: {missing}. Unknown there: {unknown}.")
    for name, weight in converted.items():
        if weight.shape != expected[name].shape:
            wanted = tuple(expected[name].shape)
            raise ValueError(f"{name} has the shape {tuple(weight.shape)} in the checkpoint, and {wanted} here.")
    model.load_state_dict(converted)
    return model


def load_open_clip(path: str | Path) -> CLIPModel:
    """The model in an OpenCLIP checkpoint of ViT-H/14, such as ``HPS_v2_compressed.pt``, float32, on the CPU.

    Args:
        path: The file: the weights, or a dictionary that holds them as ``state_dict``.

    Raises:
        ValueError: If these are not such weights.
    """
    content = torch.load(path, map_location="cpu", weights_only=True)
    weights = content.get("state_dict", content)
    return convert_open_clip(weights, open_clip_config(weights))
