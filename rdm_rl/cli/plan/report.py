"""The plan of a run: its networks without weights, what each phase of it takes, and what would take less."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny
from torch import nn

from rdm_rl.cli.plan.memory import CARDS, GIB, OFFLOADED, Phase, Setup, fits, kept, phases
from rdm_rl.cli.plan.model_sizes import Blueprint
from rdm_rl.cli.plan.passes import Passes, encoded_prompts
from rdm_rl.cli.plan.skeleton import make_skeleton, read_blueprint
from rdm_rl.cli.train import TrainArguments, lora_config, make_rewards
from rdm_rl.families import Family, load_family
from rdm_rl.families.quantization import Quantization, quantized_size, quantized_weights, unpacked_size
from rdm_rl.families.resolution import Resolution, read_resolutions
from rdm_rl.families.single_file import is_single_file
from rdm_rl.networks.roles import ADAPTERS, Networks, Role, make_networks
from rdm_rl.networks.sharding import blocks
from rdm_rl.rewards.images import TinyDecoder
from rdm_rl.rewards.model import RewardModel
from rdm_rl.rewards.protocol import DirectionReward
from rdm_rl.rewards.registry import load_rewards, reward_weights
from rdm_rl.trainers.rdm_config import RDMConfig
from rdm_rl.trainers.setup import (
    DTYPES,
    check_adapter_pass,
    check_family_settings,
    check_quantization_settings,
    precision,
)

NOTE = (
    "An estimate from shapes alone. Its error is unknown: not yet measured on a GPU (benchmarks/gpu.md). Attention is\n"
    "counted as torch's fused kernels do it. Text encoders' and reward models' own activations are not counted."
)
# Bytes of optimiser state for each byte of trained weights; Adam's for what is not named here.
STATE = {"8bit": 0.5, "4bit": 0.25, "sgd": 0.0, "adafactor": 0.0}
# The remedy that is all others, but for more GPUs.
TOGETHER = "all of these without more GPUs"
# Where a reward's facts say how large its network is.
PARAMETERS = re.compile(r"([\d.,]+)( M)? parameters")


@dataclass(frozen=True, kw_only=True)
class Component:
    """One network of a run: its parameters, their type, and the bytes of parameters and buffers."""

    parameters: int
    precision: str
    size: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The memory of a run, in bytes.

    Args:
        title: What is planned, in a line.
        components: Its networks by name.
        kept: What stays on the GPU, by part.
        phases: Its phases.
        remedies: Peak with one thing changed, by what is changed, where that lowers it.
        activations: What one policy update keeps, without and with activation checkpointing.
        setup: Where things are.
        notes: What the reader must know of this plan.
    """

    title: str
    components: Mapping[str, Component]
    kept: Mapping[str, int]
    phases: Mapping[str, Phase]
    remedies: Mapping[str, int]
    activations: tuple[int, int]
    setup: Setup
    notes: Sequence[str] = ()

    @property
    def peak(self) -> int:
        """The largest peak of all phases."""
        return max(phase.peak for phase in self.phases.values())

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data, with the verdict for each card."""
        return {
            "title": self.title,
            "components": {name: asdict(component) for name, component in self.components.items()},
            "kept": dict(self.kept),
            "phases": {name: {**asdict(phase), "peak": phase.peak} for name, phase in self.phases.items()},
            "peak": self.peak,
            "fits": {f"{card} GB": fits(self.peak, card) for card in CARDS},
            "activations": dict(zip(("without_checkpointing", "with_checkpointing"), self.activations, strict=True)),
            "remedies": dict(self.remedies),
            "notes": [*self.notes, " ".join(NOTE.split())],
        }


def make_plan(model: str | Path | Blueprint, arguments: TrainArguments, args: RDMConfig, *, gpus: int = 1) -> Plan:
    """The memory of a run on one of its GPUs.

    Args:
        model: A built-in size, a folder, a hub name or a blueprint (see :mod:`rdm_rl.cli.plan.skeleton`).
        arguments: What is trained; its model and data set are not read.
        args: The settings.
        gpus: Processes, each with a GPU; they share the networks if ``args.shard``.

    Raises:
        FileNotFoundError: If the model does not exist.
        ValueError: If the settings do not suit the model.
    """
    check_quantization_settings(args, lora_config(arguments))
    check_adapter_pass(args, lora_config(arguments))
    rewards = load_rewards(make_rewards(arguments.reward_funcs, arguments.reward_options))
    networks = _networks(model, arguments, args, matches_distributions="rdm" in rewards)
    tiny = None
    if args.reward_decoder is not None:
        with torch.device("meta"):
            tiny = TinyDecoder(AutoencoderTiny.from_config(AutoencoderTiny.load_config(args.reward_decoder)))
    setup = Setup(
        checkpointing=args.gradient_checkpointing,
        offload=frozenset(args.offload) | ({"text_encoders"} if args.prompt_cache_dir else set()),
        caches_prompts=args.prompt_cache_dir is not None,
        shards=gpus if args.shard else 1,
        full=arguments.full,
        fused=any(word in _optimiser(args) for word in ("fused", "bit")),
        accumulates=args.gradient_accumulation_steps > 1,
    )
    # What is looked at first: checkpointing stays on once it is on.
    components = _components(networks, tiny, arguments.full, _stored(networks, args.base_quantization))
    parts = _parts(networks, tiny, rewards, args, args.base_quantization)
    smaller = _smaller_base(model, arguments, args, networks)
    lighter = parts if smaller is None else _parts(networks, tiny, rewards, args, smaller)
    passes, added, activations = _measure(Passes(networks, DTYPES[precision(args)], tiny), args, rewards)

    def peak(changed: Setup, parts: Mapping[str, int] = parts) -> int:
        return max(phase.peak for phase in phases(parts, passes, changed, added).values())

    peaks = {
        name: peak(change, lighter if name == TOGETHER else parts) for name, change in _changes(setup, args).items()
    }
    if smaller is not None:
        peaks[f"base_quantization: {smaller}"] = peak(setup, lighter)
    return Plan(
        title=_title(model, networks.family, arguments, args, gpus),
        components=components,
        kept=kept(parts, setup),
        phases=phases(parts, passes, setup, added),
        remedies={
            name: peaks[name] for name in sorted(peaks, key=peaks.__getitem__) if peaks[name] < 0.99 * peak(setup)
        },
        activations=activations,
        setup=setup,
        notes=_notes(arguments, args, rewards, gpus),
    )


def _notes(arguments: TrainArguments, args: RDMConfig, rewards: Mapping[str, Any], gpus: int) -> list[str]:
    """What the reader must know of a plan."""
    init, optimiser = arguments.policy_init, _optimiser(args)
    notes = []
    if init is not None and not _is_pipeline(init):
        notes.append(
            f"policy_init={init!r} is counted as an adapter of rank {arguments.lora_r}; a network adds its own size."
        )
    if arguments.teacher_adapter is not None:
        notes.append("teacher_adapter is not counted; an adapter of its rank is about as large as the policy's.")
    if args.shard and gpus == 1:
        notes.append("shard is on, but for one GPU; --gpus says for how many.")
    if "adam" not in optimiser and optimiser != "sgd":
        notes.append(f"optim={optimiser!r} is counted as {'sgd' if optimiser == 'adafactor' else 'Adam'} is.")
    for name, reward in rewards.items():
        if isinstance(reward, RewardModel) and reward.device is not None:
            notes.append(f"The reward {name} lives on {reward.device} and is not counted.")
        elif isinstance(reward, RewardModel) and not PARAMETERS.search(reward.info.memory):
            notes.append(f"The size of the reward {name} is not known.")
    return notes


def _optimiser(args: RDMConfig) -> str:
    return str(getattr(args.optim, "value", args.optim))


def _is_pipeline(folder: str) -> bool:
    return (Path(folder) / "model_index.json").is_file()


def _networks(
    model: str | Path | Blueprint, arguments: TrainArguments, args: RDMConfig, *, matches_distributions: bool
) -> Networks:
    """The three roles as the trainer makes them, on the meta device."""
    loaded = torch.float32 if arguments.full else DTYPES[precision(args)]  # As load_networks reads them.

    largest = max(read_resolutions(args.resolution), key=lambda size: size.height * size.width, default=None)

    def family_of(source: str | Path | Blueprint) -> Family:
        family = load_family(make_skeleton(read_blueprint(source, args.model_config), loaded), resolution=largest)
        family.border = lambda: "not compared"  # type: ignore[method-assign]  # There are no weights to compare.
        return family

    family = family_of(model)
    teacher = None if arguments.teacher is None else family_of(arguments.teacher)
    if arguments.policy_init is not None and _is_pipeline(arguments.policy_init):
        family, teacher = family_of(arguments.policy_init), teacher or family
    families = [family] if teacher is None else [family, teacher]
    check_family_settings(args, families, matches_distributions=matches_distributions)
    meta, generator = torch.device("meta"), torch.Generator()
    with meta:  # Where PEFT makes its adapters, too.
        return make_networks(
            *(family, teacher, lora_config(arguments)),
            device=meta,
            dtype=DTYPES[precision(args)],
            generator=generator,
            adapter_pass=args.adapter_pass,
        )


def _smaller_base(
    model: str | Path | Blueprint, arguments: TrainArguments, args: RDMConfig, networks: Networks
) -> Quantization | None:
    """The ``base_quantization`` that takes less than the run's, if there is one and the run can have it."""
    whole = arguments.policy_init is not None and _is_pipeline(arguments.policy_init)
    one_file = any(is_single_file(str(each)) for each in (model, arguments.teacher))
    families = (networks.family, networks.teacher_family)
    if args.shard or arguments.full or whole or one_file or not all(family.loads_lora for family in families):
        return None
    if args.adapter_pass == "added" or args.base_quantization == "nf4":
        return None
    return "int8" if args.base_quantization is None else "nf4"


