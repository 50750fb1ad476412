"""The LAION aesthetic predictor as a reward."""

from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from huggingface_hub import hf_hub_download
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPModel

from rdm_rl.rewards.model import RewardModel, read_weights
from rdm_rl.rewards.preprocessing import Preprocessing
from rdm_rl.rewards.protocol import RewardInfo

# Where the predictor's linear layers are in its file; the dropout between them is not needed.
_LAYERS = (0, 2, 4, 6, 7)
# Names of the file: ours by choice, the authors', and that on the hub.
_FILES = ("model.safetensors", "sac+logos+ava1-l14-linearMSE.pth", "aesthetic-model.pth")


def load_predictor(path: str | Path) -> nn.ModuleList:
    """The predictor's five linear layers, in order.

    Args:
        path: The authors' ``.pth`` file, or a safetensors file with the same names.

    Raises:
        ValueError: If the file does not hold them.
    """
    content = read_weights(path)
    expected = {f"layers.{layer}.{kind}" for layer in _LAYERS for kind in ("weight", "bias")}
    if wrong := sorted(expected ^ {name for name in content if name.startswith("layers.")}):
        raise ValueError(f"{path} is not the linear predictor of version 2: missing or unknown are {wrong}.")
    layers = nn.ModuleList()
    for number in _LAYERS:
        weight = content[f"layers.{number}.weight"]
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.load_state_dict({"weight": weight, "bias": content[f"layers.{number}.bias"]})
        layers.append(layer)
    return layers


class AestheticScore(RewardModel):
    """How beautiful an image is: a linear predictor of people's ratings on CLIP's image embedding (LAION, version 2).

    The prompt is not read. The predictor has no activations, so its value is linear in the normalised embedding.

    References:
        | LAION-Aesthetics (Schuhmann, 2022) https://laion.ai/blog/laion-aesthetics/
        | https://github.com/christophschuhmann/improved-aesthetic-predictor

    Args:
        model: The predictor: the authors' ``.pth`` file, a safetensors file with the same names, a folder that holds
            one, or None for TRL's copy on the hub (that it equals the authors' file is unchecked).
        encoder: A folder or a hub name of the CLIP model whose image embedding is read. Another one than the published
            ViT-L/14 needs another predictor.
        device, dtype, offload: As in :class:`RewardModel`; the predictor computes in float32.

    Example:
        >>> AestheticScore("predictor.pth").encoder
        'openai/clip-vit-large-patch14'
    """

    info: ClassVar[RewardInfo] = RewardInfo(
        description="The image is beautiful, judged by the LAION aesthetic predictor; the prompt is not read.",
        paper="LAION-Aesthetics (Schuhmann, 2022), https://laion.ai/blog/laion-aesthetics/",
        units="rating from 1 to 10",
        expected_range="half of the 2.4 billion English images of LAION-5B get 4.5 or more, one in 200 gets 6 or more "
        "(LAION's announcement)",
        license="Apache-2.0, says a copy on the hub (ttj/sac-logos-ava1-l14-linearMSE); we could not check the source. "
        "The encoder is openai/CLIP, MIT",
        weights="trl-lib/ddpo-aesthetic-predictor",
        memory="1.2 GB in float32, half in bfloat16: computed from 305 M parameters",
    )

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        encoder: str | Path = "openai/clip-vit-large-patch14",
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = torch.float32,
        offload: bool = False,
    ) -> None:
        """Remember what to load; nothing is loaded yet."""
        super().__init__(model, device=device, dtype=dtype, offload=offload)
        self.encoder = str(encoder)

    def load(self) -> nn.Module:
        """Load the encoder, its image settings and the predictor, on the CPU."""
        clip: Any = self.fetch("encoder", self.encoder, partial(CLIPModel.from_pretrained, dtype=torch.float32))
        predictor = load_predictor(self.predictor_file())
        first: Any = predictor[0]
        if first.in_features != clip.config.projection_dim:
            raise ValueError(
                f"The predictor reads embeddings of {first.in_features} numbers, and encoder={self.encoder!r} gives "
                f"{clip.config.projection_dim}. Use the CLIP model that the predictor was trained with."
            )
        self.preprocessing = self.fetch("encoder", self.encoder, Preprocessing.from_pretrained)
        parts = {"encoder": clip.vision_model, "projection": clip.visual_projection, "predictor": predictor}
        return nn.ModuleDict(parts)

    def predictor_file(self) -> Path:
        """Where the predictor is; a ``FileNotFoundError`` if a folder holds none."""
        path = Path(self.model)
        if path.is_file():
            return path
        if not path.is_dir():
            return Path(self.fetch("model", self.model, partial(hf_hub_download, filename=_FILES[-1])))
        for name in _FILES:
            if (path / name).is_file():
                return path / name
        raise FileNotFoundError(f"model={self.model!r} holds no predictor. Put one there named {' or '.join(_FILES)}.")

    def rewards(self, network: nn.Module, images: Tensor, prompts: list[str], **columns: Any) -> Tensor:
        """The predicted ratings, shape (N,), float32."""
        parts: Any = network
        pixels = self.preprocessing(images).to(self.dtype)
        embeddings = parts["projection"](parts["encoder"](pixel_values=pixels).pooler_output)
        values = functional.normalize(embeddings.float(), dim=-1)
        for layer in parts["predictor"]:
            # A rating of 5 in bfloat16 would be rounded to 1/32, more than images of one prompt often differ by.
            values = functional.linear(values, layer.weight.float(), layer.bias.float())
        return values.squeeze(-1)
