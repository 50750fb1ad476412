"""Saving a student as plain diffusers: a LoRA or a pipeline, the scheduler that walks it, and a model card."""

import json
import logging
from collections.abc import Mapping, Sequence
from inspect import signature
from pathlib import Path
from shutil import copymode
from typing import Any, NamedTuple

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, LCMScheduler
from huggingface_hub import ModelCard, ModelCardData
from safetensors.torch import save_file
from yaml import YAMLError

from rdm_rl import __version__
from rdm_rl.families.adapters import DIFFUSERS_LORA, adapter_scales
from rdm_rl.families.base import Family
from rdm_rl.families.loading import FAMILIES, load_family, load_pipeline
from rdm_rl.families.single_file import SingleFile
from rdm_rl.files import read_json
from rdm_rl.manifest import MANIFEST, damage, write_manifest
from rdm_rl.networks.roles import AdapterNetworks, Networks
from rdm_rl.policy import SamplerName

_CARD = """# {name}

A {steps}-step student of `{base}`, trained with rdm_rl {version}. {guidance}

```python
{imports}

pipe = {load}{load_lora}
image = pipe({call}).images[0]
```
{drawing}
| setting | value |
|---|---|
{rows}
"""

_LOAD_LORA = """
pipe.load_lora_weights("{student}", weight_name="{file}")
pipe.scheduler = {scheduler}.from_pretrained("{student}", subfolder="scheduler")"""


_DRAWING = """
`{file}` is for {programs}{sampler}.
"""
_SAMPLER_IN_COMFYUI = ": in ComfyUI with the sampler `{name}` and {times}"

KOHYA_LORA = "kohya_lora.safetensors"
logger = logging.getLogger(__name__)
_USE_FILE = "student.json"
_BASE_FILE = "base.json"
_FACTS_FILE = "training.json"
_WHAT = {"DiTPipeline": "class_labels=[0]", "DDPMPipeline": "", "DDIMPipeline": ""}
_GUIDANCE_INSIDE = """The guidance of the teacher is part of the
student, so it is used with `guidance_scale={guidance}`, and with the {steps} steps it was trained for."""
_GUIDANCE_OUTSIDE = """It is used as it was
trained: with guidance, and with {steps} steps."""


class SavedStudent(NamedTuple):
    """A saved student in plain diffusers, and how it is used.

    Args:
        pipeline: The pipeline.
        call: The arguments beside the prompt: number of steps, guidance, and, for a flow, the times as ``sigmas``.
    """

    pipeline: DiffusionPipeline
    call: dict[str, Any]

    @property
    def num_inference_steps(self) -> int:
        """Its number of steps."""
        return int(self.call["num_inference_steps"])

    def draw(self, prompts: Sequence[str], **options: Any) -> list[Any]:
        """N images of the stock pipeline, as PIL unless ``output_type`` says otherwise.

        Args:
            prompts: N prompts; for a ``DiTPipeline`` the numbers of classes.
            options: More of the pipeline's own arguments, such as ``generator``.
        """
        pipe: Any = self.pipeline
        names = signature(type(pipe).__call__).parameters
        if "prompt" in names:
            what: dict[str, Any] = {"prompt": list(prompts)}
        elif "class_labels" in names:
            what = {"class_labels": [int(prompt) if prompt.isdigit() else pipe.labels[prompt] for prompt in prompts]}
        else:
            what = {"batch_size": len(prompts)}
        images: list[Any] = pipe(**what, **self.call, **options).images
        return images


