"""Names of models and adapters: what is a folder, what is on the hub, and why it cannot be had, in one line."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError


def check_hub_name(setting: str, name: str) -> None:
    """Raise where a name can be neither a folder, because there is none, nor one on the hub.

    Args:
        setting: What was set to it.
        name: The name.

    Raises:
        FileNotFoundError: If it can be neither.
    """
    if Path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise FileNotFoundError(
            f"{setting}={name!r} is neither an existing folder nor a hub name of the form 'owner/name'. "
            "Check the path, or pass a loaded DiffusionPipeline."
        )


def adapter_file(source: str) -> tuple[str, str | None]:
    """Where an adapter is, as ``load_lora_weights`` takes it: a folder, file or hub name, and the name of its file.

    Args:
        source: A folder, a file, a hub name ``owner/name``, or ``owner/name/file.safetensors``.

    Returns:
        Path or hub name, and the file's name; None where diffusers finds it.

    Raises:
        FileNotFoundError: If a folder does not say which of its files is the adapter.

    Example:
        >>> adapter_file("owner/name/a-lora.safetensors")
        ('owner/name', 'a-lora.safetensors')
    """
    path = Path(source)
    if path.is_dir():
        files = sorted(file.name for file in path.glob("*.safetensors"))
        usual = "pytorch_lora_weights.safetensors"
        if usual not in files and len(files) != 1:
            raise FileNotFoundError(
                f"{source!r} holds no {usual}, and {len(files)} other .safetensors files. Name the file itself."
            )
        return source, usual if usual in files else files[0]
    if path.is_file():
        return str(path.parent), path.name
    parts = source.split("/")
    if len(parts) > 2 and source.endswith(".safetensors"):
        return "/".join(parts[:2]), "/".join(parts[2:])
    return source, None


def mismatch(error: RuntimeError) -> str:
    r"""The first line that matters of torch's long story about weights of other shapes.

    Example:
        >>> mismatch(RuntimeError("Error(s) in loading:\n\tsize mismatch for to_q: a\n\tsize mismatch for to_k: b"))
        'size mismatch for to_q: a (2 such lines), so it is made for another base'
    """
    lines = [line.strip().rstrip(".") for line in str(error).splitlines() if "mismatch" in line]
    if not lines:
        return " ".join(str(error).split())
    return f"{lines[0]} ({len(lines)} such lines), so it is made for another base"


@contextmanager
def one_line_errors(setting: str, name: str) -> Iterator[None]:
    """Say in one line why something cannot be loaded, with the long story as its cause.

    Args:
        setting: What was set to it.
        name: Its name.

    Raises:
        OSError: Instead of the hub's and diffusers' own errors of loading.
    """
    try:
        yield
    except OSError as error:
        raise OSError(f"{setting}={name!r} cannot be loaded: {_reason(error, name)}.") from error
    except ValueError as error:  # What diffusers says of an adapter's repository without a connection.
        if "weight_name" not in str(error):
            raise
        raise OSError(
            f"{setting}={name!r} cannot be loaded: there is no such folder, and without a connection an adapter of the "
            "hub needs the name of its file, 'owner/name/file.safetensors'."
        ) from error


def _reason(error: OSError, name: str) -> str:
    """Why a name leads to nothing, and what to do about it."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    kinds = [type(link) for link in chain]
    if any(issubclass(kind, GatedRepoError) for kind in kinds):
        return "its owner asks you to accept a licence: do so on its hub page, then log in with `hf auth login`"
    if any(issubclass(kind, RepositoryNotFoundError) for kind in kinds):
        return "the hub has nothing public of this name: check it, or log in with `hf auth login`"
    story = " ".join(str(error).split()).split(". ")[0].rstrip(".")
    if Path(name).exists():
        return story
    if constants.HF_HUB_OFFLINE or any(issubclass(kind, ConnectionError | LocalEntryNotFoundError) for kind in kinds):
        cause = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
        return (
            f"there is no such folder, no whole copy in the hub's cache, and {cause}. Give the folder of a copy, "
            "or let it be downloaded: with a network, and without HF_HUB_OFFLINE"
        )
    return f"there is no such folder, and of the hub's: {story}"


@contextmanager
def without_diffusers_log(module: str = "loaders.peft") -> Iterator[None]:
    """Without what a module of diffusers logs: pages of an adapter that does not fit, where the error is enough."""
    logger = logging.getLogger(f"diffusers.{module}")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


@contextmanager
def sharing_a_base() -> Iterator[None]:
    """Without PEFT's warnings of a second adapter on one model, which is on purpose, and of keys, which are checked."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`", UserWarning)
        warnings.filterwarnings("ignore", "While injecting the PEFT adapters", RuntimeWarning)
        yield
