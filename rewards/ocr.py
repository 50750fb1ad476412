"""Is the wanted text in the image? A reward that reads it."""

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import GotOcr2ForConditionalGeneration, GotOcr2Processor

from rdm_rl.pixels import to_pil
from rdm_rl.rewards.model import RewardModel
from rdm_rl.rewards.protocol import RewardInfo

Recogniser = Callable[[Tensor], Sequence[str]]

_QUOTED = re.compile(r'"([^"]+)"|“([^”]+)”|«([^»]+)»|「([^」]+)」')


def quoted_text(prompt: str) -> str:
    """What a prompt says between quotation marks, several such texts joined with spaces; empty if there is none.

    Marks are ``"…"``, ``“…”``, ``«…»`` and ``「…」``. Single ones are not read, since apostrophes look the same. A lone
    ``"``, as for inches, can mislead it: then give the texts in a column.

    Example:
        >>> quoted_text('a shop with "OPEN" on the door and "24 hours" below')
        'OPEN 24 hours'
    """
    return " ".join("".join(groups) for groups in _QUOTED.findall(prompt))


def edit_distance(first: str, second: str) -> int:
    """How many characters must be inserted, deleted or replaced to make one text from another (Levenshtein).

    Example:
        >>> edit_distance("kitten", "sitting")
        3
    """
    row = list(range(len(second) + 1))
    for count, letter in enumerate(first, 1):
        diagonal, row[0] = row[0], count
        for index, other in enumerate(second, 1):
            diagonal, row[index] = row[index], min(row[index] + 1, row[index - 1] + 1, diagonal + (letter != other))
    return row[-1]


def text_similarity(read: str, wanted: str, *, allow_extra_text: bool = True) -> float:
    r"""How near a text is to the wanted one: :math:`\max(1 - d / |\mathrm{wanted}|, 0)`, with the edit distance d.

    Args:
        read: The text that was read.
        wanted: The wanted text, not empty.
        allow_extra_text: The value is 1 if ``read`` contains ``wanted``, whatever else it contains.

    Example:
        >>> text_similarity("opem", "open"), text_similarity("open24hours", "open")
        (0.75, 1.0)
    """
    if allow_extra_text and wanted in read:
        return 1.0
    return 1 - min(edit_distance(read, wanted), len(wanted)) / len(wanted)


