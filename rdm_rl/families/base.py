"""What the library asks of a family of diffusion pipelines: the border where foreign models become one interface."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from rdm_rl.families.adapters import (
    DIFFUSERS_LORA,
    check_all_loaded,
    load_peft_folder,
    load_with_alphas,
    peft_folder,
    scale_adapter,
    tensors_of,
)
from rdm_rl.families.encoding import PromptEncoding, device_of
from rdm_rl.families.hub import adapter_file, mismatch, one_line_errors, sharing_a_base, without_diffusers_log
from rdm_rl.families.kohya import check_layers, kohya_tensors, scaled_tensors
from rdm_rl.families.precision import to_precision
from rdm_rl.families.quantization import Quantization, is_quantized
from rdm_rl.families.resolution import Resolution, read_resolution
from rdm_rl.files import fingerprint
from rdm_rl.noise_schedule import NoiseSchedule, PredictionType, x_0_from_output
from rdm_rl.policy import SamplerName
from rdm_rl.randomness import Generators, normal
from rdm_rl.records import Conditioning
from rdm_rl.settings import Folder, setting


class Family(PromptEncoding, ABC):
    """One kind of diffusers pipeline; ``docs/add_a_family.md`` shows how to write one.

    Args:
        pipeline: The loaded pipeline. Its encoders and decoder are frozen and put in evaluation mode.
        resolution: Size of the images in pixels, such as 1024 or ``"832x1216"``; None is the pipeline's own.

    Raises:
        ValueError: If the pipeline cannot be distilled by this family.
    """

    network_name: ClassVar[str] = "unet"
    """Attribute of the pipeline that holds the denoising network."""

    decoder_name: ClassVar[str | None] = "vae"
    """Attribute that holds the decoder of latents; None for a model of pixels."""

    text_encoder_names: ClassVar[tuple[str, ...]] = ("text_encoder",)
    """Attributes that hold the encoders of prompts."""

    optional_components: ClassVar[tuple[str, ...]] = ()
    """Those of them that a pipeline may do without."""

    lora_targets: ClassVar[tuple[str, ...]]
    """Module names (matched by suffix) that get an adapter when the user's ``LoraConfig`` names none."""

    loads_lora: ClassVar[bool] = True
    """Whether the stock pipeline loads adapters. Where it does not, the student is saved as a whole pipeline."""

    comfyui_layers: ClassVar[str] = ""
    """Pattern of the layers, by their names, whose adapters ComfyUI knows; nothing if it has no such model."""

    comfyui_times: ClassVar[str] = "the scheduler `simple`"
    """What makes the student's times in ComfyUI."""

    teacher_guidance_scale: float
    """Guidance of the teacher when the user sets none: what published distillations of this family use."""

    any_resolution: ClassVar[bool] = True
    """Whether the network takes latents of another size than its own."""

    schedule: NoiseSchedule
    prediction_type: PredictionType

    def __init__(self, pipeline: Any, resolution: int | str | Resolution | None = None) -> None:
        """Keep the pipeline and freeze everything in it."""
        self.pipeline = _without_compilation(pipeline)
        self.resolution = None if resolution is None else read_resolution(resolution)
        PromptEncoding.__init__(self)
        self._home: torch.device | None = None
        present = [name for name, part in self.pipeline.components.items() if part is not None]
        missing = [name for name in self.needed_components(present) if getattr(pipeline, name, None) is None]
        if missing:
            raise ValueError(
                f"The {type(pipeline).__name__} has no {', '.join(missing)}, which distillation needs. Load the whole "
                "pipeline, with every component."
            )
        decoder: Any = self.decoder
        asked = self.decoder_channels
        decoded = asked if decoder is None else decoder.config.get("latent_channels", asked)
        if decoded != asked:
            raise ValueError(
                f"The pipeline's {type(decoder).__name__} decodes latents of {decoded} channels, but the network's "
                f"have {asked}. Use the autoencoder of this model, or a smaller one made for it."
            )
        if any(isinstance(module, BaseTunerLayer) for module in self.network.modules()):
            raise ValueError(
                "The pipeline already has adapters, perhaps of an earlier trainer; they would be switched off without "
                "a word. Load the pipeline again, or call pipe.fuse_lora() and pipe.unload_lora_weights() first. A "
                "student's adapter goes to policy_init=, a style for the teacher to teacher_adapter=."
            )
        if self.resolution is not None:
            self._check_resolution(self.resolution)
        for component in self.pipeline.components.values():
            if isinstance(component, nn.Module):
                component.eval().requires_grad_(False)

    def at(self, resolution: Resolution) -> "Family":
        """The same family, with all that it holds, for images of another size.

        Args:
            resolution: The size.

        Raises:
            ValueError: If the model makes no such images.
        """
        self._check_resolution(resolution)
        resized = copy(self)
        resized.resolution = resolution
        return resized

    def _check_resolution(self, resolution: Resolution) -> None:
        if not self.any_resolution:
            raise ValueError(
                f"resolution={resolution} is set, but a {type(self.pipeline).__name__} makes images of one size only. "
                "Leave it out."
            )
        step = self.pixels_per_latent * self.latent_multiple
        if any(side % step for side in resolution):
            fitting = Resolution(*(max(1, round(side / step)) * step for side in resolution))
            raise ValueError(
                f"resolution={resolution}, but the height and width of this model's images are multiples of {step}. "
                f"Set it to {fitting}."
            )

    # ----- its parts -----

    @classmethod
    def needed_components(cls, present: Collection[str]) -> list[str]:
        """Names of the parts without which a pipeline cannot be distilled: network, decoder, scheduler, encoders.

        An encoder needs its tokenizer: without one, diffusers encodes every prompt alike.

        Args:
            present: Names of the parts that the pipeline has.
        """
        encoders = [name for name in cls.text_encoder_names if name in present or name not in cls.optional_components]
        tokenizers = [tokenizer_of(name) for name in encoders]
        parts = (cls.network_name, cls.decoder_name, "scheduler", *encoders, *tokenizers)
        return [name for name in parts if name is not None]

    @property
    def network(self) -> nn.Module:
        """The denoising network of the pipeline."""
        network: nn.Module = getattr(self.pipeline, self.network_name)
        return network

    @property
    def decoder(self) -> nn.Module | None:
        """The network that makes images of latents; None for a model of pixels."""
        return None if self.decoder_name is None else getattr(self.pipeline, self.decoder_name)

    @property
    def text_encoders(self) -> list[nn.Module]:
        """The encoders of prompts that the pipeline has."""
        encoders = (getattr(self.pipeline, name, None) for name in self.text_encoder_names)
        return [encoder for encoder in encoders if encoder is not None]

    @property
    def device(self) -> torch.device:
        """Where the networks run: what :meth:`to` was given, as an offloaded network may wait elsewhere."""
        return self._home or device_of(self.network)

    @classmethod
    def text_encoder_dtype(cls, dtype: torch.dtype) -> torch.dtype:
        """The precision of the encoders of prompts in a run of a precision."""
        return dtype

    def set_precision(self, dtype: torch.dtype) -> None:
        """Give the encoders of prompts a precision; the decoder, which overflows or bands in half, gets float32.

        What an encoder keeps in float32 because it overflows otherwise, such as a part of T5, stays there, and what is
        stored quantised was loaded in its precision.
        """
        for encoder in self.text_encoders:
            if not is_quantized(encoder):
                to_precision(encoder, self.text_encoder_dtype(dtype))
        if self.decoder is not None:
            self.decoder.float()

    def to(self, device: torch.device, *, network: bool = True) -> None:
        """Move the decoder, the network unless it is to stay, and, unless they are offloaded, the prompts' encoders."""
        modules = [self.decoder, *([] if self.offloads_text_encoders else self.text_encoders)]
        modules += [self.network] if network else []
        self._home = torch.empty(0, device=device).device  # With its number: "cuda" alone equals no device of a tensor.
        for module in modules:
            if module is not None:
                module.to(device)

    # ----- sizes -----

    latent_multiple: ClassVar[int] = 1
    """What the height and width of latents are multiples of."""

    @property
    def pixels_per_latent(self) -> int:
        """How many pixels of an image's side one latent stands for."""
        return int(self.pipeline.vae_scale_factor)

    @property
    def own_latent_size(self) -> tuple[int, int]:
        """Height and width of the latents that the pipeline draws by default."""
        config: Any = self.network.config
        size = config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return int(height), int(width)

    @property
    def latent_channels(self) -> int:
        """Channels of the latents."""
        config: Any = self.network.config
        return int(config.in_channels)

    @property
    def decoder_channels(self) -> int:
        """Channels of what the decoder is given: those of the latents, unless the network packs several into one."""
        return self.latent_channels

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Shape of one latent, (C, H, W)."""
        if self.resolution is None:
            return self.latent_channels, *self.own_latent_size
        height, width = (side // self.pixels_per_latent for side in self.resolution)
        return self.latent_channels, height, width

    def describe_resolution(self) -> str:
        """What a user should know of a ``resolution`` that is not the model's own; nothing if it is, or none is set."""
        own = Resolution(*(side * self.pixels_per_latent for side in self.own_latent_size))
        if self.resolution in (None, own):
            return ""
        return f"resolution={self.resolution} is not the model's own, which is {own.width} x {own.height} pixels."

    def share_components(self, other: "Family") -> None:
        """Use another pipeline's encoders and decoder, which are equal, so that this one's need no memory.

        Args:
            other: The family of that pipeline.
        """
        self.pipeline = copy(self.pipeline)
        for name in (*self.text_encoder_names, self.decoder_name):
            if name is not None:
                setattr(self.pipeline, name, getattr(other.pipeline, name, None))

    # ----- the network and the decoder -----

    @abstractmethod
    def forward(
        self, network: nn.Module, x_t: Tensor, t: Tensor, conditioning: Conditioning, guidance_scale: float = 1.0
    ) -> Tensor:
        """The network's raw output, float32, shape (N, C, H, W).

        Args:
            network: The network to ask.
            x_t: Noisy latents, shape (N, C, H, W).
            t: Times, shape (N,), in (0, 1].
            conditioning: Encoded prompts, N rows.
            guidance_scale: The number that a network which embeds its guidance is told.
        """

    def embeds_guidance(self, network: nn.Module) -> bool:
        """Whether the network is told a guidance scale, instead of being asked twice."""
        return False

    @property
    def has_guidance(self) -> bool:
        """Whether there is anything to guide towards."""
        return True

    def decode(self, x_0: Tensor) -> Tensor:
        """Images, shape (N, 3, H', W'), in [0, 1], of latents of shape (N, C, H, W); differentiable."""
        vae: Any = self.decoder
        latents = x_0 / vae.config.scaling_factor
        if getattr(vae.config, "shift_factor", None):
            latents = latents + vae.config.shift_factor
        images: Tensor = vae.decode(latents.to(vae.dtype), return_dict=False)[0]
        return (images * 0.5 + 0.5).clamp(0, 1).float()

    def enable_decoder_checkpointing(self) -> None:
        """Recompute the decoder's activations in backward passes instead of keeping them, where it can."""
        decoder: Any = self.decoder
        if decoder is not None and decoder._supports_gradient_checkpointing:
            decoder.enable_gradient_checkpointing()

    def step_noise(self, shape: Sequence[int], generator: Generators, device: torch.device) -> Tensor:
        """The noise of a random step, of the given shape (N, C, H, W), drawn in the pipeline's order."""
        return normal(shape, generator, device)

    # ----- the student -----

    @abstractmethod
    def student_scheduler(self, num_inference_steps: int, sampler: SamplerName = "renoise") -> Any:
        """The stock scheduler with which diffusers walks the K-step student exactly as the policy does.

        Args:
            num_inference_steps: Steps K of the student.
            sampler: The policy's sampler.

        Raises:
            ValueError: If no stock scheduler makes the sampler's K steps.
        """

    @abstractmethod
    def student_times(self, num_inference_steps: int, sampler: SamplerName = "renoise") -> Tensor:
        """The times that the student visits, shape (K,), in (0, 1], falling: those of the student's scheduler."""

    def pipeline_guidance(self, guidance_scale: float) -> float:
        """The number by which the stock pipeline knows a guidance scale of :meth:`predict_x_0`."""
        return guidance_scale

    def student_call(
        self, num_inference_steps: int, sampler: SamplerName = "renoise", guidance_scale: float = 1.0
    ) -> dict[str, Any]:
        """The arguments, beside the prompt, with which the stock pipeline draws from the student.

        They name the image's size unless it is the square that the pipeline draws by default.

        Args:
            num_inference_steps: Steps K of the student.
            sampler: The policy's sampler.
            guidance_scale: The student's guidance.
        """
        guidance = self.pipeline_guidance(guidance_scale)
        usual = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance}
        height, width = (side * self.pixels_per_latent for side in self.latent_shape[1:])
        if not self.any_resolution or (self.resolution is None and height == width):
            return usual
        return {**usual, "height": height, "width": width}

    # ----- files -----

    def save_lora(
        self, folder: str, state: Mapping[str, Tensor], metadata: Mapping[str, Any], file: str = DIFFUSERS_LORA
    ) -> None:
        """Write an adapter that ``load_lora_weights`` reads.

        Args:
            folder: Where to write.
            state: The adapter's weights under PEFT's names, without the adapter's name. (diffusers' own names cover
                attention alone, and of a mixture only a part is loaded.)
            metadata: The adapter's configuration.
            file: The file's name.
        """
        parts = {f"{self.network_name}_lora_layers": state, f"{self.network_name}_lora_adapter_metadata": metadata}
        type(self.pipeline).save_lora_weights(folder, weight_name=file, safe_serialization=True, **parts)

    def comfyui_tensors(self, state: Mapping[str, Tensor], scales: Mapping[str, float]) -> dict[str, Tensor]:
        """An adapter as ComfyUI reads it, and of a U-Net also A1111, Forge and kohya's scripts.

        Args:
            state: The adapter's weights under PEFT's names, without the adapter's name.
            scales: What each layer's product of weights is multiplied by.

        Raises:
            ValueError: If ComfyUI has no such model, or does not know one of the layers.
        """
        check_layers(state, self.comfyui_layers, type(self.network).__name__)
        if self.network_name == "unet":
            return kohya_tensors(state, scales, self.kohya_name)
        return scaled_tensors(state, scales, f"{self.network_name}.")

    def kohya_name(self, layer: str) -> str:
        """What kohya's scripts call a layer of the U-Net."""
        return f"lora_unet_{layer}".replace(".", "_")

    def load_adapter(self, source: str, name: str, setting: str = "adapter", scale: float = 1.0) -> dict[str, Tensor]:
        """Give the network an adapter of any format, rank and set of layers that the stock pipeline or PEFT loads.

        Args:
            source: A folder, a file, a hub name ``owner/name``, or ``owner/name/file.safetensors``.
            name: What the adapter is called.
            setting: What was set to it, for errors.
            scale: What it is multiplied by.

        Returns:
            Its tensors under PEFT's names, as in the file: a network without weights takes none.

        Raises:
            ValueError: If the pipeline loads no adapters, or this one changes more than the network, or not all of it.
            OSError: If it cannot be loaded.
        """
        if not self.loads_lora:
            raise ValueError(
                f"{setting}={source!r} is an adapter, but a {type(self.pipeline).__name__} loads none. Pass a whole "
                "model."
            )
        path, weight_name = adapter_file(source)
        options: dict[str, Any] = {"use_safetensors": True} | ({"weight_name": weight_name} if weight_name else {})
        with one_line_errors(setting, source), sharing_a_base(), without_diffusers_log():
            try:
                folder = peft_folder(path, weight_name)
                if folder is not None:
                    tensors = load_peft_folder(self.network, folder, name)
                else:
                    tensors, alphas = tensors_of(self.pipeline, self.network_name, path, **options)
                    if alphas:
                        load_with_alphas(self.network, tensors, alphas, name)
                    else:
                        self.pipeline.load_lora_weights(path, adapter_name=name, **options)
            except RuntimeError as error:
                raise ValueError(f"{setting}={source!r} does not fit this model: {mismatch(error)}.") from error
        if any(tensor.startswith("text_encoder") for tensor in tensors):
            raise ValueError(
                f"{setting}={source!r} also adapts the text encoder, which policy, teacher and fake score share. "
                "Use an adapter of the denoising network alone."
            )
        check_all_loaded(self.network, name, tensors, f"{setting}={source!r}")
        if scale != 1.0:
            scale_adapter(self.network, name, scale)
        return tensors

    def fuse_adapter(self, source: str, setting: str = "adapter", scale: float = 1.0) -> None:
        """Add an adapter to the network's own weights.

        Args:
            source: As in :meth:`load_adapter`.
            setting: What was set to it, for errors.
            scale: What it is multiplied by.
        """
        self.load_adapter(source, "fused", setting, scale)
        self.pipeline.fuse_lora(components=[self.network_name])
        self.pipeline.unload_lora_weights()
        self.network.eval().requires_grad_(False)

    def with_network(self, network: nn.Module, scheduler: Any = None) -> "Family":
        """The same pipeline around another network; all other components are shared.

        Args:
            network: The network.
            scheduler: Its scheduler, if its noise schedule or prediction type is another.
        """
        return type(self)(self._pipeline_with(network, scheduler or self.pipeline.scheduler), self.resolution)

    def _pipeline_with(self, network: nn.Module, scheduler: Any) -> Any:
        # A shallow copy keeps what the constructor does not take, such as a pipeline's list of class names.
        pipeline = copy(self.pipeline)
        setattr(pipeline, self.network_name, network)
        pipeline.scheduler = scheduler
        return pipeline

    def save_pipeline(self, folder: str, network: nn.Module, scheduler: Any) -> None:
        """Write a whole pipeline with another network and scheduler.

        Args:
            folder: Where to write.
            network: The student's network.
            scheduler: The student's scheduler.
        """
        pipeline = self._pipeline_with(network, scheduler)
        pipeline.register_to_config(_name_or_path="")  # A student is published; a machine's paths are not.
        pipeline.save_pretrained(folder)

    @abstractmethod
    def schedule_facts(self) -> list[float]:
        """What the noise schedule is made of, for :meth:`border`."""

    def border(self) -> str:
        """A short name of what a teacher and a student must share: the noise schedule and the text encoder.

        The prediction type may differ, as both are wrapped to predict x_0.
        """
        encoders = [fingerprint(encoder) for encoder in self.text_encoders]
        return fingerprint(
            None, pipeline=type(self.pipeline).__name__, encoders=encoders, schedule=self.schedule_facts()
        )

    def predict_x_0(
        self, network: nn.Module, x_t: Tensor, t: Tensor, conditioning: Conditioning, guidance_scale: float = 1.0
    ) -> Tensor:
        """The network's prediction of x_0, with classifier-free guidance on the raw output as the pipelines do it.

        References:
            | Classifier-Free Diffusion Guidance (Ho and Salimans, 2022), eq. 6, with w = guidance_scale - 1
            | https://arxiv.org/abs/2207.12598

        Args:
            network: The network to ask.
            x_t: Noisy latents, shape (N, C, H, W).
            t: Times, shape (N,), in (0, 1].
            conditioning: Encoded prompts, N rows.
            guidance_scale: Above 1 the network is also asked for the empty prompt; else, as in the pipelines, there is
                no guidance. A network that embeds its guidance (FLUX.1-dev) is always asked once, and told the scale.

        Returns:
            The prediction, shape (N, C, H, W), float32.
        """
        if guidance_scale <= 1.0 or self.embeds_guidance(network):
            output = self.forward(network, x_t, t, conditioning, guidance_scale)
        else:
            both = self.empty_prompt().repeat(len(x_t)).then(conditioning)
            without, with_prompt = self.forward(network, torch.cat([x_t, x_t]), torch.cat([t, t]), both).chunk(2)
            output = without + guidance_scale * (with_prompt - without)
        return x_0_from_output(output, x_t, self.schedule.alpha(t), self.schedule.sigma(t), self.prediction_type)


