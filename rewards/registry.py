"""The registry of rewards: one dictionary from a name to what makes the reward.

A reward that says itself where samples should move is an object with a ``direction`` method, such as ``rdm``. If it
also has a ``bind`` method, the trainer calls it once, before training, with the networks and the settings.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

from rdm_rl.data_types import DenseAdvantage, Rollout
from rdm_rl.randomness import Generators

if TYPE_CHECKING:
    from rdm_rl.networks import Networks
    from rdm_rl.trainers.rdm_config import RDMConfig


@dataclass(frozen=True, kw_only=True)
class RewardContext:
    """What a reward that needs the networks is given, once, before training.

    Args:
        networks: The policy, the teacher and the fake score.
        args: The run's settings.
        teacher_guidance_scale: Guidance of the teacher: the setting, or the family's published value.
        global_step: Gives the number of policy updates made so far.
    """

    networks: "Networks"
    args: "RDMConfig"
    teacher_guidance_scale: float
    global_step: Callable[[], int]


@runtime_checkable
class DirectionReward(Protocol):
    """A reward that gives its own direction."""

    def direction(self, rollout: Rollout, step: int, *, generator: Generators) -> DenseAdvantage:
        """Where the prediction of x_0 at a recorded step should move.

        Args:
            rollout: The recorded chains of N samples.
            step: Index of the step that will be replayed with gradients.
            generator: The reward's randomness: one generator, or one for each sample.

        Returns:
            The direction, shape (N, C, H, W).
        """
        ...


@runtime_checkable
class BindableReward(Protocol):
    """A reward that needs the networks."""

    def bind(self, context: RewardContext) -> None:
        """Take what the trainer gives before training."""
        ...


Factory = TypeVar("Factory", bound=Callable[[], Any])
RewardSpec = str | DirectionReward

# Where the library's own rewards live; a module is imported when its reward is asked for.
_BUILT_IN = {"rdm": "rdm_rl.rewards.rdm:DistributionMatchingReward"}
_REGISTERED: dict[str, Callable[[], Any]] = {}


def register_reward(name: str) -> Callable[[Factory], Factory]:
    """A decorator that registers a reward class, or a function that makes a reward, under a name.

    Args:
        name: The name to use in ``reward_funcs``.

    Returns:
        The decorator; it returns what it decorates.

    Raises:
        ValueError: If the name is taken.

    Example:
        >>> @register_reward("stay")
        ... class Stay:
        ...     def direction(self, rollout, step, *, generator):
        ...         zero = rollout.x_0[step] * 0
        ...         return DenseAdvantage(values=zero, applicable=zero.flatten(1).isfinite().all(1))
        >>> "stay" in list_rewards()
        True
        >>> unregister_reward("stay")
    """

    def decorate(factory: Factory) -> Factory:
        if name in list_rewards():
            raise ValueError(f"A reward named {name!r} is already registered. Choose another name.")
        _REGISTERED[name] = factory
        return factory

    return decorate


def unregister_reward(name: str) -> None:
    """Remove a reward that :func:`register_reward` added.

    Args:
        name: Its name.

    Raises:
        KeyError: If no such reward was registered; the library's own cannot be removed.
    """
    del _REGISTERED[name]


def list_rewards() -> list[str]:
    """The names of all registered rewards, sorted.

    Example:
        >>> "rdm" in list_rewards()
        True
    """
    return sorted({*_BUILT_IN, *_REGISTERED})


def get_reward(name: str) -> Any:
    """A new reward of a registered name.

    Args:
        name: The name.

    Returns:
        The reward.

    Raises:
        ValueError: If no reward has the name; the message suggests the nearest.

    Example:
        >>> get_reward("rmd")
        Traceback (most recent call last):
        ...
        ValueError: No reward is named 'rmd'. Did you mean 'rdm'? Registered: rdm.
    """
    if name in _REGISTERED:
        return _REGISTERED[name]()
    if name in _BUILT_IN:
        module, attribute = _BUILT_IN[name].split(":")
        return getattr(import_module(module), attribute)()
    near = get_close_matches(name, list_rewards(), n=1, cutoff=0.3)
    hint = f"Did you mean {near[0]!r}? " if near else ""
    raise ValueError(f"No reward is named {name!r}. {hint}Registered: {', '.join(list_rewards())}.")


def resolve_rewards(reward_funcs: RewardSpec | Sequence[RewardSpec]) -> dict[str, DirectionReward]:
    """The rewards that ``reward_funcs`` names or holds, by name.

    Args:
        reward_funcs: One name or object, or a list of them. An object's name is its ``name`` attribute or its class.

    Returns:
        The rewards in the given order.

    Raises:
        ValueError: If the list is empty, a name is unknown, or two rewards share a name.
        TypeError: If an entry has no ``direction`` method.
    """
    specs = [reward_funcs] if isinstance(reward_funcs, str) or not isinstance(reward_funcs, Sequence) else reward_funcs
    if not specs:
        raise ValueError('reward_funcs is empty, so nothing says where to go. Pass at least one reward, e.g. "rdm".')
    rewards: dict[str, DirectionReward] = {}
    for index, spec in enumerate(specs):
        reward = get_reward(spec) if isinstance(spec, str) else spec
        if not isinstance(reward, DirectionReward):
            raise TypeError(
                f"reward_funcs[{index}] ({spec!r}) has no direction(rollout, step, *, generator) method. Plain reward "
                "functions are not supported in this version: give an object that returns a DenseAdvantage."
            )
        name = spec if isinstance(spec, str) else str(getattr(spec, "name", type(spec).__name__))
        if name in rewards:
            raise ValueError(f"reward_funcs names {name!r} twice. Give the second one another name.")
        rewards[name] = reward
    return rewards


def reward_weights(names: Sequence[str], weights: Sequence[float] | None) -> Mapping[str, float]:
    """The weight of each reward, by name; 1 for all if none are given.

    Args:
        names: The rewards.
        weights: One weight for each, or None.

    Returns:
        The weights.

    Raises:
        ValueError: If the numbers differ.

    Example:
        >>> reward_weights(["rdm"], None)
        {'rdm': 1.0}
    """
    if weights is not None and len(weights) != len(names):
        raise ValueError(f"reward_weights has {len(weights)} entries for {len(names)} rewards ({', '.join(names)}).")
    return dict(zip(names, weights or [1.0] * len(names), strict=True))