def save_student(
    folder: Path,
    networks: Networks,
    *,
    num_inference_steps: int,
    base: str,
    facts: Mapping[str, Any],
    single_file: SingleFile | None = None,
    name: str | None = None,
    sampler: SamplerName = "renoise",
    guidance_scale: float = 1.0,
    whole: bool = False,
    write: bool = True,
) -> None:
    """Write the policy, its scheduler and a model card, and an adapter also as ComfyUI and others read it.

    If the networks are sharded, all processes must call it.

    Args:
        folder: Where to; made if needed.
        networks: Whose policy, as it is.
        num_inference_steps: Steps K of the student.
        base: Name or path of the base model.
        facts: What else the card says, a row each, and ``training.json``.
        single_file: What more there is to say of a base that is one file.
        name: The student's name on the hub; None if it has none. What has none is ``path/to/...`` in the card's code.
        sampler: The policy's sampler.
        guidance_scale: Guidance that the student is used with.
        whole: Save a whole pipeline, with the adapter added to its weights, also where an adapter would do.
        write: Whether this process is the one that writes.
    """
    family = networks.family
    scheduler = family.student_scheduler(num_inference_steps, sampler)
    lora = isinstance(networks, AdapterNetworks) and family.loads_lora and not whole
    network = None if lora else networks.whole_policy(keep=write)
    if not write:
        return
    folder.mkdir(parents=True, exist_ok=True)
    if lora and isinstance(networks, AdapterNetworks):
        family.save_lora(str(folder), *networks.export())
        scheduler.save_pretrained(folder / "scheduler")
    elif network is not None:
        family.save_pipeline(str(folder), network, scheduler)
    drawing_file = _save_for_comfyui(folder, networks) if isinstance(networks, AdapterNetworks) and not whole else None
    drawing = _DRAWING.format(
        file=drawing_file,
        programs="ComfyUI, A1111 and Forge" if family.network_name == "unet" else "ComfyUI",
        # Any other walks without new noise in use.
        sampler=_SAMPLER_IN_COMFYUI.format(name="lcm" if sampler == "renoise" else "euler", times=family.comfyui_times),
    )
    use = family.student_call(num_inference_steps, sampler, guidance_scale)
    call = [
        _WHAT.get(type(family.pipeline).__name__, '"a prompt"'),
        *(f"{key}={value!r}" for key, value in use.items()),
    ]
    kind, base = type(scheduler).__name__, public_name(base)
    student = name or f"path/to/the/student/{folder.name}"
    base_is_on_hub = base.count("/") == 1
    (folder / _USE_FILE).write_text(json.dumps(use), encoding="utf-8")
    (folder / _FACTS_FILE).write_text(json.dumps(facts, default=str), encoding="utf-8")
    if lora:
        config = {} if single_file is None else {"model_config": public_name(single_file.model_config)}
        (folder / _BASE_FILE).write_text(json.dumps({"base": base, **config}), encoding="utf-8")
    place = student if not lora else base if base_is_on_hub else f"path/to/the/base/{base}"
    load, imports = f'DiffusionPipeline.from_pretrained("{place}")', {"diffusers": ["DiffusionPipeline"]}
    if lora and single_file is not None:
        load, imports = _code_for_file(place, single_file, family)
    if lora:
        imports["diffusers"].append(kind)
    text = _CARD.format(
        name=name or folder.name,
        steps=num_inference_steps,
        call=", ".join(call).removeprefix(", "),
        guidance=(_GUIDANCE_INSIDE if guidance_scale <= 1 else _GUIDANCE_OUTSIDE).format(
            steps=num_inference_steps, guidance=use.get("guidance_scale", 1.0)
        ),
        base=base,
        version=__version__,
        imports="\n".join(f"from {library} import {', '.join(names)}" for library, names in imports.items()),
        load=load,
        load_lora=_LOAD_LORA.format(student=student, file=DIFFUSERS_LORA, scheduler=kind) if lora else "",
        drawing=drawing if drawing_file else "",
        rows="\n".join(f"| {key} | {value} |" for key, value in facts.items()),
    )
    data = ModelCardData(
        library_name="diffusers",
        base_model=base if base_is_on_hub else None,
        tags=["rdm_rl", "distillation", "few-step", *(["lora"] if lora else [])],
    )
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}").save(folder / "README.md")
    files = _files_of(folder)
    for file in files:
        if file.suffix == ".safetensors":
            copymode(folder / "README.md", file)  # safetensors makes files that only their owner can read.
    write_manifest(folder, files)