def tokenizer_of(text_encoder: str) -> str:
    """The attribute of a pipeline that holds an encoder's tokenizer.

    Example:
        >>> tokenizer_of("text_encoder_2")
        'tokenizer_2'
    """
    return text_encoder.replace("text_encoder", "tokenizer")


def _without_compilation(pipeline: Any) -> Any:
    """The pipeline with its networks as they were before ``torch.compile``, whose wrapper renames every weight.

    Raises:
        ValueError: If a part of a network is wrapped.
    """
    networks = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    wrapped = {name: part for name, part in networks.items() if "_orig_mod" in part._modules}
    if wrapped:
        pipeline = copy(pipeline)
        for name, part in wrapped.items():
            setattr(pipeline, name, part._orig_mod)
    for name, part in networks.items():
        inside = [place for place, _ in part.named_modules() if place.endswith("._orig_mod")]
        if inside:
            raise ValueError(
                f"{inside[0].removesuffix('._orig_mod')!r} of the pipeline's {name} is compiled, so that the student's "
                "weights would have names that no stock pipeline knows. Compile nothing, or the whole network."
            )
    return pipeline


@dataclass
class ModelSettings:
    """Model and data."""

    model_config: Folder | None = setting(
        None,
        "Of a model in one file: the diffusers pipeline, a folder or a hub name, whose configuration and missing parts "
        "are used. Default: the one on the hub that diffusers knows for its kind.",
    )
    base_quantization: Quantization | None = setting(
        None,
        "How the frozen network under the adapters and the text encoders are stored: `int8` or `fp8` (8 bits), `nf4` "
        "(4 bits, on CUDA GPUs alone). Default: in the run's precision.",
    )
    resolution: list[str] | None = setting(
        None,
        "Size of the images in pixels: `1024`, or width and height, `832x1216`. Of several one is drawn for each "
        "update, and the first is that of sample grids and of the saved call. Default: the model's own.",
    )
