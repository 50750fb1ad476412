"""Pipelines without weights: every network of its true class and size, on torch's meta device, from configurations."""

import inspect
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from huggingface_hub import snapshot_download
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn

from rdm_rl.cli.plan.model_sizes import MODELS, Blueprint
from rdm_rl.families.hub import one_line_errors
from rdm_rl.families.loading import check_model_name
from rdm_rl.families.single_file import default_config, is_single_file, parts_in, read_model_header
from rdm_rl.files import read_json

CONFIG_FILES = ["model_index.json", "*/config.json", "*/*_config.json"]


def read_blueprint(model: str | Path | Blueprint, model_config: str | Path | None = None) -> Blueprint:
    """What a pipeline is made of.

    Args:
        model: A name of :data:`rdm_rl.cli.plan.model_sizes.MODELS`, a folder in the diffusers layout (its configuration
            files are enough), a hub name, of which only configuration files are fetched, a ``.safetensors`` file, of
            which only the header is read, or a blueprint itself.
        model_config: What configures a file, by any of these names; None for the one on the hub that diffusers knows.

    Raises:
        FileNotFoundError: If there is no such folder, or a component's configuration is missing.
        OSError: If the hub does not give it.
        ValueError: If no family supports the pipeline.

    Example:
        >>> read_blueprint("sd15")["unet"]["cross_attention_dim"]
        768
    """
    if isinstance(model, dict) or str(model) in MODELS:
        return model if isinstance(model, dict) else MODELS[str(model)]
    if is_single_file(str(model)):
        header = read_model_header(str(model))
        configuration = read_blueprint(model_config or default_config(header))
        parts_in(header, configuration["_class_name"])
        return configuration
    name, folder = str(model), Path(model)
    if not folder.is_dir() and "/" not in name:
        raise FileNotFoundError(
            f"--model {name!r} is neither a folder, nor a hub name 'owner/name', nor one of {', '.join(MODELS)}."
        )
    check_model_name(name)
    if not folder.is_dir():
        with one_line_errors("model", name):
            folder = Path(snapshot_download(name, allow_patterns=CONFIG_FILES))
    blueprint: Blueprint = {}
    for part, entry in read_json(folder / "model_index.json").items():
        if not isinstance(entry, list):  # The pipeline's own settings.
            blueprint[part] = entry
        for file in (folder / part / "config.json", folder / part / "scheduler_config.json"):
            if isinstance(entry, list) and entry[1] is not None and file.is_file():
                blueprint[part] = {**read_json(file), "_class_name": entry[1]}
    return blueprint


def make_skeleton(blueprint: Blueprint, dtype: torch.dtype = torch.float32, device: str | torch.device = "meta") -> Any:
    """The pipeline with networks on the meta device, which has shapes and no memory; or elsewhere, with random weights.

    Its tokenizers know one word, and what distillation does not use is left out.

    Args:
        blueprint: What it is made of.
        dtype: Precision of the denoising network and the text encoders; the decoder stays in float32, as
            ``load_family`` leaves it.
        device: Where the networks are made.

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
    parts: dict[str, Any] = {
        name: None
        for name, parameter in taken.items()
        if name not in ("self", "args", "kwargs") and parameter.default is inspect.Parameter.empty
    }
    for name, entry in blueprint.items():
        if name in taken and isinstance(entry, dict) and "_class_name" in entry:
            parts[name] = _component(name, entry, torch.float32 if name == "vae" else dtype, torch.device(device))
        elif name in taken and entry is not None:
            parts[name] = entry
    for name in taken:
        encoder = parts.get(name.replace("tokenizer", "text_encoder"))
        if name.startswith("tokenizer") and encoder is not None:
            parts[name] = _one_word_tokenizer(getattr(encoder.config, "max_position_embeddings", 512))
    if "requires_safety_checker" in taken:
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return kind(**parts)


def _component(name: str, entry: dict[str, Any], dtype: torch.dtype, device: torch.device) -> Any:
    """One network, or one scheduler; None for what no size depends on."""
    config = {key: value for key, value in entry.items() if not key.startswith("_")}
    library = diffusers if hasattr(diffusers, entry["_class_name"]) else transformers
    kind: Any = getattr(library, entry["_class_name"], None)
    is_network = inspect.isclass(kind) and issubclass(kind, nn.Module)
    if not is_network and library is diffusers:
        return kind.from_config(config)
    if not is_network and name.startswith("text_encoder"):
        raise ValueError(
            f"transformers {transformers.__version__} has no {entry['_class_name']}, the pipeline's {name}. "
            "Upgrade transformers."
        )
    if not is_network:
        return None
    with device:
        module = kind.from_config(config) if library is diffusers else kind(kind.config_class(**config))
    # Some make a table on the CPU. The plain method: diffusers' own warns of what concerns files.
    return nn.Module.to(module, device, dtype)


def _one_word_tokenizer(longest: int) -> Any:
    """A tokenizer with which a pipeline encodes a prompt of the right length, whatever it says."""
    words = Tokenizer(WordLevel({"?": 0}, unk_token="?"))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="?", pad_token="?", model_max_length=longest, chat_template="?"
    )
