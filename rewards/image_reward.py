"""ImageReward: what people prefer, by a BLIP that was trained on their rankings."""

import math
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from transformers import AutoTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from rdm_rl.rewards.model import RewardModel, read_weights
from rdm_rl.rewards.preprocessing import Preprocessing
from rdm_rl.rewards.protocol import RewardInfo

# The published standardisation, and the length that prompts are cut to.
MEAN, STD = 0.16717362830052426, 1.0333394966054072
MAX_TOKENS = 35

# Files that hold weights, the preferred one first. Both have the names that `convert` reads.
WEIGHT_FILES = ("model.safetensors", "ImageReward.pt")

# Shapes do not tell the number of attention heads; those of ViT-L/16 (16) and of BERT (12) are all 64 wide.
_HEAD_WIDTH = 64

# The image encoder's parts, there and here; the order matters, as each rule reads what the earlier ones left.
_VISION_NAMES = (
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^norm\.", "post_layernorm."),
    (r"^blocks\.", "encoder.layers."),
    (r"\.norm(?=[12]\.)", ".layer_norm"),
    (r"\.attn\.proj\.", ".self_attn.projection."),
    (r"\.attn\.", ".self_attn."),
)
# In the checkpoint but not in the score: BLIP's contrastive heads, and a buffer that counts positions.
_UNUSED = re.compile(r"blip\.(vision_proj|text_proj)\.(weight|bias)|blip\.text_encoder\.embeddings\.position_ids")


