r"""Rewards that compare the student's image with the teacher's: the same prompt and the same initial noise.

This is how ReDiF rewards: a sample is good if it is what the teacher would have made of its noise. The library hands
over the teacher's images as ``teacher_images``, in the order and of the shape of the student's, (N, 3, H, W), float32
in [0, 1] (see :mod:`rdm_rl.rewards.calling`). Values are of shape (N,), and prompts are not read.

======================  ================================================================  =====
reward                  value                                                             equal
======================  ================================================================  =====
``teacher_clip``        cosine of CLIP's image embeddings                                 1
``teacher_dino``        mean cosine of DINOv2's patch tokens                              1
``teacher_perceptual``  minus the squared distance of convolutional features of length 1  0
``teacher_mse``         minus the mean squared difference of pixels                       0
``teacher_histogram``   minus the divergence of the histograms of intensities             0
======================  ================================================================  =====

The last column is what equal images get, and no image gets more (but for rounding: 1e-6 for a cosine). All are
differentiable in the student's image; the teacher's has no graph.

References:
    | ReDiF: Reinforced Distillation for Few Step Diffusion (Tighkhorshid et al., 2025)
    | https://arxiv.org/abs/2512.22802; which rewards it tried, we read in https://github.com/AM-Tighkhorshid/ReDiF
"""

from abc import abstractmethod
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModel

from rdm_rl.rewards.clip import embedding
from rdm_rl.rewards.model import RewardModel
from rdm_rl.rewards.preprocessing import Preprocessing
from rdm_rl.rewards.protocol import RewardInfo

_REDIF = "ReDiF (Tighkhorshid et al., 2025), https://arxiv.org/abs/2512.22802"

# Architectures of transformers that return a class token, register tokens if any, and the patches.
_TOKENS = ("dinov2", "dinov2_with_registers", "dinov3_vit", "vit")
# Those whose hidden states are feature maps of shape (N, C, H, W), from the stem to the last stage.
_MAPS = ("resnet", "regnet", "convnext", "convnextv2")
# Added to a squared length before dividing by the length: features that are all 0 stay 0, and their gradient is finite.
_LENGTH_FLOOR = 1e-8
# Share of the uniform distribution that is mixed into both histograms, so that no bin is empty.
_UNIFORM_SHARE = 1e-3


def paired(images: Tensor, teacher_images: Tensor) -> Tensor:
    """The teacher's images, ready to be compared: on the device and in the type of the student's, without a graph.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> paired(torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 8, 8))
        Traceback (most recent call last):
        ...
        ValueError: The student's images have the shape (2, 3, 4, 4) and the teacher's (2, 3, 8, 8), so they are no \
pairs. Give one teacher image of the same size for each image, in the same order.
    """
    if images.shape != teacher_images.shape:
        raise ValueError(
            f"The student's images have the shape {tuple(images.shape)} and the teacher's "
            f"{tuple(teacher_images.shape)}, so they are no pairs. Give one teacher image of the same size for each "
            "image, in the same order."
        )
    return teacher_images.detach().to(images)


class TeacherFeatures(RewardModel):
    """The base of teacher matches that compare features of a network."""

    wants_teacher_images: ClassVar[bool] = True

    @abstractmethod
    def features(self, network: nn.Module, images: Tensor) -> list[Tensor]:
        """What is compared: features of length 1, a tensor for each layer, shape (N, D, number of places), float32."""

    def likeness(self, features: Tensor, teacher_features: Tensor) -> Tensor:
        """How alike features, shape (N, D, places), are at each place: their cosine, shape (N, places)."""
        return (features * teacher_features).sum(1)

    def rewards(
        self,
        network: nn.Module,
        images: Tensor,
        prompts: list[str],
        *,
        teacher_images: Tensor | None = None,
        **columns: Any,
    ) -> Tensor:
        """The mean likeness over the places of each layer, and over the layers, shape (N,), float32.

        Raises:
            ValueError: If there are no teacher images, or their shape differs.
        """
        if teacher_images is None:
            raise ValueError(f"{type(self).__name__} compares images with the teacher's: give it teacher_images.")
        # The network is frozen, so the teacher's features have no graph.
        targets = self.features(network, paired(images, teacher_images))
        layers = zip(self.features(network, images), targets, strict=True)
        return torch.stack([self.likeness(features, target).mean(1) for features, target in layers]).mean(0)


