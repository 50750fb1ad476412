"""Networks bigger than one GPU: their weights cut over the processes by torch's FSDP2.

Each process keeps a part of every weight. A block's weights are gathered just before it runs, forward or backward, and
let go after it. What runs is the same network in the same order, so the roles of :mod:`rdm_rl.networks.roles`
work as they do without.

Adapters stay whole on every process, and their gradients are averaged by the trainer. In full fine-tuning the weights
of all three networks are cut, and with them gradients, optimiser states and the average; FSDP2 averages the gradients
itself. What is saved is always whole, so that a run can go on with another number of processes.

Every process must run every network equally often, and gathering a weight takes all of them: a branch that only one
process takes waits for ever.

References:
    | PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel (Zhao et al., 2023)
    | https://arxiv.org/abs/2304.11277
"""

from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from typing import Any

import torch
import torch.distributed
from peft import inject_adapter_in_model
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor

from rdm_rl.families.hub import sharing_a_base


def check_sharding(processes: int) -> None:
    """Check that networks can be sharded over so many processes.

    Raises:
        ValueError: If there is only one.
        RuntimeError: If torch is too old.
    """
    if processes < 2:
        raise ValueError(
            "shard=True spreads the networks over the processes, but there is only one. Start several (torchrun "
            "--nproc_per_node 2 script.py, or accelerate launch on several GPUs), or leave out shard. One GPU takes "
            "less memory with bf16=True, activation_checkpointing=True and offload=['text_encoders', 'rewards']."
        )
    # torch 2.6 has fully_shard, but it cannot leave adapters out.
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 7):
        raise RuntimeError(f"shard=True needs torch 2.7 or newer; this is {torch.__version__}.")


def shard(network: nn.Module, device: torch.device, whole: Iterable[nn.Parameter] = ()) -> None:
    """Cut the weights of a network over all processes, in place.

    The network may be on the CPU before: each block is moved to the device, cut, and all but this process's part of it
    let go, before the next one is.

    Args:
        network: The network, the same on all processes. Its weights become ``DTensor``.
        device: Where this process computes.
        whole: Weights that are not cut, but moved to the device.
    """
    from torch.distributed.fsdp import fully_shard  # Not there before torch 2.6.

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    kept = set(whole)
    for parameter in kept:
        parameter.data = parameter.data.to(device)
    for module in [*blocks(network), network]:
        # Cut again after each forward pass, the outermost module too: between passes every weight is a DTensor.
        fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=kept)


def blocks(network: nn.Module, *, outermost: bool = True) -> Iterator[nn.Module]:
    """The parts of a network that are gathered one at a time, inner ones first.

    They are the items of its lists of modules, and of the lists in these, and what beside them holds lists of its own,
    as the middle of a UNet does. Attention and feed-forward layers, which keep their parts in lists too, are not
    looked into.

    Example:
        >>> block = nn.Module()
        >>> block.resnets = nn.ModuleList([nn.Linear(2, 2)])
        >>> unet = nn.Module()
        >>> unet.down_blocks, unet.conv_out = nn.ModuleList([block]), nn.Linear(2, 2)
        >>> [type(part).__name__ for part in blocks(unet)]
        ['Linear', 'Module']
    """
    for child in network.children():
        items: Iterable[nn.Module] = []
        if isinstance(child, nn.ModuleList):
            items = child
        elif outermost and any(isinstance(item, nn.ModuleList) for item in child.children()):
            items = [child]
        for item in items:
            yield from blocks(item, outermost=False)
            if any(True for _ in item.parameters()):
                yield item


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is cut over the processes."""
    return isinstance(tensor, DTensor)


def holds_shards(network: nn.Module) -> bool:
    """Whether weights of a network are cut over the processes."""
    return any(is_sharded(parameter) for parameter in network.parameters())


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, or the tensor itself if it is not cut.

    It shares the tensor's memory. It can be written to between a forward and a backward pass, if what was there is put
    back: autograd does not see it.
    """
    data = tensor.data
    return data.to_local() if isinstance(data, DTensor) else data


def with_local(tensor: Tensor, part: Tensor) -> Tensor:
    """A tensor cut as another one is, with this process's part given; the part itself if that is not cut."""
    if not isinstance(tensor, DTensor):
        return part
    shape, stride = tensor.size(), tensor.stride()
    return DTensor.from_local(part, tensor.device_mesh, tensor.placements, shape=shape, stride=stride)


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor, detached; all processes must ask for it."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def cut_like(value: Tensor, parameter: Tensor) -> Tensor:
    """A whole value, the same on all processes, cut as a parameter is, on its device and with memory of its own.

    It is the value itself if the parameter is not cut.
    """
    if not isinstance(parameter, DTensor):
        return value
    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)


def gather(tree: Any, *, keep: bool = True) -> Any:
    """A nested structure with every tensor whole, those that were cut on the CPU; all processes must call it.

    Args:
        tree: Dictionaries, lists and tuples of tensors and whatever else.
        keep: Whether this process wants the result: one process that writes a file is enough, and the others need no
            memory for it. Without it the tensors that were cut are empty.
    """
    if isinstance(tree, DTensor):
        full = whole(tree)
        return full.cpu() if keep else torch.empty(0)
    if isinstance(tree, Mapping):
        return {key: gather(value, keep=keep) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(gather(value, keep=keep) for value in tree)
    return tree


def whole_copy(network: nn.Module, *, keep: bool = True) -> nn.Module | None:
    """A plain network with the weights of another one, whole, to be saved; of a sharded one all processes must call it.

    The copy is on the CPU and in float32, in which an adapter can be added to the weights without being rounded away.

    Args:
        network: A network of diffusers, sharded or not, with adapters or without.
        keep: Whether this process wants the copy; None without.
    """
    from torch.distributed.fsdp import FSDPModule  # Not there before torch 2.6.

    state = gather(network.state_dict(), keep=keep)
    if not keep:
        return None
    # FSDP2 gives a network a class of its own and hooks, which neither can be copied nor should be saved.
    kind: Any = next(base for base in type(network).__mro__ if not issubclass(base, FSDPModule))
    source: Any = network
    with torch.device("meta"), sharing_a_base():
        copy: nn.Module = kind.from_config(source.config)
        for name, config in getattr(source, "peft_config", {}).items():
            inject_adapter_in_model(deepcopy(config), copy, name)
    # With memory of its own: what is merged into it must not reach the network.
    copies = {name: value.to("cpu", value.dtype, copy=True) for name, value in state.items()}
    copy.load_state_dict(copies, assign=True)
    copy.float()
    return copy.eval().requires_grad_(False)
