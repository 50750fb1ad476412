"""Policy, teacher and fake score: three roles on one frozen base with adapters, or three networks.

On one base, the policy and the fake score are two LoRA adapters and the teacher is the base with adapters off. A role
is entered for the length of a forward pass by switching two attributes of every adapter layer, and ``requires_grad``
is never touched: PEFT's ``set_adapter`` and ``disable_adapter`` do touch it, and used between a forward and a backward
pass they silently zero the gradients. Under activation checkpointing the recomputation re-enters the role that its
forward pass had.
"""

import warnings
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

from rdm_rl.data_types import Conditioning
from rdm_rl.families import Family
from rdm_rl.policy import X0Predictor

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
        """A role's prediction of x_0.

        Args:
            role: Who is asked.
            x_t: Noisy latents, shape (N, C, H, W).
            t: Times, shape (N,), in (0, 1].
            conditioning: Encoded prompts, N rows.
            guidance_scale: Scale of classifier-free guidance; 1 is without.

        Returns:
            The prediction, shape (N, C, H, W), float32.
        """
        family = self.teacher_family if role == "teacher" else self.family
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
        """Copy weights into a role.

        Args:
            role: Whose weights.
            state: What :meth:`state_dict` gave.

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
                "same model and the same peft_config as the run that saved it."
            )
        for name, parameter in parameters.items():
            parameter.copy_(state[name])


class AdapterNetworks(Networks):
    """Two LoRA adapters on the frozen network of a pipeline; the teacher is the network with adapters off.

    Args:
        family: The border to the model. Its network gets the adapters in place.
        config: The adapters' configuration; without ``target_modules`` the family's own are used.
        generator: Source of the adapters' initial weights.
        teacher_family: A separate teacher, or None.
        autocast: Makes the context in which networks run.

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
    ) -> None:
        """Inject the adapters."""
        super().__init__(family, teacher_family, autocast)
        self.config = deepcopy(config)
        if self.config.lora_dropout:
            raise ValueError(
                f"peft_config has lora_dropout={self.config.lora_dropout}, but the policy that is updated must be the "
                "one that made the samples, so dropout stays off. Set lora_dropout=0."
            )
        if self.config.init_lora_weights not in (True, "gaussian") or self.config.modules_to_save:
            raise ValueError(
                f"peft_config has init_lora_weights={self.config.init_lora_weights!r} and modules_to_save="
                f"{self.config.modules_to_save!r}, but the teacher is the base with adapters off and the policy must "
                "start as the teacher: set init_lora_weights to True or 'gaussian', and leave modules_to_save empty."
            )
        if self.config.bias != "none":
            raise ValueError(f"peft_config has bias={self.config.bias!r}, which trains the teacher's too. Set 'none'.")
        if self.config.target_modules is None:
            self.config.target_modules = list(family.lora_targets)
        # PEFT draws initial weights from the global generator; the fork gives it back untouched.
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            # PEFT warns of the second adapter on one model; here both share their base on purpose.
            warnings.filterwarnings("ignore", "Already found a `peft_config`", UserWarning)
            torch.default_generator.manual_seed(int(torch.randint(2**31, (), generator=generator)))
            for role in ADAPTERS:
                inject_adapter_in_model(deepcopy(self.config), family.network, role)
        family.network.eval()
        self._layers = [module for module in family.network.modules() if isinstance(module, BaseTunerLayer)]
        self._current: Role = "teacher"
        family.network.requires_grad_(False)
        for adapter in ADAPTERS:
            for parameter in self.parameters(adapter):
                parameter.data = parameter.data.float()  # A half-precision base must not halve what is trained.
                parameter.requires_grad_(True)
        self._switch("teacher")

    def module(self, role: Role) -> nn.Module:
        """The one network, or the separate teacher."""
        return self.teacher_family.network if role == "teacher" else self.family.network

    def named_parameters(self, role: Role) -> dict[str, nn.Parameter]:
        """The adapter's weights."""
        return {
            name: parameter
            for name, parameter in self.family.network.named_parameters()
            if "lora_" in name and role in name.split(".")
        }

    def _switch(self, role: Role) -> None:
        for layer in self._layers:
            layer._disable_adapters = role == "teacher"
            if role != "teacher":
                layer._active_adapter = [role]
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

        network: Any = self.family.network
        network.enable_gradient_checkpointing(checkpointed)

    def start_policy(self, folder: str) -> None:
        """Load a LoRA saved for diffusers into the policy's adapter: a student that is already distilled.

        Args:
            folder: Where it is.

        Raises:
            ValueError: If its rank or scale is another than the adapter's: the same weights would be another student.
        """
        state, saved = self.family.load_lora(folder)
        own = self.config.to_dict()
        names = ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")
        wanted = {name: own[name] for name in names}
        # Without its configuration in the file, diffusers takes an adapter's alpha to be its rank.
        found = {**wanted, "lora_alpha": wanted["r"]} if saved is None else {name: saved.get(name) for name in names}
        if found != wanted:
            raise ValueError(f"policy_init={folder!r} has {found}, but peft_config has {wanted}. Make them equal.")
        parts = (".lora_A.", ".lora_B.", ".lora_magnitude_vector.")
        for part in parts:
            state = {name.replace(part, f"{part}policy."): value for name, value in state.items()}
        self.load_state_dict("policy", state)

    def export(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The policy's adapter under PEFT's names without the adapter's name, and its configuration."""
        network: Any = self.family.network
        return get_peft_model_state_dict(network, adapter_name="policy"), network.peft_config["policy"].to_dict()


class SeparateNetworks(Networks):
    """Full fine-tuning: the policy and the fake score are copies of the pipeline's network, which stays the teacher.

    Args:
        family: The border to the model.
        teacher_family: A separate teacher, or None.
        autocast: Makes the context in which networks run.
    """

    def __init__(
        self,
        family: Family,
        teacher_family: Family | None = None,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        """Copy the network twice, in float32."""
        super().__init__(family, teacher_family, autocast)
        self._trained = {role: deepcopy(family.network).float().eval().requires_grad_(True) for role in ADAPTERS}

    def module(self, role: Role) -> nn.Module:
        """The network of the role."""
        return self.teacher_family.network if role == "teacher" else self._trained[role]

    def named_parameters(self, role: Role) -> dict[str, nn.Parameter]:
        """Every weight of the role's network; none for the teacher."""
        return {} if role == "teacher" else dict(self._trained[role].named_parameters())

    def enable_activation_checkpointing(self) -> None:
        """Recompute activations in both trained networks."""
        trained: Any = self._trained
        for network in trained.values():
            network.enable_gradient_checkpointing()


def make_networks(
    family: Family,
    teacher_family: Family | None,
    peft_config: LoraConfig | None,
    *,
    device: torch.device,
    dtype: torch.dtype,
    generator: torch.Generator,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
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

    Returns:
        The networks.

    Raises:
        ValueError: If the teacher shares too little with the student.
    """
    if teacher_family is not None and teacher_family.latent_shape != family.latent_shape:
        raise ValueError(
            f"The teacher's latents are {teacher_family.latent_shape}, the student's {family.latent_shape}. "
            "Distribution matching compares them, so both must share one latent space."
        )
    if teacher_family is not None and teacher_family.border() != family.border():
        raise ValueError(
            "The teacher has another noise schedule or text encoder than the student. Both are given the same noisy "
            "samples and the same encoded prompts, so these must be equal."
        )
    frozen = [one for one in (family, teacher_family) if one is not None]
    for one in frozen:
        one.pipeline.to(device)
    # Full copies are made before the frozen weights are halved, adapters after: what is trained stays in float32.
    copies = None if peft_config else SeparateNetworks(family, teacher_family, autocast)
    for one in frozen:
        if next(one.network.parameters()).dtype != dtype:
            one.network.to(dtype)
    return copies or AdapterNetworks(family, peft_config, generator, teacher_family, autocast)