def _stored(networks: Networks, kind: Quantization | None) -> dict[int, int]:
    """The bytes, by id, of the weights that a ``base_quantization`` stores in fewer bits."""
    if kind is None:
        return {}
    families = dict.fromkeys((networks.family, networks.teacher_family))
    modules = [module for family in families for module in (family.network, *family.text_encoders)]
    weights = (weight for module in modules for weight in quantized_weights(module))
    return {id(weight): quantized_size(weight, kind) for weight in weights}


def _unpacked(networks: Networks, kind: Quantization | None) -> int:
    """What putting the largest of these weights back takes."""
    if kind is None:
        return 0
    weights = quantized_weights(networks.module("policy"))
    return max((unpacked_size(weight, kind) for weight in weights), default=0)


def _bytes(*sources: nn.Module | Iterable[torch.Tensor] | None, stored: Mapping[int, int] = {}) -> int:
    """The size of tensors, and of modules' parameters and buffers, each counted once; of some it is given by id."""
    tensors: dict[int, torch.Tensor] = {}
    for source in sources:
        whole = (*source.parameters(), *source.buffers()) if isinstance(source, nn.Module) else source or ()
        tensors |= {id(tensor): tensor for tensor in whole}
    return sum(stored.get(number, tensor.numel() * tensor.element_size()) for number, tensor in tensors.items())


