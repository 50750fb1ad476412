"""What every report shares: a page that needs nothing but itself, plain JSON, and the versions that made it.

Pictures are inlined, there is no script, and the page's content security policy forbids any request.
"""

import platform
from base64 import b64encode
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from io import BytesIO
from math import isfinite
from typing import Any, Literal

import torch
from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure
from PIL import Image

import rdm_rl
from rdm_rl.evaluation.curves import History, curves_figure, present_panels
from rdm_rl.evaluation.pictures import DARK, LIGHT
from rdm_rl.evaluation.tables import ARROWS

_PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "numpy")


def render(package: str, template: str, **content: Any) -> str:
    """A page from a template beside a package's modules, which extends ``page.html``. All text in it is escaped.

    Args:
        package: The package.
        template: The template's name.
        content: What the template names.
    """
    loader = ChoiceLoader([PackageLoader(name, "") for name in (package, "rdm_rl.evaluation")])
    pages = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return pages.get_template(template).render(arrows=ARROWS, versions=library_versions(), **content)


def drawn_panels(histories: Mapping[str, History]) -> list[dict[str, Any]]:
    """The plots of training logs in both colour schemes, each with what the page says of it."""
    panels = []
    for panel in present_panels(histories):
        light, dark = (data_uri(curves_figure([panel], histories, theme=theme)) for theme in (LIGHT, DARK))
        texts = {"title": panel.title, "reading": panel.reading, "primary": panel.primary}
        panels.append({**texts, "light": light, "dark": dark})
    return panels


def data_uri(picture: Image.Image | Figure, form: Literal["png", "jpeg"] = "png") -> str:
    """A picture as the address of itself."""
    buffer = BytesIO()
    if isinstance(picture, Figure):
        picture.savefig(buffer, format=form, dpi=150)
    else:
        picture.save(buffer, format=form, optimize=True)
    return f"data:image/{form};base64," + b64encode(buffer.getvalue()).decode("ascii")


def library_versions() -> dict[str, str]:
    """The versions of Python, of this library and of those it computes with, and the kind of machine.

    Example:
        >>> library_versions()["rdm_rl"] == rdm_rl.__version__
        True
    """
    versions = {"python": platform.python_version(), "rdm_rl": rdm_rl.__version__}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return versions | {"system": f"{platform.system()} {platform.machine()}", "cuda_device": accelerator}


def plain(value: Any) -> Any:
    """A value in terms of strict JSON: a number that is not finite is null, and what JSON lacks is text.

    Example:
        >>> plain({"rate": 0.1, "limit": float("inf"), "sizes": (1, 2)})
        {'rate': 0.1, 'limit': None, 'sizes': [1, 2]}
    """
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(entry) for entry in value]
    if isinstance(value, float):
        return value if isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)
