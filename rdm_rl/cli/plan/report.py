"""``rdm-rl plan``: the memory of a run, from configurations and shapes alone."""

import argparse
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny
from peft import LoraConfig
from torch import nn

from rdm_rl.cli.parser import SettingsParser
from rdm_rl.cli.plan.activations import Pass, Rehearsal, conditioning_of
from rdm_rl.cli.plan.memory import CARDS, GIB, OFFLOADED, Phase, Settings, Sizes, fits, kept, phases
from rdm_rl.cli.plan.model_sizes import MODELS, Blueprint
from rdm_rl.cli.plan.skeleton import make_skeleton, read_blueprint
from rdm_rl.cli.train import TrainArguments, lora_config, make_rewards
from rdm_rl.demo.data import TEACHER_FOLDER
from rdm_rl.families import Family, load_family
from rdm_rl.networks.roles import ADAPTERS, Networks, Role, make_networks
from rdm_rl.networks.sharding import blocks
from rdm_rl.rewards.images import TinyDecoder
from rdm_rl.rewards.model import RewardModel
from rdm_rl.rewards.protocol import DirectionReward
from rdm_rl.rewards.registry import load_rewards, reward_weights
from rdm_rl.trainers.rdm_config import RDMConfig
from rdm_rl.trainers.setup import DTYPES, check_family_settings, precision

NOTE = (
    "An estimate from shapes alone. Its error is unknown: not yet measured on a GPU (benchmarks/gpu.md). Attention is\n"
    "counted as torch's fused kernels do it. Text encoders' and reward models' own activations are not counted."
)