class ImageRewardNetwork(nn.Module):
    """BLIP's image encoder, its text encoder that looks at the image, and a head on the first text token.

    Args:
        vision: Architecture of the image encoder.
        text: Architecture of the text encoder.
    """

    def __init__(self, vision: BlipVisionConfig, text: BlipTextConfig) -> None:
        """Make the parts, with random weights."""
        super().__init__()
        self.vision = BlipVisionModel(vision)
        self.text = BlipTextModel(text, add_pooling_layer=False)
        # The published head has no activations: between its layers is dropout, which is off outside of training.
        # Numbers of the layers are those of the checkpoint.
        self.mlp = nn.Sequential(
            nn.Linear(text.hidden_size, 1024),
            nn.Dropout(0.2),
            nn.Linear(1024, 128),
            nn.Dropout(0.2),
            nn.Linear(128, 64),
            nn.Dropout(0.1),
            nn.Linear(64, 16),
            nn.Linear(16, 1),
        )

    def forward(self, pixels: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """The values before standardisation, shape (N,).

        Args:
            pixels: Normalised images, shape (N, 3, side, side).
            tokens: Ids of the prompts' tokens, shape (N, L), int64.
            mask: 1 for tokens and 0 for padding, shape (N, L).
        """
        image_features = self.vision(pixel_values=pixels).last_hidden_state
        features = self.text(
            input_ids=tokens,
            attention_mask=mask,
            encoder_hidden_states=image_features,
            encoder_attention_mask=mask.new_ones(image_features.shape[:2]),
        ).last_hidden_state
        values: Tensor = self.mlp(features[:, 0])[:, 0]
        return values


def network_for(weights: Mapping[str, Tensor]) -> ImageRewardNetwork:
    """A network of the architecture that weights have, read from their shapes; its own weights are random.

    Args:
        weights: The weights by the checkpoint's names.

    Raises:
        ValueError: If a weight that tells the architecture is missing.
    """
    image, text = "blip.visual_encoder.", "blip.text_encoder."
    try:
        width, _, patch, _ = weights[image + "patch_embed.proj.weight"].shape
        places = weights[image + "pos_embed"].shape[1] - 1
        vision_hidden = len(weights[image + "blocks.0.mlp.fc1.weight"])
        vocabulary, text_width = weights[text + "embeddings.word_embeddings.weight"].shape
        positions = len(weights[text + "embeddings.position_embeddings.weight"])
        text_hidden = len(weights[text + "encoder.layer.0.intermediate.dense.weight"])
    except KeyError as error:
        raise ValueError(f"These are no weights of ImageReward: {error.args[0]!r} is missing.") from None
    return ImageRewardNetwork(
        BlipVisionConfig(
            hidden_size=width,
            intermediate_size=vision_hidden,
            num_hidden_layers=sum(name.startswith(image) and name.endswith(".norm1.weight") for name in weights),
            num_attention_heads=width // _HEAD_WIDTH,
            image_size=patch * math.isqrt(places),
            patch_size=patch,
            hidden_act="gelu",
            layer_norm_eps=1e-6,
        ),
        BlipTextConfig(
            vocab_size=vocabulary,
            hidden_size=text_width,
            encoder_hidden_size=width,
            intermediate_size=text_hidden,
            num_hidden_layers=sum(
                name.startswith(text) and name.endswith(".intermediate.dense.weight") for name in weights
            ),
            num_attention_heads=text_width // _HEAD_WIDTH,
            max_position_embeddings=positions,
            hidden_act="gelu",
            layer_norm_eps=1e-12,
            # With this transformers builds the attention to the image; the text itself is read in both directions.
            is_decoder=True,
        ),
    )


def convert(weights: Mapping[str, Tensor]) -> ImageRewardNetwork:
    """The network with the weights of a checkpoint, float32, on the CPU.

    Args:
        weights: The weights by the checkpoint's names: ``blip.visual_encoder.*``, ``blip.text_encoder.*`` and
            ``mlp.layers.*``.

    Raises:
        ValueError: If a weight is missing or unknown.
        RuntimeError: If a weight has another shape.
    """
    network = network_for(weights)
    names = {name: _new_name(name) for name in weights if not _UNUSED.fullmatch(name)}
    expected = network.state_dict().keys()
    missing = sorted(expected - set(names.values()))
    unknown = sorted(old for old, new in names.items() if new not in expected)
    if missing or unknown:
        raise ValueError(
            f"The checkpoint is not one of ImageReward. Missing weights, by the names of transformers: {missing}. "
            f"Unknown weights, by the checkpoint's names: {unknown}. Use one with the layout of ImageReward.pt."
        )
    network.load_state_dict({new: weights[old] for old, new in names.items()})
    return network


def _new_name(name: str) -> str:
    if name.startswith("blip.visual_encoder."):
        name = name.removeprefix("blip.visual_encoder.")
        for pattern, replacement in _VISION_NAMES:
            name = re.sub(pattern, replacement, name)
        return f"vision.{name}"
    if name.startswith("blip.text_encoder."):
        return "text." + name.removeprefix("blip.text_encoder.")
    return "mlp." + name.removeprefix("mlp.layers.") if name.startswith("mlp.layers.") else name


def find_weights(model: str) -> Path:
    """The file with the weights: ``model`` itself, or one in that folder.

    Raises:
        FileNotFoundError: If there is none.
    """
    path = Path(model)
    if path.is_file():
        return path
    for name in WEIGHT_FILES:
        if (path / name).is_file():
            return path / name
    raise FileNotFoundError(f"{model!r} holds none of {', '.join(WEIGHT_FILES)}. Give the file itself.")


class ImageReward(RewardModel):
    """ImageReward: how much people would prefer the image for its prompt. Differentiable.

    Images are resized so that the shorter side has the encoder's size (224), and cut to the middle square. Prompts are
    cut after 35 tokens.

    On small random weights and the CPU, values and gradients equal those of the published code (image-reward 1.5)
    exactly; unchecked against the published weights.

    References:
        | ImageReward: Learning and Evaluating Human Preferences for Text-to-Image Generation (Xu et al., 2023)
        | https://arxiv.org/abs/2304.05977, code: https://github.com/THUDM/ImageReward
        | BLIP: Bootstrapping Language-Image Pre-training (Li et al., 2022), https://arxiv.org/abs/2201.12086

    Args:
        model: A file, a folder or a hub name, with weights in the published layout: ``ImageReward.pt``, or the same
            weights as ``model.safetensors``. None for the published ones.
        tokenizer: A folder or a hub name: the vocabulary of BERT, to which BLIP's two tokens are added.
        device, dtype, offload: As in :class:`RewardModel`.

    Raises:
        ValueError: If ``dtype`` is no floating-point type.

    Example:
        >>> ImageReward(dtype="bfloat16").model
        'zai-org/ImageReward'
    """

    info: ClassVar[RewardInfo] = RewardInfo(
        description="How much people would prefer the image for its prompt.",
        paper="ImageReward: Learning and Evaluating Human Preferences for Text-to-Image Generation (Xu et al., 2023), "
        "https://arxiv.org/abs/2304.05977",
        units="standard deviations, by the published standardisation",
        expected_range="-2.03 to 0.58 for the four images of one prompt in the authors' README; unchecked here.",
        license="Apache-2.0",
        weights="zai-org/ImageReward",
        memory="1.78 GB in float32, 0.89 GB in bfloat16: computed from the 446.2 M parameters of the architecture, "
        "without activations. Nothing was measured on a GPU.",
    )

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        tokenizer: str | Path = "google-bert/bert-base-uncased",
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = torch.float32,
        offload: bool = False,
    ) -> None:
        """Remember what to load; nothing is loaded yet."""
        super().__init__(model, device=device, dtype=dtype, offload=offload)
        self.tokenizer_name = str(tokenizer)

    def load(self) -> nn.Module:
        """Load the network and the tokenizer, on the CPU.

        Raises:
            FileNotFoundError: If there are no weights.
            ValueError: If the weights or the tokenizer are not those of ImageReward.
        """
        place = self.model
        if not Path(place).exists():
            place = self.fetch("model", place, partial(snapshot_download, allow_patterns=list(WEIGHT_FILES)))
        network = convert(read_weights(find_weights(place)))
        self.tokenizer: Any = self.fetch("tokenizer", self.tokenizer_name, AutoTokenizer.from_pretrained)
        self.tokenizer.add_tokens(["[DEC]", "[ENC]"], special_tokens=True)
        vocabulary = network.text.config.vocab_size
        if len(self.tokenizer) != vocabulary:
            raise ValueError(
                f"tokenizer={self.tokenizer_name!r} knows {len(self.tokenizer)} tokens with BLIP's two, but the "
                f"network reads {vocabulary}. Use the vocabulary it was trained with, google-bert/bert-base-uncased."
            )
        side = network.vision.config.image_size
        self.preprocessing = Preprocessing(size=side, crop=(side, side))
        return network

    def rewards(self, network: nn.Module, images: Tensor, prompts: list[str], **columns: Any) -> Tensor:
        """The values, shape (N,), float32."""
        tokens = self.tokenizer(
            prompts, padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        ).to(images.device)
        pixels = self.preprocessing(images).to(self.dtype)
        values: Tensor = network(pixels, tokens["input_ids"], tokens["attention_mask"])
        return (values.float() - MEAN) / STD
