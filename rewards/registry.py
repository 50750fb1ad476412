"""The registry of rewards: one dictionary from a name to a reward, of either kind.

A *plain* reward is a callable ``(images, prompts, **columns)`` that returns a value for each image; see
:mod:`rdm_rl.rewards.calling` for the contract. A reward that says itself where samples should move is an object with a
``direction`` method, such as ``rdm``. If an object also has a ``bind`` method, the trainer calls it once, before
training, with the networks and the settings.

Names come from :func:`register_reward`, from the library, and from packages with an entry point in the group
``rdm_rl.rewards``. A name may also be ``module:attribute`` or ``path/to/file.py:attribute``.
"""

import inspect
import math
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, TypeVar
from zlib import crc32

from rdm_rl.rewards.calling import DECLARATIONS
from rdm_rl.rewards.protocol import DirectionReward
from rdm_rl.settings import did_you_mean

ENTRY_POINTS = "rdm_rl.rewards"


Reward = TypeVar("Reward", bound=Callable[..., Any])
RewardSpec = str | DirectionReward | Callable[..., Any]

# Where the library's own rewards live; a module is imported when its reward is asked for.
_BUILT_IN = {
    "rdm": "rdm_rl.rewards.rdm:DistributionMatchingReward",
    "pickscore": "rdm_rl.rewards.clip:PickScore",
    "hpsv2": "rdm_rl.rewards.clip:HPSv2",
    "hpsv2.1": "rdm_rl.rewards.clip:HPSv21",
    "clip_score": "rdm_rl.rewards.clip:CLIPScore",
    "aesthetic": "rdm_rl.rewards.aesthetic:AestheticScore",
    "image_reward": "rdm_rl.rewards.image_reward:ImageReward",
    "jpeg_compressibility": "rdm_rl.rewards.jpeg:JpegCompressibility",
    "jpeg_incompressibility": "rdm_rl.rewards.jpeg:JpegIncompressibility",
    "ocr": "rdm_rl.rewards.ocr:TextMatch",
    "teacher_clip": "rdm_rl.rewards.teacher_match:TeacherCLIP",
    "teacher_dino": "rdm_rl.rewards.teacher_match:TeacherDINO",
    "teacher_perceptual": "rdm_rl.rewards.teacher_match:TeacherPerceptual",
    "teacher_mse": "rdm_rl.rewards.teacher_match:TeacherMSE",
    "teacher_histogram": "rdm_rl.rewards.teacher_match:TeacherHistogram",
    "vlm_judge": "rdm_rl.rewards.server:VLMJudge",
    "http": "rdm_rl.rewards.server:HTTPReward",
    "digit_logprob": "rdm_rl.digits.rewards:DigitLogProb",
    "scene_logprob": "rdm_rl.scenes.rewards:SceneLogProb",
    "ink": "rdm_rl.digits.rewards:ink",
    "symmetry": "rdm_rl.digits.rewards:symmetry",
}
_REGISTERED: dict[str, Callable[..., Any]] = {}


def register_reward(name: str, **declarations: Any) -> Callable[[Reward], Reward]:
    """A decorator that registers a reward under a name, and returns what it decorates.

    That is either a function, which is the reward, or a class, which makes the reward when the name is asked for (with
    the options given there).

    Args:
        name: The name to use in ``reward_funcs``.
        declarations: Attributes to set on it, such as ``differentiable=True`` (see :mod:`rdm_rl.rewards.calling`), or
            others that it has.

    Raises:
        ValueError: If the name is taken, or could not be told from ``module:attribute``, or a declaration is unknown.

    Example:
        >>> @register_reward("brightness", differentiable=True)
        ... def brightness(images, prompts):
        ...     return images.mean((1, 2, 3))
        >>> "brightness" in list_rewards()
        True
        >>> unregister_reward("brightness")
    """

    def decorate(reward: Reward) -> Reward:
        if ":" in name:
            raise ValueError(f"A reward cannot be named {name!r}: a colon means module:attribute.")
        if name in list_rewards():
            raise ValueError(
                f"A reward named {name!r} is already registered. Choose another name, or call "
                f"rdm_rl.rewards.unregister_reward({name!r}) first if you are defining it again."
            )
        for attribute in declarations:
            if attribute not in DECLARATIONS and not hasattr(reward, attribute):
                raise ValueError(
                    f"register_reward({name!r}, {attribute}=...) declares what no reward has."
                    f"{did_you_mean(attribute, DECLARATIONS)} Declarations are {', '.join(DECLARATIONS)}."
                )
        for attribute, value in declarations.items():
            setattr(reward, attribute, value)
        _REGISTERED[name] = reward
        return reward

    return decorate


