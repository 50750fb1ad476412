"""Encoding prompts: from a cache on disk if there is one, and with text encoders that wait off the GPU."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import CLIPTokenizer, CLIPTokenizerFast, PreTrainedTokenizerBase

from rdm_rl.files import cache_key, config_facts, load_tensors, save_tensors
from rdm_rl.records import Conditioning

EMPTY_PROMPT = "\0empty"
"""Stands for what guidance compares with: no prompt begins with this character."""

_CLIP = (CLIPTokenizer, CLIPTokenizerFast)
_PROBE = "Two Cats,  a naïve “3.5” & 猫."


@dataclass(frozen=True)
class CutPrompts:
    """Prompts of which the end is not encoded.

    Args:
        tokenizers: Names of the tokenizers that cut them.
        limit: The tokens that are kept, special ones included.
        count: Number of such prompts.
        longest: Tokens of the longest.
    """

    tokenizers: tuple[str, ...]
    limit: int
    count: int
    longest: int


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
        save_tensors(self.file(prompt), row.tensors)

    def read(self, prompts: Sequence[str]) -> Conditioning:
        """The rows of prompts that are there, on the CPU.

        Args:
            prompts: N prompts.

        Returns:
            N rows.

        Raises:
            ValueError: If a file is damaged.
        """
        rows = {prompt: load_tensors(self.file(prompt))[0] for prompt in dict.fromkeys(prompts)}
        names = rows[prompts[0]]
        return Conditioning(tensors={name: torch.cat([rows[prompt][name] for prompt in prompts]) for name in names})


class PromptEncoding(ABC):
    """A family's encoding of prompts, with a cache and with encoders that are on the GPU only while they encode."""

    pipeline: Any

    def __init__(self) -> None:
        """No cache, and encoders that stay where they are."""
        self.prompt_cache: PromptCache | None = None
        self.offloads_text_encoders = False
        self._empty: Conditioning | None = None

    @property
    @abstractmethod
    def text_encoders(self) -> list[nn.Module]:
        """The encoders of prompts that the pipeline has."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the networks run."""

    @abstractmethod
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """The encoded prompts, one row each, on the family's device: what the pipeline's own encoding gives."""

    def encode_empty_prompt(self) -> Conditioning:
        """What guidance compares with, one row: the encoded empty prompt."""
        return self.encode_prompts([""])

    @torch.no_grad()
    def encode_without_values(self, count: int) -> Conditioning:
        """Encoded prompts on the meta device, where ``rdm-rl plan`` makes the pipeline: shapes and types alone.

        A family whose encoding looks at words, or at values, overrides it.

        Args:
            count: Rows N.
        """
        return self.encode_prompts(["a prompt"] * count)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """The encoded prompts, one row each, on the family's device, without a graph; from the cache if there is one.

        Args:
            prompts: N prompts.

        Returns:
            N rows.
        """
        if self.prompt_cache is None:
            with self._encoding():
                return self._finite(self.encode_prompts(prompts), prompts)
        self.fill_prompt_cache(prompts, show_progress=False)
        return self.prompt_cache.read(prompts).to(self.device)

    @torch.no_grad()
    def empty_prompt(self) -> Conditioning:
        """What guidance compares with, one row, kept after the first call."""
        if self._empty is None:
            if self.prompt_cache is None:
                with self._encoding():
                    self._empty = self._finite(self.encode_empty_prompt(), [""])
            else:
                self._empty = self.encode([EMPTY_PROMPT])
        return self._empty

    @property
    def tokenizers(self) -> dict[str, PreTrainedTokenizerBase]:
        """The pipeline's tokenizers by name."""
        parts = self.pipeline.components.items()
        return {name: part for name, part in parts if isinstance(part, PreTrainedTokenizerBase)}

    @property
    def token_limits(self) -> dict[str, int]:
        """How many tokens of a prompt the pipeline keeps, special ones included, by the name of the tokenizer.

        Stock pipelines give CLIP's tokenizers their own limit, and the others that of ``encode_prompt``, if it has one.
        A family that cuts elsewhere overrides it.
        """
        limits = {name: tokenizer.model_max_length for name, tokenizer in self.tokenizers.items()}
        encode = getattr(self.pipeline, "encode_prompt", None)
        usual = encode and signature(encode).parameters.get("max_sequence_length")
        if usual and isinstance(usual.default, int):
            others = [name for name, tokenizer in self.tokenizers.items() if not isinstance(tokenizer, _CLIP)]
            limits |= dict.fromkeys(others, usual.default)
        return limits

    def cut_prompts(self, prompts: Iterable[str]) -> list[CutPrompts]:
        """The prompts that are too long for the pipeline.

        Args:
            prompts: The prompts.

        Returns:
            An entry for each tokenizer that cuts any; tokenizers that cut the same share one.
        """
        texts = list(prompts)
        if hasattr(self.pipeline, "_text_preprocessing"):  # Sana's and PixArt's read small letters only.
            texts = self.pipeline._text_preprocessing(texts)
        names: dict[tuple[int, int, int], list[str]] = {}
        for name, tokenizer in self.tokenizers.items():  # Some may be missing, where prompts are given encoded.
            limit = self.token_limits[name]
            too_long = [length for length in _token_counts(tokenizer, texts) if length > limit]
            if too_long:
                names.setdefault((limit, len(too_long), max(too_long)), []).append(name)
        return [CutPrompts(tuple(cutting), *numbers) for numbers, cutting in names.items()]

    @torch.no_grad()
    def fill_prompt_cache(self, prompts: Sequence[str], *, show_progress: bool = True) -> None:
        """Encode the prompts that the cache does not hold yet, if there is a cache.

        Each is encoded by itself, so that its row does not depend on who stands beside it.

        Args:
            prompts: The prompts; :data:`EMPTY_PROMPT` is what guidance compares with.
            show_progress: Show a progress bar.
        """
        missing = [] if self.prompt_cache is None else self.prompt_cache.missing(prompts)
        if self.prompt_cache is None or not missing:
            return  # The encoders are left where they are.
        with self._encoding():
            for prompt in tqdm(missing, desc="encoding prompts", disable=not show_progress):
                is_empty = prompt == EMPTY_PROMPT
                row = self.encode_empty_prompt() if is_empty else self.encode_prompts([prompt])
                self.prompt_cache.write(prompt, self._finite(row, ["" if is_empty else prompt]))

    def _finite(self, rows: Conditioning, prompts: Sequence[str]) -> Conditioning:
        """The encoded prompts, if all their values are finite.

        Raises:
            ValueError: If one is not: an encoder has overflowed.
        """
        for name, value in rows.tensors.items():
            if value.is_meta or bool(value.isfinite().all()):
                continue
            prompt = prompts[int((~value.isfinite()).flatten(1).any(1).nonzero()[0])]
            encoders = [f"{type(encoder).__name__} in {dtype_of(encoder)}" for encoder in self.text_encoders]
            raise ValueError(
                f"The prompt {prompt!r} is encoded with values that are not finite ({name}, by {', '.join(encoders)}): "
                "an encoder overflows, or its weights are damaged. If fp16=True is set, set bf16=True instead, or none."
            )
        return rows

    @contextmanager
    def _encoding(self) -> Iterator[None]:
        """The encoders on the network's device for the length of the context, outside of any autocast."""
        asleep = [
            encoder
            for encoder in self.text_encoders
            if self.offloads_text_encoders and device_of(encoder) != self.device
        ]
        for encoder in asleep:
            encoder.to(self.device)
        try:
            with torch.autocast(self.device.type, enabled=False):
                yield
        finally:
            for encoder in asleep:
                encoder.to("cpu")

    def encoding_facts(self) -> dict[str, object]:
        """What encoded prompts depend on beside encoders and tokenizers; a family adds settings of its own.

        Here it is the pipeline's kind, and those of its settings that are no components.
        """
        pipeline = self.pipeline
        settings = {
            name: value for name, value in config_facts(pipeline.config).items() if name not in pipeline.components
        }
        return {"pipeline": type(pipeline).__name__, "settings": settings}

    def encoder_fingerprint(self) -> str:
        """A short name of all that makes the encoded prompts: encoders, tokenizers, and how the pipeline uses them."""
        tokenizers = {name: _facts(tokenizer) for name, tokenizer in self.tokenizers.items()}
        encoders = {str(number): encoder for number, encoder in enumerate(self.text_encoders)}
        return cache_key(encoders, tokenizers=tokenizers, **self.encoding_facts())