class TeacherCLIP(TeacherFeatures):
    """How alike the images of student and teacher are to CLIP: the cosine of their embeddings. ReDiF's own reward.

    Images are prepared as the model's settings say. Those of CLIP keep the square in the middle, so what is beside it
    does not count.

    References:
        | Learning Transferable Visual Models From Natural Language Supervision (Radford et al., 2021), CLIP
        | https://arxiv.org/abs/2103.00020

    Args:
        model: A folder, or a hub name, of a CLIP or SigLIP model with its image settings; None for ReDiF's encoder.
        device, dtype, offload: As in :class:`RewardModel`; the cosine itself is computed in float32.

    Example:
        >>> TeacherCLIP(dtype="bfloat16").model
        'openai/clip-vit-base-patch32'
    """

    info: ClassVar[RewardInfo] = RewardInfo(
        description="The image is like the teacher's of the same prompt and noise, judged by CLIP.",
        paper=f"{_REDIF}, with CLIP (Radford et al., 2021), https://arxiv.org/abs/2103.00020",
        units="cosine",
        expected_range="-1 to 1, and 1 for equal images, by construction; what pairs usually get is unchecked",
        license="MIT (openai/CLIP); whether it covers the weights is an open question on their page, and the model "
        "card calls deployed uses out of scope",
        weights="openai/clip-vit-base-patch32",
        memory="0.35 GB in float32, half in bfloat16: computed from 88 M parameters, without the text encoder",
    )

    def load(self) -> nn.Module:
        """Load the network, without its text encoder, and the image settings, on the CPU."""
        network: nn.Module = self.fetch("model", self.model, _load_network)
        if not hasattr(network, "get_image_features"):
            raise ValueError(f"model={self.model!r} is a {type(network).__name__}. Use a CLIP or SigLIP model.")
        network.text_model = nn.Identity()  # Nothing is read but images.
        self.preprocessing = self.fetch("model", self.model, Preprocessing.from_pretrained)
        return network

    def features(self, network: nn.Module, images: Tensor) -> list[Tensor]:
        """The embedding: one layer, one place."""
        model: Any = network
        return [embedding(model.get_image_features(pixel_values=self.preprocessing(images).to(self.dtype)))[..., None]]


class TeacherDINO(TeacherFeatures):
    """How alike the images of student and teacher are to DINOv2: the mean cosine of their tokens, patch by patch.

    Patches are compared where they are, so this asks for the teacher's layout, which CLIP's one embedding hardly does.
    ReDiF's repository has DINOv3 at 512 pixels, whose weights are gated; ours is DINOv2 at the size of its settings.

    References:
        | DINOv2: Learning Robust Visual Features without Supervision (Oquab et al., 2023)
        | https://arxiv.org/abs/2304.07193

    Args:
        model: A folder, or a hub name, of a DINO, DINOv2 or DINOv3 model (a vision transformer) with its image
            settings; None for DINOv2's base size.
        tokens: ``patch`` compares the patches, ``class`` the class token, which says what is in the image rather than
            where.
        device, dtype, offload: As in :class:`RewardModel`; the cosines themselves are computed in float32.

    Raises:
        ValueError: If there are no such ``tokens``.

    Example:
        >>> TeacherDINO(tokens="class").model
        'facebook/dinov2-base'
    """

    info: ClassVar[RewardInfo] = RewardInfo(
        description="The image is like the teacher's of the same prompt and noise, patch by patch, judged by DINOv2.",
        paper=f"{_REDIF}, with DINOv2 (Oquab et al., 2023), https://arxiv.org/abs/2304.07193",
        units="mean cosine",
        expected_range="-1 to 1, and 1 for equal images, by construction; what pairs usually get is unchecked",
        license="Apache-2.0 (model card)",
        weights="facebook/dinov2-base",
        memory="0.35 GB in float32, half in bfloat16: computed from 87 M parameters",
    )

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        tokens: Literal["patch", "class"] = "patch",
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = torch.float32,
        offload: bool = False,
    ) -> None:
        """Remember what to load; nothing is loaded yet."""
        super().__init__(model, device=device, dtype=dtype, offload=offload)
        if tokens not in ("patch", "class"):
            raise ValueError(f"tokens={tokens!r} are none that the model has; use 'patch' or 'class'.")
        self.tokens = tokens

    def load(self) -> nn.Module:
        """Load the network and the image settings, on the CPU."""
        network = self.fetch("model", self.model, _load_network)
        _check_kind(network, self.model, _TOKENS, "DINO, DINOv2 or DINOv3 vision transformer")
        self.preprocessing = self.fetch("model", self.model, Preprocessing.from_pretrained)
        return network

    def features(self, network: nn.Module, images: Tensor) -> list[Tensor]:
        """The tokens after the last layer."""
        model: Any = network
        tokens: Tensor = model(pixel_values=self.preprocessing(images).to(self.dtype)).last_hidden_state
        first_patch = 1 + getattr(model.config, "num_register_tokens", 0)
        wanted = tokens[:, first_patch:] if self.tokens == "patch" else tokens[:, :1]
        return [functional.normalize(wanted.float(), dim=-1).transpose(1, 2)]