def _components(
    networks: Networks, tiny: TinyDecoder | None, full: bool, stored: Mapping[int, int]
) -> dict[str, Component]:
    """Each network of a run, adapters apart from what they sit on."""
    trained = {id(parameter) for parameter in networks.adapters}

    def component(*parameters: torch.Tensor, buffers: Iterable[torch.Tensor] = ()) -> Component:
        precision = str(parameters[0].dtype).removeprefix("torch.") if parameters else ""
        if any(id(parameter) in stored for parameter in parameters):
            precision = "quantised"
        count = sum(parameter.numel() for parameter in parameters)
        return Component(parameters=count, precision=precision, size=_bytes(parameters, buffers, stored=stored))

    modules: dict[str, Any] = {}
    for label, family in ((" of the teacher", networks.teacher_family), ("", networks.family)):
        if not label or family is not networks.family:
            names = (family.network_name, family.decoder_name, *family.text_encoder_names)
            modules |= {name + label: getattr(family.pipeline, name, None) for name in names if name is not None}
    modules["reward decoder"] = None if tiny is None else tiny.network
    components = {
        name: component(
            *(weight for weight in module.parameters() if id(weight) not in trained), buffers=module.buffers()
        )
        for name, module in modules.items()
        if module is not None
    }
    label = "copy for the" if full else "adapter of the"
    return components | {
        f"{label} {role.replace('_', ' ')}": component(*networks.parameters(role)) for role in ADAPTERS
    }


