"""From a name or a folder to a family, with one clear line for everything that can be wrong with it."""

import re
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download

from rdm_rl.families.base import Family, tokenizer_of
from rdm_rl.families.dit import DiTFamily
from rdm_rl.families.flux import FluxFamily
from rdm_rl.families.hub import check_hub_name, one_line_errors, without_diffusers_log
from rdm_rl.families.klein import Flux2KleinFamily
from rdm_rl.families.pixart import PixArtFamily
from rdm_rl.families.quantization import (
    Quantization,
    free_memory_between_products,
    quantization_config,
    single_file_error,
)
from rdm_rl.families.resolution import Resolution
from rdm_rl.families.sana import SanaFamily
from rdm_rl.families.sd import StableDiffusionFamily
from rdm_rl.families.sd3 import StableDiffusion3Family
from rdm_rl.families.sdxl import StableDiffusionXLFamily
from rdm_rl.families.single_file import (
    Header,
    SingleFile,
    check_prediction,
    config_folder,
    default_config,
    is_single_file,
    parts_in,
    read_header,
    read_model_header,
    read_network,
    read_parts,
)
from rdm_rl.families.unconditional import UnconditionalFamily
from rdm_rl.families.zimage import ZImageFamily
from rdm_rl.files import read_json

FAMILIES: dict[str, type[Family]] = {
    "StableDiffusionPipeline": StableDiffusionFamily,
    "StableDiffusionXLPipeline": StableDiffusionXLFamily,
    "StableDiffusion3Pipeline": StableDiffusion3Family,
    "FluxPipeline": FluxFamily,
    "Flux2KleinPipeline": Flux2KleinFamily,
    "SanaPipeline": SanaFamily,
    "ZImagePipeline": ZImageFamily,
    "PixArtSigmaPipeline": PixArtFamily,
    "DiTPipeline": DiTFamily,
    "DDPMPipeline": UnconditionalFamily,
    "DDIMPipeline": UnconditionalFamily,
}


# What two networks of one class must share to be given the same latents and the same encoded prompts.
INTERFACE = (
    *("in_channels", "cross_attention_dim", "addition_embed_type", "projection_class_embeddings_input_dim"),
    *("joint_attention_dim", "pooled_projection_dim", "caption_channels", "cap_feat_dim"),
    "num_embeds_ada_norm",
)


# A shard may have its number before the variant, as older versions of diffusers wrote it.
_WEIGHTS = re.compile(
    r"(model|diffusion_pytorch_model)(\.(?P<variant>\w+))?(-\d+-of-\d+)?(\.(?P<late_variant>\w+))?\.safetensors"
)


def register_family(pipeline_class: str, family: type[Family]) -> None:
    """Make the trainer use a family for a class of pipelines.

    Args:
        pipeline_class: Name of the pipeline's class, as in ``model_index.json``.
        family: The family.

    Raises:
        TypeError: If it is no family.
    """
    if not (isinstance(family, type) and issubclass(family, Family)):
        raise TypeError(f"{family!r} does not derive from rdm_rl.families.Family.")
    FAMILIES[pipeline_class] = family


def load_family(
    model: str | Path | DiffusionPipeline,
    *,
    dtype: torch.dtype | None = None,
    resolution: int | str | Resolution | None = None,
    model_config: str | Path | None = None,
    quantization: Quantization | None = None,
) -> Family:
    """The family of a pipeline, loading it first if a path or a hub name is given.

    Args:
        model: A folder in the diffusers layout, a hub name ``owner/name``, a ``.safetensors`` file with the whole
            model, or a loaded pipeline.
        dtype: Precision that networks and text encoders are loaded in; the decoder stays in float32. None: float32.
        resolution: Size of the images in pixels, such as 1024 or ``"832x1216"``; None is the pipeline's own.
        model_config: Folder or hub name of the pipeline that configures a file and gives the parts that it lacks; None
            for the one that diffusers knows for its kind.
        quantization: How the network and the text encoders are stored; None: as they are.

    Returns:
        The family.

    Raises:
        FileNotFoundError: If the folder does not exist or holds no pipeline.
        OSError: If the hub does not give it.
        ValueError: If the pipeline's class belongs to no family.
    """
    pipeline: Any = model
    if isinstance(model, str | Path):
        config = None if model_config is None else str(model_config)
        check_model_name(str(model), config)
        if is_single_file(str(model)):
            if quantization is not None:
                raise single_file_error(quantization, str(model))
            pipeline = load_single_file(str(model), dtype or torch.float32, config)
        else:
            pipeline = load_pipeline(str(model), dtype or torch.float32, quantization)
    family = FAMILIES[_supported(type(pipeline).__name__)](pipeline, resolution)
    for network in (family.network, *family.text_encoders):
        free_memory_between_products(network)
    return family