def _facts(tokenizer: PreTrainedTokenizerBase) -> list[object]:
    """What a tokenizer makes of texts: its tokens, how long a text may be and how it is filled up, and a probe."""
    length, side, filler = tokenizer.model_max_length, tokenizer.padding_side, tokenizer.pad_token_id
    return [tokenizer.get_vocab(), length, side, filler, tokenizer(_PROBE, verbose=False).input_ids]


def _token_counts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], at_once: int = 1000) -> Iterator[int]:
    """Tokens of each text, special ones included, without a limit."""
    for first in range(0, len(texts), at_once):
        for tokens in tokenizer(texts[first : first + at_once], verbose=False).input_ids:
            yield len(tokens)


def tokens_before_prompt(tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens that the template of a chat puts before what is said; they take their part of a prompt's length."""
    mark = "\0"
    chat = [{"role": "user", "content": mark}]
    text = str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
    return len(tokenizer(text.partition(mark)[0]).input_ids)


def dtype_of(network: nn.Module) -> torch.dtype:
    """The precision that a network computes in: not that of weights in 4 bits, which are bytes, nor of adapters.

    Example:
        >>> stored = nn.Parameter(torch.zeros(2, dtype=torch.uint8), requires_grad=False)
        >>> dtype_of(nn.ParameterList([stored, torch.zeros(2, dtype=torch.bfloat16)]))
        torch.bfloat16
    """
    named = network.named_parameters()
    return next(value.dtype for name, value in named if value.is_floating_point() and "lora_" not in name)


def device_of(network: nn.Module) -> torch.device:
    """Where a network's weights are."""
    return next(network.parameters()).device
