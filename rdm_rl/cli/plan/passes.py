"""How much memory a pass takes, found by going through it on torch's meta device, where tensors have no memory.

The run's own networks, adapters and family code run there once, forward and backward. A mode of torch sees every call
of a function of torch, recomputations in the backward pass included, and hooks see the gradients; both note what is
allocated, storage by storage, until it is freed.

What differs from a GPU: what a kernel allocates for itself and the allocator's rounding are not seen. Attention is
counted as torch's fused kernels do it, which keep queries, keys, values and the output, and never the whole matrix.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from rdm_rl.families import Family
from rdm_rl.networks.roles import Networks, Role
from rdm_rl.records import Conditioning

# What CUDA's autocast computes in half precision, and what in float32, among what diffusion networks spend memory on.
# https://docs.pytorch.org/docs/stable/amp.html, "CUDA Op-Specific Behavior"
MATMUL = {torch.matmul, Tensor.matmul, Tensor.__matmul__}
LOWERED = {
    *(functional.linear, functional.conv2d, functional.scaled_dot_product_attention, torch.bmm, torch.baddbmm),
    *MATMUL,
}
WIDENED = {
    *(functional.group_norm, functional.layer_norm, functional.rms_norm, functional.interpolate),
    *(functional.softmax, torch.softmax, Tensor.softmax),
}


class FusedAttention(torch.autograd.Function):
    """The shapes of attention, and what its kernels keep for the backward pass."""

    @staticmethod
    def forward(context: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The output's shape, with the heads of a token side by side in memory, as the kernels leave it."""
        output = query.new_empty(*query.transpose(-3, -2).shape[:-1], value.shape[-1]).transpose(-3, -2)
        context.save_for_backward(query, key, value, output)
        return output

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        """The gradients' shapes."""
        return tuple(torch.empty_like(tensor) for tensor in context.saved_tensors[:3])


class Memory(TorchFunctionMode):
    """Counts the bytes that are allocated and not yet freed within the context; gradients of weights are left out.

    Args:
        existing: Tensors that are there already, which count as nothing.
        dtype: Precision in which CUDA's autocast would compute; float32 is without.

    Example:
        >>> with Memory() as memory:
        ...     kept = torch.ones(10) + torch.ones(10)
        >>> memory.now, memory.peak
        (40, 120)

    Attributes:
        now: Bytes alive.
        peak: The most at once.
    """

    def __init__(self, existing: Iterable[Tensor] = (), dtype: torch.dtype = torch.float32) -> None:
        """Start from nothing."""
        super().__init__()
        self.now: int = 0
        self.peak: int = 0
        self._sizes = {id(tensor.untyped_storage()): 0 for tensor in existing}
        self._dtype = dtype
        # As autocast does, weights are cast once in a forward pass, and anew where it is computed again.
        self._casts: dict[int, Tensor] | None = {}

    def pull_back(self, output: list[Tensor], inputs: Iterable[Tensor]) -> int:
        """Bytes that are alive after a forward pass, before its only output, which is taken, is pulled back."""
        self._casts = None
        kept = self.now
        start = [torch.zeros_like(output[0])]
        # Edges of the graph instead of tensors, for which torch would leave the mode.
        ends = [get_gradient_edge(output.pop())]
        torch.autograd.grad(ends, [get_gradient_edge(tensor) for tensor in inputs], start)
        return kept

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the function and note what it made."""
        kwargs = kwargs or {}
        if self._casts is None and not torch.is_grad_enabled():
            return function(*args, **kwargs)  # How the meta device makes a kernel of the backward pass, in steps.
        if function is Tensor.__bool__ and args[0].is_meta:
            return True  # Such as whether a mask hides nothing: there are no values to look at.
        if self._dtype != torch.float32 and (function in LOWERED or function in WIDENED):
            dtype = self._dtype if function in LOWERED else torch.float32
            args = tuple(self._cast(value, dtype) for value in args)
            kwargs = {name: self._cast(value, dtype) for name, value in kwargs.items()}
        result = self._run(function, args, kwargs)
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor):
                self._note(value)
        return result

    def _run(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if function is functional.scaled_dot_product_attention:
            names = ("query", "key", "value")
            inputs = (*args[:3], *(kwargs[name] for name in names[len(args) :]))
            return FusedAttention.apply(*inputs)  # type: ignore[no-untyped-call]
        if function in MATMUL and args[0].ndim == args[1].ndim > 3:  # It folds what may have to be copied for it.
            folded = [value.flatten(0, -3) for value in args]
            for value in folded:
                self._note(value)
            return torch.bmm(*folded).unflatten(0, args[0].shape[:-2])
        return function(*args, **kwargs)

    def _cast(self, value: Any, dtype: torch.dtype) -> Any:
        halves = (torch.bfloat16, torch.float16, torch.float32)
        if not isinstance(value, Tensor) or value.dtype not in halves or value.dtype == dtype:
            return value
        if self._casts is not None and id(value) in self._casts:
            return self._casts[id(value)]
        cast = value.to(dtype)
        self._note(cast)
        if self._casts is not None and value.is_leaf and value.requires_grad:
            self._casts[id(value)] = cast
        return cast

    def _note(self, tensor: Tensor) -> None:
        if tensor.grad_fn is not None:
            tensor.register_hook(self._count)
        self._count(tensor)

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if id(storage) not in self._sizes:
            self._sizes[id(storage)] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, id(storage)).atexit = False

    def _forget(self, storage: int) -> None:
        self.now -= self._sizes.pop(storage)


def encoded_prompts(family: Family, count: int) -> Conditioning:
    """A family's encoded prompts without values, N rows, of a pipeline on the meta device."""
    with Memory():
        return family.encode_without_values(count)


