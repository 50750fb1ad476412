"""``rdm-rl export``: a student's adapter in the form of another program, without loading the model it belongs to."""

from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from rdm_rl.cli.plan.skeleton import make_skeleton, read_blueprint
from rdm_rl.families import load_family
from rdm_rl.families.adapters import adapter_scales
from rdm_rl.families.loading import configuration
from rdm_rl.files import written_whole

Format = Literal["kohya", "diffusers"]


def export_adapter(
    source: str,
    model: str | Path | None,
    form: Format,
    output: Path,
    dtype: torch.dtype,
    model_config: str | Path | None = None,
) -> None:
    """Write an adapter of any format that a policy can start from in one of two forms.

    Of the model only the configurations are read: they say which layers there are.

    Args:
        source: A saved student's folder, or an adapter's file, folder or name on the hub.
        model: What it belongs to: a folder, a hub name, or a name that ``rdm-rl plan`` knows; None if it does not say.
        form: ``kohya`` for ComfyUI, A1111, Forge and kohya's scripts; ``diffusers`` for ``load_lora_weights``.
        output: The file.
        dtype: Precision of the weights in it; a layer's alpha stays in float32.
        model_config: What configures a model in one file, by any of those names.

    Raises:
        ValueError: If the source is no adapter of this model, or the form cannot hold it.
        OSError: If it cannot be loaded.
    """
    if configuration(source, "student") is not None:
        raise ValueError(
            f"{source!r} is a whole model, trained without adapters or saved with them in its weights, and a LoRA "
            "cannot hold it. Draw with diffusers or `rdm-rl sample`, or train with adapters (peft_config, --lora_r)."
        )
    if model is None:
        raise ValueError(f"{source!r} does not say which model it belongs to: give its --model.")
    family = load_family(make_skeleton(read_blueprint(model, model_config)))
    loaded = family.load_adapter(source, "student", "student")
    state = {f"{name.removesuffix('.weight')}.weight": value for name, value in loaded.items()}
    network: Any = family.network
    with written_whole(output) as file:
        if form == "diffusers":
            config = network.peft_config["student"].to_dict()
            family.save_lora(str(file.parent), _in_precision(state, dtype), config, file.name)
        else:
            tensors = family.comfyui_tensors(state, adapter_scales(network, "student"))
            save_file(_in_precision(tensors, dtype), file)


def _in_precision(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors in a precision, without the alphas, which are numbers."""
    return {name: (value.to(dtype) if value.ndim else value).contiguous() for name, value in tensors.items()}
