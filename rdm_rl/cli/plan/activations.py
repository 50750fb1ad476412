"""How much memory a forward or backward pass takes, found by going through it with tensors that have no memory.

torch's fake tensors have shape, type and device but no values. The run's own networks, adapters and family code go
through the pass with them, and a dispatch mode adds up what is allocated and what is freed, storage by storage. The
same counter gives the same figures on real tensors (a test looks).

What differs from a GPU: kernels' workspaces and the allocator's rounding are not seen. Attention is counted as torch's
fused kernels do it, which keep queries, keys, values, the output and one number a row, and never the whole matrix.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from rdm_rl.families.base import Family
from rdm_rl.networks.roles import Networks, Role
from rdm_rl.records import Conditioning

# What CUDA's autocast computes in float32 and the CPU's does not, among what diffusion networks spend memory on.
# https://docs.pytorch.org/docs/stable/amp.html, "CUDA Ops that can autocast to float32"
FLOAT32_ON_CUDA = ("group_norm", "interpolate", "layer_norm", "rms_norm", "softmax")


class LiveBytes(TorchDispatchMode):
    """Counts the bytes that are allocated and not yet freed within the context.

    Args:
        existing: Tensors that are there already, which count as nothing.

    Example:
        >>> with LiveBytes() as live:
        ...     kept = torch.ones(10) + torch.ones(10)
        >>> live.now, live.peak
        (40, 120)

    Attributes:
        now: Bytes alive.
        peak: The most at once.
        peak_beside: The most at once of what was not set aside.
    """

    def __init__(self, existing: Any = ()) -> None:
        """Start from nothing."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._sizes: dict[int, int] = {}
        self._aside: set[int] = set()
        self.now = self.peak = self.peak_beside = 0
        self._now_aside = 0
        for tensor in existing:
            self._note(tensor, count=False)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation and note what it made."""
        result = function(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._note(value)
        return result

    def _note(self, tensor: Tensor, *, count: bool = True) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes() if count else 0
        self.now += self._sizes[key]
        self.peak = max(self.peak, self.now)
        self.peak_beside = max(self.peak_beside, self.now - self._now_aside)
        weakref.finalize(storage, self._forget, key).atexit = False

    def set_aside(self, tensor: Tensor) -> None:
        """Leave a tensor out of ``peak_beside`` from now on."""
        key = tensor.untyped_storage()._cdata
        if key not in self._aside:
            self._aside.add(key)
            self._now_aside += self._sizes[key]

    def _forget(self, key: int) -> None:
        size = self._sizes.pop(key)
        self.now -= size
        if key in self._aside:
            self._aside.remove(key)
            self._now_aside -= size


@contextmanager
def cuda_autocast() -> Iterator[None]:
    """Within this context the CPU's autocast keeps the tensors that CUDA's keeps.

    It replaces functions of ``torch.nn.functional``, because recomputations within a backward pass must see them too.
    """

    def widened(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if torch.is_autocast_enabled("cpu"):
                args, kwargs = tree_map_only(Tensor, _in_float32, (args, kwargs))
            return function(*args, **kwargs)

        return call

    originals = {name: getattr(functional, name) for name in FLOAT32_ON_CUDA}
    try:
        for name, function in originals.items():
            setattr(functional, name, widened(function))
        yield
    finally:
        for name, function in originals.items():
            setattr(functional, name, function)


def _in_float32(value: Tensor) -> Tensor:
    return value.float() if value.dtype in (torch.bfloat16, torch.float16) else value


def conditioning_of(family: Family, count: int) -> Conditioning:
    """Encoded prompts as the family's ``encode`` gives them, with the right shapes and without values.

    Args:
        family: The family.
        count: Rows N.

    Returns:
        N rows.

    Raises:
        ValueError: If the family is none of the library's own.
    """
    pipeline, network = family.pipeline, family.network
    config: Any = network.config
    dtype = next(network.parameters()).dtype

    def clip_length() -> int:
        tokenizer = next((one for one in (pipeline.tokenizer, getattr(pipeline, "tokenizer_2", None)) if one), None)
        encoder = next(one for one in (pipeline.text_encoder, getattr(pipeline, "text_encoder_2", None)) if one)
        return int(tokenizer.model_max_length if tokenizer else encoder.config.max_position_embeddings)

    shapes: dict[str, tuple[int, ...]]
    match type(pipeline).__name__:
        case "StableDiffusionPipeline":
            shapes = {"encoder_hidden_states": (clip_length(), config.cross_attention_dim)}
        case "StableDiffusionXLPipeline":
            pooled = pipeline.text_encoder_2.config.projection_dim
            shapes = {"encoder_hidden_states": (clip_length(), config.cross_attention_dim), "text_embeds": (pooled,)}
        case "StableDiffusion3Pipeline":
            length = clip_length() + _t5_length(pipeline)
            shapes = {
                "encoder_hidden_states": (length, config.joint_attention_dim),
                "pooled_projections": (config.pooled_projection_dim,),
            }
        case "FluxPipeline":
            flux: Any = family
            shapes = {
                "encoder_hidden_states": (flux.prompt_tokens, config.joint_attention_dim),
                "pooled_projections": (config.pooled_projection_dim,),
            }
        case "SanaPipeline" | "PixArtSigmaPipeline":
            length = _t5_length(pipeline)
            shapes = {"encoder_hidden_states": (length, config.caption_channels), "encoder_attention_mask": (length,)}
        case "DiTPipeline":
            return Conditioning(tensors={"class_labels": torch.zeros(count, dtype=torch.int64)})
        case "DDPMPipeline" | "DDIMPipeline":
            shapes = {}
        case name:
            raise ValueError(
                f"The shapes of a {name}'s encoded prompts are not known to the plan. Supported are the library's own "
                "families; for one of yours, measure a short run instead."
            )
    tensors = {name: torch.zeros(count, *shape, dtype=dtype) for name, shape in shapes.items()}
    if "encoder_attention_mask" in tensors:
        tensors["encoder_attention_mask"] = tensors["encoder_attention_mask"].long()
    return Conditioning(tensors=tensors)


def _t5_length(pipeline: Any) -> int:
    """Tokens of the long text encoder: what the pipeline's own encoding pads to."""
    if type(pipeline).__name__ == "StableDiffusion3Pipeline" and pipeline.text_encoder_3 is None:
        return int(pipeline._get_t5_prompt_embeds("").shape[1])  # Zeros, whose number depends on diffusers.
    return int(signature(type(pipeline).encode_prompt).parameters["max_sequence_length"].default)