def load_pipeline(model: str, dtype: torch.dtype, quantization: Quantization | None = None, **components: Any) -> Any:
    """A pipeline from a folder or the hub, in a precision, without optional parts that were saved as missing.

    Args:
        model: A folder in the diffusers layout, or a hub name.
        dtype: Precision of everything but the decoder, which stays in float32.
        quantization: How the network and the text encoders are stored; None: as they are.
        components: Parts that are given instead of loaded.

    Returns:
        The pipeline.

    Raises:
        OSError: If it cannot be loaded.
        ValueError: If its class belongs to no family.
    """
    index = configuration(model, "model")  # Of a hub name too: its class is known before gigabytes come.
    if index is None:
        raise FileNotFoundError(f"model={model!r} holds no model_index.json, so it is no diffusers pipeline.")
    family = FAMILIES[_supported(str(index.get("_class_name")))]
    if not hasattr(diffusers, str(index.get("_class_name"))):
        raise ValueError(
            f"model={model!r} is a {index['_class_name']}, which is no class of diffusers: load the pipeline yourself, "
            "and pass it instead of its name."
        )
    if quantization is not None and not family.loads_lora:
        raise ValueError(
            f"base_quantization={quantization!r} is set, but a {index['_class_name']} loads no LoRA, so that its "
            "student is saved whole, with all its weights. Leave it out."
        )
    listed = _listed(index)
    needed = family.needed_components(listed)
    # diffusers wants to be told of what was saved as missing, and would load what only other uses of a pipeline need.
    libraries = {name: part[0] for name, part in index.items() if isinstance(part, list)}
    for encoder in set(family.optional_components).difference(listed):
        libraries |= {encoder: None, tokenizer_of(encoder): None}
    optional = getattr(diffusers, index["_class_name"])._optional_components
    unneeded = [name for name in libraries if name not in needed and (libraries[name] is None or name in optional)]
    components = dict.fromkeys(unneeded) | components
    if "safety_checker" in unneeded:
        components["requires_safety_checker"] = False
    dtypes: dict[str, torch.dtype] = dict.fromkeys(family.text_encoder_names, family.text_encoder_dtype(dtype))
    if family.decoder_name is not None:
        dtypes[family.decoder_name] = torch.float32  # Decoders overflow or band in half precision.
    variant = weights_variant(
        "model", Path(model), [name for name in _networks(family, needed) if name not in components]
    )
    quiet: AbstractContextManager[Any] = nullcontext()
    if quantization is not None:
        quiet = without_diffusers_log("quantizers.torchao.torchao_quantizer")  # It doubts float32, which works.
        encoders = {name: dtypes[name] for name in family.text_encoder_names if name in needed}
        components["quantization_config"] = quantization_config(quantization, {family.network_name: dtype}, encoders)
    with one_line_errors("model", model), quiet:
        pipeline = DiffusionPipeline.from_pretrained(
            model, use_safetensors=True, variant=variant, **_precision({"default": dtype, **dtypes}), **components
        )
    return pipeline


def load_single_file(model: str, dtype: torch.dtype, model_config: str | None = None) -> Any:
    """A pipeline from one file with its weights, and another pipeline's configuration and missing parts.

    Args:
        model: The ``.safetensors`` file.
        dtype: Precision of everything but the decoder, which stays in float32.
        model_config: Folder or hub name of the other pipeline; None for the one that diffusers knows for this kind.

    Returns:
        The pipeline.

    Raises:
        OSError: If something cannot be loaded.
        ValueError: If the file is no whole model, or does not fit the configuration.
    """
    header = read_model_header(model)
    folder = config_folder(header, model_config)
    index = _index("model_config", folder)
    name = _supported(str(index.get("_class_name")))
    parts = parts_in(header, name)
    lacking = [part for part in FAMILIES[name].needed_components(_listed(index)) if part not in parts]
    folder = config_folder(header, model_config, _networks(FAMILIES[name], lacking))
    _check_single_file(header, folder)
    # What the file gives is left out here, and loaded in its place.
    others = load_pipeline(str(folder), dtype, **dict.fromkeys(parts)).components
    components = {name: part for name, part in others.items() if name not in parts}
    if "safety_checker" in components:
        components["requires_safety_checker"] = False
    return read_parts(header, folder, name, components, _precision(dtype))


def describe_single_file(model: str, family: Family, model_config: str | None) -> SingleFile | None:
    """What more there is to say of a model that is one file; None for any other.

    Args:
        model: What the family was loaded from.
        family: The family.
        model_config: Folder or hub name of the pipeline that configures a file, if it is set.
    """
    if not is_single_file(model):
        return None
    header = read_header("model", model)
    parts = parts_in(header, type(family.pipeline).__name__)
    present = [name for name, part in family.pipeline.components.items() if part is not None]
    lacking = [name for name in _networks(type(family), present) if name not in parts]
    return SingleFile(model_config or default_config(header), lacking)


