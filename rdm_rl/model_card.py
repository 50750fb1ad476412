"""The model card that is saved beside a student."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from rdm_rl import __version__

_TEXT = """# {name}

A {steps}-step student of `{base}`, distilled with rdm_rl {version}.

{usage}

It was trained for `num_inference_steps={steps}` and `guidance_scale=1.0`: the teacher's guidance ({guidance}) is part of
the student. The weights are {weights}.

| setting | value |
|---|---|
| rewards | {rewards} |
{settings}
"""

_LORA_USAGE = """```python
from diffusers import {scheduler}, DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{base}")
pipe.load_lora_weights("{folder}", weight_name="pytorch_lora_weights.safetensors")
pipe.scheduler = {scheduler}.from_pretrained("{folder}", subfolder="scheduler")
image = pipe("a prompt", num_inference_steps={steps}, guidance_scale=1.0).images[0]
```"""

_PIPELINE_USAGE = """```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{folder}")
image = pipe("a prompt", num_inference_steps={steps}, guidance_scale=1.0).images[0]
```"""


def write_model_card(
    folder: Path,
    *,
    base: str,
    scheduler: str,
    steps: int,
    guidance: float,
    rewards: Sequence[str],
    settings: Mapping[str, Any],
    lora: bool,
    averaged: bool,
) -> None:
    """Write ``README.md``: how to use the student in plain diffusers, and what it was trained with.

    Args:
        folder: Where the student was saved.
        base: Name or path of the base model.
        scheduler: Class name of the student's scheduler.
        steps: Steps K of the student.
        guidance: Guidance of the teacher.
        rewards: Names of the rewards.
        settings: Settings worth a row each.
        lora: Whether an adapter was saved, or else a whole pipeline.
        averaged: Whether the weights are the averaged ones.
    """
    usage = (_LORA_USAGE if lora else _PIPELINE_USAGE).format(
        base=base, folder=folder.name, steps=steps, scheduler=scheduler
    )
    text = _TEXT.format(
        name=folder.name,
        steps=steps,
        base=base,
        version=__version__,
        usage=usage,
        guidance=guidance,
        weights="the average over training (EMA)" if averaged else "those of the last update",
        rewards=", ".join(rewards),
        settings="\n".join(f"| {key} | {value} |" for key, value in settings.items()),
    )
    data = ModelCardData(
        library_name="diffusers",
        base_model=base if base.count("/") == 1 and not Path(base).exists() else None,
        tags=["rdm_rl", "distillation", "few-step", *(["lora"] if lora else [])],
    )
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")
    card.save(folder / "README.md")
