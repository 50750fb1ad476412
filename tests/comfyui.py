"""What ComfyUI does with a LoRA's file and with a number of steps, restated as data: it is not installed here.

Source: github.com/Comfy-Org/ComfyUI, read on 2026-11-29:

- names that a model's layers may have in a file: comfy/lora.py (17358c8) with the tables of comfy/utils.py (09708ea);
- tensors that a layer may have: comfy/weight_adapter/lora.py (6f98b15);
- which models there are: comfy/supported_models.py (01f03bb);
- schedulers: comfy/samplers.py (311c014), over the levels of comfy/model_sampling.py (2fd2083);
- the sampler ``euler``: algorithm 2 of Karras et al. (2022) without churn, in copies of comfy/k_diffusion/sampling.py;
- inputs of nodes: nodes.py (02217e3);
- the node Flux2Scheduler: comfy_extras/nodes_flux.py, in copies whose commits are not known.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

# ----- U-Nets: ComfyUI has the layers under the names of the SGM code, and knows those of diffusers -----

_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_RESNET = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_ATTENTION = [f"attn{number}.{layer}" for number in (1, 2) for layer in ("to_q", "to_k", "to_v", "to_out.0")]
_TRANSFORMER_BLOCK = [*_ATTENTION, "ff.net.0.proj", "ff.net.2"]


def _resnet(name: str, place: str) -> Iterator[tuple[str, str]]:
    yield from ((f"{name}.{layer}", f"{place}.{own}") for layer, own in _RESNET.items())


def _attention(name: str, place: str, depth: int) -> Iterator[tuple[str, str]]:
    inside = [f"transformer_blocks.{index}.{layer}" for index in range(depth) for layer in _TRANSFORMER_BLOCK]
    yield from ((f"{name}.{layer}", f"{place}.{layer}") for layer in ("proj_in", "proj_out", *inside))


def unet_layers(unet: Any) -> dict[str, str]:
    """The layers of a U-Net, diffusers' name and ComfyUI's own, in the order in which they run."""
    layers, number = list(_OUTSIDE.items()), 1
    for index, block in enumerate(unet.down_blocks):
        for place in range(len(block.resnets)):
            layers += _resnet(f"down_blocks.{index}.resnets.{place}", f"input_blocks.{number}.0")
            if hasattr(block, "attentions"):
                depth = len(block.attentions[place].transformer_blocks)
                layers += _attention(f"down_blocks.{index}.attentions.{place}", f"input_blocks.{number}.1", depth)
            number += 1
        if block.downsamplers is not None:
            layers.append((f"down_blocks.{index}.downsamplers.0.conv", f"input_blocks.{number}.0.op"))
            number += 1
    layers += [*_resnet("mid_block.resnets.0", "middle_block.0"), *_resnet("mid_block.resnets.1", "middle_block.2")]
    depth = len(unet.mid_block.attentions[0].transformer_blocks)
    layers += _attention("mid_block.attentions.0", "middle_block.1", depth)
    number = 0
    for index, block in enumerate(unet.up_blocks):
        for place in range(len(block.resnets)):
            layers += _resnet(f"up_blocks.{index}.resnets.{place}", f"output_blocks.{number}.0")
            after = 1
            if hasattr(block, "attentions"):
                depth = len(block.attentions[place].transformer_blocks)
                layers += _attention(f"up_blocks.{index}.attentions.{place}", f"output_blocks.{number}.1", depth)
                after = 2
            if block.upsamplers is not None and place == len(block.resnets) - 1:
                layers.append((f"up_blocks.{index}.upsamplers.0.conv", f"output_blocks.{number}.{after}.conv"))
            number += 1
    return dict(layers)


def unet_names(unet: Any) -> dict[str, str]:
    """What a file may call a U-Net's layers, and which layer of diffusers each name stands for."""
    names = {}
    for layer, own in unet_layers(unet).items():
        flat, flat_own = layer.replace(".", "_"), own.replace(".", "_")
        names |= dict.fromkeys((f"lora_unet_{flat_own}", f"diffusion_model.{own}"), layer)
        names |= dict.fromkeys((f"lora_unet_{flat}", f"lycoris_{flat}"), layer)
        old = layer.replace(".to_", ".processor.to_")
        old = old.removesuffix(".0") if old.endswith(".to_out.0") else old
        names |= dict.fromkeys((old, f"unet.{old}"), layer)
    return names


