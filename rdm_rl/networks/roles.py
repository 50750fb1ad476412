"""Policy, teacher and fake score: three roles on one frozen base with adapters, or three networks.

On one base, the policy and the fake score are two LoRA adapters and the teacher is the base with adapters off, or with
a style adapter of its own. A separate teacher has the fake score's adapter, which then starts as that teacher. A role
is entered for the length of a forward pass by switching two attributes of every adapter layer, and ``requires_grad``
is never touched: PEFT's ``set_adapter`` and ``disable_adapter`` do touch it, and used between a forward and a backward
pass they silently zero the gradients. Under activation checkpointing the recomputation re-enters the role that its
forward pass had.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from functools import partial
from typing import Any, Literal, get_args

import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rdm_rl.families import Family
from rdm_rl.families.encoding import dtype_of
from rdm_rl.families.hub import sharing_a_base
from rdm_rl.families.precision import to_precision
from rdm_rl.families.quantization import is_quantized
from rdm_rl.files import fingerprint
from rdm_rl.networks.added import add_adapters_to_weights
from rdm_rl.networks.offload import AdapterPass, OffloadedNetwork
from rdm_rl.networks.sharding import cut_like, holds_shards, shard, whole_copy
from rdm_rl.policy import X0Predictor
from rdm_rl.records import Conditioning

Role = Literal["policy", "teacher", "fake_score"]
ADAPTERS: tuple[Role, Role] = ("policy", "fake_score")


class Networks(ABC):
    """The three roles, each a predictor of x_0.

    Args:
        family: The border to the model.
        teacher_family: The teacher's family, if it is another model; None for the same one.
        autocast: Makes the context in which networks run, for mixed precision.
    """

    def __init__(
        self,
        family: Family,
        teacher_family: Family | None = None,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        """Keep the families."""
        self.family = family
        self.teacher_family = teacher_family or family
        self.autocast = autocast
        self._offloaded: OffloadedNetwork | None = None

    def offload_teacher(self, device: torch.device) -> None:
        """Let the teacher's network wait on the CPU from now on; it comes to the device when it is asked."""
        self._offloaded = OffloadedNetwork(self.module("teacher"), device)

    def fingerprints(self) -> dict[str, str]:
        """Short names of what teacher and policy began with: weights, without trained adapters, and their schedule."""
        teacher, is_shared = self._fingerprint("teacher"), self.module("policy") is self.module("teacher")
        return {"teacher": teacher, "policy": teacher if is_shared else self._fingerprint("policy")}

    def _fingerprint(self, role: Role) -> str:
        family = self.family_of(role)
        facts = {"prediction_type": family.prediction_type, "schedule": family.schedule_facts()}
        return fingerprint(self.module(role), **facts)

    def release_teacher(self) -> None:
        """The teacher will not be asked for a while: if it is offloaded, it leaves the device."""
        if self._offloaded is not None:
            self._offloaded.release()

    def family_of(self, role: Role) -> Family:
        """The border to the network that plays the role: the fake score is a copy, or an adapter, of the teacher."""
        return self.family if role == "policy" else self.teacher_family

    @abstractmethod
    def module(self, role: Role) -> nn.Module:
        """The module that plays the role."""

    @abstractmethod
    def named_parameters(self, role: Role) -> dict[str, nn.Parameter]:
        """The trainable parameters of a role by name; none for the teacher."""

    @abstractmethod
    def enable_activation_checkpointing(self) -> None:
        """Recompute activations in the backward pass instead of keeping them."""

    @contextmanager
    def role(self, role: Role) -> Iterator[None]:
        """Let the base play a role for the length of the context."""
        if role not in get_args(Role):
            raise ValueError(f"role {role!r} is unknown; use one of {', '.join(get_args(Role))}.")
        yield

    def parameters(self, role: Role) -> list[nn.Parameter]:
        """The trainable parameters of a role."""
        return list(self.named_parameters(role).values())

    def predict(
        self, role: Role, x_t: Tensor, t: Tensor, conditioning: Conditioning, guidance_scale: float = 1.0
    ) -> Tensor:
        """A role's prediction of x_0, shape (N, C, H, W), float32.

        Args:
            role: Who is asked.
            x_t: Noisy latents, shape (N, C, H, W).
            t: Times, shape (N,), in (0, 1].
            conditioning: Encoded prompts, N rows.
            guidance_scale: Scale of classifier-free guidance; 1 is without.
        """
        family = self.family_of(role)
        with self.role(role), self.autocast():
            return family.predict_x_0(self.module(role), x_t, t, conditioning, guidance_scale).float()

    def predictor(self, role: Role, guidance_scale: float = 1.0) -> X0Predictor:
        """A role as a plain function of (x_t, t, conditioning)."""
        return partial(self.predict, role, guidance_scale=guidance_scale)

    def state_dict(self, role: Role) -> dict[str, Tensor]:
        """The trainable weights of a role, detached, by name."""
        return {name: parameter.detach() for name, parameter in self.named_parameters(role).items()}

    @torch.no_grad()
    def load_state_dict(self, role: Role, state: dict[str, Tensor]) -> None:
        """Copy weights into a role: what :meth:`state_dict` gave.

        Raises:
            ValueError: If a name or a shape differs.
        """
        parameters = self.named_parameters(role)
        shapes = {name: tuple(value.shape) for name, value in state.items()}
        wanted = {name: tuple(value.shape) for name, value in parameters.items()}
        if shapes != wanted:
            differing = sorted(name for name in shapes.keys() | wanted.keys() if shapes.get(name) != wanted.get(name))
            raise ValueError(
                f"The saved {role} does not fit this one: {len(differing)} weights differ in name or shape, the first "
                f"being {differing[0]!r} (saved {shapes.get(differing[0])}, here {wanted.get(differing[0])}). Use the "
                "same model, peft_config and policy_init as the run that saved it."
            )
        for name, parameter in parameters.items():
            parameter.copy_(cut_like(state[name], parameter))

    def shard(self, device: torch.device) -> None:
        """Cut the weights of all networks over the processes (:mod:`rdm_rl.networks.sharding`); adapters stay whole."""
        for network in dict.fromkeys(map(self.module, get_args(Role))):
            shard(network, device, self.adapters)

    @property
    def adapters(self) -> list[nn.Parameter]:
        """The weights of all adapters, trained or not."""
        return []

    @abstractmethod
    def whole_policy(self, *, keep: bool = True) -> nn.Module | None:
        """The policy as one plain network, to be saved; None where it is not to be kept.

        If the networks are sharded, all processes must call it.
        """