def _parts(
    networks: Networks,
    tiny: TinyDecoder | None,
    rewards: Mapping[str, Any],
    args: RDMConfig,
    kind: Quantization | None,
) -> dict[str, int]:
    """What a run keeps with a kind of ``base_quantization``, by part, before anything is cut or offloaded."""
    stored = _stored(networks, kind)
    families = (networks.family, networks.teacher_family)
    policy, fake_score = (_bytes(networks.parameters(role)) for role in ADAPTERS)
    roles = [networks.module(role) for role in ADAPTERS]
    updated = policy + (fake_score if args.fake_score_updates_per_policy_update else 0)
    state = next((size for word, size in STATE.items() if word in _optimiser(args)), 2.0)
    return {
        "frozen networks": _bytes(*(family.network for family in families), *roles, stored=stored)
        - policy
        - fake_score,
        "a weight put back": _unpacked(networks, kind),
        "policy": policy,
        "fake score": fake_score,
        "optimiser state": int(updated * state),
        "averaged policy": policy * (int(args.ema_decay > 0) + int(args.beta > 0)),
        "gathered blocks": _gathered(networks),
        "decoder": _bytes(*(family.decoder for family in families), None if tiny is None else tiny.network),
        "text encoders": _bytes(*(encoder for family in families for encoder in family.text_encoders), stored=stored),
        "reward models": sum(map(_reward_size, rewards.values())),
        "recorded rollouts": _records(networks.family, args, len(rewards)),
    }


def _gathered(networks: Networks) -> int:
    """What FSDP holds whole at once: the outermost weights, the largest block, and the next one."""
    network = networks.module("policy")
    seen = {id(parameter) for parameter in networks.adapters}  # Never cut.
    sizes = []
    for unit in (*blocks(network), network):  # Inner ones come first, and are gathered by themselves.
        parameters = {id(parameter): parameter for parameter in unit.parameters() if id(parameter) not in seen}
        sizes.append(_bytes(parameters.values()))
        seen |= parameters.keys()
    *inner, outermost = sizes
    return min(outermost + 2 * max(inner, default=0), sum(sizes))


def _reward_size(reward: Any) -> int:
    """A reward's network, if it lives on the GPU, by the parameter count that its facts give."""
    if not isinstance(reward, RewardModel) or reward.device is not None:
        return 0
    text = PARAMETERS.search(reward.info.memory)
    count = float(text[1].replace(",", "")) * (1e6 if text[2] else 1) if text else 0
    return int(count * reward.dtype.itemsize)


def _records(family: Family, args: RDMConfig, rewards: int) -> int:
    """Recorded rollouts (states, predictions, encoded prompts), directions, and the images that rewards look at."""
    channels, height, width = family.latent_shape
    latent: int = 4 * channels * height * width
    pixels = 4 * 3 * height * width * family.pixels_per_latent**2
    recorded = 1 if args.random_times else args.num_inference_steps
    sample = (2 * recorded + rewards * args.num_replayed_steps) * latent
    sample += _bytes(encoded_prompts(family, 1).tensors.values())
    # The last rollouts are let go when the new ones are there.
    count: int = args.per_device_train_batch_size
    walk = 2 * (args.random_times or 0) * latent  # One batch's, of which the last step is kept.
    return count * (2 * int(args.gradient_accumulation_steps) * sample + walk + pixels)


