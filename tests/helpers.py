"""Tiny real pipelines, built on the fly; examples as modules; tables of the docs."""

import json
import os
import re
import runpy
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from filelock import FileLock
from peft import LoraConfig
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, TrainerCallback

from rdm_rl import RDMConfig, RDMTrainer
from rdm_rl.networks.roles import Networks
from rdm_rl.records import Conditioning, Direction, PromptBatch, Rollout

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
# Its old name alone is known to older transformers, and warns in newer ones.
CHECKPOINTING = next(
    name for name in ("activation_checkpointing", "gradient_checkpointing") if name in RDMConfig.__dataclass_fields__
)
PROMPTS = [{"prompt": f"the digit {digit}", "digit": digit} for digit in range(10)]


def table_rows(page: str) -> list[list[str]]:
    """The rows of every table on a page of docs, outside of code."""
    prose = re.sub(
        r"^```.*?^```$", "", (ROOT / "docs" / page).read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL
    )
    return [[cell.strip() for cell in row.split("|")] for row in re.findall(r"^\|(.+)\|$", prose, re.MULTILINE)]


def tiny_tokenizer(folder: Path) -> CLIPTokenizer:
    folder.mkdir(parents=True, exist_ok=True)
    characters = [chr(code) for code in range(33, 127)]
    tokens = [*characters, *(one + "</w>" for one in characters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16)


def tiny_sd(
    folder: Path, prediction_type: str = "epsilon", seed: int = 0, *, whole: bool = False, **scheduler
) -> StableDiffusionPipeline:
    """A StableDiffusionPipeline of random weights, with latents of shape (4, 8, 8).

    ``whole``: with the layers of every kind that a U-Net has, which takes twice as long.
    """
    down, up = ["CrossAttnDownBlock2D", "DownBlock2D"], ["UpBlock2D", "CrossAttnUpBlock2D"]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32) if whole else (16,),
            layers_per_block=1,
            cross_attention_dim=32,
            attention_head_dim=2,
            norm_num_groups=8,
            down_block_types=down if whole else down[:1],
            mid_block_type="UNetMidBlock2DCrossAttn" if whole else None,
            up_block_types=up if whole else up[1:],
        )
        vae = AutoencoderKL(
            block_out_channels=(8, 16),
            latent_channels=4,
            norm_num_groups=8,
            sample_size=16,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
        )
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=190,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=16,
                bos_token_id=188,
                eos_token_id=189,
                pad_token_id=189,
            )
        )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction_type,
        **{"clip_sample": False, "steps_offset": 1, **scheduler},
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tiny_tokenizer(folder / "tokenizer_source"),
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        image_encoder=None,
        requires_safety_checker=False,
    )


def tiny_config(output_dir: Path, **overrides) -> RDMConfig:
    """Settings for a run of a few seconds."""
    defaults = dict(
        output_dir=str(output_dir),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        max_steps=2,
        logging_steps=1,
        save_strategy="no",
        per_device_train_batch_size=4,
        num_generations=2,
        num_inference_steps=2,
        fake_score_updates_per_policy_update=2,
        fake_score_warmup_steps=1,
        sanity_check=False,
        warm_start_steps=2,
        warm_start_num_states=4,
        warm_start_ode_steps=2,
        teacher_guidance_scale=1.0,
        # Large enough that two updates are visible in the weights.
        learning_rate=1e-3,
        fake_score_learning_rate=1e-3,
        warm_start_learning_rate=1e-3,
        seed=7,
    )
    return RDMConfig(**{**defaults, **overrides})


def tiny_trainer(
    base: Any,
    output_dir: Path,
    *,
    lora: bool = True,
    kind: type[RDMTrainer] = RDMTrainer,
    train_dataset: Any = PROMPTS,
    given: Mapping[str, Any] | None = None,
    **overrides: Any,
) -> RDMTrainer:
    """A trainer on a tiny pipeline; ``given`` goes to the trainer, ``overrides`` to its settings.

    Its adapters are on one layer of each kind: making them takes as long as two updates.
    """
    adapter = LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_v", "conv1", "conv_out"])
    return kind(
        base,
        args=tiny_config(output_dir, **overrides),
        train_dataset=train_dataset,
        **{"peft_config": adapter if lora else None, **(given or {})},
    )


