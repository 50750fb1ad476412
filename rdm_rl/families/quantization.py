"""The frozen base in 8 or 4 bits: which backend stores what, and how many bytes that takes.

Linear layers alone are stored so, of the denoising network and of the text encoders; convolutions, norms and the
decoder keep the run's precision. A weight is put back into that precision for the moment of its matrix product, forward
and backward, so that gradients pass through it and adapters train on it as on any other.

========  =====================================  =======================================================  =============
kind      backend                                what is kept of a weight                                 runs on
========  =====================================  =======================================================  =============
``int8``  torchao, ``Int8WeightOnlyConfig``      8-bit integers, a scale for each output                  CPU and GPU
``fp8``   torchao, ``Float8WeightOnlyConfig``    8-bit floats (e4m3), a scale for each output             CPU and GPU
``nf4``   bitsandbytes, ``load_in_4bit``         4-bit indices into a table of normal quantiles, a scale  a CUDA GPU
                                                 for each 64 weights, itself in 8 bits
========  =====================================  =======================================================  =============

optimum-quanto is not used: diffusers has it marked for removal.

References:
    | QLoRA: Efficient Finetuning of Quantized LLMs (Dettmers et al., 2023): frozen 4-bit weights under trained adapters
    | https://arxiv.org/abs/2305.14314
"""

from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Any, Literal

import diffusers
import torch
import transformers
from diffusers import PipelineQuantizationConfig
from torch import Tensor, nn
from torch.nn import functional

# Not public by its name, but documented (torch's notes on extending it), and the only way to see a tensor's subclass.
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

Quantization = Literal["int8", "nf4", "fp8"]
BACKENDS: dict[Quantization, str] = {"int8": "torchao", "nf4": "bitsandbytes", "fp8": "torchao"}
NEEDS_GPU: frozenset[Quantization] = frozenset({"nf4"})


def check_quantization(kind: Quantization, *, on_gpu: bool) -> None:
    """Raise where a kind of quantisation cannot work here.

    Args:
        kind: The kind.
        on_gpu: Whether the networks run on a CUDA GPU.

    Raises:
        ImportError: If its backend is not installed.
        ValueError: If it does not run on this device.
    """
    backend = BACKENDS[kind]
    if find_spec(backend) is None:
        raise ImportError(
            f"base_quantization={kind!r} needs the package {backend}, which is not installed: "
            f"pip install 'rdm-rl[{backend}]', or leave it out."
        )
    if kind in NEEDS_GPU and not on_gpu:
        raise ValueError(
            f"base_quantization={kind!r} needs a CUDA GPU, and this run is on another device. Set 'int8' or 'fp8', "
            "which run anywhere, or leave it out."
        )


def single_file_error(kind: Quantization, model: str) -> ValueError:
    """Why a model in one file is refused: diffusers (0.42) takes the setting, and leaves the weights as they were."""
    return ValueError(
        f"base_quantization={kind!r} is set, but model={model!r} is one file, which diffusers does not quantise. "
        "Convert it once, from_single_file(file, config=...).save_pretrained(folder), and pass the folder, or leave it "
        "out."
    )


def quantization_config(
    kind: Quantization, networks: Mapping[str, torch.dtype], text_encoders: Mapping[str, torch.dtype]
) -> PipelineQuantizationConfig:
    """What ``from_pretrained`` of a pipeline is told.

    Args:
        kind: The kind.
        networks: Names of its networks of diffusers, and the precision that their products are computed in.
        text_encoders: The same of its encoders of prompts, which are of transformers.
    """
    mapping: dict[str, Any] = {name: _config(diffusers, kind, dtype) for name, dtype in networks.items()}
    mapping |= {name: _config(transformers, kind, dtype) for name, dtype in text_encoders.items()}
    return PipelineQuantizationConfig(quant_mapping=mapping)


