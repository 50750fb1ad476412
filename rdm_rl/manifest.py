"""The manifest of a folder: what its files held when they were written, so that damage is found before they are used.

``manifest.json`` has the size and the checksum (XXH3, 128 bits) of every file, some facts about the whole, and a
checksum of itself. It finds accidents, not attackers: whoever can write the files can write a manifest, too.
"""

import json
import os
from collections.abc import Iterable
from errno import EINVAL
from hashlib import file_digest
from pathlib import Path
from typing import Any

from xxhash import xxh3_128, xxh3_128_hexdigest

from rdm_rl.files import written_whole

MANIFEST = "manifest.json"


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk: a power cut does not take them back then."""
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folders.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != EINVAL:  # Some network file systems do not sync folders.
            raise
    finally:
        os.close(descriptor)


def write_manifest(folder: Path, files: Iterable[Path], **facts: Any) -> None:
    """Bring files to the disk, and after them a manifest that says what they hold.

    Args:
        folder: Where the manifest goes.
        files: Files in it, or in folders below it.
        facts: What else it says, as JSON can hold it.

    Example:
        >>> from tempfile import mkdtemp
        >>> folder = Path(mkdtemp())
        >>> file = folder / "weights.bin"
        >>> _ = file.write_bytes(b"1234")
        >>> write_manifest(folder, [file], step=4)
        >>> read_manifest(folder)["step"], damage(folder)
        (4, [])
        >>> _ = file.write_bytes(b"123")
        >>> damage(folder)
        ['weights.bin is cut off: 3 bytes instead of 4']
    """
    listed = {}
    for file in sorted(files):
        sync(file)
        listed[file.relative_to(folder).as_posix()] = {"size": file.stat().st_size, "checksum": _checksum(file)}
    content = {**facts, "files": listed}
    with written_whole(folder / MANIFEST) as file:
        file.write_text(json.dumps({**content, "checksum": _own_checksum(content)}, indent=2), encoding="utf-8")
        sync(file)
    sync(folder)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The facts of a folder's manifest, and under ``files`` the size and checksum of each file.

    Raises:
        ValueError: If there is none, or it is not what was written.
    """
    try:
        text = (folder / MANIFEST).read_bytes()
    except FileNotFoundError:
        raise ValueError(f"{MANIFEST} is missing") from None
    if not text:
        raise ValueError(f"{MANIFEST} is empty")
    try:
        content: dict[str, Any] = json.loads(text)
        checksum = content.pop("checksum")
    except (ValueError, LookupError, AttributeError, TypeError):
        raise ValueError(f"{MANIFEST} is no manifest, or cut off: {len(text)} bytes") from None
    if checksum != _own_checksum(content):
        raise ValueError(f"{MANIFEST} has changed since it was written")
    return content


def damage(folder: Path, *, contents: bool = True) -> list[str]:
    """What is wrong with a folder that has a manifest, or should have one.

    Args:
        folder: The folder.
        contents: Read the files and compare their checksums; without it, their sizes alone.

    Returns:
        A clause for each file that is not what was written; none if all are.
    """
    try:
        files = read_manifest(folder)["files"]
    except ValueError as error:
        return [str(error)]
    faults = {name: _fault(folder / name, **written, contents=contents) for name, written in files.items()}
    return [f"{name} {fault}" for name, fault in faults.items() if fault]


def _fault(file: Path, size: int, checksum: str, *, contents: bool) -> str:
    """What is wrong with a file; empty if nothing is."""
    try:
        bytes_now = file.stat().st_size
        if bytes_now != size:
            what = "is empty" if bytes_now == 0 else "is cut off" if bytes_now < size else "has grown"
            return f"{what}: {bytes_now} bytes instead of {size}"
        if contents and _checksum(file) != checksum:
            return "has changed since it was written, or is a file of another folder: its checksum differs"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return ""


def _checksum(file: Path) -> str:
    with file.open("rb") as content:
        return file_digest(content, xxh3_128).hexdigest()


def _own_checksum(content: dict[str, Any]) -> str:
    return xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())