def _measure(
    passes: Passes, args: RDMConfig, rewards: Mapping[str, Any]
) -> tuple[dict[str, tuple[int, int]], dict[str, tuple[int, int]], tuple[int, int]]:
    """What each phase takes, what gradients add to an update, and what it keeps: all without and with checkpointing."""
    networks = passes.networks
    count: int = args.per_device_train_batch_size
    scale = args.teacher_guidance_scale
    scale = networks.teacher_family.teacher_guidance_scale if scale is None else scale

    def samples(role: Role, guidance: float, count: int = count) -> int:
        family = networks.family_of(role)
        twice = guidance > 1 and family.has_guidance and not family.embeds_guidance(networks.module(role))
        return 2 * count if twice else count

    plain = {name: reward for name, reward in rewards.items() if not isinstance(reward, DirectionReward)}
    weights = reward_weights(list(rewards), args.reward_weights)
    sees_images = any(getattr(reward, "inputs", "images") == "images" for reward in plain.values())
    pulls = args.reward_gradient == "pathwise" and any(
        getattr(reward, "differentiable", False) and weights[name] for name, reward in plain.items()
    )
    policy, teacher = samples("policy", args.guidance_scale), samples("teacher", scale)
    evaluated: int = args.per_device_eval_batch_size
    decoded, shown = (min(size, args.decode_batch_size) for size in (count, evaluated))
    fixed = {
        "rollout": passes.forward("policy", policy),
        "teacher and fake score": max(passes.forward("teacher", teacher), passes.forward("fake_score", count)),
    }
    if sees_images:
        fixed["reward images"] = passes.decode(decoded, gradient=False)
    if args.eval_strategy != "no" or args.eval_on_start:
        fixed["evaluation"] = max(
            passes.decode(shown, gradient=False),
            passes.forward("policy", samples("policy", args.guidance_scale, evaluated)),
            passes.forward("teacher", samples("teacher", scale, evaluated)),
        )

    def updates() -> tuple[int, dict[str, int], dict[str, int]]:
        activations, *update = passes.update("policy", policy)
        found = {"policy update": update}
        if args.fake_score_updates_per_policy_update:
            # On the same layers and as many samples, one update is as the other.
            alike = networks.teacher_family is networks.family and policy == count
            found["fake-score update"] = update if alike else [*passes.update("fake_score", count)[1:]]
        sizes, added = ({name: figures[index] for name, figures in found.items()} for index in (0, 1))
        if args.num_replayed_steps > 1:
            del added["policy update"]  # Several steps add up as micro-batches do.
        if sees_images and pulls:
            sizes["reward gradient"] = passes.decode(decoded, gradient=True)
        return activations, sizes, added

    kept, plain_sizes, plain_added = updates()
    passes.enable_checkpointing()
    kept_with_checkpointing, sizes, added = updates()
    both = _pairs(fixed, fixed) | _pairs(plain_sizes, sizes)
    return both, _pairs(plain_added, added), (kept, kept_with_checkpointing)