class TextMatch(RewardModel):
    """How well the text in the image matches the wanted text, from 0 to 1. Not differentiable.

    The wanted text is the column ``text`` if the data set has one, else what the prompt says between quotation marks
    (:func:`quoted_text`). The reward does not apply to samples that want no text.

    The value is :func:`text_similarity`, as in Flow-GRPO: an edit distance over the length of the wanted text, where
    case and spaces do not count, and where further text costs nothing once the wanted text is complete. Flow-GRPO reads
    with PaddleOCR and wants only the first quoted text of a prompt.

    The default reader is GOT-OCR2, since it reads whole scenes. TrOCR, the other candidate in transformers, reads one
    line that something else has found and cut out. Any other reader fits as ``recogniser``;
    :func:`~rdm_rl.pixels.to_pil` makes the 8-bit pictures that most of them take. The reader's own mistakes are
    in the reward, and a policy can learn to please them: read with a second one before you believe a high value.

    Checked on small random weights of the architecture only; unchecked against the published weights.

    References:
        | Flow-GRPO: Training Flow Matching Models via Online RL (Liu et al., 2025)
        | https://arxiv.org/abs/2505.05470
        | General OCR Theory: Towards OCR-2.0 via a Unified End-to-end Model (Wei et al., 2024), the default reader
        | https://arxiv.org/abs/2409.01704

    Args:
        model: A folder, or a hub name, of a GOT-OCR2 model; None for the published weights.
        recogniser: A callable that reads the images itself, from a tensor of shape (N, 3, H, W) in [0, 1] to N texts.
            No model is loaded then.
        ignore_case: Case does not count.
        ignore_spaces: Spaces and line breaks do not count.
        allow_extra_text: Further text in the image costs nothing if the wanted text is complete.
        max_new_tokens: After how many tokens reading stops.
        device, dtype, offload: As in :class:`RewardModel`.

    Raises:
        ValueError: If both ``model`` and ``recogniser`` are given, or ``dtype`` is no floating-point type.

    Example:
        >>> reward = TextMatch(recogniser=lambda images: ["Opem"] * len(images))
        >>> reward(torch.rand(2, 3, 64, 64), ['a sign that says "OPEN"', "a cat"])
        [0.75, None]
    """

    differentiable: ClassVar[bool] = False
    info: ClassVar[RewardInfo] = RewardInfo(
        description="How well the text in the image matches the text that the prompt asks for.",
        paper="Flow-GRPO: Training Flow Matching Models via Online RL (Liu et al., 2025), "
        "https://arxiv.org/abs/2505.05470",
        units="share of the wanted characters",
        expected_range="0 to 1 by construction. Flow-GRPO reports a text accuracy of 59 % for Stable Diffusion 3.5 "
        "Medium, and 92 % after training on this reward, with another reader; unchecked for the default reader.",
        license="Apache-2.0 (GOT-OCR2)",
        weights="stepfun-ai/GOT-OCR-2.0-hf",
        memory="2.24 GB in float32, 1.12 GB in bfloat16: computed from the 560.5 M parameters of the architecture, "
        "without activations. Nothing was measured on a GPU.",
        columns=("text",),
    )

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        recogniser: Recogniser | None = None,
        ignore_case: bool = True,
        ignore_spaces: bool = True,
        allow_extra_text: bool = True,
        max_new_tokens: int = 128,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = torch.float32,
        offload: bool = False,
    ) -> None:
        """Remember what to load; nothing is loaded yet."""
        super().__init__(model, device=device, dtype=dtype, offload=offload)
        if model is not None and recogniser is not None:
            raise ValueError(f"Both model={str(model)!r} and a recogniser are given, but only one can read. Drop one.")
        self.recogniser = recogniser
        self.ignore_case, self.ignore_spaces = ignore_case, ignore_spaces
        self.allow_extra_text = allow_extra_text
        self.max_new_tokens = max_new_tokens

    def load(self) -> nn.Module:
        """Load the model and its processor, on the CPU; a network that does nothing if a ``recogniser`` reads."""
        if self.recogniser is not None:
            return nn.Identity()
        load: Any = partial(GotOcr2ForConditionalGeneration.from_pretrained, dtype=torch.float32)
        self.processor: Any = self.fetch("model", self.model, GotOcr2Processor.from_pretrained)
        network: nn.Module = self.fetch("model", self.model, load)
        return network

    def read(self, network: Any, images: Tensor) -> list[str]:
        """The N texts in images of shape (N, 3, H, W); empty where none was seen.

        Raises:
            TypeError: If the ``recogniser`` does not return one string for each image.
        """
        if self.recogniser is not None:
            texts = list(self.recogniser(images))
            if len(texts) != len(images) or not all(isinstance(text, str) for text in texts):
                raise TypeError(
                    f"The recogniser returned {texts!r} for {len(images)} images: one string each is wanted."
                )
            return texts
        inputs = self.processor(images=to_pil(images), return_tensors="pt").to(images.device, self.dtype)
        tokenizer = self.processor.tokenizer
        tokens = network.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=self.max_new_tokens,
            # The model ends its answer with this token, which its saved settings do not say.
            eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
            pad_token_id=tokenizer.pad_token_id,
        )
        answers = tokens[:, inputs["input_ids"].shape[1] :]
        return [str(text) for text in tokenizer.batch_decode(answers, skip_special_tokens=True)]

    def rewards(
        self,
        network: nn.Module,
        images: Tensor,
        prompts: list[str],
        *,
        text: Sequence[str | None] | None = None,
        **columns: Any,
    ) -> Tensor:
        """The values of images that all want text, shape (N,); without ``text``, what their prompts quote."""
        pairs = zip(self.read(network, images), self._wanted(prompts, text), strict=True)
        similarity = [
            text_similarity(self._normalise(read), wanted, allow_extra_text=self.allow_extra_text)
            for read, wanted in pairs
        ]
        return torch.tensor(similarity, device=images.device)

    def __call__(
        self, images: Tensor, prompts: list[str], *, text: Sequence[str | None] | None = None, **columns: Any
    ) -> list[float | None]:
        """N values, from 0 to 1, or None where no text is wanted.

        ``text`` holds the wanted texts, length N, with None or nothing where there is none; without it the prompts do.
        """
        wanted = self._wanted(prompts, text)
        asked = [index for index, words in enumerate(wanted) if words]
        values: list[float | None] = [None] * len(prompts)
        if asked:
            some = self.evaluate(images[asked], [prompts[index] for index in asked], text=[wanted[i] for i in asked])
            for index, value in zip(asked, some.tolist(), strict=True):
                values[index] = value
        return values

    def _wanted(self, prompts: Sequence[str], text: Sequence[str | None] | None) -> list[str]:
        return [self._normalise(words or "") for words in (map(quoted_text, prompts) if text is None else text)]

    def _normalise(self, text: str) -> str:
        text = "".join(text.split()) if self.ignore_spaces else " ".join(text.split())
        return text.casefold() if self.ignore_case else text
