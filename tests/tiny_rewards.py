"""Tiny saved CLIP and SigLIP models and vision transformers, for rewards and features that are built on them."""

import json

import torch
import transformers
from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

from rdm_rl.evaluation import Features
from tests.helpers import tiny_tokenizer

TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 190}
VISION = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION |= {"image_size": 28, "patch_size": 14}

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
# What the names of their classes begin with.
TRANSFORMERS = {
    "dinov2": "Dinov2",
    "dinov2_with_registers": "Dinov2WithRegisters",
    "dinov3_vit": "DINOv3ViT",
    "vit": "ViT",
}


def sharpen(model):
    """Random weights four times the usual: otherwise all images look alike to the model."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.mul_(1 if weight.ndim < 2 or "embedding" in name else 4)
    return model


def save_clip(folder, kind="clip", *, processor=True):
    """A tiny saved CLIP or SigLIP model; returns the folder and the pieces to compute its value otherwise."""
    name = {"clip": "CLIP", "siglip": "Siglip"}[kind]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ends = {"bos_token_id": 188, "eos_token_id": 189, "pad_token_id": 189}
        if kind == "clip":
            text = TEXT | ends | {"max_position_embeddings": 16, "projection_dim": 20}
            config = CLIPConfig(text_config=text, vision_config=VISION | {"projection_dim": 20}, projection_dim=20)
            model = sharpen(CLIPModel(config))
            settings = {"size": {"shortest_edge": 28}, "crop_size": 28}
        else:
            text = TEXT | ends | {"max_position_embeddings": 12, "projection_size": 24}
            model = sharpen(SiglipModel(SiglipConfig(text_config=text, vision_config=VISION)))
            settings = {"size": {"height": 28, "width": 28}}
    model.save_pretrained(folder)
    tokenizer = tiny_tokenizer(folder / "source")
    new = getattr(transformers, f"{name}ImageProcessorPil", None)  # version 5 names the one with Pillow so
    images = (new or getattr(transformers, f"{name}ImageProcessor"))(**settings)
    if processor:
        tokenizer.save_pretrained(folder)
        images.save_pretrained(folder)
    return folder, model.eval(), tokenizer, images


def save_settings(folder, size, **settings):
    """How a model's images are prepared, as transformers saves it."""
    settings |= {"size": size, "image_mean": MEAN, "image_std": STD, "resample": 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))


def save_transformer(folder, kind="dinov2"):
    """A tiny saved vision transformer with 16 patches; it reads the middle 28 of 32 pixels."""
    model, config = (getattr(transformers, f"{TRANSFORMERS[kind]}{part}") for part in ("Model", "Config"))
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sharpen(model(config(**sizes, image_size=28, patch_size=7))).save_pretrained(folder)
    save_settings(folder, {"shortest_edge": 32}, crop_size={"height": 28, "width": 28})
    return folder


def brightness(images, prompts):
    """A differentiable reward of images: how bright they are."""
    return images.mean((1, 2, 3))


brightness.differentiable = True

COLOUR = Features("colour", lambda images: images.mean((2, 3)))
"""Features that can be computed by hand."""