class StopAfter(TrainerCallback):
    """Stops a run after so many updates, as a user would."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_step_end(self, args, state, control, **_) -> None:
        control.should_training_stop = control.should_training_stop or state.global_step >= self.steps


class StepAway:
    """A reward that wants every value of x_0 to grow by the same amount."""

    def __init__(self, amount: float = 1.0, name: str = "away") -> None:
        self.amount, self.name = amount, name

    def direction(self, rollout, step, *, generator) -> Direction:
        x_0 = rollout.x_0[step]
        return Direction(
            values=torch.full_like(x_0, self.amount),
            applicable=torch.ones(len(x_0), dtype=torch.bool),
            rewards=x_0.flatten(1).mean(1),
        )


def latents(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def masked_direction(seed: int, applicable: list[bool]) -> Direction:
    """A direction of shape (N, 2, 2, 2) that holds NaN where it is not applicable: anything may stand there."""
    values = latents(len(applicable), 2, 2, 2, seed=seed)
    rows = torch.tensor(applicable)
    values[~rows] = float("nan")
    return Direction(values=values, applicable=rows)


def prompt_batch(count: int, conditioning: Conditioning | None = None, per_group: int = 1) -> PromptBatch:
    return PromptBatch(
        prompts=["a prompt"] * count,
        conditioning=conditioning or Conditioning(),
        group_ids=torch.arange(count) // per_group,
        sample_ids=range(count),
    )


def randomize(networks: Networks, scale: float = 0.05, seed: int = 0) -> None:
    """Give policy and fake score weights of their own, so that no two roles agree by chance."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for role in ("policy", "fake_score"):
            for parameter in networks.parameters(role):
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def changed(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> set[str]:
    """Names of the tensors that are not bit-identical."""
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def same(first: Any, second: Any) -> bool:
    """Whether two nested structures agree bit for bit."""
    if isinstance(first, Tensor):
        return isinstance(second, Tensor) and first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, Mapping):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


# Numbers of the log that depend on the machine and not on the run.
TIMINGS = {"images_per_second", "samples_per_second", "memory_gib"}


def log_numbers(trainer: RDMTrainer) -> list[dict[str, float]]:
    return [{key: value for key, value in row.items() if key not in TIMINGS} for row in trainer.state.log_history]


# As little as possible beside what a test of rewards looks at.
QUICK = {
    "warm_start": "none",
    "fake_score_warmup_steps": 0,
    "fake_score_updates_per_policy_update": 1,
    "num_inference_steps": 1,
    "lr_scheduler_type": "constant",
    "ema_decay": 0,
}
# Nor a fake score.
WITHOUT_RDM = {**QUICK, "fake_score_updates_per_policy_update": 0}


def quick_trainer(
    base: Any, output_dir: Path, reward_funcs: Any, *, given: Mapping[str, Any] | None = None, **settings: Any
) -> RDMTrainer:
    """A trainer of a small adapter; with ``QUICK`` its updates take less than a tenth of a second."""
    adapter = LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v", "conv_out"])
    return tiny_trainer(
        base, output_dir, given={"reward_funcs": reward_funcs, "peft_config": adapter, **(given or {})}, **settings
    )


def trained_weights(trainer: RDMTrainer) -> dict[str, Tensor]:
    """A copy of the weights of policy and fake score."""
    return {
        f"{role}/{name}": value.clone()
        for role in ("policy", "fake_score")
        for name, value in trainer.networks.state_dict(role).items()
    }


def one_rollout(trainer: RDMTrainer) -> Rollout:
    return trainer.generate_rollout(next(trainer.prompt_batches(0)))


def declare(reward: Any, **declarations: Any) -> Any:
    """The reward with attributes such as ``differentiable=True``."""
    for name, value in declarations.items():
        setattr(reward, name, value)
    return reward


def brightness(scale: float = 1.0, shift: float = 0.0, name: str = "brightness") -> Any:
    """A differentiable reward: the mean grey level, in other units."""
    return declare(lambda images, prompts: scale * images.mean((1, 2, 3)) + shift, differentiable=True, __name__=name)


def made_once(tmp_path_factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder that the first of the test processes fills, and all then read."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    with FileLock(root / f"{name}.lock"):
        if not (root / f"{name}.made").exists():
            (root / name).mkdir()
            make(root / name)
            (root / f"{name}.made").touch()
    return root / name


@contextmanager
def with_onednn() -> Iterator[None]:
    """oneDNN's convolutions for a while, which the tests otherwise do without (``conftest.py``)."""
    torch.backends.mkldnn.enabled = True
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = False


@contextmanager
def batches_of(module: nn.Module) -> Iterator[list[int]]:
    """The batch sizes of the module's forward passes."""
    sizes: list[int] = []
    hook = module.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    yield sizes
    hook.remove()


def stock_images(pipeline: StableDiffusionPipeline, vae: nn.Module, x_0: Tensor) -> Tensor:
    """What diffusers makes of latents."""
    with torch.no_grad():
        decoded = vae.decode(x_0 / vae.config.scaling_factor, return_dict=False)[0]
    return pipeline.image_processor.postprocess(decoded, output_type="pt")


def count_convolutions(work: Callable[[], None]) -> int:
    """How many forward convolutions some work takes."""
    count = 0

    def see(module: nn.Module, _: object) -> None:
        nonlocal count
        count += isinstance(module, nn.Conv2d)

    hook = nn.modules.module.register_module_forward_pre_hook(see)
    work()
    hook.remove()
    return count


def run_example(name: str, *words: object) -> None:
    """Run an example's script as the main program, with these words on its command line."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{name}.py", *map(str, words)])
        try:
            runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        except SystemExit as ended:
            assert not ended.code, f"it ended with {ended.code!r}"


def example(name: str) -> ModuleType:
    spec = spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