class TeacherPerceptual(TeacherFeatures):
    r"""Minus the perceptual distance between the images of student and teacher, in the manner of LPIPS.

    .. math:: r = -\frac1L \sum_l \frac1{H_l W_l} \sum_{h,w} \| \hat y^l_{hw} - \hat y^l_{0,hw} \|^2

    with :math:`\hat y^l` the features of layer l, scaled to length 1 over the channels: of the stem and of each stage
    of a convolutional network. It is **not LPIPS**: no weights of layers or channels were learnt from people's
    judgements (it is equation 1 of the LPIPS paper with all weights equal, averaged over layers where the paper sums),
    and the network is a ResNet-50, since transformers has neither AlexNet nor VGG. Values do not compare with LPIPS.
    Kumar et al. find that the better a modern network classifies, the worse its features agree with people about
    likeness; how far that holds of these weights and layers is unchecked.

    References:
        | The Unreasonable Effectiveness of Deep Features as a Perceptual Metric (Zhang et al., 2018), LPIPS
        | https://arxiv.org/abs/1801.03924
        | Do better ImageNet classifiers assess perceptual similarity better? (Kumar et al., 2022)
        | https://arxiv.org/abs/2203.04946
        | Deep Residual Learning for Image Recognition (He et al., 2015), the network
        | https://arxiv.org/abs/1512.03385

    Args:
        model: A folder, or a hub name, of a ResNet, RegNet, ConvNeXt or ConvNeXt V2 with its image settings; None for
            ResNet-50.
        size: Length to which the shorter side is resized, such as the 224 that the network was trained at; None
            compares images at their own size.
        device, dtype, offload: As in :class:`RewardModel`; the distance itself is computed in float32.

    Raises:
        ValueError: If ``size`` is not above 0.

    Example:
        >>> TeacherPerceptual(size=224).model
        'microsoft/resnet-50'
    """

    info: ClassVar[RewardInfo] = RewardInfo(
        description="The image looks like the teacher's of the same prompt and noise, judged by features of a ResNet.",
        paper=f"{_REDIF}, with a distance in the manner of LPIPS (Zhang et al., 2018), "
        "https://arxiv.org/abs/1801.03924, on ResNet-50 (He et al., 2015), https://arxiv.org/abs/1512.03385",
        units="minus a squared distance of vectors of length 1; not on the scale of LPIPS",
        expected_range="-2 to 0 for a ResNet or RegNet, whose features are never negative, else -4 to 0, and 0 for "
        "equal images, by construction; what pairs usually get is unchecked",
        license="Apache-2.0 (model card)",
        weights="microsoft/resnet-50",
        memory="0.09 GB in float32, half in bfloat16: computed from 23.5 M parameters",
    )

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        size: int | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = torch.float32,
        offload: bool = False,
    ) -> None:
        """Remember what to load; nothing is loaded yet."""
        super().__init__(model, device=device, dtype=dtype, offload=offload)
        if size is not None and size < 1:
            raise ValueError(f"size={size} is no length in pixels; use 224, or None for the images' own size.")
        self.size = size

    def load(self) -> nn.Module:
        """Load the network and the image settings, on the CPU."""
        network = self.fetch("model", self.model, _load_network)
        _check_kind(network, self.model, _MAPS, "ResNet, RegNet, ConvNeXt or ConvNeXt V2")
        self.preprocessing = self.fetch("model", self.model, Preprocessing.from_pretrained)
        return network

    def features(self, network: nn.Module, images: Tensor) -> list[Tensor]:
        """The features of stem and stages."""
        height, width = images.shape[-2:]
        pixels = replace(self.preprocessing, size=self.size or (height, width), crop=None)(images).to(self.dtype)
        model: Any = network
        maps = [layer.float().flatten(2) for layer in model(pixels, output_hidden_states=True).hidden_states]
        return [layer * (layer.square().sum(1, keepdim=True) + _LENGTH_FLOOR).rsqrt() for layer in maps]

    def likeness(self, features: Tensor, teacher_features: Tensor) -> Tensor:
        """Minus the squared distance at each place."""
        return -(features - teacher_features).square().sum(1)


def _load_network(model: str) -> nn.Module:
    network: nn.Module = AutoModel.from_pretrained(model, dtype=torch.float32)
    return network


def _check_kind(network: nn.Module, model: str, kinds: tuple[str, ...], wanted: str) -> None:
    config: Any = network.config
    if config.model_type not in kinds:
        raise ValueError(f"model={model!r} is a {type(network).__name__}. Use a {wanted}.")


