"""Encoded prompts on disk: computed once, so that the text encoders can leave the GPU."""

import os
from collections.abc import Callable, Iterable, Sequence
from hashlib import sha256
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from rdm_rl.data_types import Conditioning

Encode = Callable[[Sequence[str]], Conditioning]


class PromptCache:
    """A folder with a file for each encoded prompt.

    Each prompt is encoded by itself, so that its row does not depend on who stood beside it.

    Args:
        folder: Where the files are.
        key: Name of the text encoders: rows of others never mix.
    """

    def __init__(self, folder: str | Path, key: str) -> None:
        """Keep the folder."""
        self.folder = Path(folder) / key

    def file(self, prompt: str) -> Path:
        """Where a prompt's row is."""
        name = sha256(prompt.encode()).hexdigest()[:32]
        return self.folder / name[:2] / f"{name}.safetensors"

    def fill(self, prompts: Iterable[str], encode: Encode, *, show_progress: bool = True) -> None:
        """Encode the prompts that are not there yet.

        Args:
            prompts: The prompts.
            encode: The encoders.
            show_progress: Show a progress bar.
        """
        missing = [prompt for prompt in dict.fromkeys(prompts) if not self.file(prompt).is_file()]
        for prompt in tqdm(missing, desc="encoding prompts", disable=not (show_progress and missing)):
            self._write(prompt, encode)

    def encode(self, prompts: Sequence[str], encode: Encode) -> Conditioning:
        """The rows of prompts, on the CPU; those that are not there yet are encoded and kept.

        Args:
            prompts: N prompts.
            encode: The encoders.

        Returns:
            N rows.
        """
        rows: dict[str, dict[str, Tensor]] = {}
        for prompt in prompts:
            if prompt not in rows:
                file = self.file(prompt)
                if not file.is_file():
                    self._write(prompt, encode)
                rows[prompt] = load_file(file)
        names = rows[prompts[0]]
        return Conditioning(tensors={name: torch.cat([rows[prompt][name] for prompt in prompts]) for name in names})

    def _write(self, prompt: str, encode: Encode) -> None:
        file = self.file(prompt)
        file.parent.mkdir(parents=True, exist_ok=True)
        # Under a name of this process first: two processes may encode one prompt, and none must read half a file.
        partial = file.with_suffix(f".{os.getpid()}.partial")
        save_file({name: row.cpu().contiguous() for name, row in encode([prompt]).tensors.items()}, partial)
        partial.replace(file)