def _precision(dtype: torch.dtype | dict[str, torch.dtype]) -> dict[str, Any]:
    """The argument of ``from_pretrained`` for a precision, or for one of each component."""
    version = tuple(int(part) for part in diffusers.__version__.split(".")[:2])
    return {"dtype" if version >= (0, 42) else "torch_dtype": dtype}


def load_policy_init(source: str, base: Family, dtype: torch.dtype | None = None) -> Family | None:
    """The family of an already distilled model that a policy starts from.

    Of a pipeline only the network and the scheduler are read: encoders and decoder are the base's.

    Args:
        source: Folder or hub name of a pipeline or of a bare network; or an adapter.
        base: The teacher's family.
        dtype: Precision that the network is loaded in.

    Returns:
        The family; None if the source is an adapter.

    Raises:
        FileNotFoundError: If there is nothing there.
        OSError: If the hub does not give it.
        ValueError: If its network is of another kind than the base's.
    """
    if is_single_file(source):
        return _load_policy_file(source, base, dtype or torch.float32)
    index = configuration(source, "policy_init")
    if index is None:
        return None
    wanted: Any = type(base.network)
    listed = index.get(base.network_name)  # Of a pipeline: its library and its class.
    kind = listed[1] if isinstance(listed, list) else index.get("_class_name")
    if kind != wanted.__name__:
        raise ValueError(
            f"policy_init={source!r} is a {kind}, but the base's {base.network_name} is a {wanted.__name__}. Pass a "
            "pipeline with such a network, the network alone, or an adapter."
        )
    scheduler = None
    with one_line_errors("policy_init", source):
        if isinstance(listed, list):
            scheduler = getattr(diffusers, index["scheduler"][1]).from_pretrained(source, subfolder="scheduler")
        place = {"subfolder": base.network_name} if isinstance(listed, list) else {}
        variant = weights_variant("policy_init", Path(source), [place.get("subfolder", ".")])
        network = wanted.from_pretrained(
            source, use_safetensors=True, variant=variant, **place, **_precision(dtype or torch.float32)
        )
    asked: Any = base.network
    own, told = dict(network.config), dict(asked.config)
    for name in INTERFACE:
        if own.get(name) != told.get(name):
            raise ValueError(
                f"policy_init={source!r} is a {kind} with {name}={own.get(name)}, where the base's has "
                f"{told.get(name)}: it is made for another kind of model, and cannot be told what the base is told."
            )
    return base.with_network(network, scheduler)


def _load_policy_file(source: str, base: Family, dtype: torch.dtype) -> Family | None:
    """The family of a policy's start that is one file; None if that is an adapter."""
    if len(Path(source).parts) > 2 and not Path(source).exists():
        return None  # A file of an adapter on the hub.
    header = read_header("policy_init", source)
    if not header.is_whole_model:
        return None
    if header.predicts_v and base.prediction_type != "v_prediction":
        raise ValueError(
            f"policy_init={source!r} says that it predicts v, but the base's scheduler has {base.prediction_type!r}, "
            "and a file has no scheduler of its own. Pass the folder of a pipeline."
        )
    with TemporaryDirectory() as folder:
        return base.with_network(read_network(header, base.network, _precision(dtype), Path(folder)))


def configuration(source: str, setting: str) -> dict[str, Any] | None:
    """What a pipeline or a network says of itself; None for an adapter.

    Args:
        source: Folder, file or hub name.
        setting: What was set to it, for errors.

    Raises:
        FileNotFoundError: If it can be neither a folder nor a hub name.
        OSError: If the hub does not give it.
    """
    folder = Path(source)
    if folder.is_file() or source.endswith(".safetensors"):
        return None
    if not folder.is_dir():
        check_hub_name(setting, source)
        with one_line_errors(setting, source):
            folder = Path(snapshot_download(source, allow_patterns=["model_index.json", "config.json"]))
    for name in ("model_index.json", "config.json"):
        if (folder / name).is_file():
            found: dict[str, Any] = read_json(folder / name)
            return found
    return None


def _supported(name: str) -> str:
    """The class name of a pipeline, if a family supports it."""
    if name not in FAMILIES:
        raise ValueError(
            f"model is a {name}, which no family supports. Supported pipelines: {', '.join(sorted(FAMILIES))}. "
            "docs/add_a_family.md shows how to add one."
        )
    return name


