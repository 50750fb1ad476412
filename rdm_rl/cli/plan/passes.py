"""How much memory a pass takes, found by going through it on torch's meta device, where tensors have no memory.

The run's own networks, adapters and family code run there once, forward and backward. One mode of torch sees every
operation, and notes what it allocates, storage by storage, until it is freed; another makes of the meta device what
matters of CUDA: its autocast, and its fused attention.

What differs from a GPU: what a kernel allocates for itself and the allocator's rounding are not seen. Attention is
counted as torch's fused kernels do it, which keep queries, keys, values, the output and one number a row, and never the
whole matrix.
"""

import weakref
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any, get_args

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.nn import functional
from torch.overrides import TorchFunctionMode

# Not public by its name, but documented (torch's notes on extending it), and the only sight of what operations allocate
# within others, such as the copies that a matrix product folds.
from torch.utils._python_dispatch import TorchDispatchMode

from rdm_rl.families import Family
from rdm_rl.networks.roles import Networks, Role
from rdm_rl.records import Conditioning
from rdm_rl.rewards.images import TinyDecoder

# What CUDA's autocast computes in half precision, and what in float32, among what diffusion networks spend memory on.
# https://docs.pytorch.org/docs/stable/amp.html, "CUDA Op-Specific Behavior"
LOWERED = {
    *(functional.linear, functional.conv2d, functional.scaled_dot_product_attention, torch.bmm, torch.baddbmm),
    *(torch.matmul, Tensor.matmul, Tensor.__matmul__),
}
WIDENED = {
    *(functional.group_norm, functional.layer_norm, functional.rms_norm, functional.interpolate),
    *(functional.softmax, torch.softmax, Tensor.softmax),
}


