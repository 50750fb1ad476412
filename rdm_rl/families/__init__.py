"""Families of diffusers pipelines: one small adapter file each, chosen by the pipeline's class."""

import json
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from rdm_rl.families.base import Family
from rdm_rl.families.sd import StableDiffusionFamily

FAMILIES: dict[str, type[Family]] = {"StableDiffusionPipeline": StableDiffusionFamily}


def load_family(model: str | Path | DiffusionPipeline) -> Family:
    """The family of a pipeline, loading it first if a path or a hub name is given.

    Args:
        model: A folder in the diffusers layout, a hub name ``owner/name``, or a loaded pipeline.

    Returns:
        The family.

    Raises:
        FileNotFoundError: If the folder does not exist or holds no pipeline.
        ValueError: If the pipeline's class belongs to no family.
    """
    pipeline: Any = model
    if isinstance(model, str | Path):
        check_model_name(str(model))
        pipeline = DiffusionPipeline.from_pretrained(str(model))
    return FAMILIES[_supported(type(pipeline).__name__)](pipeline)


def _supported(name: str) -> str:
    """The class name of a pipeline, if a family supports it."""
    if name not in FAMILIES:
        raise ValueError(
            f"model is a {name}, which no family supports. Supported pipelines: {', '.join(sorted(FAMILIES))}."
        )
    return name


def check_model_name(model: str) -> None:
    """Raise where a path can be seen not to hold a supported pipeline, before anything is loaded."""
    folder = Path(model)
    if folder.is_dir():
        index = folder / "model_index.json"
        if not index.is_file():
            raise FileNotFoundError(
                f"model={model!r} is a folder without model_index.json, so it is no diffusers pipeline. Pass the "
                "folder that save_pretrained() wrote."
            )
        _supported(str(json.loads(index.read_text(encoding="utf-8")).get("_class_name")))
    elif folder.is_absolute() or model.startswith((".", "~")) or model.count("/") != 1:
        raise FileNotFoundError(
            f"model={model!r} is neither an existing folder nor a hub name of the form 'owner/name'. "
            "Check the path, or pass a loaded DiffusionPipeline."
        )


__all__ = ["FAMILIES", "Family", "StableDiffusionFamily", "check_model_name", "load_family"]