def _files_of(folder: Path) -> list[Path]:
    """The files of a student, in a folder that may be a run's and hold much else."""
    index = folder / "model_index.json"
    parts = read_json(index) if index.is_file() else ["scheduler"]
    names = (index.name, DIFFUSERS_LORA, KOHYA_LORA, _USE_FILE, _BASE_FILE, _FACTS_FILE, "README.md")
    files = [folder / name for name in names]
    files += [file for part in parts if (folder / part).is_dir() for file in (folder / part).rglob("*")]
    return [file for file in files if file.is_file()]


def student_parts(folder: Path) -> list[Path]:
    """The files and folders of the student that is saved in a folder, also of one half written; none if none is."""
    if not any((folder / name).is_file() for name in (DIFFUSERS_LORA, KOHYA_LORA, _USE_FILE)):
        return []
    names = {file.relative_to(folder).parts[0] for file in _files_of(folder)} | {MANIFEST}
    return [folder / name for name in sorted(names) if (folder / name).exists()]


def _code_for_file(place: str, single_file: SingleFile, family: Family) -> tuple[str, dict[str, list[str]]]:
    """The call that loads a base from one file, and the classes that it takes, by library."""
    kind, config = type(family.pipeline).__name__, public_name(single_file.model_config)
    config = config if config.count("/") == 1 else f"path/to/its/configuration/{config}"
    imports, options = {"diffusers": [kind]}, [f'"{place}"', f'config="{config}"']
    for part in single_file.lacking:
        network = type(getattr(family.pipeline, part))
        imports.setdefault(network.__module__.partition(".")[0], []).append(network.__name__)
        options.append(f'{part}={network.__name__}.from_pretrained("{config}", subfolder="{part}")')
    return f"{kind}.from_single_file({', '.join(options)})", imports


def _save_for_comfyui(folder: Path, networks: AdapterNetworks) -> str | None:
    """Write the policy's adapter as ComfyUI reads it, unless the one for diffusers is that; the name of that file."""
    family, (state, _) = networks.family, networks.export()
    scales = adapter_scales(networks.module("policy"), "policy")
    (folder / KOHYA_LORA).unlink(missing_ok=True)  # Of an earlier student.
    if not family.comfyui_layers:
        return None
    try:
        tensors = family.comfyui_tensors(state, scales)
    except ValueError as error:  # The training must not be lost for it.
        logger.warning("No %s is written. %s", KOHYA_LORA, error)
        return None
    if family.loads_lora and family.network_name != "unet" and all(scale == 1 for scale in scales.values()):
        return DIFFUSERS_LORA
    save_file({name: value.cpu().contiguous() for name, value in tensors.items()}, folder / KOHYA_LORA)
    return KOHYA_LORA


def public_name(source: str) -> str:
    """What a model is called on a card: a card is published, and a machine's paths are not.

    A folder is called what its own card says (``model_name`` of its ``README.md``), else by its name.

    Example:
        >>> public_name("/models/mine"), public_name("owner/name")
        ('mine', 'owner/name')
    """
    path = Path(source)
    if (path / "README.md").is_file():
        try:
            named = getattr(ModelCard.load(path / "README.md", ignore_metadata_errors=True).data, "model_name", None)
        except YAMLError:  # Somebody has edited it: no run is lost for that.
            named = None
        return str(named or path.resolve().name)
    return path.name if path.is_absolute() or path.exists() else source


def base_of(folder: str | Path) -> str | None:
    """What the model is called that a saved adapter belongs to; None for a whole pipeline.

    That is a hub name, a folder's without its place, or ``digits`` or ``scenes`` for an embedded teacher.
    """
    return _base_facts(folder).get("base")


def model_config_of(folder: str | Path) -> str | None:
    """What the pipeline is called that configures a saved adapter's base in one file; None for any other student."""
    return _base_facts(folder).get("model_config")


def call_of(folder: str | Path) -> dict[str, Any]:
    """The arguments beside the prompt that a saved student is drawn with; none if its folder does not say."""
    return _read_facts(Path(folder) / _USE_FILE)


