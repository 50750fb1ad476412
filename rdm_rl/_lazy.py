"""Public names that load their module on first use, so that ``import rdm_rl`` does not wait for torch."""

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazy_names(package: str, modules: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The module-level ``__getattr__`` and ``__dir__`` of a package (PEP 562).

    Args:
        package: Name of the package that shows the names.
        modules: For each public name, the module that defines it.

    Returns:
        The two functions, to be assigned to ``__getattr__`` and ``__dir__`` in the package.

    Example:
        >>> get, names = lazy_names("rdm_rl", {"sqrt": "math"})
        >>> get("sqrt")(9.0)
        3.0
    """

    def get(name: str) -> Any:
        if name not in modules:
            # Python uses `name` and `obj` to suggest the nearest public name.
            raise AttributeError(f"module {package!r} has no attribute {name!r}", name=name, obj=sys.modules[package])
        return getattr(import_module(modules[name]), name)

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *modules})

    return get, names