def unregister_reward(name: str) -> None:
    """Remove a reward that :func:`register_reward` added.

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
    return sorted({*_BUILT_IN, *_REGISTERED, *(point.name for point in entry_points(group=ENTRY_POINTS))})


def find_reward(name: str) -> Callable[..., Any]:
    """The function that is the reward of a name, or the class that makes it.

    Args:
        name: A registered name, ``module:attribute`` or ``path/to/file.py:attribute``.

    Raises:
        ValueError: If no reward has the name (the message suggests the nearest), or two have it.
        ModuleNotFoundError: If a package that the reward needs is not installed.
        FileNotFoundError: If the file does not exist.

    Example:
        >>> find_reward("rmd")
        Traceback (most recent call last):
        ...
        ValueError: No reward is named 'rmd'. Did you mean 'rdm'? `rdm-rl rewards list` shows all of them.
    """
    points = [point for point in entry_points(group=ENTRY_POINTS) if point.name == name]
    if len(points) + (name in _BUILT_IN) + (name in _REGISTERED) > 1:
        origins = ", ".join(_distribution(point) for point in points)
        raise ValueError(f"Several rewards are named {name!r}: that of {origins} clashes. Uninstall one of them.")
    if name in _REGISTERED:
        return _REGISTERED[name]
    if points:
        point, extras = points[0], ",".join(points[0].extras)
        loaded: Callable[..., Any] = _load(name, point.load, f"'{_distribution(point)}[{extras}]'" if extras else "")
        return loaded
    if name in _BUILT_IN or ":" in name:
        source, attribute = _BUILT_IN.get(name, name).rsplit(":", 1)
        try:
            module = _load(name, lambda: _import(source))
        except ModuleNotFoundError as error:
            if error.name is None or not f"{source}.".startswith(f"{error.name}."):
                raise  # Something that the module needs.
            raise ModuleNotFoundError(
                f"reward_funcs names {name!r}, but there is no module {source!r}: it is misspelt, or not installed. "
                "For a file, give its path: path/to/file.py:attribute.",
                name=error.name,
            ) from None
        if not hasattr(module, attribute):
            near = get_close_matches(attribute, dir(module), n=1, cutoff=0.6)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"reward_funcs names {name!r}, but {source!r} has no {attribute!r}.{hint}")
        reward: Callable[..., Any] = getattr(module, attribute)
        return reward
    near = get_close_matches(name, list_rewards(), n=1, cutoff=0.5)
    hint = f"Did you mean {near[0]!r}? " if near else ""
    raise ValueError(f"No reward is named {name!r}. {hint}`rdm-rl rewards list` shows all of them.")


def _distribution(point: EntryPoint) -> str:
    return point.dist.name if point.dist else point.value


def _import(source: str) -> Any:
    if not source.endswith(".py"):
        return import_module(source)
    file = Path(source)
    if not file.is_file():
        raise FileNotFoundError(f"The reward file {source!r} does not exist.")
    name = f"rdm_rl_reward_file_{crc32(str(file.resolve()).encode()):08x}"
    if name not in sys.modules:  # Run once, however many of its rewards are used.
        spec = spec_from_file_location(name, file)
        if spec is None or spec.loader is None:
            raise ValueError(f"{source!r} is no Python file that can be imported.")
        sys.modules[name] = module_from_spec(spec)
        try:
            spec.loader.exec_module(sys.modules[name])
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def _load(name: str, load: Callable[[], Any], install: str = "") -> Any:
    try:
        return load()
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"The reward {name!r} needs {error.name!r}, which is not installed: pip install {install or error.name}",
            name=error.name,
        ) from error


def get_reward(name: str, **options: Any) -> Any:
    """A reward by name: a new object if the name stands for a class, else the function itself.

    Args:
        name: As in :func:`find_reward`.
        options: What the reward's class takes, such as ``model="folder"`` or ``device="cuda:1"``.

    Raises:
        ValueError: If no reward has the name, or it takes no such options.

    Example:
        >>> get_reward("clip_score", model="my-clip", dtype="bfloat16").model
        'my-clip'
    """
    reward = find_reward(name)
    if not inspect.isclass(reward):
        if options:
            raise ValueError(f"The reward {name!r} is a function and takes no options; got {', '.join(options)}.")
        return reward
    try:
        inspect.signature(reward).bind(**options)
    except TypeError as error:
        known = ", ".join(inspect.signature(reward).parameters) or "none"
        raise ValueError(f"The reward {name!r} cannot be made: {error}. Its options are: {known}.") from None
    try:
        made: Any = reward(**options)
    except TypeError as error:  # Options that it passes on.
        raise ValueError(f"The reward {name!r} cannot be made with {options}: {error}.") from error
    if not hasattr(made, "name"):
        made.name = name_of(name)  # So that the log has one name for it, however it was made.
    return made


def name_of(spec: RewardSpec) -> str:
    """The name under which a reward appears in the log.

    That is the registered name; the attribute's name for ``module:attribute``; a function's name; an object's ``name``,
    or that of its class.

    Example:
        >>> name_of("my_package.rewards:sharpness")
        'sharpness'
    """
    if isinstance(spec, str):
        return spec.rsplit(":", 1)[-1]
    return str(getattr(spec, "name", None) or getattr(spec, "__name__", type(spec).__name__)).strip("<>")


def load_rewards(reward_funcs: RewardSpec | Sequence[RewardSpec]) -> dict[str, Any]:
    """The rewards that ``reward_funcs`` names or holds, by name, in the given order.

    Args:
        reward_funcs: One name, callable or object, or a list of them.

    Raises:
        ValueError: If the list is empty, a name is unknown, or two rewards share a name.
        TypeError: If an entry is neither callable nor has a ``direction`` method.
    """
    specs = [reward_funcs] if isinstance(reward_funcs, str) or not isinstance(reward_funcs, Sequence) else reward_funcs
    if not specs:
        raise ValueError('reward_funcs is empty, so nothing says where to go. Pass at least one reward, e.g. "rdm".')
    rewards: dict[str, Any] = {}
    for index, spec in enumerate(specs):
        reward = get_reward(spec) if isinstance(spec, str) else spec
        if inspect.isclass(reward):
            raise TypeError(
                f"reward_funcs[{index}] is the class {reward.__name__}. Pass an object: {reward.__name__}()."
            )
        if not isinstance(reward, DirectionReward) and not callable(reward):
            raise TypeError(
                f"reward_funcs[{index}] ({spec!r}) is neither a name, nor a callable (images, prompts, **columns), nor "
                "an object with a direction(rollout, step, *, generator) method."
            )
        name = name_of(spec)
        if name in rewards:
            raise ValueError(f"reward_funcs names {name!r} twice. Set the attribute `name` of one of them.")
        rewards[name] = reward
    return rewards


def reward_weights(
    names: Sequence[str], weights: Sequence[float] | None, *, adaptive: bool = False
) -> dict[str, float]:
    """The weight of each reward, by name.

    Args:
        names: The rewards.
        weights: One weight for each; None for the default.
        adaptive: Whether weights are shares of the force of ``rdm``. Then the default is 1 for ``rdm`` and 0.3 for each
            other reward, which on the digits raised a reward and cost little fidelity; otherwise it is 1 for all.

    Raises:
        ValueError: If the numbers differ, or one is not finite.

    Example:
        >>> reward_weights(["rdm"], None)
        {'rdm': 1.0}
        >>> reward_weights(["rdm", "ink"], None, adaptive=True)
        {'rdm': 1.0, 'ink': 0.3}
    """
    if weights is not None and len(weights) != len(names):
        raise ValueError(f"reward_weights has {len(weights)} entries for {len(names)} rewards ({', '.join(names)}).")
    if weights is None:
        return {name: 0.3 if adaptive and "rdm" in names and name != "rdm" else 1.0 for name in names}
    if not all(map(math.isfinite, weights)):
        raise ValueError(
            f"reward_weights={list(weights)} has an entry that is no finite number. Use 0 to watch a reward."
        )
    return dict(zip(names, weights, strict=True))