class TeacherMSE:
    """Minus the mean squared difference between the pixels of student and teacher; images of any size.

    Example:
        >>> TeacherMSE()(torch.zeros(1, 3, 8, 8), ["a cat"], torch.full((1, 3, 8, 8), 0.5))
        tensor([-0.2500])
    """

    differentiable: ClassVar[bool] = True
    wants_teacher_images: ClassVar[bool] = True
    info: ClassVar[RewardInfo] = RewardInfo(
        description="The pixels are those of the teacher's image of the same prompt and noise.",
        paper=_REDIF,
        units="minus squared grey level, black 0 and white 1",
        expected_range="-1 to 0 by construction; -0.18 to -0.01 for 98 % of pairs of embedded training images of one "
        "digit; measured here",
    )

    def __call__(self, images: Tensor, prompts: list[str], teacher_images: Tensor) -> Tensor:
        """The values, from -1 to 0.

        Raises:
            ValueError: If the shapes of the images differ.
        """
        return -(images - paired(images, teacher_images)).square().mean((1, 2, 3))


def histogram(images: Tensor, bins: int) -> Tensor:
    """The distribution of the intensities of each image and channel, with a graph to the images.

    The bins' centres divide [0, 1] evenly, black and white included. An intensity counts for the two bins nearest to
    it, the more the nearer (a triangular kernel), so the shares sum to 1 whatever the image.

    Args:
        images: Images, shape (N, C, H, W), in [0, 1]; values outside are clamped.
        bins: Number of bins, at least 2.

    Returns:
        Shares, shape (N, C, bins), float64; NaN for a channel that has one.

    Example:
        >>> histogram(torch.tensor([0.0, 0.25, 1.0, 1.0]).view(1, 1, 2, 2), 3)[0, 0]
        tensor([0.3750, 0.1250, 0.5000], dtype=torch.float64)
    """
    # float64: summed one by one in float32, the pixels of a large image would lose digits.
    places = images.double().clamp(0, 1).flatten(2) * (bins - 1)
    # A NaN must not become an index: on CUDA that ends the process. It reaches the result through the shares.
    lower = places.detach().nan_to_num().floor().clamp(max=bins - 2)
    upper_share = places - lower
    index = lower.long()
    empty = torch.zeros(*places.shape[:2], bins, dtype=places.dtype, device=places.device)
    counts = empty.scatter_add(2, index, 1 - upper_share).scatter_add(2, index + 1, upper_share)
    return counts / places.shape[-1]


class TeacherHistogram:
    r"""Minus the divergence of the intensities of student and teacher, whatever their places; images of any size.

    .. math:: r = -\sum_c \mathrm{KL}(h_c(\mathrm{teacher}) \,\|\, h_c(\mathrm{student}))

    with :math:`h_c` the histogram of channel c (:func:`histogram`), of which 0.1 % is replaced by the uniform
    distribution, on both sides: a bin that the student leaves empty costs much, but not infinitely much, and 0 stays
    the best value. It sees tones, not shapes: an image with shuffled pixels is as good. The gradient moves an intensity
    only along the slope between the two bins nearest to it, so it is small where both images have few pixels between
    their tones: pair it with a reward that sees places.

    Args:
        bins: Number of bins, at least 2; ReDiF's repository has 32.

    Raises:
        ValueError: If there are fewer bins.

    Example:
        >>> reward, image = TeacherHistogram(), torch.linspace(0, 1, 192).view(1, 3, 8, 8)
        >>> reward(image.flip(-1), ["a cat"], image), reward(image / 2, ["a cat"], image) < -1
        (tensor([0.]), tensor([True]))
    """

    differentiable: ClassVar[bool] = True
    wants_teacher_images: ClassVar[bool] = True
    info: ClassVar[RewardInfo] = RewardInfo(
        description="The tones are those of the teacher's image of the same prompt and noise, wherever they are.",
        paper=_REDIF,
        units="minus nats, summed over the three channels",
        expected_range="-31.1 to 0 by construction with 32 bins; -0.60 to -0.04 for 98 % of pairs of embedded training "
        "images of one digit; measured here",
    )

    def __init__(self, bins: int = 32) -> None:
        """Check the number of bins."""
        if bins < 2:
            raise ValueError(f"bins={bins} is too few for a histogram; use at least 2. ReDiF's repository has 32.")
        self.bins = bins

    def __call__(self, images: Tensor, prompts: list[str], teacher_images: Tensor) -> Tensor:
        """The values, at most 0.

        Raises:
            ValueError: If the shapes of the images differ.
        """
        teacher, student = (
            (1 - _UNIFORM_SHARE) * histogram(pictures, self.bins) + _UNIFORM_SHARE / self.bins
            for pictures in (paired(images, teacher_images), images)
        )
        return (teacher * (student / teacher).log()).sum((1, 2)).to(images.dtype)
