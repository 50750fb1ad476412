"""Whole models in one ``.safetensors`` file, as people publish their fine-tunes: what a file holds, and its pipeline.

A file has weights under the names of the code that its model was published with, and no configuration: that is a
diffusers pipeline's (``model_config``), which also gives the parts that the file lacks. The file's header names every
tensor, so that what is wrong is said before a weight is read.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
from diffusers.loaders.single_file_utils import (
    DIFFUSERS_DEFAULT_PIPELINE_PATHS,
    SingleFileComponentError,
    infer_diffusers_model_type,
)
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import nn

from rdm_rl.families.hub import check_hub_name, one_line_errors, without_diffusers_log
from rdm_rl.files import read_json

_VAE = ("first_stage_model.", "vae.")
_UNET = ("model.diffusion_model.input_blocks.", "down_blocks.")
# What the names of each part's tensors begin with, by the class of the pipeline; the first part is the network. A
# network alone may also have diffusers' own names.
LAYOUTS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "StableDiffusionPipeline": {"unet": _UNET, "vae": _VAE, "text_encoder": ("cond_stage_model.",)},
    "StableDiffusionXLPipeline": {
        "unet": _UNET,
        "vae": _VAE,
        "text_encoder": ("conditioner.embedders.0.transformer.",),
        "text_encoder_2": ("conditioner.embedders.1.",),
    },
    "StableDiffusion3Pipeline": {
        "transformer": ("model.diffusion_model.joint_blocks.", "joint_blocks.", "transformer_blocks."),
        "vae": _VAE,
        "text_encoder": ("text_encoders.clip_l.",),
        "text_encoder_2": ("text_encoders.clip_g.",),
        "text_encoder_3": ("text_encoders.t5xxl.",),
    },
    "FluxPipeline": {
        "transformer": ("model.diffusion_model.double_blocks.", "double_blocks.", "transformer_blocks."),
        "vae": _VAE,
        "text_encoder": ("text_encoders.clip_l.",),
        "text_encoder_2": ("text_encoders.t5xxl.",),
    },
}
_NETWORKS = tuple({prefix for layout in LAYOUTS.values() for prefix in next(iter(layout.values()))})
# diffusers' names for the models of these pipelines.
_KINDS = ("v1", "v2", "xl_base", "sd3", "sd35_medium", "sd35_large", "flux-dev", "flux-schnell")
_ADAPTER_MARKS = ("lora_", ".lora.", "hada_w", "lokr_w", ".oft_")
_QUANTISED = (".scale_weight", ".weight_scale", ".comfy_quant", "scaled_fp8", ".absmax")
_OTHER_FORMATS = (".ckpt", ".pt", ".pth", ".bin", ".gguf")


class Header(NamedTuple):
    """What a file's header says, without its weights.

    Args:
        path: The file.
        tensors: Its tensors by name, on the meta device: they have shapes and no values.
        metadata: Text of the file's own, by name.
    """

    path: str
    tensors: Mapping[str, torch.Tensor]
    metadata: Mapping[str, str]

    def has(self, prefixes: tuple[str, ...]) -> bool:
        """Whether a tensor's name begins with one of these."""
        return any(name.startswith(prefixes) for name in self.tensors)

    @property
    def is_whole_model(self) -> bool:
        """Whether it has a denoising network."""
        return self.has(_NETWORKS) and not self.is_adapter

    @property
    def is_adapter(self) -> bool:
        """Whether it is a LoRA, or another adapter."""
        return any(mark in name for name in self.tensors for mark in _ADAPTER_MARKS)

    @property
    def predicts_v(self) -> bool:
        """Whether it says, as only some do, that its network predicts v."""
        return "v_pred" in self.tensors or self.metadata.get("modelspec.prediction_type") == "v"


class SingleFile(NamedTuple):
    """What more there is to say of a model that is one file, than its name.

    Args:
        model_config: Folder or hub name of the pipeline that configures it.
        lacking: The networks that are that pipeline's, as the file has none.
    """

    model_config: str
    lacking: list[str]


def is_single_file(model: str) -> bool:
    """Whether a name is that of a file of weights.

    Example:
        >>> is_single_file("models/mine.safetensors"), is_single_file("owner/name")
        (True, False)
    """
    return Path(model).suffix in (".safetensors", *_OTHER_FORMATS) and not Path(model).is_dir()