class Memory(TorchDispatchMode):
    """Counts the bytes alive (``now``, and at most ``peak``) of what is allocated within the context.

    What is left out counts in ``whole`` only, the most with all that was left out until then, as if nothing freed it.

    Args:
        existing: Tensors that are there already, which count as nothing.
        forms: What is known of operations' results on the meta device, which several passes may share.

    Example:
        >>> with Memory() as memory:
        ...     kept = torch.ones(10) + torch.ones(10)
        >>> memory.now, memory.peak
        (40, 120)
    """

    def __init__(self, existing: Iterable[Tensor] = (), forms: dict[Any, Any] | None = None) -> None:
        """Start from nothing."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.now: int = 0
        self.peak: int = 0
        self.whole: int = 0
        self._left_out = 0
        self._forms = {} if forms is None else forms
        self._sizes = {id(tensor.untyped_storage()): 0 for tensor in existing}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation and note what it made."""
        result = self._run(function, args, kwargs or {})
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor):
                self._note(value.untyped_storage())
        return result

    def _run(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the operation; what it made before of tensors of these forms, it makes again.

        Many of the meta device's kernels are written in Python, and take a millisecond.
        """
        if _has_aliases(function):
            return function(*args, **kwargs)
        key = (function, _form(args), _form(kwargs))
        if key in self._forms:
            shape, stride, dtype = self._forms[key]
            return torch.empty_strided(shape, stride, dtype=dtype, device="meta")
        result = function(*args, **kwargs)
        if isinstance(result, Tensor) and result.is_meta and id(result.untyped_storage()) not in self._sizes:
            self._forms[key] = (result.shape, result.stride(), result.dtype)
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        if id(storage) not in self._sizes:
            self._sizes[id(storage)] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            self.whole = max(self.whole, self.now + self._left_out)
            weakref.finalize(storage, self._forget, id(storage)).atexit = False

    def _forget(self, storage: int) -> None:
        self.now -= self._sizes.pop(storage)

    def leave_out(self, tensor: Tensor) -> None:
        """Count a tensor no longer."""
        size = self._sizes[id(tensor.untyped_storage())]
        self.now, self._left_out = self.now - size, self._left_out + size
        self._sizes[id(tensor.untyped_storage())] = 0


@cache
def _has_aliases(function: Any) -> bool:
    """Whether an operation says that it works in place, or makes a view (`_unsafe_view` does not say so)."""
    return any(argument.alias_info is not None for argument in function._schema.arguments)


def _form(value: Any) -> Any:
    """What the form of an operation's result depends on: on the meta device, tensors have no values."""
    match value:
        case Tensor():
            return value.shape, value.stride(), value.dtype, value.device
        case list() | tuple():
            return tuple(map(_form, value))
        case dict():
            return tuple((name, _form(item)) for name, item in value.items())
    return type(value), value


class FusedAttention(torch.autograd.Function):
    """The shapes of attention, and what its kernels keep for the backward pass."""

    @staticmethod
    def forward(context: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The output's shape, with the heads of a token side by side in memory, as the kernels leave it."""
        output = query.new_empty(*query.transpose(-3, -2).shape[:-1], value.shape[-1]).transpose(-3, -2)
        context.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        """The gradients' shapes."""
        return tuple(torch.empty_like(tensor) for tensor in context.saved_tensors[:3])


class Cuda(TorchFunctionMode):
    """On the meta device, the types of tensors that CUDA's autocast would make, and its fused attention.

    The ``dtype`` is the autocast's precision; float32 is without.
    """

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        """Start a forward pass."""
        super().__init__()
        self._dtype = dtype
        # As autocast does, weights are cast once in a forward pass, and anew where it is computed again.
        self._casts: dict[int, Tensor] | None = {}

    def end_forward(self) -> None:
        """What follows is the backward pass."""
        self._casts = None

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the function."""
        kwargs = kwargs or {}
        if self._casts is None and not torch.is_grad_enabled():
            return function(*args, **kwargs)  # How the meta device makes a kernel of the backward pass, in steps.
        if function is Tensor.__bool__ and args[0].is_meta:
            return True  # Such as whether a mask hides nothing: there are no values to look at.
        if self._dtype != torch.float32 and (function in LOWERED or function in WIDENED):
            dtype = self._dtype if function in LOWERED else torch.float32
            args = tuple(self._cast(value, dtype) for value in args)
            kwargs = {name: self._cast(value, dtype) for name, value in kwargs.items()}
        if function is functional.scaled_dot_product_attention:
            inputs = (*args[:3], *(kwargs[name] for name in ("query", "key", "value")[len(args) :]))
            return FusedAttention.apply(*inputs)  # type: ignore[no-untyped-call]
        return function(*args, **kwargs)

    def _cast(self, value: Any, dtype: torch.dtype) -> Any:
        halves = (torch.bfloat16, torch.float16, torch.float32)
        if not isinstance(value, Tensor) or value.dtype not in halves or value.dtype == dtype:
            return value
        if self._casts is None or not (value.is_leaf and value.requires_grad):
            return value.to(dtype)
        if id(value) not in self._casts:
            self._casts[id(value)] = value.to(dtype)
        return self._casts[id(value)]


def encoded_prompts(family: Family, count: int) -> Conditioning:
    """A family's encoded prompts without values, N rows, of a pipeline on the meta device."""
    with Cuda():
        return family.encode_without_values(count)


class Passes:
    """The passes of a run on the meta device, in bytes beside what was there before.

    Args:
        networks: The three roles, on the meta device.
        dtype: Precision of the run: bfloat16, float16 or float32.
        tiny: What makes images of latents, if it is not the family's own decoder.
    """

    def __init__(self, networks: Networks, dtype: torch.dtype, tiny: TinyDecoder | None = None) -> None:
        """Keep the networks."""
        self.networks, self.dtype, self.tiny = networks, dtype, tiny
        self._rows: dict[Family, Conditioning] = {}
        self._forms: dict[Any, Any] = {}

    def forward(self, role: Role, count: int) -> int:
        """The most that a role's network takes at once for so many samples, without gradients."""
        inputs = self._inputs(role, count)
        memory = self._memory(*inputs)
        with torch.no_grad(), Cuda(self.dtype), memory:
            self._predict(role, *inputs)
        return memory.peak

    def update(self, role: Role, count: int) -> tuple[int, int, int]:
        """The activations that a role's forward pass keeps, and the most at once until the end of the backward pass.

        The gradients of weights are left out; the third figure is what they add to that, where each comes as its
        layer's activations go.
        """
        inputs = self._inputs(role, count)
        memory, cuda = self._memory(*inputs), Cuda(self.dtype)
        parameters = self.networks.parameters(role)
        hooks = [parameter.register_hook(memory.leave_out) for parameter in parameters]
        with cuda, memory:
            output = [self._predict(role, *inputs)]
            cuda.end_forward()
            kept = memory.now
            _pull_back(output, parameters)
        for hook in hooks:
            hook.remove()
        return kept, memory.peak, memory.whole - memory.peak

    def decode(self, count: int, *, gradient: bool) -> int:
        """The most that decoding so many latents takes; with ``gradient``, and a gradient pulled back to them."""
        latents = torch.zeros(count, *self.networks.family.latent_shape, device="meta", requires_grad=gradient)
        memory, cuda = self._memory(latents), Cuda()
        with torch.set_grad_enabled(gradient), cuda, memory:
            images = (self.tiny or self.networks.family.decode)(latents)
            cuda.end_forward()
            if gradient:
                _pull_back([images], [latents])
        return memory.peak

    def enable_checkpointing(self) -> None:
        """Recompute activations from now on, in the networks and the decoder."""
        self.networks.enable_activation_checkpointing()
        self.networks.family.enable_decoder_checkpointing()
        if self.tiny is not None:
            self.tiny.network.enable_gradient_checkpointing()

    def _inputs(self, role: Role, count: int) -> tuple[Tensor, Tensor, Conditioning]:
        family = self.networks.family_of(role)
        if family not in self._rows:
            self._rows[family] = encoded_prompts(family, 1)
        x_t = torch.zeros(count, *family.latent_shape, device="meta")
        return x_t, torch.ones(count, device="meta"), self._rows[family].repeat(count)

    def _predict(self, role: Role, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        with self.networks.role(role):
            return self.networks.family_of(role).forward(self.networks.module(role), x_t, t, conditioning)

    def _memory(self, *inputs: Any) -> Memory:
        return Memory(self._existing(*inputs), self._forms)

    def _existing(self, *inputs: Any) -> Iterator[Tensor]:
        tiny = None if self.tiny is None else self.tiny.network
        for module in (*map(self.networks.module, get_args(Role)), self.networks.family.decoder, tiny):
            if module is not None:
                yield from (*module.parameters(), *module.buffers())
        for value in inputs:
            yield from value.tensors.values() if isinstance(value, Conditioning) else (value,)


def _pull_back(output: list[Tensor], inputs: Iterable[Tensor]) -> None:
    """Go backward from the only output, which is taken, so that nobody else keeps it."""
    start = [torch.zeros_like(output[0])]
    # Edges of the graph instead of tensors, for which torch would leave the modes of functions.
    ends = [get_gradient_edge(output.pop())]
    torch.autograd.grad(ends, [get_gradient_edge(tensor) for tensor in inputs], start)
