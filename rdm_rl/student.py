"""Saving a student as plain diffusers: a LoRA or a pipeline, the scheduler that walks it, and a model card."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline, LCMScheduler
from huggingface_hub import ModelCard, ModelCardData

from rdm_rl import __version__
from rdm_rl.networks import AdapterNetworks, Networks

_CARD = """# {name}

A {steps}-step student of `{base}`, distilled with rdm_rl {version}. The guidance of the teacher is part of the student,
so it is used with `guidance_scale=1.0`, and with the {steps} steps it was trained for.

```python
from diffusers import {imports}

pipe = DiffusionPipeline.from_pretrained("{source}"){load_lora}
image = pipe("a prompt", num_inference_steps={steps}, guidance_scale=1.0).images[0]
```

| setting | value |
|---|---|
{rows}
"""

_LOAD_LORA = """
pipe.load_lora_weights("{name}", weight_name="pytorch_lora_weights.safetensors")
pipe.scheduler = {scheduler}.from_pretrained("{name}", subfolder="scheduler")"""


def save_student(
    folder: Path,
    networks: Networks,
    *,
    num_inference_steps: int,
    base: str,
    facts: Mapping[str, Any],
    name: str | None = None,
) -> None:
    """Write the policy, its scheduler and a model card.

    Args:
        folder: Where to; made if needed.
        networks: Whose policy, as it is.
        num_inference_steps: Steps K of the student.
        base: Name or path of the base model.
        facts: What else the card says, a row each.
        name: What the student is called in the card's code: its name on the hub; None is the folder's name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    scheduler = networks.family.student_scheduler(num_inference_steps)
    lora = isinstance(networks, AdapterNetworks)
    if isinstance(networks, AdapterNetworks):
        networks.family.save_lora(str(folder), *networks.export())
        scheduler.save_pretrained(folder / "scheduler")
    else:
        networks.family.save_pipeline(str(folder), networks.module("policy"), scheduler)
    kind, name = type(scheduler).__name__, name or folder.name
    base = Path(base).name if Path(base).is_absolute() else base  # A card is published; a machine's paths are not.
    text = _CARD.format(
        name=name,
        steps=num_inference_steps,
        base=base,
        version=__version__,
        imports=f"DiffusionPipeline, {kind}" if lora else "DiffusionPipeline",
        source=base if lora else name,
        load_lora=_LOAD_LORA.format(name=name, scheduler=kind) if lora else "",
        rows="\n".join(f"| {key} | {value} |" for key, value in facts.items()),
    )
    data = ModelCardData(
        library_name="diffusers",
        base_model=base if base.count("/") == 1 and not Path(base).exists() else None,
        tags=["rdm_rl", "distillation", "few-step", *(["lora"] if lora else [])],
    )
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}").save(folder / "README.md")


def load_student(folder: str | Path, model: str | Path) -> tuple[DiffusionPipeline, int]:
    """A saved student in plain diffusers, and its number of steps.

    Args:
        folder: What :func:`save_student` wrote.
        model: The base pipeline, used if the folder holds an adapter.

    Returns:
        The pipeline, without progress bars, and the steps it was trained for.

    Raises:
        FileNotFoundError: If the folder holds no student.
        ValueError: If it holds another pipeline.
    """
    folder = Path(folder)
    if (folder / "pytorch_lora_weights.safetensors").is_file():
        pipeline = DiffusionPipeline.from_pretrained(str(model))
        pipeline.load_lora_weights(str(folder), weight_name="pytorch_lora_weights.safetensors")
        pipeline.scheduler = LCMScheduler.from_pretrained(str(folder), subfolder="scheduler")
    elif (folder / "model_index.json").is_file():
        pipeline = DiffusionPipeline.from_pretrained(str(folder))
    else:
        raise FileNotFoundError(f"{str(folder)!r} holds neither pytorch_lora_weights.safetensors nor model_index.json.")
    pipeline.set_progress_bar_config(disable=True)
    if "original_inference_steps" not in pipeline.scheduler.config:
        raise ValueError(f"{str(folder)!r} holds no student: the pipeline's scheduler names no number of steps.")
    return pipeline, int(pipeline.scheduler.config.original_inference_steps)