# ----- transformers: by diffusers' names behind prefixes -----

_QKV = ["attn.to_q", "attn.to_k", "attn.to_v", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"]
_FEED_FORWARD = ["ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"]
_JOINT_BLOCK = [*_QKV, "attn.to_out.0", "attn.to_add_out", *_FEED_FORWARD, "norm1.linear", "norm1_context.linear"]
_SINGLE_BLOCK = ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp", "proj_out", "norm.linear"]
_EMBEDDERS = [f"time_text_embed.{kind}_embedder.linear_{n}" for kind in ("timestep", "text") for n in (1, 2)]
_FLUX_2_FEED_FORWARD = [f"{part}.linear_{end}" for part in ("ff", "ff_context") for end in ("in", "out")]
_Z_IMAGE_BLOCK = [
    *("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0", "adaLN_modulation.0"),
    *("feed_forward.w1", "feed_forward.w2", "feed_forward.w3"),
]
TRANSFORMERS: Mapping[str, tuple[tuple[str, ...], Mapping[str, list[str]]]] = {
    "SD3Transformer2DModel": (
        ("transformer.", "base_model.model."),
        {
            "transformer_blocks": [*_JOINT_BLOCK, "attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0"],
            "": [*_EMBEDDERS, "context_embedder", "pos_embed.proj", "norm_out.linear", "proj_out"],
        },
    ),
    "FluxTransformer2DModel": (
        ("transformer.", ""),
        {
            "transformer_blocks": _JOINT_BLOCK,
            "single_transformer_blocks": _SINGLE_BLOCK,
            "": [
                *(_EMBEDDERS + [f"time_text_embed.guidance_embedder.linear_{n}" for n in (1, 2)]),
                *("x_embedder", "context_embedder", "norm_out.linear", "proj_out"),
            ],
        },
    ),
    "Flux2Transformer2DModel": (
        ("transformer.", ""),
        {
            "transformer_blocks": [*_QKV, "attn.to_out.0", "attn.to_add_out", *_FLUX_2_FEED_FORWARD],
            "single_transformer_blocks": ["attn.to_qkv_mlp_proj", "attn.to_out"],
            "": ["x_embedder", "context_embedder", "norm_out.linear", "proj_out"],
        },
    ),
    "PixArtTransformer2DModel": (
        ("transformer.", "base_model.model.", "unet.base_model.model."),
        {
            "transformer_blocks": _TRANSFORMER_BLOCK,
            "": [
                *("pos_embed.proj", "proj_out", "adaln_single.linear"),
                *(f"adaln_single.emb.timestep_embedder.linear_{n}" for n in (1, 2)),
                *(f"caption_projection.linear_{n}" for n in (1, 2)),
            ],
        },
    ),
    "ZImageTransformer2DModel": (
        ("transformer.", "diffusion_model.", ""),
        {
            **dict.fromkeys(["layers", "noise_refiner", "context_refiner"], _Z_IMAGE_BLOCK),
            "": [
                *("all_x_embedder.2-1", "all_final_layer.2-1.linear", "all_final_layer.2-1.adaLN_modulation.1"),
                *("cap_embedder.1", "t_embedder.mlp.0", "t_embedder.mlp.2"),
            ],
        },
    ),
}


def transformer_names(transformer: Any) -> dict[str, str]:
    """What a file may call a transformer's layers, and which layer each stands for; nothing without such a model."""
    prefixes, blocks = TRANSFORMERS.get(type(transformer).__name__, ((), {}))
    layers = list(blocks.get("", []))
    for block in filter(None, blocks):
        layers += [f"{block}.{n}.{layer}" for n in range(len(getattr(transformer, block))) for layer in blocks[block]]
    return {f"{prefix}{layer}": layer for prefix in prefixes for layer in layers}


def names_of(network: Any) -> dict[str, str]:
    """What a file may call a network's layers, and which layer of diffusers each name stands for."""
    return unet_names(network) if hasattr(network, "down_blocks") else transformer_names(network)


# ----- the reader -----

_PAIRS = [(".lora_up.weight", ".lora_down.weight"), ("_lora.up.weight", "_lora.down.weight")]
_PAIRS += [(".lora_B.weight", ".lora_A.weight"), (".lora.up.weight", ".lora.down.weight")]


def what_is_added(file: Mapping[str, Tensor], names: Mapping[str, str]) -> tuple[dict[str, Tensor], set[str]]:
    """What a file adds to the weights of which layers, and the names in it that are left over."""
    added, taken = {}, set()
    for name, layer in names.items():
        for up, down in ((name + up, name + down) for up, down in _PAIRS):
            if up not in file:
                continue
            alpha = file.get(f"{name}.alpha")
            scale = 1.0 if alpha is None else alpha.item() / file[down].shape[0]
            product = file[up].flatten(1) @ file[down].flatten(1)
            added[layer] = scale * product
            taken |= {up, down, f"{name}.alpha"}
    return added, file.keys() - taken


# ----- the schedulers, of a model with 1000 noise levels -----


def simple_timesteps(steps: int) -> list[int]:
    """Times of the scheduler ``simple``: it picks from the model's table, counted from the end."""
    return [999 - int(step * (1000 / steps)) for step in range(steps)]


def sgm_uniform_timesteps(steps: int) -> list[float]:
    """Times of the scheduler ``sgm_uniform``: even ones from the last to the first, which is left out."""
    times: list[float] = torch.linspace(999, 0, steps + 1)[:-1].tolist()
    return times


def flux_2_levels(steps: int, width: int, height: int) -> list[float]:
    """Noise levels of the node ``Flux2Scheduler``, without the last, which is 0: they depend on the size in pixels."""
    tokens = round(width * height / 16**2)
    at_200 = 0.00016927 * tokens + 0.45666666
    at_10 = 8.73809524e-05 * tokens + 1.89833333
    slope = (at_200 - at_10) / 190
    mu = at_200 if tokens > 4300 else at_200 + slope * (steps - 200)
    even: list[float] = torch.linspace(1, 0, steps + 1)[:-1].tolist()
    return [math.exp(mu) / (math.exp(mu) + 1 / time - 1) for time in even]


def walked_by_lcm(
    network: Callable[[Tensor, Tensor], Tensor], sigmas: Tensor, noises: list[Tensor], *, is_flow: bool
) -> Tensor:
    """What the sampler ``lcm`` makes of a network that predicts noise, or a flow's velocity, and of these noises.

    It keeps x_0 + sigma * noise, which such a network is given divided by its deviation; a flow's is a mixture.
    """
    x_t = noises[0] * (1 if is_flow else (1 + sigmas[0] ** 2).sqrt())
    for sigma, following, noise in zip(sigmas, [*sigmas[1:], torch.zeros(())], [*noises[1:], 0], strict=True):
        x_0 = x_t - sigma * network(x_t if is_flow else x_t / (1 + sigma**2).sqrt(), sigma)
        x_t = following * noise + (1 - following if is_flow else 1) * x_0
    return x_t


def walked_by_euler(
    network: Callable[[Tensor, Tensor], Tensor], sigmas: Tensor, noise: Tensor, *, is_flow: bool
) -> Tensor:
    """What the sampler ``euler`` makes of such a network and of this noise."""
    x_t = noise * (1 if is_flow else (1 + sigmas[0] ** 2).sqrt())
    for sigma, following in zip(sigmas, [*sigmas[1:], torch.zeros(())], strict=True):
        x_t = x_t + (following - sigma) * network(x_t if is_flow else x_t / (1 + sigma**2).sqrt(), sigma)
    return x_t


# ----- inputs of nodes: links, by the type that they carry, and values -----

NODES: Mapping[str, tuple[Mapping[str, str], set[str], tuple[str, ...]]] = {
    "CheckpointLoaderSimple": ({}, {"ckpt_name"}, ("MODEL", "CLIP", "VAE")),
    "LoraLoaderModelOnly": ({"model": "MODEL"}, {"lora_name", "strength_model"}, ("MODEL",)),
    "CLIPTextEncode": ({"clip": "CLIP"}, {"text"}, ("CONDITIONING",)),
    "EmptyLatentImage": ({}, {"width", "height", "batch_size"}, ("LATENT",)),
    "KSampler": (
        {"model": "MODEL", "positive": "CONDITIONING", "negative": "CONDITIONING", "latent_image": "LATENT"},
        {"seed", "steps", "cfg", "sampler_name", "scheduler", "denoise"},
        ("LATENT",),
    ),
    "VAEDecode": ({"samples": "LATENT", "vae": "VAE"}, set(), ("IMAGE",)),
    "SaveImage": ({"images": "IMAGE"}, {"filename_prefix"}, ()),
}