def _pairs(first: Mapping[str, int], second: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """Two figures of each name."""
    return {name: (first[name], second[name]) for name in first}


def _changes(setup: Setup, args: RDMConfig) -> dict[str, Setup]:
    """What a user may try, as the setting and the setup that it makes."""
    batch = _smaller_batch(setup, args.num_generations / args.per_device_train_batch_size)
    decoded = 1 / min(args.decode_batch_size, args.per_device_train_batch_size)
    away: set[str] = {"text_encoders", "rewards"} | ({"teacher"} if setup.full else set())
    changes: dict[str, dict[str, Any]] = {
        "activation_checkpointing: true": {"checkpointing": True},
        "prompt_cache_dir: FOLDER": {"offload": setup.offload | {"text_encoders"}, "caches_prompts": True},
        f"per_device_train_batch_size: {args.num_generations} (and more gradient_accumulation_steps)": batch,
    }
    # Groups of at least two. With it the batch is one group.
    if (fewer := args.num_generations // 2) > 1:
        name = f"num_generations: {fewer}, per_device_train_batch_size: {fewer} (more accumulation)"
        changes[name] = _smaller_batch(setup, fewer / args.per_device_train_batch_size)
    changes |= {
        "decode_batch_size: 1": {"decoded": decoded},
        "offload: [rewards]": {"offload": setup.offload | {"rewards"}},
    }
    if setup.full:
        changes["offload: [teacher]"] = {"offload": setup.offload | {"teacher"}}
    together = {name: value for change in changes.values() for name, value in change.items()}
    changes[TOGETHER] = {**together, "offload": setup.offload | away}
    if args.base_quantization is None and args.adapter_pass != "added":  # Neither can be cut.
        changes |= {f"shard: true, on {count} GPUs": {"shards": count} for count in (2, 4, 8) if count > setup.shards}
    return {name: replace(setup, **change) for name, change in changes.items()}


def _smaller_batch(setup: Setup, share: float) -> dict[str, Any]:
    """So much of a batch at once, and the rest in more micro-batches."""
    return {"batch": min(1.0, share), "accumulates": setup.accumulates or share < 1}


def _title(model: str | Path | Blueprint, family: Family, arguments: TrainArguments, args: RDMConfig, gpus: int) -> str:
    size = Resolution(*(side * family.pixels_per_latent for side in family.latent_shape[1:]))
    count = len(read_resolutions(args.resolution))
    several = f" (the largest of {count})" if count > 1 else ""
    trained = "two full copies" if arguments.full else f"adapters of rank {arguments.lora_r}"
    name = "a model of its own" if isinstance(model, dict) else str(model)
    shared = f", {gpus} GPUs" + (" that share the networks" if args.shard else "") if gpus > 1 else ""
    return (
        f"{name} ({type(family.pipeline).__name__}), images of {size.width}x{size.height}{several}, {trained}, "
        f"{str(DTYPES[precision(args)]).removeprefix('torch.')}, {args.per_device_train_batch_size} samples at once, "
        f"{args.num_inference_steps} steps{shared}"
    )


def format_plan(plan: Plan) -> str:
    """The plan as text, in lines of at most 120 characters, but for long names."""
    away = {OFFLOADED[name] for name in plan.setup.offload}
    without, within = (value / GIB for value in plan.activations)
    lines = [plan.title, NOTE, "", f"{'network':34} {'parameters':>12}  {'precision':9} {'GiB':>8}"]
    lines += [
        f"{name:34} {component.parameters / 1e6:10,.2f} M  {component.precision:9} {component.size / GIB:8.2f}"
        for name, component in plan.components.items()
    ]
    lines += ["", f"{'kept on the GPU':34} {'GiB':>8}"]
    lines += [
        f"{name:34} {size / GIB:8.2f}{'  (only while it is used)' if name in away else ''}"
        for name, size in plan.kept.items()
        if size
    ]
    lines += ["", f"{'phase':34} {'kept':>8} {'working':>8} {'peak GiB':>8}"]
    lines += [
        f"{name:34} {phase.stays / GIB:8.2f} {phase.working / GIB:8.2f} {phase.peak / GIB:8.2f}"
        + (" <- the most" if phase.peak == plan.peak else "")
        for name, phase in plan.phases.items()
    ]
    lines += [
        "",
        f"Activations of one policy update: {without:.2f} GiB, with activation_checkpointing {within:.2f} GiB "
        f"(it is {'on' if plan.setup.checkpointing else 'off'}).",
        "Fits: " + ", ".join(f"{card} GB {'yes' if fits(plan.peak, card) else 'NO'}" for card in CARDS),
    ]
    remedies = {name: peak for name, peak in plan.remedies.items() if f"{peak / GIB:.2f}" != f"{plan.peak / GIB:.2f}"}
    if remedies:
        lines += ["", f"{'what lowers the peak':74} {'peak GiB':>8}  fits from"]
        for name, peak in remedies.items():
            card = next((f"{card} GB" for card in CARDS if fits(peak, card)), "-")
            lines.append(f"{name:74} {peak / GIB:8.2f}  {card}")
    return "\n".join([*lines, *(f"\nNote: {note}" for note in plan.notes)])
