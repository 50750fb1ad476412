r"""Adapters that are added to the weights within each pass: one product with a weight instead of three.

An adapter beside its layer, as PEFT computes it, costs a small network more than its arithmetic says: on the embedded
digits a forward pass with rank 1, with 2 % more arithmetic, takes 1.6 times as long as without, because every layer
becomes three, each of which reads and writes whole activations. Here the layer is applied once, to
:math:`W + s\, B A`, which is made anew in each pass, with its graph: so rollout and replay agree to the last bit, as
they do beside, and adapters have the same gradients up to rounding. The price is a copy of the layer's weights until
its backward pass, and the gradient of a whole weight on the way to A and B: large networks are better off beside.
"""

from functools import partial
from typing import Any

import torch
from peft.tuners.lora.layer import Conv2d, Linear
from torch import Tensor, nn
from torch.nn import functional as F


def add_adapters_to_weights(network: nn.Module) -> None:
    """Let the adapter layers of a network in float32 add what is active to their weights in each pass.

    Args:
        network: A network with adapters; its other weights are frozen.
    """
    for layer in network.modules():
        if _is_plain(layer):
            layer.forward = partial(_forward, layer)


def _is_plain(layer: nn.Module) -> bool:
    """Whether a module is an adapter layer whose adapters are products of two weights and nothing else."""
    if type(layer) not in (Linear, Conv2d):
        return False
    adapted: Any = layer
    base = adapted.base_layer
    return (
        base.weight.dtype == torch.float32
        and not adapted.lora_variant
        and not any(adapted.lora_bias.values())
        and not getattr(adapted, "fan_in_fan_out", False)
        and getattr(base, "groups", 1) == 1
    )


def _forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """What the layer's own ``forward`` gives, up to rounding."""
    active = layer.active_adapters
    if args or kwargs or layer.merged or len(active) != 1:
        output: Tensor = type(layer).forward(layer, x, *args, **kwargs)
        return output
    base, (adapter,) = layer.base_layer, active
    if layer.disable_adapters or adapter not in layer.lora_A:
        output = base(x)
        return output
    product = layer.lora_B[adapter].weight.flatten(1) @ layer.lora_A[adapter].weight.flatten(1)
    weight = torch.add(base.weight, product.view_as(base.weight), alpha=layer.scaling[adapter])
    if isinstance(base, nn.Linear):
        return F.linear(x, weight, base.bias)
    output = base._conv_forward(x, weight, base.bias)
    return output
