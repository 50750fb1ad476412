"""Pipelines without weights: every network of its true class and size, on torch's meta device, from configurations."""

import inspect
import json
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from huggingface_hub import snapshot_download
from torch import nn

from rdm_rl.cli.plan.model_sizes import MODELS, Blueprint
from rdm_rl.families.hub import one_line_errors
from rdm_rl.families.loading import check_model_name

CONFIG_FILES = ["model_index.json", "*/config.json", "*/*_config.json"]


def read_blueprint(model: str | Path | Blueprint) -> Blueprint:
    """What a pipeline is made of.

    Args:
        model: A name of :data:`rdm_rl.cli.plan.model_sizes.MODELS`, a folder in the diffusers layout (its configuration
            files are enough), a hub name, of which only configuration files are fetched, or a blueprint itself.

    Returns:
        The blueprint.

    Raises:
        FileNotFoundError: If there is no such folder, or a component's configuration is missing.
        OSError: If the hub does not give it.
        ValueError: If no family supports the pipeline.

    Example:
        >>> read_blueprint("sd15")["unet"]["cross_attention_dim"]
        768
    """
    if isinstance(model, dict):
        return model
    name = str(model)
    if name in MODELS:
        return MODELS[name]
    folder = Path(name)
    if not folder.is_dir() and "/" not in name:
        raise FileNotFoundError(
            f"--model {name!r} is neither a folder, nor a hub name 'owner/name', nor one of {', '.join(MODELS)}."
        )
    check_model_name(name)
    if not folder.is_dir():
        with one_line_errors("model", name):
            folder = Path(snapshot_download(name, allow_patterns=CONFIG_FILES))
    return _read_folder(folder)


def _read_folder(folder: Path) -> Blueprint:
    index: dict[str, Any] = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    found: Blueprint = {}
    for name, entry in index.items():
        if not isinstance(entry, list):  # The pipeline's own settings.
            found[name] = entry
            continue
        files = [folder / name / "config.json", folder / name / "scheduler_config.json"]
        file = next((one for one in files if one.is_file()), None)
        if file is not None and entry[1] is not None:
            found[name] = {**json.loads(file.read_text(encoding="utf-8")), "_class_name": entry[1]}
    return found


def make_skeleton(blueprint: Blueprint, dtype: torch.dtype = torch.float32, device: str | torch.device = "meta") -> Any:
    """The pipeline with networks on the meta device, which has shapes and no memory; or elsewhere, with random weights.

    Args:
        blueprint: What it is made of.
        dtype: Precision of the denoising network and the text encoders; the decoder stays in float32, as
            ``load_family`` leaves it.
        device: Where the networks are made.

    Returns:
        The pipeline, without tokenizers and without components that distillation does not use.

    Raises:
        ValueError: If a component's class is unknown to diffusers and transformers.

    Example:
        >>> pipeline = make_skeleton(read_blueprint("sd15"))
        >>> sum(weight.numel() for weight in pipeline.unet.parameters())
        859520964
    """
    kind = getattr(diffusers, blueprint["_class_name"], None)
    if kind is None:
        raise ValueError(f"diffusers {diffusers.__version__} has no {blueprint['_class_name']}. Upgrade diffusers.")
    taken = inspect.signature(kind.__init__).parameters
    parts: dict[str, Any] = {}
    for name in taken:
        entry = blueprint.get(name)
        if isinstance(entry, dict) and "_class_name" in entry:
            parts[name] = _component(name, entry, torch.float32 if name == "vae" else dtype, torch.device(device))
        elif entry is not None:
            parts[name] = entry
        elif name not in ("self", "args", "kwargs") and taken[name].default is inspect.Parameter.empty:
            parts[name] = None
    if "requires_safety_checker" in taken:
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return kind(**parts)


def _component(name: str, entry: dict[str, Any], dtype: torch.dtype, device: torch.device) -> Any:
    """One network, or one scheduler; None for what no size depends on, such as a tokenizer."""
    config = {key: value for key, value in entry.items() if not key.startswith("_")}
    kind: Any = getattr(diffusers, entry["_class_name"], None)
    if kind is not None and not issubclass(kind, nn.Module):
        return kind.from_config(config)
    if kind is None:
        kind = getattr(transformers, entry["_class_name"], None)
        if not inspect.isclass(kind) or not issubclass(kind, nn.Module):
            if name.startswith("text_encoder"):
                raise ValueError(
                    f"transformers {transformers.__version__} has no {entry['_class_name']}, the pipeline's {name}. "
                    "Upgrade transformers."
                )
            return None
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # Or a network would take twice its memory while it is made.
    try:
        with device:
            module = kind.from_config(config) if hasattr(kind, "from_config") else kind(kind.config_class(**config))
    finally:
        torch.set_default_dtype(usual)
    # Tables are made in float32, and some on the CPU. The plain method: diffusers' own warns of what concerns files.
    return nn.Module.to(module, device, dtype)
