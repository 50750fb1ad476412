"""Settings said once: a type says which values there are, one sentence what they do, and a class what they belong to.

A settings class is a dataclass whose name ends in ``Settings`` and which stands beside what it sets. From its fields
follow the flags, the help text and its groups, the tables of the reference page (:func:`groups`), how a value from a
file, the command line or Python is read (:func:`convert`), and what is refused (:func:`check`).
"""

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import Field, field, fields
from difflib import get_close_matches
from enum import Enum
from functools import wraps
from inspect import signature
from os import PathLike, fspath
from os.path import expanduser
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias, TypeVar, Union, get_args, get_origin, get_type_hints


class Within(NamedTuple):
    """The range of a number, written in its type, where transformers' argument parser does not see it.

    Args:
        low: The smallest value.
        high: The largest value.
        but_not: An end that does not belong to the range.

    Example:
        >>> str(Within(1)), str(Within(0, but_not=0)), str(Within(0, 1, but_not=1))
        ('at least 1', 'above 0', 'between 0 and 1, and not 1')
    """

    low: float = -math.inf
    high: float = math.inf
    but_not: float | None = None

    def holds(self, value: float) -> bool:
        """Whether a value is in the range; infinity and NaN never are."""
        return math.isfinite(value) and self.low <= value <= self.high and value != self.but_not

    def __str__(self) -> str:
        """What a value must be."""
        if self.high < math.inf:
            text = f"between {self.low} and {self.high}"
            return text if self.but_not is None else f"{text}, and not {self.but_not}"
        return f"above {self.low}" if self.but_not == self.low else f"at least {self.low}"


Count: TypeAlias = Annotated[int, Within(1)]
Whole: TypeAlias = Annotated[int, Within(0)]
Finite: TypeAlias = Annotated[float, Within()]
Size: TypeAlias = Annotated[float, Within(0)]
Positive: TypeAlias = Annotated[float, Within(0, but_not=0)]
Share: TypeAlias = Annotated[float, Within(0, 1)]
Folder: TypeAlias = Annotated[str, expanduser]  # What is called in a type, is called on the value.

Kind = TypeVar("Kind")

_NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false", dict: "a mapping"}
_BOOLEANS = {**dict.fromkeys(("true", "yes", "on", "1"), True), **dict.fromkeys(("false", "no", "off", "0"), False)}
_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")  # YAML takes it for text unless it has both dot and sign.


def setting(default: Any, help: str) -> Any:
    """A field of a settings class.

    Args:
        default: The default, or a function that makes it.
        help: What the setting does and what else its default means, in a sentence or two; code is in backticks.

    Returns:
        The field.
    """
    chosen = {"default_factory": default} if callable(default) else {"default": default}
    return field(**chosen, metadata={"help": help})


def convert(settings: Any, names: Collection[str] | None = None) -> None:
    """Give every field the type of its annotation, and refuse what cannot have it or could not be saved.

    Args:
        settings: An object of a settings class, which is changed.
        names: The fields; None for all.

    Raises:
        ValueError: If a value has no such type.

    Example:
        >>> from dataclasses import dataclass
        >>> from pathlib import Path
        >>> @dataclass
        ... class DemoSettings:
        ...     sizes: list[float] | None = None
        ...     folder: Folder = "out"
        >>> demo = DemoSettings("1e-3", Path("runs"))
        >>> convert(demo)
        >>> demo
        DemoSettings(sizes=[0.001], folder='runs')
    """
    hints = get_type_hints(type(settings), include_extras=True)
    for each in fields(settings):
        if each.init and (names is None or each.name in names):
            value, hint = getattr(settings, each.name), hints[each.name]
            try:
                setattr(settings, each.name, _converted(_plain(value), hint, each.default))
            except _UnsavableError as error:
                raise ValueError(f"{each.name}={value!r} cannot be saved with a run: {error}.") from None
            except (TypeError, ValueError):
                raise ValueError(f"{each.name}={value!r}, but it must be {_described(hint)}.") from None


