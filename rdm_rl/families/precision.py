"""The precision of a model's weights: half, but for what the model itself keeps in float32."""

import torch
from torch import nn
from transformers import PreTrainedModel


def kept_in_float32(model: nn.Module, dtype: torch.dtype) -> set[str]:
    """Names of the modules and parameters that overflow or lose too much in a precision, as their model declares.

    A model of transformers declares some for float16 alone (T5's ``wo``) and others, strictly, for both halves; one of
    diffusers makes no difference.

    Args:
        model: A model of transformers or diffusers; any other declares nothing.
        dtype: The precision.
    """
    if dtype not in (torch.float16, torch.bfloat16):
        return set()
    names = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16 or not isinstance(model, PreTrainedModel):
        names |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    return names


def to_precision(model: nn.Module, dtype: torch.dtype) -> None:
    """Give a model's weights a precision, as its ``from_pretrained`` does: what it keeps in float32 is float32.

    Args:
        model: The model.
        dtype: The precision.
    """
    kept = kept_in_float32(model, dtype)
    if not kept:
        model.to(dtype)
        return
    for name, module in model.named_modules():
        for own, value in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if value.is_floating_point():
                stays = not kept.isdisjoint([*name.split("."), own])
                value.data = value.data.to(torch.float32 if stays else dtype)
