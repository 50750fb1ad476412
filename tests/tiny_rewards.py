"""Tiny saved CLIP and SigLIP models, for the rewards that are built on them."""

import torch
import transformers
from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

from tests.helpers import tiny_tokenizer

TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 190}
VISION = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION |= {"image_size": 28, "patch_size": 14}


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