def rewards_of(folder: str | Path) -> tuple[str, ...]:
    """Names of the rewards that a saved student was trained on; none if its folder does not say."""
    listed = str(training_facts(folder).get("rewards", "")).partition(", combined by ")[0]
    return tuple(name.partition(" (weight ")[0] for name in listed.split(", ") if name)


def training_facts(folder: str | Path) -> dict[str, Any]:
    """What the card of a saved student says of its training, by name."""
    return _read_facts(Path(folder) / _FACTS_FILE)


def _base_facts(folder: str | Path) -> dict[str, str]:
    return _read_facts(Path(folder) / _BASE_FILE)


def _read_facts(file: Path) -> dict[str, Any]:
    facts: dict[str, Any] = read_json(file) if file.is_file() else {}
    return facts


def set_decoder_precision(pipeline: Any, dtype: torch.dtype) -> None:
    """Give the decoder the precision of the network, as stock pipelines hand it what the network gives.

    In training it has float32. A stock pipeline of SDXL still decodes in float32 what it has in float16.
    """
    decoder = getattr(pipeline, FAMILIES[type(pipeline).__name__].decoder_name or "", None)
    if decoder is not None and decoder.dtype != dtype:
        decoder.to(dtype)


def load_student(
    folder: str | Path, model: str | Path, dtype: torch.dtype = torch.float32, model_config: str | Path | None = None
) -> SavedStudent:
    """A saved student in plain diffusers, without progress bars, and how it is used.

    Args:
        folder: What :func:`save_student` wrote.
        model: The base pipeline, used if the folder holds an adapter.
        dtype: Precision that it is loaded in.
        model_config: Folder or hub name of the pipeline that configures a base in one file.

    Raises:
        FileNotFoundError: If the folder holds no student.
        ValueError: If it holds another pipeline, or an adapter of another base, or its weights are not what was saved.
    """
    folder = Path(folder)
    if (folder / MANIFEST).is_file():  # Its card may have been edited since, and a part of it may be elsewhere.
        faults = [fault for fault in damage(folder) if ".safetensors " in fault and "is missing" not in fault]
        if faults:
            raise ValueError(
                f"The student {str(folder)!r} is damaged: {'; '.join(faults)}. Save or copy it again, or, if the "
                f"change is yours, delete its {MANIFEST}."
            )
    if (folder / DIFFUSERS_LORA).is_file():
        family = load_family(model, dtype=dtype, model_config=model_config)
        family.load_adapter(str(folder), "student", setting="student")
        pipeline = family.pipeline
        config = read_json(folder / "scheduler" / "scheduler_config.json")
        schedulers = {kind.__name__: kind for kind in (LCMScheduler, DDIMScheduler, FlowMatchEulerDiscreteScheduler)}
        pipeline.scheduler = schedulers[config["_class_name"]].from_config(config)
    elif (folder / "model_index.json").is_file():
        pipeline = load_pipeline(str(folder), dtype)
    else:
        is_checkpoint = (folder / "trainer_state.json").is_file()
        reason = "is a checkpoint, from which a run goes on" if is_checkpoint else "holds no student"
        raise FileNotFoundError(
            f"{str(folder)!r} {reason if folder.is_dir() else 'does not exist'}. `save_model` writes a student, and "
            f"`rdm-rl train` into output_dir at the end: {DIFFUSERS_LORA}, or a pipeline with its model_index.json."
        )
    set_decoder_precision(pipeline, dtype)
    pipeline.set_progress_bar_config(disable=True)
    call = call_of(folder)
    if call:
        return SavedStudent(pipeline, call)
    if "original_inference_steps" not in pipeline.scheduler.config:
        raise ValueError(f"{str(folder)!r} holds no student: nothing in it says how many steps it takes.")
    steps = int(pipeline.scheduler.config.original_inference_steps)
    return SavedStudent(pipeline, {"num_inference_steps": steps, "guidance_scale": 1.0})