def read_header(setting: str, path: str) -> Header:
    """What the header of a file says.

    Args:
        setting: What was set to the file, for errors.
        path: The file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, or of another format.
    """
    if Path(path).suffix != ".safetensors":
        raise ValueError(
            f"{setting}={path!r} is no .safetensors file. Pickles (.ckpt, .pt), which may run code, and .gguf are not "
            "read: take the .safetensors file of the model, or convert it once."
        )
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"{setting}={path!r} does not exist. Check the path; one of the hub is fetched first: "
            "`hf download owner/name file.safetensors`."
        )
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(
            f"{setting}={path!r} is damaged, or only a part of a download: {error}. Fetch it again."
        ) from error
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    return Header(path=path, tensors=tensors, metadata=metadata)


def read_model_header(path: str) -> Header:
    """The header of a file that is to be a whole model.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, or holds something else.
    """
    header = read_header("model", path)
    if header.is_adapter:
        raise ValueError(
            f"model={path!r} is an adapter (a LoRA), and no whole model. Pass the model that it belongs to as model, "
            "and the adapter as policy_init (a distilled student) or as teacher_adapter (a style)."
        )
    if not header.is_whole_model:
        first = next(iter(header.tensors), "nothing")
        raise ValueError(
            f"model={path!r} holds no denoising network of Stable Diffusion, SDXL, SD3 or FLUX.1, only {first!r} and "
            "the like. Is it an autoencoder, a text encoder or a ControlNet alone?"
        )
    quantised = next((name for name in header.tensors if name.endswith(_QUANTISED)), None)
    if quantised is not None:
        raise ValueError(
            f"model={path!r} is quantised: {quantised!r} scales other weights, which diffusers would leave out. Take "
            "the file in fp16, bf16 or float32."
        )
    return header


def default_config(header: Header) -> str:
    """The hub name of the pipeline whose configuration diffusers uses for a file, where none is set.

    Args:
        header: The file's header.

    Raises:
        ValueError: If it is of no supported kind, or does not say of which.
    """
    # A network under diffusers' own names, or an SDXL network alone, is taken for Stable Diffusion 1.5.
    kind = infer_diffusers_model_type(header.tensors) if header.has(tuple(_original_networks())) else None
    if kind == "v1" and "model.diffusion_model.label_emb.0.0.weight" in header.tensors:
        kind = "xl_base"
    if kind not in _KINDS:
        of_kind = "does not say of which model it is" if kind is None else f"is of the kind {kind!r}"
        raise ValueError(
            f"model={header.path!r} {of_kind}. Set model_config to a folder or hub name of a diffusers pipeline that "
            f"it fits: {', '.join(LAYOUTS)}."
        )
    name: str = DIFFUSERS_DEFAULT_PIPELINE_PATHS[kind]["pretrained_model_name_or_path"]
    return name


def _original_networks() -> Iterable[str]:
    """What names in a network begin with, without those of diffusers."""
    return (prefix for prefix in _NETWORKS if prefix not in ("down_blocks.", "transformer_blocks."))


def parts_in(header: Header, pipeline: str) -> list[str]:
    """The parts of a pipeline that a file holds.

    Args:
        header: The file's header.
        pipeline: The pipeline's class.

    Raises:
        ValueError: If it does not hold this pipeline's network.
    """
    layout = LAYOUTS.get(pipeline, {})
    present = [part for part, prefixes in layout.items() if header.has(prefixes)]
    if not present or present[0] != next(iter(layout)):
        raise ValueError(
            f"model={header.path!r} holds no network of a {pipeline}, which model_config says it is. Single files are "
            f"read of {', '.join(LAYOUTS)}."
        )
    return present


def config_folder(header: Header, model_config: str | None, parts: Iterable[str] = ()) -> Path:
    """The folder of the pipeline that configures a file, fetched if it is a hub name: configurations, and some weights.

    Args:
        header: The file's header.
        model_config: Folder or hub name; None for :func:`default_config`.
        parts: The parts whose weights are needed, too.

    Raises:
        FileNotFoundError: If the folder does not exist.
        OSError: If the hub does not give it.
        ValueError: If the file does not say which one it is.
    """
    name = model_config or default_config(header)
    if Path(name).is_dir():
        return Path(name)
    patterns = ["*.json", "*.txt", "*.model", *(f"{part}/*.safetensors" for part in parts)]
    try:
        check_hub_name("model_config", name)
        with one_line_errors("model_config", name):
            return Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=["*.fp16*"]))
    except OSError as error:
        raise type(error)(
            f"model={header.path!r} is one file, whose configuration is that of a diffusers pipeline. {error}"
        ) from error