def _config(library: Any, kind: Quantization, dtype: torch.dtype) -> Any:
    """The configuration of diffusers or transformers: each takes its own classes, of the same names."""
    if kind == "nf4":
        options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": dtype}
        return library.BitsAndBytesConfig(load_in_4bit=True, **options)
    # It may be missing, and takes seconds to import.
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

    # Unless told not to, both change torch's global precision of matrix products.
    kind_of = Int8WeightOnlyConfig if kind == "int8" else Float8WeightOnlyConfig
    return library.TorchAoConfig(kind_of(set_inductor_config=False))


def is_quantized(network: nn.Module) -> bool:
    """Whether a network of diffusers or transformers was loaded quantised."""
    return getattr(network, "hf_quantizer", None) is not None


class _FrozenProduct(torch.autograd.Function):
    """``inputs @ weight.T + bias`` of a quantised weight, which the backward pass puts back anew."""

    @staticmethod
    def forward(context: Any, inputs: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
        """The product."""
        context.weight, context.dtype = weight, inputs.dtype
        return functional.linear(inputs, weight.dequantize(), bias)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """The gradient of the inputs alone: weight and bias are frozen."""
        weight = context.weight.dequantize().to(gradients[0].dtype)
        return (gradients[0] @ weight).to(context.dtype), None, None


class FrozenLinear(nn.Linear):
    """A linear layer with a frozen weight of torchao, which is put back for the moment of a product.

    torchao's own product lets autograd keep what it put back of every layer until the backward pass, which is more than
    the layer takes unquantised.
    """

    def forward(self, inputs: Tensor) -> Tensor:
        """The layer's output, shape (..., outputs)."""
        output: Tensor = _FrozenProduct.apply(inputs, self.weight, self.bias)  # type: ignore[no-untyped-call]
        return output


def free_memory_between_products(network: nn.Module) -> None:
    """Make the linear layers of torchao in a network :class:`FrozenLinear`, in place; bitsandbytes' need no help."""
    for module in network.modules():
        if type(module) is nn.Linear and is_traceable_wrapper_subclass(module.weight):
            module.__class__ = FrozenLinear


def quantized_weights(network: nn.Module) -> Iterator[Tensor]:
    """The weights that are stored quantised, of a network that is loaded so: those of linear layers, without adapters.

    What the network keeps in float32 stays as it is, and of an encoder of transformers also the last parameter and the
    head of a language model.

    Args:
        network: A network of diffusers or transformers, quantised or not.
    """
    kept = set(getattr(network, "_keep_in_fp32_modules", None) or ())
    if isinstance(network, transformers.PreTrainedModel):
        ends = [list(network.parameters())[-1], getattr(network.get_output_embeddings(), "weight", None)]
    else:
        ends = []
    for name, layer in network.named_modules():
        stays = "lora_" in name or not kept.isdisjoint(name.split("."))
        if isinstance(layer, nn.Linear) and not stays and all(layer.weight is not end for end in ends):
            yield layer.weight


def unpacked_size(weight: Tensor, kind: Quantization) -> int:
    """The most that putting a weight back takes, in bytes: torchao goes through float32, twice.

    Example:
        >>> weight = torch.empty(64, 256, dtype=torch.bfloat16, device="meta")
        >>> unpacked_size(weight, "int8"), unpacked_size(weight, "nf4")
        (131072, 32768)
    """
    return weight.numel() * (weight.element_size() if kind == "nf4" else 8)


def quantized_size(weight: Tensor, kind: Quantization) -> int:
    """The bytes of a linear layer's weight, shape (outputs, inputs), when it is stored quantised.

    Example:
        >>> weight = torch.empty(64, 256, dtype=torch.bfloat16, device="meta")
        >>> [quantized_size(weight, kind) for kind in ("int8", "fp8", "nf4")]
        [16704, 16640, 8452]
    """
    outputs, count = len(weight), weight.numel()
    if kind == "int8":
        return count + outputs * 5  # Scales in float32, and offsets, which are 0.
    if kind == "fp8":
        return count + outputs * 4
    groups = -(-count // 64)
    return -(-count // 2) + groups + -(-groups // 256) * 4
