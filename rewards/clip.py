"""Rewards that compare an image with its prompt by a CLIP model: CLIPScore, PickScore and HPSv2."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from huggingface_hub import hf_hub_download
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModel, AutoTokenizer

from rdm_rl.rewards.model import RewardModel
from rdm_rl.rewards.open_clip import VIT_H_14, load_open_clip
from rdm_rl.rewards.preprocessing import Preprocessing, fit_square
from rdm_rl.rewards.protocol import RewardInfo

_VIT_H_MEMORY = "3.9 GB in float32, half in bfloat16: computed from 986 M parameters"


def embedding(output: Any) -> Tensor:
    """The embeddings in what a CLIP encoder returns, shape (N, D), float32, of length 1.

    Args:
        output: A tensor, or with transformers 5 an object.
    """
    values: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return functional.normalize(values.float(), dim=-1)


class CLIPScore(RewardModel):
    """How well an image fits its prompt: the cosine of their embeddings under any CLIP or SigLIP model.

    The paper's CLIPScore is 2.5 times the cosine, clamped at zero; many papers report 100 times the cosine. We do
    neither: a factor belongs into the reward's weight, and a clamp has no gradient where it acts. Prompts are cut to
    what the text encoder reads (77 tokens for CLIP).

    References:
        | CLIPScore: A Reference-free Evaluation Metric for Image Captioning (Hessel et al., 2021), section 3
        | https://arxiv.org/abs/2104.08718

    Args:
        model: A folder, or a hub name, of a CLIP or SigLIP model of fixed image size.
        processor: A folder or a hub name with the tokenizer and the image settings, if they are not with the model.
        device, dtype, offload: As in :class:`RewardModel`; the cosine itself is computed in float32.

    Example:
        >>> CLIPScore(dtype="bfloat16").model
        'openai/clip-vit-large-patch14'
    """

    info: ClassVar[RewardInfo] = RewardInfo(
        description="The image fits the prompt, judged by CLIP.",
        paper="CLIPScore (Hessel et al., 2021), https://arxiv.org/abs/2104.08718",
        units="cosine; papers often report it times 100, and the original is 2.5 times the cosine",
        expected_range="0 to 0.4, says the paper of CLIP ViT-B/32 (footnote 6); lower for SigLIP",
        license="MIT (openai/CLIP); its model card calls deployed uses out of scope",
        weights="openai/clip-vit-large-patch14",
        memory="1.7 GB in float32, half in bfloat16: computed from 428 M parameters",
    )
    # The processor of published weights that come without one; None if the model has its own.
    default_processor: ClassVar[str | None] = None

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        processor: str | Path | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = torch.float32,
        offload: bool = False,
    ) -> None:
        """Remember what to load; nothing is loaded yet."""
        super().__init__(model, device=device, dtype=dtype, offload=offload)
        has_processor = self.default_processor is None or (Path(self.model) / "tokenizer_config.json").is_file()
        self.processor = str(processor or (self.model if has_processor else self.default_processor))

    def load(self) -> nn.Module:
        """Load the network, the tokenizer and the image settings, on the CPU."""
        network = self.load_network()
        if not hasattr(network, "get_text_features"):
            raise ValueError(f"model={self.model!r} is a {type(network).__name__}. Use a CLIP or SigLIP model.")
        config: Any = network.config
        self.tokenizer: Any = self.fetch("processor", self.processor, AutoTokenizer.from_pretrained)
        self.max_length = min(self.tokenizer.model_max_length, config.text_config.max_position_embeddings)
        self.preprocessing = self.load_preprocessing(config)
        return network

    def load_network(self) -> nn.Module:
        """Load the network, in float32: the base class converts it."""
        load: Any = partial(AutoModel.from_pretrained, dtype=torch.float32)
        network: nn.Module = self.fetch("model", self.model, load)
        return network

    def load_preprocessing(self, config: Any) -> Preprocessing:
        """What prepares images for the network of this configuration."""
        return self.fetch("processor", self.processor, Preprocessing.from_pretrained)

    def rewards(self, network: nn.Module, images: Tensor, prompts: list[str], **columns: Any) -> Tensor:
        """The cosines of images and their prompts, shape (N,), float32.

        Raises:
            ValueError: If the numbers of images and prompts differ.
        """
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images were given with {len(prompts)} prompts. Give one for each.")
        # Always the full length: SigLIP was trained so, and a value must not depend on its neighbours' prompts. No
        # mask: CLIP reads a text no further than its end, and SigLIP was trained without one.
        tokens = self.tokenizer(
            prompts, padding="max_length", truncation=True, max_length=self.max_length, return_tensors="pt"
        ).input_ids.to(images.device)
        pixels = self.preprocessing(images).to(self.dtype)
        model: Any = network
        texts, pictures = model.get_text_features(input_ids=tokens), model.get_image_features(pixel_values=pixels)
        return (embedding(texts) * embedding(pictures)).sum(-1)


class PickScore(CLIPScore):
    """Which image people would pick for a prompt: the logit of a CLIP ViT-H/14 trained on Pick-a-Pic.

    The value is the cosine times the model's scale, about 100. Differences between images of one prompt matter: the
    paper's probability that one is preferred is the softmax over such values.

    References:
        | Pick-a-Pic: An Open Dataset of User Preferences for Text-to-Image Generation (Kirstain et al., 2023)
        | https://arxiv.org/abs/2305.01569

    Args:
        model: As in :class:`CLIPScore`, and so are the others. A model without a processor of its own, such as the
            published one, gets that of the model it was fine-tuned from.

    Example:
        >>> PickScore().processor
        'laion/CLIP-ViT-H-14-laion2B-s32B-b79K'
    """

    info: ClassVar[RewardInfo] = RewardInfo(
        description="People would pick the image for the prompt, judged by a model trained on Pick-a-Pic.",
        paper="Pick-a-Pic (Kirstain et al., 2023), https://arxiv.org/abs/2305.01569",
        units="logit: about 100 times the cosine",
        expected_range="means of 20 to 23 for SDXL and SD3 with few-step students (DMDR, arxiv.org/abs/2511.13649)",
        license="we found none stated for the weights; fine-tuned from LAION's CLIP ViT-H/14, MIT",
        weights="yuvalkirstain/PickScore_v1",
        memory=_VIT_H_MEMORY,
    )
    default_processor: ClassVar[str | None] = VIT_H_14

    def load(self) -> nn.Module:
        """Load as the base class does, and keep the scale, which a shorter type would round."""
        network = super().load()
        model: Any = network
        self.scale: float = model.logit_scale.exp().item()
        return network

    def rewards(self, network: nn.Module, images: Tensor, prompts: list[str], **columns: Any) -> Tensor:
        """The logits, shape (N,)."""
        return self.scale * super().rewards(network, images, prompts)


class HPSv2(CLIPScore):
    """Human preference score, version 2.0: the cosine under a CLIP ViT-H/14 trained on people's choices.

    As in the authors' package, an image is fitted into a square with black bars: nothing is cropped away. Their resize
    has antialiasing with today's torchvision only (0.17 and later); ours always has. Values compare images of one
    prompt; those of versions 2.0 and 2.1 do not compare.

    References:
        | Human Preference Score v2 (Wu et al., 2023)
        | https://arxiv.org/abs/2306.09341

    Args:
        model: The published ``.pt`` file, a folder that holds it, a folder or a hub name of a CLIP of transformers, or
            None for the published file from the hub. The other arguments are those of :class:`PickScore`.

    Example:
        >>> HPSv2(dtype="bfloat16").model
        'xswu/HPSv2'
    """

    info: ClassVar[RewardInfo] = RewardInfo(
        description="People would prefer the image for the prompt, judged by HPS version 2.0.",
        paper="Human Preference Score v2 (Wu et al., 2023), https://arxiv.org/abs/2306.09341",
        units="cosine; papers report it times 100",
        expected_range="means of 0.24 (GLIDE) to 0.28 (Dreamlike Photoreal 2.0): the table in the authors' repository",
        license="Apache-2.0 (code, and weights on the hub)",
        weights="xswu/HPSv2",
        memory=_VIT_H_MEMORY,
    )
    default_processor: ClassVar[str | None] = VIT_H_14
    filename: ClassVar[str] = "HPS_v2_compressed.pt"

    def load_network(self) -> nn.Module:
        """Load the published file, or a converted model."""
        path = Path(self.model)
        if path.is_dir():
            path /= self.filename
        elif self.model == self.info.weights:
            path = Path(self.fetch("model", self.model, partial(hf_hub_download, filename=self.filename)))
        if path.is_file():
            network: nn.Module = load_open_clip(path)
            return network
        return super().load_network()

    def load_preprocessing(self, config: Any) -> Preprocessing:
        """Only the normalisation: :meth:`rewards` fits images into the square."""
        self.side: int = config.vision_config.image_size
        return Preprocessing(size=(self.side, self.side))

    def rewards(self, network: nn.Module, images: Tensor, prompts: list[str], **columns: Any) -> Tensor:
        """The cosines, shape (N,)."""
        return super().rewards(network, fit_square(images, self.side), prompts)


class HPSv21(HPSv2):
    """Human preference score, version 2.1: as :class:`HPSv2`, trained on better data.

    Example:
        >>> HPSv21.filename
        'HPS_v2.1_compressed.pt'
    """

    info: ClassVar[RewardInfo] = replace(
        HPSv2.info,
        description="People would prefer the image for the prompt, judged by HPS version 2.1.",
        expected_range="means of 0.15 (GLIDE) to 0.31 (SDXL Refiner 0.9): the table in the authors' repository",
    )
    filename: ClassVar[str] = "HPS_v2.1_compressed.pt"