def check_prediction(header: Header, folder: Path) -> None:
    """Raise where a file says that its network predicts v, and the scheduler's configuration does not.

    Args:
        header: The file's header.
        folder: The folder of the pipeline that configures it.

    Raises:
        ValueError: If the two differ.
    """
    file = folder / "scheduler" / "scheduler_config.json"
    config = read_json(file) if file.is_file() else {}
    wanted: dict[str, object] = {"prediction_type": "v_prediction"} if header.predicts_v else {}
    if "ztsnr" in header.tensors:
        wanted["rescale_betas_zero_snr"] = True
    for name, value in wanted.items():
        if config.get(name) != value:
            raise ValueError(
                f"model={header.path!r} says that it was trained with {name}={value!r}, but the configuration's "
                f"scheduler has {config.get(name)!r}. Set model_config to a copy of the pipeline's folder whose "
                f"{file.name} has {json.dumps(wanted)}."
            )


def read_parts(
    header: Header, folder: Path, pipeline: str, components: Mapping[str, Any], precision: Mapping[str, Any]
) -> Any:
    """The pipeline of a file, with some parts that are there already.

    Args:
        header: The file's header.
        folder: The folder of the pipeline that configures it.
        pipeline: The pipeline's class.
        components: The parts that the file does not give, and None for those to do without.
        precision: The argument of ``from_single_file`` for it.

    Raises:
        ValueError: If file and configuration do not fit.
    """
    parts = parts_in(header, pipeline)
    advice = "Set model_config to the pipeline that it was made from."
    with _fitting("model", header.path, f"the configuration in {str(folder)!r}", advice):
        given = dict(components)
        if "vae" in parts:  # In float32, whatever the others have.
            given["vae"] = diffusers.AutoencoderKL.from_single_file(header.path, config=str(folder), subfolder="vae")
        loaded: Any = getattr(diffusers, pipeline).from_single_file(
            header.path, config=str(folder), **precision, **given
        )
        for part in parts:
            _check_complete(getattr(loaded, part), part)
    return loaded


def read_network(header: Header, like: nn.Module, precision: Mapping[str, Any], folder: Path) -> Any:
    """The network of a file, of the class and configuration of another one.

    Args:
        header: The file's header.
        like: The other network, of diffusers.
        precision: The argument of ``from_single_file`` for it.
        folder: An empty folder, in which the configuration is written.

    Raises:
        ValueError: If file and network do not fit.
    """
    kind: Any = type(like)
    kind.save_config(like, folder)
    advice = "Pass a student of this base."
    with _fitting("policy_init", header.path, f"the base's {kind.__name__}", advice):
        network = kind.from_single_file(header.path, config=str(folder), **precision)
        _check_complete(network, kind.__name__)
    return network


def _check_complete(part: nn.Module, name: str) -> None:
    """Raise where the file had no values for some of a part's weights, which then are on the meta device."""
    missing = [weight for weight, value in part.named_parameters() if value.is_meta]
    if missing:
        raise ValueError(f"it has no tensor for {len(missing)} of the {name}, such as {missing[0]!r}")


@contextmanager
def _fitting(setting: str, path: str, config: str, advice: str) -> Iterator[None]:
    """Say in one line that a file does not fit its configuration, with diffusers' story as the cause."""
    try:
        with without_diffusers_log("models.modeling_utils"):  # It warns of modules to keep in float32, and names none.
            yield
    except (ValueError, KeyError, RuntimeError, SingleFileComponentError) as error:
        reason = " ".join(str(error).split()).split(". If you want")[0].rstrip(".")
        if "meta tensor" in reason:  # What torch says of weights that nothing was loaded into.
            reason = "it has no tensor for some of a network's weights"
        raise ValueError(f"{setting}={path!r} does not fit {config}: {reason}. {advice}") from error
