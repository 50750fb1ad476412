"""Families of diffusers pipelines: one small adapter file each, chosen by the pipeline's class."""

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
    name = type(pipeline).__name__
    if name not in FAMILIES:
        raise ValueError(
            f"model is a {name}, which no family supports. Supported pipelines: {', '.join(sorted(FAMILIES))}."
        )
    return FAMILIES[name](pipeline)


def check_model_name(model: str) -> None:
    """Raise ``FileNotFoundError`` where a path can be seen not to hold a pipeline, before anything is loaded."""
    folder = Path(model)
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise FileNotFoundError(
                f"model={model!r} is a folder without model_index.json, so it is no diffusers pipeline. Pass the "
                "folder that save_pretrained() wrote."
            )
    elif folder.is_absolute() or model.startswith((".", "~")) or model.count("/") != 1:
        raise FileNotFoundError(
            f"model={model!r} is neither an existing folder nor a hub name of the form 'owner/name'. "
            "Check the path, or pass a loaded DiffusionPipeline."
        )


__all__ = ["FAMILIES", "Family", "StableDiffusionFamily", "check_model_name", "load_family"]