@dataclass(frozen=True, kw_only=True)
class Component:
    """One network of a run.

    Args:
        parameters: Its parameters.
        precision: Their type.
        size: Bytes of parameters and buffers.
    """

    parameters: int
    precision: str
    size: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The memory of a run.

    Args:
        title: What is planned, in a line.
        components: Its networks by name.
        sizes: What it keeps.
        settings: Where things are.
        working: Working memory by phase, as configured.
        remedies: Peak in bytes with one thing changed, by what is changed.
        activations: Activations that one policy update keeps, without and with activation checkpointing.
        checkpointing: Whether checkpointing is on.
        notes: What the reader must know of this plan.
    """

    title: str
    components: Mapping[str, Component]
    sizes: Sizes
    settings: Settings
    working: Mapping[str, int]
    remedies: Mapping[str, int]
    activations: tuple[int, int]
    checkpointing: bool
    notes: Sequence[str] = ()

    @property
    def phases(self) -> dict[str, Phase]:
        """The phases of the run."""
        return phases(self.sizes, self.settings, self.working)

    @property
    def peak(self) -> int:
        """The largest peak of all phases, in bytes."""
        return max(phase.peak for phase in self.phases.values())

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data, in bytes, with the verdict for each card."""
        return {
            "title": self.title,
            "components": {name: asdict(one) for name, one in self.components.items()},
            "kept": kept(self.sizes, self.settings),
            "phases": {name: {**asdict(one), "peak": one.peak} for name, one in self.phases.items()},
            "peak": self.peak,
            "fits": {f"{card} GB": fits(self.peak, card) for card in CARDS},
            "activations": {"without_checkpointing": self.activations[0], "with_checkpointing": self.activations[1]},
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

    Returns:
        The plan.

    Raises:
        FileNotFoundError: If the model does not exist.
        ValueError: If the settings do not suit the model.
    """
    notes: list[str] = []
    rewards = _rewards(arguments, args)
    peft_config = lora_config(arguments)
    networks = _networks(model, arguments, args, peft_config, matches_distributions="rdm" in rewards, notes=notes)
    family, teacher = networks.family, networks.teacher_family
    dtype = DTYPES[precision(args)]
    tiny = None if args.reward_decoder is None else _tiny_decoder(args.reward_decoder)
    components = _components(networks, tiny, peft_config is None)
    reward_sizes = _reward_sizes(rewards, notes)
    families = list({id(one): one for one in (family, teacher)}.values())
    policy, fake_score = (_bytes(networks.parameters(role)) for role in ADAPTERS)
    if args.shard and gpus == 1:
        notes.append("shard is on, but for one GPU; --gpus says for how many.")
    trained_fake_score = args.fake_score_updates_per_policy_update > 0
    sizes = Sizes(
        frozen=_bytes(_tensors(*(one.network for one in families), *(networks.module(role) for role in ADAPTERS)))
        - policy
        - fake_score,
        policy=policy,
        fake_score=fake_score,
        gathered=_gathered(networks, full=peft_config is None),
        decoder=_bytes(_tensors(*(one.decoder for one in families), tiny)),
        text_encoders=_bytes(_tensors(*(encoder for one in families for encoder in one.text_encoders))),
        rewards=sum(reward_sizes.values()),
        records=_records(networks, args, len(rewards)),
    )
    state, fused = _optimiser(args.optim, notes)
    offload = {*args.offload} | ({"text_encoders"} if args.prompt_cache_dir else set())
    settings = Settings(
        full=peft_config is None,
        shards=gpus if args.shard else 1,
        offload=frozenset(offload),
        state=state,
        fused=fused,
        averages=int(args.ema_decay > 0) + int(args.beta > 0),
        trains_fake_score=trained_fake_score,
        caches_prompts=args.prompt_cache_dir is not None,
    )
    rehearsal = Rehearsal(networks, dtype, decode=TinyDecoder(tiny) if tiny else None, decoders=[tiny] if tiny else [])
    passes = _rehearse(rehearsal, args, rewards)
    without, within = passes.found["policy update"]
    found = Plan(
        title=_title(model, family, args, peft_config, gpus),
        components=components,
        sizes=sizes,
        settings=settings,
        working=passes.working(settings, checkpointing=args.gradient_checkpointing),
        remedies={},
        activations=(without.kept, within.kept),
        checkpointing=args.gradient_checkpointing,
        notes=notes,
    )
    return replace(found, remedies=_remedies(found, passes, args, gpus))


def _rewards(arguments: TrainArguments, args: RDMConfig) -> dict[str, Any]:
    """The rewards by name; objects are made, networks are not loaded."""
    made = make_rewards(arguments.reward_funcs, arguments.reward_options)
    rewards = load_rewards(made)
    reward_weights(list(rewards), args.reward_weights)  # Checks their number.
    return rewards


def _networks(
    model: str | Path | Blueprint,
    arguments: TrainArguments,
    args: RDMConfig,
    peft_config: LoraConfig | None,
    *,
    matches_distributions: bool,
    notes: list[str],
) -> Networks:
    """The three roles as the trainer makes them, on the meta device."""
    dtype = DTYPES[precision(args)]
    loaded = dtype if peft_config else torch.float32  # As load_networks reads them.

    def family_of(source: str | Path | Blueprint) -> Family:
        family = load_family(make_skeleton(read_blueprint(source), loaded), resolution=args.resolution)
        family.border = lambda: "not compared"  # type: ignore[method-assign]  # There are no weights to compare.
        return family

    family = family_of(model)
    teacher = None if arguments.teacher is None else family_of(arguments.teacher)
    init = arguments.policy_init
    if init is not None and (Path(init) / "model_index.json").is_file():
        network = family_of(init).network
        family, teacher = family.with_network(network), teacher or family
        family.border = lambda: "not compared"  # type: ignore[method-assign]
    elif init is not None:
        notes.append(
            f"policy_init={init!r} is counted as an adapter of rank {arguments.lora_r}; a network adds its own size."
        )
    if arguments.teacher_adapter is not None:
        notes.append("teacher_adapter is not counted; an adapter of its rank is about as large as the policy's.")
    families = [one for one in (family, teacher) if one is not None]
    check_family_settings(args, families, matches_distributions=matches_distributions)
    return make_networks(
        family,
        teacher,
        peft_config,
        device=torch.device("meta"),
        dtype=dtype,
        generator=torch.Generator(),
    )


def _tiny_decoder(model: str) -> AutoencoderTiny:
    with torch.device("meta"):
        tiny: AutoencoderTiny = AutoencoderTiny.from_config(AutoencoderTiny.load_config(model))
    return tiny


def _tensors(*modules: nn.Module | None) -> list[torch.Tensor]:
    return [tensor for one in modules if one is not None for tensor in (*one.parameters(), *one.buffers())]


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(one.numel() * one.element_size() for one in {id(tensor): tensor for tensor in tensors}.values())


def _component(module: nn.Module | Sequence[nn.Parameter]) -> Component:
    parameters = list(module.parameters()) if isinstance(module, nn.Module) else list(module)
    buffers = list(module.buffers()) if isinstance(module, nn.Module) else []
    return Component(
        parameters=sum(one.numel() for one in parameters),
        precision=str(parameters[0].dtype).removeprefix("torch.") if parameters else "",
        size=_bytes([*parameters, *buffers]),
    )


def _components(networks: Networks, tiny: nn.Module | None, full: bool) -> dict[str, Component]:
    """Each network of a run, adapters apart from what they sit on."""
    family, teacher = networks.family, networks.teacher_family
    found: dict[str, Component] = {}
    for label, one in (("", family), (" of the teacher", teacher)):
        if label and teacher is family:
            continue
        plain = [value for name, value in one.network.named_parameters() if "lora_" not in name]
        found[one.network_name + label] = replace(_component(plain), size=_bytes([*plain, *one.network.buffers()]))
        if one.decoder is not None:
            found[f"{one.decoder_name}{label}"] = _component(one.decoder)
        for name in one.text_encoder_names:
            encoder = getattr(one.pipeline, name, None)
            if encoder is not None:
                found[name + label] = _component(encoder)
    for role in ADAPTERS:
        kind = "copy for" if full else "adapter of"
        found[f"{kind} the {role.replace('_', ' ')}"] = _component(networks.parameters(role))
    if tiny is not None:
        found["reward decoder"] = _component(tiny)
    return found


def _gathered(networks: Networks, *, full: bool) -> int:
    """What FSDP holds whole at once: the outermost weights, the largest chain of nested blocks, and the next block."""
    network = networks.module("policy")
    units = [*blocks(network), network]
    own: dict[int, int] = {}
    # Adapters are never cut.
    inner = set() if full else {id(one) for role in ADAPTERS for one in networks.parameters(role)}
    for unit in units:  # Inner ones come first.
        mine = [one for one in unit.parameters() if id(one) not in inner]
        own[id(unit)] = _bytes(mine)
        inner |= {id(one) for one in mine}
    inside = {id(unit): {id(one) for one in unit.modules()} for unit in units[:-1]}
    chains = [sum(own[id(outer)] for outer in units[:-1] if id(unit) in inside[id(outer)]) for unit in units[:-1]]
    most = own[id(network)] + max(chains, default=0) + max((own[id(unit)] for unit in units[:-1]), default=0)
    return min(most, sum(own.values()))


def _reward_sizes(rewards: Mapping[str, Any], notes: list[str]) -> dict[str, int]:
    """The reward networks that live on the GPU, by the parameter counts that the rewards' facts give."""
    found = {}
    for name, reward in rewards.items():
        if not isinstance(reward, RewardModel):
            continue
        if reward.device is not None:
            notes.append(f"The reward {name} lives on {reward.device} and is not counted.")
            continue
        text = re.search(r"([\d.,]+)( M)? parameters", reward.info.memory)
        if text is None:
            notes.append(f"The size of the reward {name} is not known.")
            continue
        count = float(text[1].replace(",", "")) * (1e6 if text[2] else 1)
        found[name] = int(count * torch.empty((), dtype=reward.dtype).element_size())
    return found


def _records(networks: Networks, args: RDMConfig, rewards: int) -> int:
    """Recorded rollouts (states, predictions, encoded prompts), directions, and the images that rewards look at."""
    family = networks.family
    with torch.device("meta"):
        told = _bytes(conditioning_of(family, 1).tensors.values())
    channels, height, width = family.latent_shape
    latent = 4 * channels * height * width
    pixels = 4 * 3 * height * width * family.pixels_per_latent**2
    each: int = 2 * args.num_inference_steps * latent + rewards * args.num_replayed_steps * latent + told
    # The last rollouts are let go when the new ones are there.
    return int(args.per_device_train_batch_size * (2 * args.gradient_accumulation_steps * each + pixels))


def _optimiser(name: Any, notes: list[str]) -> tuple[float, bool]:
    """Bytes of state for each byte of weights, and whether a step needs no copy of the weights."""
    text = str(getattr(name, "value", name))
    if "8bit" in text:
        return 0.5, True
    if "4bit" in text:
        return 0.25, True
    if text == "sgd":
        return 0.0, False
    if text == "adafactor":
        notes.append("adafactor's factored state is counted as nothing.")
        return 0.0, False
    if "adam" not in text:
        notes.append(f"optim={text!r} is counted as Adam is.")
    return 2.0, "fused" in text


@dataclass(frozen=True, kw_only=True)
class _Passes:
    """What the phases took: (without, with) checkpointing, and the bytes of the gradients that a phase makes."""

    found: Mapping[str, tuple[Pass, Pass]]
    gradients: Mapping[str, int]

    def working(
        self, settings: Settings, *, checkpointing: bool, batch: float = 1.0, decoded: float = 1.0
    ) -> dict[str, int]:
        """Working memory with these shares of the samples, and of the images decoded at once."""
        shares = {"reward images": decoded, "reward gradient": decoded, "sample grid": decoded}
        cut = settings.shards if settings.full else 1
        # What encoders need beside their weights is not counted.
        result = {"encode prompts": 0} if "text_encoders" in settings.offload else {}
        for name, both in self.found.items():
            one, share, gradients = both[checkpointing], shares.get(name, batch), self.gradients.get(name, 0)
            if share == 1 and cut == 1:
                result[name] = one.peak
            else:  # With a smaller batch gradients are accumulated, so they are all there.
                result[name] = int(one.peak_beside_gradients * share) + gradients // cut
        return result


def _rehearse(rehearsal: Rehearsal, args: RDMConfig, rewards: Mapping[str, Any]) -> _Passes:
    """Go through every phase, first without checkpointing and then with it."""
    networks = rehearsal.networks
    count: int = args.per_device_train_batch_size
    steps: int = args.gradient_accumulation_steps
    scale = args.teacher_guidance_scale
    scale = networks.teacher_family.teacher_guidance_scale if scale is None else scale

    def samples(role: Role, guidance: float) -> int:
        family = networks.family_of(role)
        twice = guidance != 1 and family.has_guidance and not family.embeds_guidance(networks.module(role))
        return 2 * count if twice else count

    plain = {name: one for name, one in rewards.items() if not isinstance(one, DirectionReward)}
    weights = reward_weights(list(rewards), args.reward_weights)
    pulls = args.reward_gradient == "pathwise" and any(
        getattr(one, "differentiable", False) and weights[name] for name, one in plain.items()
    )
    has_images = any(getattr(one, "inputs", "images") == "images" for one in plain.values())
    policy_samples = samples("policy", args.guidance_scale)
    teacher = rehearsal.forward("teacher", samples("teacher", scale))
    fake_score = rehearsal.forward("fake_score", count)
    fixed = {
        "rollout": rehearsal.forward("policy", policy_samples),
        "teacher and fake score": max(teacher, fake_score, key=lambda one: one.peak),
    }
    if plain and has_images:
        fixed["reward images"] = rehearsal.decode(min(count, args.decode_batch_size), gradient=False)
    if args.eval_strategy != "no" or args.eval_on_start:
        fixed["sample grid"] = rehearsal.decode(
            min(args.per_device_eval_batch_size, args.decode_batch_size), gradient=False
        )

    shapes = {role: [one.shape for one in networks.parameters(role)] for role in ADAPTERS}
    many = steps * args.num_replayed_steps > 1
    # On the same layers and as many samples, one update is as the other.
    alike = shapes["policy"] == shapes["fake_score"] and policy_samples == count and many == (steps > 1)

    def with_gradients() -> dict[str, Pass]:
        updates = {"policy update": rehearsal.update("policy", policy_samples, accumulate=many)}
        if args.fake_score_updates_per_policy_update:
            updates["fake-score update"] = (
                updates["policy update"] if alike else rehearsal.update("fake_score", count, accumulate=steps > 1)
            )
        if plain and has_images and pulls:
            updates["reward gradient"] = rehearsal.decode(min(count, args.decode_batch_size), gradient=True)
        return updates

    without = with_gradients()
    networks.enable_activation_checkpointing()
    networks.family.enable_decoder_checkpointing()
    if args.reward_decoder is not None:
        tiny: Any = rehearsal.decoders[0]
        tiny.enable_gradient_checkpointing()
    within = with_gradients()
    return _Passes(
        found={name: (one, one) for name, one in fixed.items()}
        | {name: (one, within[name]) for name, one in without.items()},
        gradients={
            "policy update": _bytes(networks.parameters("policy")),
            "fake-score update": _bytes(networks.parameters("fake_score")),
        },
    )


def _remedies(plan: Plan, passes: _Passes, args: RDMConfig, gpus: int) -> dict[str, int]:
    """The run's peak with one thing changed, where that lowers it."""
    checkpointing, settings = args.gradient_checkpointing, plan.settings
    batch = args.num_generations / args.per_device_train_batch_size
    decoded = 1 / min(args.decode_batch_size, args.per_device_train_batch_size)
    away = settings.offload

    def peak(settings: Settings = settings, **changes: Any) -> int:
        working = passes.working(settings, **{"checkpointing": checkpointing, **changes})
        return max(one.peak for one in phases(plan.sizes, settings, working).values())

    tried: dict[str, int] = {
        "activation_checkpointing: true": peak(checkpointing=True),
        "prompt_cache_dir: FOLDER": peak(replace(settings, offload=away | {"text_encoders"}, caches_prompts=True)),
        "offload: [rewards]": peak(replace(settings, offload=away | {"rewards"})),
        f"per_device_train_batch_size: {args.num_generations} (and more gradient_accumulation_steps)": peak(
            batch=batch
        ),
        "decode_batch_size: 1": peak(decoded=decoded),
    }
    offload = away | {"text_encoders", "rewards"}
    if settings.full:
        tried["offload: [teacher]"] = peak(replace(settings, offload=away | {"teacher"}))
        offload |= {"teacher"}
    lowering = [name.partition(":")[0] for name, value in tried.items() if value < plan.peak]
    together = peak(
        replace(settings, offload=offload, caches_prompts=True),
        checkpointing=True,
        batch=batch,
        decoded=decoded,
    )
    if len(lowering) > 1:
        tried[f"all of {', '.join(lowering)}"] = together
    for count in (2, 4, 8):
        if count > settings.shards:
            tried[f"shard: true, on {count} GPUs"] = peak(replace(settings, shards=count))
    return {name: value for name, value in tried.items() if value < 0.99 * plan.peak}


def _title(
    model: str | Path | Blueprint, family: Family, args: RDMConfig, peft_config: LoraConfig | None, gpus: int
) -> str:
    _, height, width = family.latent_shape
    pixels = family.pixels_per_latent
    trained = "two full copies" if peft_config is None else f"adapters of rank {peft_config.r}"
    name = "a model of its own" if isinstance(model, dict) else str(model)
    shared = f", {gpus} GPUs" + (" that share the networks" if args.shard else "") if gpus > 1 else ""
    return (
        f"{name} ({type(family.pipeline).__name__}), images of {height * pixels}x{width * pixels}, {trained}, "
        f"{str(DTYPES[precision(args)]).removeprefix('torch.')}, {args.per_device_train_batch_size} samples at once, "
        f"{args.num_inference_steps} steps{shared}"
    )


def format_plan(plan: Plan) -> str:
    """The plan as text.

    Args:
        plan: The plan.

    Returns:
        Lines of at most 120 characters, but for long names.
    """
    lines = [plan.title, NOTE, "", f"{'network':34} {'parameters':>12}  {'precision':9} {'GiB':>8}"]
    for name, one in plan.components.items():
        lines.append(f"{name:34} {one.parameters / 1e6:10,.2f} M  {one.precision:9} {one.size / GIB:8.2f}")
    parts = kept(plan.sizes, plan.settings)
    away = {OFFLOADED[name] for name in plan.settings.offload}
    lines += ["", f"{'kept on the GPU':34} {'GiB':>8}"]
    lines += [
        f"{name:34} {size / GIB:8.2f}{'  (only while it is used)' if name in away else ''}"
        for name, size in parts.items()
        if size
    ]
    lines += ["", f"{'phase':34} {'kept':>8} {'working':>8} {'peak GiB':>8}"]
    for name, phase in plan.phases.items():
        lines.append(
            f"{name:34} {phase.stays / GIB:8.2f} {phase.working / GIB:8.2f} {phase.peak / GIB:8.2f}"
            + (" <- the most" if phase.peak == plan.peak else "")
        )
    without, within = (value / GIB for value in plan.activations)
    state = "on" if plan.checkpointing else "off"
    lines += [
        "",
        f"Activations of one policy update: {without:.2f} GiB, with activation_checkpointing {within:.2f} GiB "
        f"(it is {state}).",
        "Fits: " + ", ".join(f"{card} GB {'yes' if fits(plan.peak, card) else 'NO'}" for card in CARDS),
    ]
    if plan.remedies:
        lines += ["", f"{'what lowers the peak':74} {'peak GiB':>8}"]
        lines += [f"{name:74} {value / GIB:8.2f}" for name, value in plan.remedies.items()]
    return "\n".join([*lines, *(f"\nNote: {note}" for note in plan.notes)])


def plan_command(words: Sequence[str]) -> None:
    """Parse, plan and print.

    Args:
        words: ``--model``, ``--gpus`` and ``--json``, and every setting of ``rdm-rl train``.
    """
    parser = argparse.ArgumentParser(
        prog="rdm-rl plan",
        usage="%(prog)s --model MODEL [--config FILE.yaml] [--setting VALUE ...]",
        description="How much GPU memory a run takes, from configurations alone: no weights are loaded.",
        epilog="Every setting of `rdm-rl train` may follow; `rdm-rl train --help` lists them.",
        allow_abbrev=False,
    )
    parser.add_argument("--model", help=f"pipeline folder, hub name, or one of {', '.join(MODELS)}")
    parser.add_argument("--gpus", type=int, default=1, help="processes, each with a GPU; with shard they share")
    parser.add_argument("--json", type=Path, help="also write the plan here, in bytes")
    own, left = parser.parse_known_args(list(words))
    if own.gpus < 1:
        raise ValueError(f"--gpus {own.gpus}, but a run needs at least one.")
    # What a plan does not need and training does; and no setting may ask for a GPU that is not here.
    defaults = {"dataset": "digits", "model_name_or_path": "", "output_dir": "plan"}
    settings = SettingsParser((TrainArguments, RDMConfig), "", prog="rdm-rl plan", defaults=defaults)
    arguments, args = settings.parse([*left, "--use_cpu", "true"])
    model = own.model or arguments.model_name_or_path
    if not model:
        raise ValueError("--model is missing: pass it, or a --config with model_name_or_path.")
    found = make_plan(TEACHER_FOLDER if model == "digits" else model, arguments, args, gpus=own.gpus)
    print(format_plan(found))
    if own.json is not None:
        own.json.write_text(json.dumps(found.to_dict(), indent=2) + "\n", encoding="utf-8")
