"""From names of models to the three roles of a run, on its device."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from torch import nn

from rdm_rl.families import Family, check_model_name, load_family, load_policy_init
from rdm_rl.families.encoding import PromptCache
from rdm_rl.families.hub import adapter_file, check_hub_name
from rdm_rl.families.loading import describe_single_file
from rdm_rl.families.quantization import check_quantization, single_file_error
from rdm_rl.families.resolution import Resolution, read_resolutions
from rdm_rl.families.single_file import SingleFile, is_single_file, read_header
from rdm_rl.files import cache_key, fingerprint
from rdm_rl.networks.roles import Networks, make_networks
from rdm_rl.policy import suits
from rdm_rl.randomness import seeded_generator
from rdm_rl.trainers.rdm_config import RDMConfig

Model: TypeAlias = str | Path | DiffusionPipeline
Precision: TypeAlias = Literal["bf16", "fp16", "no"]
DTYPES: dict[Precision, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16, "no": torch.float32}


class LoadedModels(NamedTuple):
    """The roles of a run, and where they come from.

    Args:
        networks: The roles.
        name: Name of the model that the policy started from.
        is_pipeline: Whether that is a pipeline which a saved adapter can belong to.
        sources: Other models that went into it, for the model card.
        single_file: What more there is to say of a model that is one file; None for any other.
    """

    networks: Networks
    name: str
    is_pipeline: bool
    sources: dict[str, str]
    single_file: SingleFile | None


def precision(args: RDMConfig) -> Precision:
    """What networks run in, by accelerate's name; :data:`DTYPES` has torch's."""
    return "bf16" if args.bf16 else "fp16" if args.fp16 else "no"


def teacher_fingerprint(networks: Networks, args: RDMConfig, decoder: nn.Module | None = None) -> str:
    """A short name for what the teacher is made of; it reads all weights, so it is asked for once.

    Args:
        networks: The roles of the run. Prompts come from the student's family, or are the teacher's own.
        args: The run's settings.
        decoder: What makes images of the teacher's latents, if that is kept.

    Returns:
        16 hexadecimal digits.
    """
    families = _teacher_families(networks)
    return cache_key(
        {"teacher": networks.module("teacher"), "decoder": decoder},
        prompts=[family.encoder_fingerprint() for family in families],
        prediction_type=families[0].prediction_type,
        precision=precision(args),
    )


def teacher_key(teacher: str, networks: Networks, resolution: Resolution | None, **settings: object) -> str:
    """The name under which what the teacher makes is kept: that of another teacher or setting has another one.

    Args:
        teacher: The teacher's :func:`teacher_fingerprint`.
        networks: The roles of the run. Noise comes from the student's family.
        resolution: Size of the images; None is the model's own.
        settings: How the teacher is sampled: its steps, its guidance, the time it starts from, the noise.

    Returns:
        16 hexadecimal digits.
    """
    families = _teacher_families(networks)
    sized = families if resolution is None else [family.at(resolution) for family in families]
    schedules = [family.schedule for family in sized]
    return fingerprint(None, teacher=teacher, schedules=schedules, shape=sized[0].latent_shape, **settings)


def _teacher_families(networks: Networks) -> list[Family]:
    """The teacher's family, and the student's if it is another: often one, whose encoders are large."""
    return [*dict.fromkeys((networks.teacher_family, networks.family))]


def check_models(
    args: RDMConfig,
    model: Model,
    teacher: Model | None,
    teacher_adapter: str | Path | None,
    policy_init: str | Path | None,
    peft_config: LoraConfig | None,
) -> None:
    """Raise where a model's name or what is asked of it can be seen not to work, before anything is loaded.

    Args:
        args: The settings.
        model: The pipeline.
        teacher: A separate teacher.
        teacher_adapter: An adapter that only the teacher has.
        policy_init: What the policy starts from.
        peft_config: The adapters; None trains full copies.

    Raises:
        ValueError: If settings cannot work together.
        FileNotFoundError: If a folder does not exist.
    """
    names = [str(source) for source in (model, teacher) if isinstance(source, str | Path)]
    for name in names:
        check_model_name(name, args.model_config)
    if args.model_config is not None and not any(map(is_single_file, names)):
        raise ValueError(
            f"model_config={args.model_config!r} configures a model in one .safetensors file, but neither model nor "
            "teacher is one. Leave it out."
        )
    _check_quantization(args, (model, teacher), peft_config)
    check_adapter_pass(args, peft_config)
    for setting, source in (("teacher_adapter", teacher_adapter), ("policy_init", policy_init)):
        if source is None:
            continue
        if Path(source).is_file():
            if read_header(setting, str(source)).is_whole_model and setting == "teacher_adapter":
                raise ValueError(f"teacher_adapter={str(source)!r} is a whole model. Pass it as teacher.")
            continue
        folder = Path(source)
        if not folder.is_dir():
            check_hub_name(setting, adapter_file(str(source))[0])
        elif not any((folder / name).is_file() for name in ("model_index.json", "config.json")):
            try:
                adapter_file(str(source))
            except FileNotFoundError as error:
                raise FileNotFoundError(f"{setting}={error}") from None
    if policy_init is not None and args.warm_start != "none":
        raise ValueError(
            f"policy_init={str(policy_init)!r} starts the policy from a student that is already distilled, but "
            "warm_start='ode' would teach it anew. Set warm_start='none'."
        )
    if policy_init is None and args.policy_init_scale != 1:
        raise ValueError(
            f"policy_init_scale={args.policy_init_scale:g} scales the LoRA that policy_init names, but policy_init is "
            "not set. Set it, or leave policy_init_scale out."
        )
    if policy_init is not None and _is_network(policy_init):
        _check_network_start(args, policy_init)
    if "teacher" in args.offload and peft_config is not None:
        raise ValueError(
            "offload has 'teacher', but with adapters the teacher is the network that policy or fake score run on: "
            "there is nothing to move. Leave it out, or train full copies with peft_config=None."
        )
    if "teacher" in args.offload and args.shard:
        raise ValueError(
            "offload has 'teacher', but with shard=True each process holds only its part of the teacher. Leave one out."
        )


def _check_quantization(args: RDMConfig, models: Sequence[Model | None], peft_config: LoraConfig | None) -> None:
    """Raise where ``base_quantization`` does not go with the rest of a run."""
    kind = args.base_quantization
    if kind is None:
        return
    check_quantization_settings(args, peft_config)
    if any(isinstance(model, DiffusionPipeline) for model in models):
        raise ValueError(
            f"base_quantization={kind!r} acts while a model is loaded, but model or teacher is a loaded pipeline. Pass "
            "its name or folder, or load it with diffusers' PipelineQuantizationConfig and leave base_quantization out."
        )
    for model in models:
        if isinstance(model, str | Path) and is_single_file(str(model)):
            raise single_file_error(kind, str(model))
    check_quantization(kind, on_gpu=torch.cuda.is_available() and not args.use_cpu)


def check_quantization_settings(args: RDMConfig, peft_config: LoraConfig | None) -> None:
    """Raise where ``base_quantization`` does not go with how the networks are trained.

    Args:
        args: The settings.
        peft_config: The adapters; None trains full copies.

    Raises:
        ValueError: If it does not.
    """
    if args.base_quantization is None:
        return
    setting = f"base_quantization={args.base_quantization!r}"
    if peft_config is None:
        raise ValueError(
            f"{setting} stores weights that cannot be trained, but without a peft_config (--full) all weights are. "
            "Pass a LoraConfig, or leave base_quantization out."
        )
    if args.shard:
        raise ValueError(f"{setting} stores weights that shard=True cannot cut. Leave one of the two out.")


def check_adapter_pass(args: RDMConfig, peft_config: LoraConfig | None) -> None:
    """Raise where adapters cannot be added to the weights.

    Args:
        args: The settings.
        peft_config: The adapters; None trains full copies.

    Raises:
        ValueError: If ``adapter_pass`` says so, and there are none or the weights are not whole ones in float32.
    """
    reasons = {
        "without a peft_config (--full) there are no adapters": peft_config is None,
        f"{precision(args)}=True would round the adapters off": args.bf16 or args.fp16,
        "base_quantization stores the weights otherwise": args.base_quantization is not None,
        "shard=True leaves each process a part of them": args.shard,
    }
    for reason, holds in reasons.items():
        if args.adapter_pass == "added" and holds:
            raise ValueError(
                f"adapter_pass='added' adds adapters to whole weights in float32, but {reason}. Set 'beside'."
            )


def _check_network_start(args: RDMConfig, policy_init: str | Path | None) -> None:
    """Raise where a setting does not go with a policy that starts from a whole network."""
    start = f"policy_init={str(policy_init)!r} is a whole network"
    if args.base_quantization is not None:
        raise ValueError(
            f"base_quantization={args.base_quantization!r} is for a base under adapters, but {start}, whose student is "
            "saved whole. Pass an adapter as policy_init, or leave base_quantization out."
        )
    if args.policy_init_scale != 1:
        raise ValueError(
            f"policy_init_scale={args.policy_init_scale:g} scales a LoRA, but {start}. Pass a LoRA as policy_init, or "
            "leave policy_init_scale out."
        )


def _is_network(policy_init: str | Path) -> bool:
    """Whether what a policy starts from can be seen to be a network: one on the hub is looked at when it is loaded."""
    if Path(policy_init).is_file():
        return read_header("policy_init", str(policy_init)).is_whole_model
    return any((Path(policy_init) / name).is_file() for name in ("model_index.json", "config.json"))


def load_networks(
    args: RDMConfig,
    model: Model,
    teacher: Model | None,
    teacher_adapter: str | Path | None,
    policy_init: str | Path | None,
    peft_config: LoraConfig | None,
    *,
    matches_distributions: bool,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> LoadedModels:
    """Load the models of a run and make its roles.

    Args:
        args: The settings.
        model: The pipeline.
        teacher: A separate teacher, or None.
        teacher_adapter: An adapter that only the teacher has, or None.
        policy_init: What the policy starts from, or None.
        peft_config: The adapters; None trains full copies.
        matches_distributions: Whether ``"rdm"`` is among the rewards.
        device: Where everything goes.
        autocast: Makes the context in which networks run.

    Returns:
        The networks, and where they come from.

    Raises:
        ValueError: If the models and settings cannot work together.
        OSError: If a model cannot be loaded.
    """
    dtype = DTYPES[precision(args)]
    # Full copies are trained in float32, so they are read in it.
    options: dict[str, Any] = {
        "dtype": dtype if peft_config else torch.float32,
        "resolution": next(iter(read_resolutions(args.resolution)), None),
        "model_config": args.model_config,
        "quantization": args.base_quantization,
    }
    family = load_family(model, **options)
    teacher_family = None if teacher is None else load_family(teacher, **options)
    name, adapter = _name(model), policy_init
    student = None if policy_init is None else load_policy_init(str(policy_init), family, options["dtype"])
    if student is not None:
        _check_network_start(args, policy_init)
    if student is not None:
        family, teacher_family = student, teacher_family or family
        name, adapter = str(policy_init), None
    families = [loaded for loaded in (family, teacher_family) if loaded is not None]
    check_family_settings(args, families, matches_distributions=matches_distributions)
    for loaded in families:
        loaded.offloads_text_encoders = "text_encoders" in args.offload or args.prompt_cache_dir is not None
    networks = make_networks(
        family,
        teacher_family,
        peft_config,
        device=device,
        dtype=dtype,
        generator=seeded_generator(args.seed, "adapters"),
        autocast=autocast,
        policy_init=None if adapter is None else str(adapter),
        policy_init_scale=args.policy_init_scale,
        teacher_adapter=None if teacher_adapter is None else str(teacher_adapter),
        adapter_pass=args.adapter_pass,
        sharded=args.shard,
    )
    if "teacher" in args.offload:
        networks.offload_teacher(device)
    for loaded in families:
        if args.prompt_cache_dir is not None and loaded.text_encoders:
            loaded.prompt_cache = PromptCache(args.prompt_cache_dir, loaded.encoder_fingerprint())
    if args.gradient_checkpointing:
        networks.enable_activation_checkpointing()
        family.enable_decoder_checkpointing()
    others = {"teacher": teacher, "teacher_adapter": teacher_adapter, "policy_init": adapter}
    if student is not None and teacher is None:
        others["teacher"] = model
    sources = {setting: _name(source) for setting, source in others.items() if source is not None}
    single_file = None
    if student is None and isinstance(model, str | Path):
        single_file = describe_single_file(str(model), family, args.model_config)
    return LoadedModels(networks, name, is_pipeline=student is None, sources=sources, single_file=single_file)


def _name(source: Model) -> str:
    """What a model is called."""
    return str(source) if isinstance(source, str | Path) else str(source.name_or_path or "the base model")


def check_family_settings(args: RDMConfig, families: list[Family], *, matches_distributions: bool) -> None:
    """Raise where a setting is not made for a family.

    Args:
        args: The settings.
        families: The student's, and the teacher's if it is another.
        matches_distributions: Whether ``"rdm"`` is among the rewards.

    Raises:
        ValueError: If one is not.
    """
    family, teacher = families[0], families[-1]
    if not suits(args.sampler, family.schedule):
        raise ValueError(
            f"sampler={args.sampler!r} is not made for this model's noise schedule. Use 'renoise' with any model, "
            "'ddim' with a variance-preserving one, 'flow_sde' or 'cps' with a flow."
        )
    family.student_times(args.num_inference_steps, args.sampler)  # Which the number of steps may not suit.
    for setting, scale, guided in (
        ("guidance_scale", args.guidance_scale, family),
        ("teacher_guidance_scale", args.teacher_guidance_scale, teacher),
    ):
        if (scale or 0.0) > 1 and not guided.has_guidance:
            raise ValueError(
                f"{setting}={scale} is set, but a {type(guided.pipeline).__name__} of this kind has no guidance. Set "
                "1, or leave it out."
            )
    if args.guidance_scale <= 1 or family.embeds_guidance(family.network):
        return
    if matches_distributions:
        raise ValueError(
            f"guidance_scale={args.guidance_scale} gives the policy guidance of its own, but with 'rdm' it takes over "
            "the teacher's (teacher_guidance_scale). Set guidance_scale=1, or leave out 'rdm'."
        )
    if args.warm_start != "none":
        raise ValueError(
            f"guidance_scale={args.guidance_scale} asks the policy with guidance, but the warm start teaches it to "
            "do without. Set guidance_scale=1, or warm_start='none'."
        )