class Passes:
    """The passes of a run on the meta device, in bytes beside what was there before.

    Args:
        networks: The three roles, on the meta device.
        dtype: Precision of the run: bfloat16, float16 or float32.
        decode: Images of latents; None is the family's own way.
        decoder: The network that does it, if it is not the family's.
    """

    def __init__(
        self,
        networks: Networks,
        dtype: torch.dtype,
        decode: Callable[[Tensor], Tensor] | None = None,
        decoder: nn.Module | None = None,
    ) -> None:
        """Keep the networks."""
        self.networks, self.dtype, self.decoder = networks, dtype, decoder
        self._decode = decode or networks.family.decode
        self._rows: dict[Family, Conditioning] = {}

    def forward(self, role: Role, count: int) -> int:
        """The most that a role's network takes at once for so many samples, without gradients."""
        inputs = self._inputs(role, count)
        memory = Memory(self._existing(*inputs), self.dtype)
        with torch.no_grad(), memory:
            self._predict(role, *inputs)
        return memory.peak

    def update(self, role: Role, count: int) -> tuple[int, int]:
        """The activations that a role's forward pass keeps, and the most at once until the end of the backward pass."""
        inputs = self._inputs(role, count)
        memory = Memory(self._existing(*inputs), self.dtype)
        with memory:
            kept = memory.pull_back([self._predict(role, *inputs)], self.networks.parameters(role))
        return kept, memory.peak

    def decode(self, count: int, *, gradient: bool) -> int:
        """The most that decoding so many latents takes; with ``gradient``, and a gradient pulled back to them."""
        latents = torch.zeros(count, *self.networks.family.latent_shape, device="meta", requires_grad=gradient)
        memory = Memory(self._existing(latents))
        with torch.set_grad_enabled(gradient), memory:
            images = [self._decode(latents)]
            if gradient:
                memory.pull_back(images, [latents])
        return memory.peak

    def enable_checkpointing(self) -> None:
        """Recompute activations from now on, in the networks and the decoder."""
        self.networks.enable_activation_checkpointing()
        self.networks.family.enable_decoder_checkpointing()
        if self.decoder is not None:
            tiny: Any = self.decoder
            tiny.enable_gradient_checkpointing()

    def _inputs(self, role: Role, count: int) -> tuple[Tensor, Tensor, Conditioning]:
        family = self.networks.family_of(role)
        if family not in self._rows:
            self._rows[family] = encoded_prompts(family, 1)
        x_t = torch.zeros(count, *family.latent_shape, device="meta")
        return x_t, torch.ones(count, device="meta"), self._rows[family].repeat(count)

    def _predict(self, role: Role, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        with self.networks.role(role):
            return self.networks.family_of(role).forward(self.networks.module(role), x_t, t, conditioning)

    def _existing(self, *inputs: Any) -> Iterator[Tensor]:
        for module in (*map(self.networks.module, get_args(Role)), self.networks.family.decoder, self.decoder):
            if module is not None:
                yield from (*module.parameters(), *module.buffers())
        for value in inputs:
            yield from value.tensors.values() if isinstance(value, Conditioning) else (value,)
