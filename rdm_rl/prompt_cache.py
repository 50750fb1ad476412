"""Encoded prompts on disk: computed once, so that the text encoders can leave the GPU."""

import os
from collections.abc import Iterable, Sequence
from hashlib import sha256
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rdm_rl.data_types import Conditioning

EMPTY_PROMPT = "\0empty"
"""Stands for what guidance compares with: no prompt begins with this character."""


class PromptCache:
    """A folder with a file for each encoded prompt.

    Args:
        folder: Where the files are.
        key: Name of what encodes: rows of others never mix.
    """

    def __init__(self, folder: str | Path, key: str) -> None:
        """Keep the folder."""
        self.folder = Path(folder) / key

    def file(self, prompt: str) -> Path:
        """Where a prompt's row is."""
        name = sha256(prompt.encode()).hexdigest()[:32]
        return self.folder / name[:2] / f"{name}.safetensors"

    def missing(self, prompts: Iterable[str]) -> list[str]:
        """Those of the prompts that are not there yet, each once."""
        return [prompt for prompt in dict.fromkeys(prompts) if not self.file(prompt).is_file()]

    def write(self, prompt: str, row: Conditioning) -> None:
        """Keep a row.

        Args:
            prompt: The prompt.
            row: Its encoding, one row.
        """
        file = self.file(prompt)
        file.parent.mkdir(parents=True, exist_ok=True)
        # Under a name of this process first: two processes may encode one prompt, and none must read half a file.
        partial = file.with_suffix(f".{os.getpid()}.partial")
        save_file({name: value.cpu().contiguous() for name, value in row.tensors.items()}, partial)
        partial.replace(file)

    def read(self, prompts: Sequence[str]) -> Conditioning:
        """The rows of prompts that are there, on the CPU.

        Args:
            prompts: N prompts.

        Returns:
            N rows.
        """
        rows: dict[str, dict[str, Tensor]] = {prompt: load_file(self.file(prompt)) for prompt in dict.fromkeys(prompts)}
        names = rows[prompts[0]]
        return Conditioning(tensors={name: torch.cat([rows[prompt][name] for prompt in prompts]) for name in names})