def check(settings: Any, names: Collection[str] | None = None) -> None:
    """Refuse a value that is none of its type's choices or outside its range, and say what to set instead.

    Args:
        settings: An object of a settings class whose values are converted.
        names: The fields; None for all.

    Raises:
        ValueError: If a value cannot be.
    """
    hints = get_type_hints(type(settings), include_extras=True)
    for each in fields(settings):
        if names is None or each.name in names:
            _check(each.name, getattr(settings, each.name), hints[each.name])


def groups(kind: type) -> dict[str, dict[str, Field[Any]]]:
    """The fields of a class's settings, by the group that they are explained in.

    Args:
        kind: A class that derives from settings classes.

    Returns:
        For the title of each group, its fields by name, with the defaults that they have in ``kind``; in their order.
    """
    groups: dict[str, dict[str, Field[Any]]] = {}
    settings = {each.name: each for each in fields(kind)}
    for parent in reversed(kind.__mro__):
        if parent.__name__.endswith("Settings"):
            title = str(parent.__doc__).split("\n", 1)[0].rstrip(".")
            groups.setdefault(title, {}).update({name: settings[name] for name in parent.__annotations__})
    return groups


def help_of(kind: type, name: str) -> str:
    """What a setting does: in a class that only changes its default, what its parents say.

    Args:
        kind: A dataclass.
        name: The field.

    Returns:
        The sentence; empty if there is none.
    """
    declared = (vars(parent).get("__dataclass_fields__", {}).get(name) for parent in kind.__mro__)
    return next((each.metadata["help"] for each in declared if each is not None and each.metadata.get("help")), "")


def did_you_mean(value: Any, known: Iterable[Any]) -> str:
    """A sentence with the nearest name that there is; empty if none is near.

    Example:
        >>> did_you_mean("gruop", ["group", "sample"])
        " Did you mean 'group'?"
    """
    near = get_close_matches(str(value), [str(each) for each in known], n=1, cutoff=0.4)
    return f" Did you mean {near[0]!r}?" if near else ""


def explains_names(kind: type[Kind]) -> type[Kind]:
    """A decorator for a class that says which argument is meant where it is given one that it does not take.

    Args:
        kind: The class; what it takes must be named in its ``__init__``.

    Returns:
        The same class.

    Example:
        >>> @explains_names
        ... class Demo:
        ...     def __init__(self, adam_beta1: float = 0.9) -> None: ...
        >>> Demo(beta1=0.5)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        TypeError: Demo takes no 'beta1'. Did you mean 'adam_beta1'? docs/reference.md has ...
    """
    make = kind.__init__

    @wraps(make)
    def __init__(self: Kind, *values: Any, **named: Any) -> None:
        strange = [name for name in named if name not in known]
        if strange:
            near = nearest_setting(strange[0], known)
            raise TypeError(
                f"{kind.__name__} takes no {strange[0]!r}.{f' Did you mean {near!r}?' if near else ''} "
                "docs/reference.md has all that it takes, and docs/migration_from_trl.md what TRL calls otherwise."
            )
        make(self, *values, **named)

    known = signature(make).parameters
    kind.__init__ = __init__  # type: ignore[method-assign, assignment]
    return kind


def nearest_setting(name: str, known: Collection[str]) -> str | None:
    """The setting that a name ends, or else the nearest if one is near.

    Example:
        >>> nearest_setting("train_batch_size", ["reward_batch_size", "per_device_train_batch_size"])
        'per_device_train_batch_size'
    """
    ended = [each for each in known if each.endswith(f"_{name}")]
    return next(iter(ended or get_close_matches(name, known, n=1, cutoff=0.75)), None)


class _UnsavableError(Exception):
    """A value has no form in JSON."""


def _plain(value: Any) -> Any:
    """A value as JSON can hold it: numbers of NumPy and torch, paths and tuples become Python's own."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, PathLike):
        value = fspath(value)
    if isinstance(value, Mapping):
        return {str(_plain(key)): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(entry) for entry in value]
    if value is None or isinstance(value, bool | int | float | str | Enum):
        return value
    raise _UnsavableError(f"{value!r} is neither a number nor text, nor a list or mapping of them")


def _converted(value: Any, hint: Any, default: Any = None) -> Any:
    """A plain value in the type that an annotation asks for; a ValueError or TypeError if it has none."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        value = _converted(value, arguments[0], default)
        for mark in hint.__metadata__:
            value = mark(value) if callable(mark) else value
        return value
    if origin in (Union, UnionType):
        return _first_that_fits(value, arguments, default)
    if origin is Literal:
        return _switched_off(value, arguments) if value is None or value is False else value
    if origin is list or hint is list:
        if isinstance(value, dict):
            raise TypeError
        entries = value if isinstance(value, list) else [value]
        return [_converted(entry, arguments[0]) for entry in entries] if arguments else entries
    if origin is dict or hint is dict:
        if not isinstance(value, dict):
            raise TypeError
        return _with_numbers(value)
    if hint in _SCALARS:
        return _SCALARS[hint](value)
    return value  # Enumerations, of which transformers makes members itself.