@dataclass(frozen=True, kw_only=True)
class Pass:
    """The memory of one pass, in bytes, beside what was there before.

    Args:
        kept: What is alive after the forward pass: for a pass with gradients, the activations.
        peak: The most that was alive at once, gradients included.
        peak_beside_gradients: The most that was alive at once beside the gradients of weights.
    """

    kept: int
    peak: int
    peak_beside_gradients: int


class Rehearsal:
    """Goes through the passes of a run without memory.

    Args:
        networks: The three roles, on the meta device; they are moved to fake tensors.
        dtype: Precision of the run: bfloat16, float16 or float32.
        decode: Images of latents, if not by the family's own decoder; its network is in ``decoders``.
        decoders: Further networks to move.
    """

    def __init__(
        self,
        networks: Networks,
        dtype: torch.dtype,
        *,
        decode: Callable[[Tensor], Tensor] | None = None,
        decoders: Sequence[nn.Module] = (),
    ) -> None:
        """Move the networks."""
        self.networks = networks
        self.decoders = list(decoders)
        self.decode_latents = decode or networks.family.decode
        self._autocast = partial(torch.autocast, "cpu", dtype) if dtype != torch.float32 else nullcontext
        self._memoryless = FakeTensorMode(allow_non_fake_inputs=True)
        families = {id(one): one for one in (networks.family, networks.teacher_family)}.values()
        modules = [networks.module(role) for role in get_args(Role)]
        modules += [module for one in families for module in (one.network, one.decoder) if module is not None]
        self._modules = list({id(module): module for module in [*modules, *self.decoders]}.values())
        with self._memoryless:
            for module in self._modules:
                module.to_empty(device="cpu")

    def forward(self, role: Role, count: int) -> Pass:
        """One call of a role's network on so many samples, without gradients."""
        with self._rehearsing() as inputs, torch.no_grad():
            state, *rest = inputs(role, count)
            with LiveBytes(self._existing(state, *rest)) as live, cuda_autocast():
                output = self._predict(role, state, *rest)
                kept = live.now
                del output
        return Pass(kept=kept, peak=live.peak, peak_beside_gradients=live.peak)

    def update(self, role: Role, count: int, *, accumulate: bool = False) -> Pass:
        """A forward and a backward pass of a role on so many samples.

        Args:
            role: The policy or the fake score.
            count: Samples.
            accumulate: Whether gradients of an earlier micro-batch are there already.
        """
        parameters = self.networks.parameters(role)
        with self._rehearsing() as inputs:
            state, *rest = inputs(role, count)
            with LiveBytes(self._existing(state, *rest)) as live, cuda_autocast():

                def set_aside(parameter: Tensor) -> None:
                    if parameter.grad is not None:
                        live.set_aside(parameter.grad)

                hooks = [one.register_post_accumulate_grad_hook(set_aside) for one in parameters]
                for parameter in parameters if accumulate else ():
                    parameter.grad = torch.zeros_like(parameter)
                    set_aside(parameter)
                before = live.now
                output = self._predict(role, state, *rest)
                kept = live.now - before
                output.square().mean().backward()
                del output
            for hook in hooks:
                hook.remove()
            for parameter in parameters:
                parameter.grad = None
        return Pass(kept=kept, peak=live.peak, peak_beside_gradients=live.peak_beside)

    def decode(self, count: int, *, gradient: bool) -> Pass:
        """Images of so many latents; with ``gradient``, and a gradient pulled back to the latents."""
        with self._memoryless:
            latents = torch.zeros(count, *self.networks.family.latent_shape, requires_grad=gradient)
            with LiveBytes(self._existing(latents)) as live, torch.set_grad_enabled(gradient):
                images = self.decode_latents(latents)
                kept = live.now
                if gradient:
                    torch.autograd.grad(images, latents, torch.zeros_like(images))
                del images
        return Pass(kept=kept, peak=live.peak, peak_beside_gradients=live.peak)

    @contextmanager
    def _rehearsing(self) -> Iterator[Callable[[Role, int], tuple[Any, ...]]]:
        def inputs(role: Role, count: int) -> tuple[Any, ...]:
            family = self.networks.family_of(role)
            return torch.zeros(count, *family.latent_shape), torch.ones(count), conditioning_of(family, count)

        with self._memoryless:
            yield inputs

    def _predict(self, role: Role, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        family = self.networks.family_of(role)
        with self.networks.role(role), self._autocast():
            return family.forward(self.networks.module(role), x_t, t, conditioning)

    def _existing(self, *given: Any) -> Iterator[Tensor]:
        for module in self._modules:
            yield from module.parameters()
            yield from module.buffers()
        for one in given:
            yield from one.tensors.values() if isinstance(one, Conditioning) else (one,)