class AdapterNetworks(Networks):
    """LoRA adapters on the frozen network of a pipeline, in place; the teacher is the network with these adapters off.

    Args:
        family, generator, teacher_family, autocast, teacher_adapter: As in :func:`make_networks`.
        config: The adapters' configuration; without ``target_modules`` the family's own are used.
        policy_init: An adapter that the policy starts from and goes on training, of any rank and set of layers;
            ``config`` is then the fake score's alone.
        policy_init_scale: What that adapter is multiplied by.

    Raises:
        ValueError: If the configuration asks for dropout.
    """

    def __init__(
        self,
        family: Family,
        config: LoraConfig,
        generator: torch.Generator,
        teacher_family: Family | None = None,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        *,
        policy_init: str | None = None,
        policy_init_scale: float = 1.0,
        teacher_adapter: str | None = None,
    ) -> None:
        """Inject the adapters."""
        super().__init__(family, teacher_family, autocast)
        self.config = _checked(config, family)
        if policy_init is not None:
            family.load_adapter(policy_init, "policy", "policy_init", policy_init_scale)
        if teacher_adapter is not None:
            self.teacher_family.load_adapter(teacher_adapter, "teacher", "teacher_adapter")
        # PEFT draws initial weights from the global generator; the fork gives it back untouched.
        with torch.random.fork_rng(devices=[]), sharing_a_base():
            seed = torch.randint(2**31, (), generator=generator, device=generator.device)
            torch.default_generator.manual_seed(int(seed))
            for role in ADAPTERS:
                if role == "fake_score" or policy_init is None:
                    self._inject(role)
        bases = dict.fromkeys((family.network, self.teacher_family.network))
        layers = (module for base in bases for module in base.modules() if isinstance(module, BaseTunerLayer))
        # A module's __setattr__ looks for weights of that name first: 24 switches a step would be 1.7 % of its time.
        self._layers = [vars(layer) for layer in layers]
        for base in bases:
            base.eval().requires_grad_(False)
        self._has_teacher_adapter = teacher_adapter is not None
        self._current: Role = "teacher"
        for adapter in ADAPTERS:
            for parameter in self.parameters(adapter):
                parameter.data = parameter.data.float()  # A half-precision base must not halve what is trained.
                parameter.requires_grad_(True)
        self._switch("teacher")

    def _inject(self, role: Role) -> None:
        network = self.module(role)
        try:
            inject_adapter_in_model(deepcopy(self.config), network, role)
        except ValueError as error:  # PEFT prints whole layers.
            targets = self.config.target_modules
            names = targets if isinstance(targets, str) else ", ".join(sorted(targets or ()))
            raise ValueError(
                f"target_modules ({names}) cannot all have adapters: the {type(network).__name__} has no such layers, "
                "or PEFT has no adapter for their kind. Name linear or convolutional layers, such as 'to_q', or leave "
                "it out for the family's own."
            ) from error

    def module(self, role: Role) -> nn.Module:
        """The network with the role's adapter."""
        return self.family_of(role).network

    def named_parameters(self, role: Role) -> dict[str, nn.Parameter]:
        """The adapter's weights; none for the teacher, whose adapter is frozen."""
        return {
            name: parameter
            for name, parameter in (() if role == "teacher" else self.module(role).named_parameters())
            if "lora_" in name and role in name.split(".")
        }

    def _switch(self, role: Role) -> None:
        plain = role == "teacher" and not self._has_teacher_adapter
        for attributes in self._layers:
            attributes["_disable_adapters"] = plain
            if not plain:
                attributes["_active_adapter"] = [role]
        self._current = role

    @contextmanager
    def role(self, role: Role) -> Iterator[None]:
        """Let the network play a role for the length of the context; contexts nest."""
        with super().role(role):
            previous = self._current
            self._switch(role)
            try:
                yield
            finally:
                self._switch(previous)

    def enable_activation_checkpointing(self) -> None:
        """Recompute activations, re-entering the role that the forward pass had."""

        def checkpointed(module: nn.Module, *inputs: Any) -> Any:
            role = self._current

            def run(*again: Any) -> Any:
                with self.role(role):
                    return module(*again)

            return checkpoint(run, *inputs, use_reentrant=False)

        for trained in ADAPTERS:
            network: Any = self.module(trained)
            network.enable_gradient_checkpointing(checkpointed)

    def export(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The policy's adapter under PEFT's names without the adapter's name, and its configuration."""
        network: Any = self.module("policy")
        return get_peft_model_state_dict(network, adapter_name="policy"), network.peft_config["policy"].to_dict()

    @property
    def adapters(self) -> list[nn.Parameter]:
        """The weights of all adapters, trained or not."""
        bases = dict.fromkeys((self.family.network, self.teacher_family.network))
        return [weight for base in bases for name, weight in base.named_parameters() if "lora_" in name]

    def whole_policy(self, *, keep: bool = True) -> nn.Module | None:
        """A copy of the policy's network with its adapter added to the weights, without any adapter, in float32."""
        network = whole_copy(self.module("policy"), keep=keep)
        if network is None:
            return None
        for name, layer in list(network.named_modules()):
            if isinstance(layer, BaseTunerLayer):
                layer._disable_adapters = False
                if "policy" in layer.active_adapters or "policy" in layer.lora_A:
                    layer.merge(adapter_names=["policy"])
                parent, _, attribute = name.rpartition(".")
                setattr(network.get_submodule(parent), attribute, layer.get_base_layer())
        del network.peft_config
        return network


def _checked(config: LoraConfig, family: Family) -> LoraConfig:
    """A copy of the adapters' configuration with the family's layers where it names none."""
    config = deepcopy(config)
    if config.lora_dropout:
        raise ValueError(
            f"peft_config has lora_dropout={config.lora_dropout}, but the policy that is updated must be the "
            "one that made the samples, so dropout stays off. Set lora_dropout=0."
        )
    if config.init_lora_weights not in (True, "gaussian") or config.modules_to_save:
        raise ValueError(
            f"peft_config has init_lora_weights={config.init_lora_weights!r} and modules_to_save="
            f"{config.modules_to_save!r}, but the teacher is the base with adapters off and the policy must "
            "start as the teacher: set init_lora_weights to True or 'gaussian', and leave modules_to_save empty."
        )
    if config.bias != "none":
        raise ValueError(f"peft_config has bias={config.bias!r}, which trains the teacher's too. Set 'none'.")
    if config.target_modules is None:
        config.target_modules = list(family.lora_targets)
    return config


class SeparateNetworks(Networks):
    """Full fine-tuning: the policy is a copy of the pipeline's network, the fake score one of the teacher's.

    With a separate teacher, the policy is the pipeline's network itself. The arguments are those of
    :func:`make_networks`; adapters that the policy or the teacher begin with are added to their weights.
    """

    def __init__(
        self,
        family: Family,
        teacher_family: Family | None = None,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        *,
        policy_init: str | None = None,
        policy_init_scale: float = 1.0,
        teacher_adapter: str | None = None,
    ) -> None:
        """Copy the networks, in float32."""
        super().__init__(family, teacher_family, autocast)
        fake_score = deepcopy(self.teacher_family.network).float()
        # With a separate teacher, nothing else needs the pipeline's network.
        policy = (deepcopy(family.network) if self.teacher_family is family else family.network).float()
        if policy_init is not None:
            family.with_network(policy).fuse_adapter(policy_init, "policy_init", policy_init_scale)
        if teacher_adapter is not None:
            self.teacher_family.fuse_adapter(teacher_adapter, "teacher_adapter")
        self._trained: dict[Role, nn.Module] = {"policy": policy, "fake_score": fake_score}
        for network in self._trained.values():
            network.eval().requires_grad_(True)

    def module(self, role: Role) -> nn.Module:
        """The network of the role."""
        return self.teacher_family.network if role == "teacher" else self._trained[role]

    def named_parameters(self, role: Role) -> dict[str, nn.Parameter]:
        """Every weight of the role's network; none for the teacher."""
        return {} if role == "teacher" else dict(self._trained[role].named_parameters())

    def whole_policy(self, *, keep: bool = True) -> nn.Module | None:
        """The policy's network, or a copy of it if it is sharded."""
        network = self.module("policy")
        return whole_copy(network, keep=keep) if holds_shards(network) else network

    def enable_activation_checkpointing(self) -> None:
        """Recompute activations in both trained networks."""
        trained: Any = self._trained
        for network in trained.values():
            network.enable_gradient_checkpointing()


def _check_compiled(network: nn.Module, device: torch.device) -> None:
    """Raise where a whole network is compiled in place for a CPU: its gradients can be wrong without a sign."""
    if device.type == "cpu" and network._compiled_call_impl is not None:
        raise ValueError(
            f"The {type(network).__name__} is compiled as a whole. On a CPU torch's inductor then gave most weights of "
            "a U-Net no gradient, without a message; other networks were not checked. Compile its repeated blocks "
            "alone (compile_repeated_blocks()), or nothing."
        )


def make_networks(
    family: Family,
    teacher_family: Family | None,
    peft_config: LoraConfig | None,
    *,
    device: torch.device,
    dtype: torch.dtype,
    generator: torch.Generator,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    policy_init: str | None = None,
    policy_init_scale: float = 1.0,
    teacher_adapter: str | None = None,
    adapter_pass: AdapterPass = "beside",
    sharded: bool = False,
) -> Networks:
    """The three roles of a run, on its device, with frozen weights in its precision and trained ones in float32.

    Args:
        family: The border to the model.
        teacher_family: A separate teacher, or None.
        peft_config: The adapters; None makes full copies.
        device: Where the pipelines go.
        dtype: Precision of the frozen networks.
        generator: Source of the adapters' initial weights.
        autocast: Makes the context in which networks run.
        policy_init: An adapter that the policy starts from, or None.
        policy_init_scale: What that adapter is multiplied by.
        teacher_adapter: An adapter that only the teacher has, of a style, say; or None.
        adapter_pass: Whether a pass takes adapters along beside their layers, or added to the weights.
        sharded: Cut the weights over the processes (see :mod:`rdm_rl.networks.sharding`).

    Raises:
        ValueError: If the teacher shares too little with the student, or a network is compiled as a whole on a CPU.
    """
    families = [family] if teacher_family is None else [family, teacher_family]
    for member in families:
        _check_compiled(member.network, device)
        member.set_precision(dtype)
    if teacher_family is not None:
        if teacher_family.latent_shape != family.latent_shape:
            raise ValueError(
                f"The teacher's latents are {teacher_family.latent_shape}, the student's {family.latent_shape}. "
                "Distribution matching compares them, so both must share one latent space."
            )
        if teacher_family.border() != family.border():
            raise ValueError(
                "The teacher has another noise schedule or text encoder than the student. Both are given the same "
                "noisy samples and the same encoded prompts, so these must be equal."
            )
        teacher_family.share_components(family)
    for member in families:
        member.to(device, network=not sharded)  # What is sharded may not fit on the device as a whole.
    # Full copies are made before the frozen weights are halved, adapters after: what is trained stays in float32.
    starts: dict[str, Any] = {
        "policy_init": policy_init,
        "policy_init_scale": policy_init_scale,
        "teacher_adapter": teacher_adapter,
    }
    copies = None if peft_config else SeparateNetworks(family, teacher_family, autocast, **starts)
    frozen = families if copies is None else [copies.teacher_family]
    for member in frozen:
        if not is_quantized(member.network) and dtype_of(member.network) != dtype:
            to_precision(member.network, dtype)
    networks = copies or AdapterNetworks(family, peft_config, generator, teacher_family, autocast, **starts)
    if sharded:
        networks.shard(device)
    if adapter_pass == "added":
        for member in families:
            add_adapters_to_weights(member.network)
    return networks