def _first_that_fits(value: Any, kinds: Sequence[Any], default: Any) -> Any:
    """A value in the alternative that it has already, or else in the first one that it can take."""
    choices = [choice for kind in kinds for choice in _choices(kind)] + ([default] if isinstance(default, str) else [])
    if value is False and bool not in kinds and False not in choices:
        value = _switched_off(value, choices) or None
    if NoneType in kinds and value not in choices and str(value).lower() in ("none", "null"):
        return None
    for kind in sorted((kind for kind in kinds if kind is not NoneType), key=lambda kind: not _is(value, kind)):
        with suppress(TypeError, ValueError):
            return _converted(value, kind)
    raise TypeError


def _choices(kind: Any) -> list[Any]:
    if isinstance(kind, type) and issubclass(kind, Enum):
        return [member.value for member in kind]
    return list(get_args(kind)) if get_origin(kind) is Literal else []


def _switched_off(value: bool | None, choices: Sequence[Any]) -> Any:
    """The choice that `no` or `off` meant before YAML made False of it, if there is one."""
    return next((word for word in ("none", "no", "off") if word in choices), value)


def _is(value: Any, kind: Any) -> bool:
    """Whether a value needs no conversion."""
    if get_origin(kind) is Annotated:
        return _is(value, get_args(kind)[0])
    kind = get_origin(kind) or kind
    return value in _choices(kind) or type(value) is kind or (kind is float and type(value) is int)


def _whole(value: Any) -> int:
    if isinstance(value, str):
        value = int(value) if value.strip().lstrip("+-").isdigit() else float(value)
    if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
        raise ValueError
    return int(value)


def _number(value: Any) -> float:
    if isinstance(value, bool):
        raise TypeError
    return value if isinstance(value, int) else float(value)


def _text(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise TypeError
    return str(value)


def _truth(value: Any) -> bool:
    if str(value).lower() not in _BOOLEANS:
        raise ValueError
    return _BOOLEANS[str(value).lower()]


_SCALARS: dict[Any, Callable[[Any], Any]] = {int: _whole, float: _number, str: _text, bool: _truth}


def _with_numbers(value: Any) -> Any:
    """A mapping whose values have no annotation, with the numbers that YAML takes for text: 1e-3."""
    if isinstance(value, dict):
        return {key: _with_numbers(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_with_numbers(entry) for entry in value]
    return float(value) if isinstance(value, str) and _EXPONENT.fullmatch(value) else value


def _described(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(_described(kind) for kind in arguments))
    if origin is Annotated:
        return _described(arguments[0])
    if origin is list:
        return f"a list, each entry {_described(arguments[0])}"
    return "None" if hint is NoneType else _NAMES.get(origin or hint, "text")


def _check(name: str, value: Any, hint: Any, instead: str = "") -> None:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        kinds = [kind for kind in arguments if kind is not NoneType]
        if len(kinds) == 1 and value is not None:
            _check(name, value, kinds[0], ", or None")
    elif origin is list:
        for index, entry in enumerate(value):
            _check(f"{name}[{index}]", entry, arguments[0])
    elif origin is Literal and value not in arguments:
        raise ValueError(
            f"{name}={value!r} is unknown.{did_you_mean(value, arguments)} Use one of {arguments}{instead}."
        )
    elif origin is Annotated:
        _check(name, value, arguments[0], instead)
        for within in hint.__metadata__:
            if isinstance(within, Within) and not within.holds(value):
                needed = str(within) if math.isfinite(value) else "a finite number"
                raise ValueError(f"{name}={value}, but it must be {needed}{instead}.")
