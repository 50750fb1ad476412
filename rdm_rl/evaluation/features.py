"""What an image looks like to a network: the features that distances between sets of images are measured on."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel

from rdm_rl.families.hub import one_line_errors
from rdm_rl.rewards.preprocessing import Preprocessing
from rdm_rl.student import public_name

# Their class token is what their authors compare images by; some of these classes pool by a layer of random weights.
_CLASS_TOKEN = ("dinov2", "dinov2_with_registers", "dinov3_vit", "vit")


@dataclass(frozen=True)
class Features:
    """A frozen network, as a function of images.

    Args:
        name: What tables call it.
        function: Gives features of shape (N, D) for images of shape (N, 3, H, W), float32, in [0, 1].

    Example:
        >>> mean_color = Features("mean colour", lambda images: images.mean((2, 3)))
        >>> mean_color(torch.ones(2, 3, 8, 8))
        tensor([[1., 1., 1.],
                [1., 1., 1.]])
    """

    name: str
    function: Callable[[Tensor], Tensor]

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Features of images, shape (N, D), float32, on the CPU."""
        return self.function(images).float().cpu()


def load_features(
    source: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> Features:
    """The features of any image model of transformers, such as DINOv2, CLIP, SigLIP or a ResNet.

    Those of CLIP and SigLIP are the embedding that texts are compared with; those of other vision transformers the
    class token; those of anything else what the network pools. An image is prepared as the settings beside the weights
    say, without torchvision.

    References:
        | Exposing flaws of generative model evaluation metrics (Stein et al., 2023), why DINOv2 and not Inception
        | https://arxiv.org/abs/2306.04675

    Args:
        source: A folder, or a hub name, with ``preprocessor_config.json``.
        device: Where the network runs.
        dtype: Precision of its weights.

    Raises:
        OSError: If it cannot be had.
        ValueError: If the model reads no images.
    """
    with one_line_errors("features", str(source)):
        network: Any = AutoModel.from_pretrained(source, dtype=dtype)
        preprocessing = Preprocessing.from_pretrained(source)
    embeds = hasattr(network, "get_image_features")
    if not embeds and network.main_input_name != "pixel_values":
        raise ValueError(f"features={str(source)!r} is a {type(network).__name__}, which reads no images: use CLIP.")
    if embeds:
        network.text_model = nn.Identity()  # Nothing is read but images.
    network.eval().requires_grad_(False).to(device)

    def features(images: Tensor) -> Tensor:
        pixels = preprocessing(images.to(device)).to(dtype)
        if embeds:
            output = network.get_image_features(pixel_values=pixels)
            pooled = output if isinstance(output, Tensor) else output.pooler_output  # Of transformers 5.
        else:
            output = network(pixel_values=pixels)
            by_token = network.config.model_type in _CLASS_TOKEN
            pooled = output.last_hidden_state[:, 0] if by_token else output.pooler_output
        return pooled.flatten(1)

    return Features(public_name(str(source)).rpartition("/")[-1], features)


def find_features(source: str, device: str | torch.device = "cpu") -> Features:
    """The features that a word of a setting or of a command line names.

    Args:
        source: What :func:`load_features` takes, or ``module:attribute`` for a :class:`Features` object.
        device: Where a network that is loaded runs.

    Raises:
        ImportError: If there is no such module.
        AttributeError: If there is no such object in it.
        OSError: If a network cannot be had.
        ValueError: If it reads no images.

    Example:
        >>> find_features("rdm_rl.digits.recognisers:FEATURES").name
        'digits B'
    """
    module, colon, attribute = source.partition(":")
    if not colon:
        return load_features(source, device=device)
    features: Features = getattr(import_module(module), attribute)
    return features