def check_model_name(model: str, model_config: str | None = None) -> None:
    """Raise where a path can be seen not to hold a supported pipeline, before anything is loaded.

    Args:
        model: A folder, a file or a hub name.
        model_config: Folder or hub name of the pipeline that configures a file.

    Raises:
        FileNotFoundError: If something is not there.
        ValueError: If it is of a kind that no family supports.
    """
    if is_single_file(model):
        header = read_model_header(model)
        if model_config is not None and Path(model_config).is_dir():
            _check_single_file(header, Path(model_config))
        elif model_config is not None:
            check_hub_name("model_config", model_config)
        return
    folder = Path(model)
    if not folder.is_dir():
        check_hub_name("model", model)
        return
    index = _index("model", folder)
    family = FAMILIES[_supported(str(index.get("_class_name")))]
    _check_folders("model", folder, index, family.needed_components(_listed(index)))


def _check_single_file(header: Header, folder: Path) -> None:
    """Raise where a file and the folder of the pipeline that configures it do not make a whole pipeline together."""
    index = _index("model_config", folder)
    name = _supported(str(index.get("_class_name")))
    family, parts = FAMILIES[name], parts_in(header, name)
    needed = [part for part in family.needed_components(_listed(index)) if part not in parts]
    networks = _networks(family, needed)
    _check_folders("model_config", folder, index, [part for part in needed if part not in networks])
    lacking = [part for part in networks if not any((folder / part).glob("*.safetensors"))]
    if lacking:
        optional = "".join(
            f" To do without {part}, let its model_index.json say [null, null] for it and its tokenizer."
            for part in lacking
            if part in family.optional_components
        )
        raise FileNotFoundError(
            f"model={header.path!r} holds no {', '.join(lacking)}, and model_config={str(folder)!r} has no "
            f".safetensors weights of them either. Set model_config to a whole {name}.{optional}"
        )
    check_prediction(header, folder)


def _index(setting: str, folder: Path) -> dict[str, Any]:
    """The ``model_index.json`` of a folder."""
    file = folder / "model_index.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"{setting}={str(folder)!r} is a folder without model_index.json, so it is no diffusers pipeline. Pass the "
            "folder that save_pretrained() wrote."
        )
    index: dict[str, Any] = read_json(file)
    return index


def _check_folders(setting: str, folder: Path, index: Mapping[str, Any], parts: Iterable[str]) -> None:
    """Raise where a part of a pipeline is not listed, or has no folder."""
    listed = _listed(index)
    for name in parts:
        if name not in listed or not (folder / name).is_dir():
            raise FileNotFoundError(
                f"{setting}={str(folder)!r} has no {name!r} folder, but a {index['_class_name']} needs one. Save or "
                "download the whole pipeline."
            )


def _listed(index: Mapping[str, Any]) -> list[str]:
    """The parts that a ``model_index.json`` says the pipeline has."""
    return [name for name, part in index.items() if isinstance(part, list) and part[0] is not None]


def _networks(family: type[Family], needed: Iterable[str]) -> list[str]:
    """Those of a pipeline's parts that have weights."""
    return [name for name in needed if name in (family.network_name, family.decoder_name, *family.text_encoder_names)]


def weights_variant(setting: str, folder: Path, networks: Iterable[str]) -> str | None:
    """The variant, such as ``fp16``, of the weights in a folder, where they are not all there without one.

    Args:
        setting: What was set to the folder, for errors.
        folder: The folder; the hub is not looked into.
        networks: The networks' own folders in it; ``"."`` is the folder itself.

    Returns:
        The variant; None for weights without one.

    Raises:
        FileNotFoundError: If a network has no weights that can be loaded.
    """
    if not folder.is_dir():
        return None
    variants: set[str] = set()
    for name in networks:
        files = sorted(file.name for file in (folder / name).glob("*") if file.suffix in (".safetensors", ".bin"))
        matches = [match for file in files if (match := _WEIGHTS.fullmatch(file))]
        kinds = {match["variant"] or match["late_variant"] for match in matches}
        if None in kinds:
            continue
        if len(kinds) != 1:
            pickles = any(file.endswith(".bin") for file in files)
            advice = (
                "pickles, which may run code, are not read: convert them once with diffusers, "
                "from_pretrained(folder, use_safetensors=False).save_pretrained(new_folder)"
                if pickles
                else "download the whole model, with its .safetensors files"
            )
            raise FileNotFoundError(
                f"{setting}={str(folder)!r} has no weights for {name!r} in .safetensors files of one kind, only "
                f"{', '.join(files) or 'a configuration at most'}; {advice}."
            )
        variants |= kinds
    if len(variants) > 1:
        raise FileNotFoundError(
            f"{setting}={str(folder)!r} has networks in different variants alone: {', '.join(sorted(variants))}. "
            "Download one variant, or the weights without any, of all of them."
        )
    return variants.pop() if variants else None
