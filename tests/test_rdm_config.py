"""Settings that cannot work are refused when they are made, and inherited ones are honoured or refused."""

import dataclasses
import math
import re
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainingArguments
from trl import TrlParser

from rdm_rl import RDMConfig, RDMTrainer, ReDiFConfig
from rdm_rl.trainers.inherited import HONOURED
from tests.helpers import tiny_config

# A changed value for every inherited field that is not honoured and whose default does not suggest one.
CHANGED: dict[str, Any] = {
    "optim_target_modules": ["to_q"],
    "activation_checkpointing_kwargs": {"use_reentrant": True},
    "gradient_checkpointing_kwargs": {"use_reentrant": True},
    "torch_compile_backend": "inductor",
    "torch_compile_mode": "default",
    "liger_kernel_config": {"rope": True},
    "neftune_noise_alpha": 0.1,
    "torch_empty_cache_steps": 1,
    "include_num_input_tokens_seen": "all",
    "eval_accumulation_steps": 1,
    "include_for_metrics": ["inputs"],
    "hub_strategy": "end",
    "metric_for_best_model": "loss",
    "greater_is_better": True,
    "accelerator_config": {"split_batches": True},
    "parallelism_config": object(),
    "dataloader_prefetch_factor": 2,
    "dataloader_multiprocessing_context": "spawn",
    "label_names": ["labels"],
    "train_sampling_strategy": "sequential",
    "length_column_name": "size",
    "ddp_find_unused_parameters": True,
    "ddp_bucket_cap_mb": 5,
    "ddp_broadcast_buffers": True,
    "ddp_static_graph": True,
    "fsdp": "full_shard",
    "fsdp_config": {"min_num_params": 1},
    "deepspeed": "config.json",
    "debug": "underflow_overflow",
}
STRATEGIES = ("logging_strategy", "eval_strategy", "save_strategy")
AT_LEAST_1 = """
    num_inference_steps num_generations reward_batch_size decode_batch_size num_replayed_steps
    teacher_num_inference_steps warm_start_steps warm_start_num_states warm_start_ode_steps num_iterations
    gradient_accumulation_steps per_device_train_batch_size per_device_eval_batch_size
""".split()
AT_LEAST_0 = """
    dm_scale_floor reward_start_step reward_ramp_steps epsilon epsilon_high beta learning_rate
    fake_score_updates_per_policy_update fake_score_warmup_steps fake_score_max_grad_norm fake_score_learning_rate
""".split()
ABOVE_0 = "advantage_clip reward_timeout fidelity_budget teacher_cache_gib".split()
IGNORED = [one for one in fields(TrainingArguments) if one.init and one.name not in HONOURED]


def config(**settings: Any) -> RDMConfig:
    return RDMConfig(**{"output_dir": "out", "use_cpu": True, **settings})


def other_value(inherited: dataclasses.Field) -> Any:
    if inherited.name in CHANGED:
        return CHANGED[inherited.name]
    if isinstance(inherited.default, bool):
        return not inherited.default
    # Other versions of transformers have further fields; any text differs from their defaults.
    return inherited.default + 1 if isinstance(inherited.default, int | float) else "set"


# Defaults that some versions of transformers switch off by themselves, without accelerator or with one process.
SWITCHED_OFF = ("dataloader_pin_memory", "average_tokens_across_devices")


@pytest.mark.parametrize("inherited", [one for one in IGNORED if one.name not in SWITCHED_OFF], ids=lambda f: f.name)
def test_a_field_we_do_not_honour_is_refused_when_set(inherited: dataclasses.Field) -> None:
    with pytest.raises(ValueError, match=rf"^{inherited.name}=.* RDMTrainer does not act on it"):
        config(**{inherited.name: other_value(inherited)})


def test_defaults_work_and_differ_where_documented() -> None:
    made = RDMConfig(output_dir="out", use_cpu=True)
    assert (made.num_inference_steps, made.num_generations, made.per_device_train_batch_size) == (4, 8, 8)
    assert (made.learning_rate, made.logging_steps, made.report_to) == (1e-5, 10, [])
    assert not made.remove_unused_columns
    assert not made.bf16
    assert (made.dm_normalization, made.dm_scale_floor) == ("group_rms", 0.1)
    assert made.warm_start == "ode"


# What is set, and a part of what is said of it.
REFUSED: list[tuple[dict[str, Any], str]] = [
    # A choice that there is not.
    ({"dm_normalization": "gruop"}, "dm_normalization='gruop' is unknown. Did you mean 'group'? Use one of ('sample',"),
    ({"renoise_distribution": "unifrom"}, "Did you mean 'uniform'?"),
    ({"reward_weighting": "fixt"}, "Did you mean 'fixed'?"),
    ({"warm_start": "odes"}, "Did you mean 'ode'?"),
    ({"warm_start": "xyz"}, "is unknown. Use one of ('ode', 'denoise', 'none')"),
    ({"sampler": "dimm"}, "sampler='dimm' is unknown. Did you mean 'ddim'?"),
    ({"importance_sampling_level": "token"}, "importance_sampling_level='token' is unknown"),
    ({"step_weighting": "sdt"}, "Did you mean 'std'?"),
    ({"reward_gradient": "pathways"}, "Did you mean 'pathwise'?"),
    ({"reward_baseline": "prompt"}, "reward_baseline='prompt' is unknown"),
    ({"group_noise": "common"}, "group_noise='common' is unknown"),
    ({"offload": ["text_encoder"]}, "offload[0]='text_encoder' is unknown. Did you mean 'text_encoders'?"),
    # A number out of range.
    *(({name: 0}, f"{name}=0, but it must be at least 1") for name in AT_LEAST_1),
    *(({name: -1}, f"{name}=-1, but it must be at least 0") for name in AT_LEAST_0),
    *(({name: 0.0}, f"{name}=0.0, but it must be above 0") for name in ABOVE_0),
    ({"noise_pool": 0}, "noise_pool=0, but it must be between 1 and 16777216, or None."),
    ({"ema_decay": 1.0}, "ema_decay=1.0, but it must be between 0 and 1, and not 1"),
    (
        {"importance_weight_clip": 1.5, "num_iterations": 2},
        "importance_weight_clip=1.5, but it must be between 0 and 1",
    ),
    ({"renoise_range": [0.1, 1.5]}, "renoise_range[1]=1.5, but it must be between 0 and 1"),
    ({"sampler": "flow_sde", "eta": -0.1}, "eta=-0.1, but it must be at least 0"),
    ({"sampler": "ddim", "eta": 1.2}, "eta=1.2, but it must be between 0 and 1"),
    ({"sampler": "cps", "eta": 1.2}, "eta=1.2, but it must be between 0 and 1"),
    ({"sampler": "flow_sde", "eta": math.inf}, "eta=inf, but it must be a finite number"),
    *(({name: math.nan}, f"{name}=nan, but it must be a finite number") for name in ("beta", "guidance_scale")),
    ({"reward_weights": [1.0, math.inf]}, "reward_weights[1]=inf, but it must be a finite number"),
    # Settings that do not go together.
    ({"renoise_anneal_steps": 10}, "needs renoise_distribution='annealed_beta'"),
    ({"renoise_range": [0.0, 0.98]}, "0 < low <= high <= 1"),
    ({"renoise_range": [0.9, 0.2]}, "0 < low <= high <= 1"),
    ({"renoise_range": [0.02]}, "must be two times"),
    ({"fake_score_updates_per_policy_update": 0, "fake_score_warmup_steps": 3}, "Leave that out"),
    ({"per_device_train_batch_size": 12}, "is not a multiple of num_generations=8, so a prompt's group would be split"),
    ({"per_device_train_batch_size": 12}, "Set it to 16"),
    ({"per_device_train_batch_size": 2}, "Set it to 8"),
    ({"adaptive_reference": "online", "reward_weighting": "fixed"}, "uses no reference"),
    ({"lr_scheduler_kwargs": {"speed": 2}}, "cannot be made with lr_scheduler_kwargs={'speed': 2}"),
    ({"lr_scheduler_kwargs": 0}, "Give a mapping"),
    ({"lr_scheduler_type": "cosine_with_min_lr"}, "min_lr_rate should be set"),
    ({"fidelity_budget": 2.0}, "needs reward_weighting='budget', not 'adaptive'"),
    ({"reward_baseline": "batch"}, "Set scale_rewards to 'batch' or 'none'"),
    ({"pathwise_steps": "any", "reward_gradient": "score_function"}, "pathwise_steps='any' is set, but"),
    ({"group_noise": "shared", "num_inference_steps": 1}, "so they would be copies"),
    ({"eta": 0.5}, "eta=0.5 is set, but sampler='renoise'"),
    ({"importance_weight_clip": 0.1}, "importance_weight_clip=0.1 is set, but no rollout is used twice"),
    ({"random_times": 28}, "random_times=28 is for students of two steps or more"),
    ({"random_times": 28, "sampler": "ddim", "eta": 0.0, "num_inference_steps": 1}, "for students of two steps"),
    ({"random_times": 28, "num_replayed_steps": 2}, "num_replayed_steps=2 is set, but with random_times=28"),
    ({"random_times": 1}, "random_times=1"),
    ({"torch_compile": True}, "torch_compile=True is set, but RDMTrainer does not act on it. Compile the pipeline's"),
    ({"beta": 0.1, "num_inference_steps": 1}, "beta=0.1 compares the policy's random steps"),
    ({"beta": 0.1, "sampler": "ddim", "eta": 0.0}, "sampler='ddim', eta=0.0. Set beta=0."),
    # Inherited fields.
    *(({name: "epoch"}, f"{name}='epoch', but a run counts") for name in STRATEGIES),
    ({"save_strategy": "best"}, "save_strategy='best'"),
    ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "lr_scheduler_type='reduce_lr_on_plateau'"),
    ({"push_to_hub": True}, "hub_model_id"),
    ({"hub_model_id": "owner/name\n---\nlicense: mit"}, "is no name of the hub"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED, ids=str)
def test_what_cannot_work_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        config(**settings)


@pytest.mark.parametrize(
    ("make", "name", "message"),
    [
        (RDMConfig, "adam_beta", "RDMConfig takes no 'adam_beta'. Did you mean 'adam_beta"),
        (RDMConfig, "train_batch_size", "Did you mean 'per_device_train_batch_size'?"),
        (ReDiFConfig, "sample_num_steps", "ReDiFConfig takes no 'sample_num_steps'. docs/reference.md"),
        (
            partial(RDMTrainer, "unused"),
            "processing_class",
            "RDMTrainer takes no 'processing_class'. docs/reference.md",
        ),
    ],
)
def test_names_that_there_are_not_are_explained(make: Any, name: str, message: str) -> None:
    with pytest.raises(TypeError, match=re.escape(message)):
        make(**{name: 1})


def test_nothing_is_no_setting() -> None:
    assert config(dataloader_num_workers=None).dataloader_num_workers == 0


def test_more_noise_than_1_suits_the_flow_alone() -> None:
    assert config(sampler="flow_sde", eta=1.4).eta == 1.4


def test_the_clip_range_follows_the_level() -> None:
    assert config().clip_range == (1e-4, 1e-4)
    assert config(importance_sampling_level="sample").clip_range == (0.2, 0.2)
    assert config(epsilon=0.3).clip_range == (0.3, 0.3)
    assert config(epsilon=0.3, epsilon_high=0.5).clip_range == (0.3, 0.5)
    assert config(epsilon_high=0.5).clip_range == (1e-4, 0.5)


def test_methods() -> None:
    assert RDMConfig.from_method("dmd", output_dir="out", use_cpu=True).dm_normalization == "sample"
    assert RDMConfig.from_method("gndm", output_dir="out", use_cpu=True).dm_normalization == "group_rms"
    own = RDMConfig.from_method("dmd", output_dir="out", use_cpu=True, dm_normalization="none", num_generations=4)
    assert (own.dm_normalization, own.num_generations) == ("none", 4)
    with pytest.raises(ValueError, match=r"method 'gnmd' is unknown\. Did you mean 'gndm'\?"):
        RDMConfig.from_method("gnmd")


def test_annealing_gets_its_length() -> None:
    assert config(renoise_distribution="annealed_beta").renoise_anneal_steps == 2000
    assert config(renoise_distribution="annealed_beta", renoise_anneal_steps=5).renoise_anneal_steps == 5
    assert config().renoise_anneal_steps is None


def test_a_copy_with_changes_is_a_config() -> None:
    made = config(num_inference_steps=2, renoise_distribution="annealed_beta")
    copy = dataclasses.replace(made, max_steps=7)
    assert (copy.max_steps, copy.num_inference_steps, copy.renoise_anneal_steps) == (7, 2, 2000)


def test_flags_are_parsed() -> None:
    flags = "--output_dir out --use_cpu --num_inference_steps 2 --dm_normalization sample --renoise_range 0.1 0.9"
    (args,) = TrlParser((RDMConfig,)).parse_args_and_config([*flags.split(), "--learning_rate", "3e-5"])
    assert isinstance(args, RDMConfig)
    assert (args.num_inference_steps, args.dm_normalization, args.learning_rate) == (2, "sample", 3e-5)
    assert args.renoise_range == [0.1, 0.9]
    assert args.report_to == []


def test_yaml_is_parsed_and_flags_win(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(
        "output_dir: out\nuse_cpu: true\nnum_inference_steps: 2\nnum_generations: 4\nema_decay: 0.99\n"
        "reward_weights: [1.0, 0.5]\n"
    )
    words = ["--config", str(tmp_path / "run.yaml"), "--num_generations", "2"]
    (args,) = TrlParser((RDMConfig,)).parse_args_and_config(words)
    assert (args.num_inference_steps, args.num_generations, args.ema_decay) == (2, 2, 0.99)
    assert args.reward_weights == [1.0, 0.5]


def test_bfloat16_that_no_device_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("is_torch_bf16_gpu_available", "is_torch_xla_available"):
        monkeypatch.setattr(f"rdm_rl.trainers.rdm_config.{name}", lambda: False)
    with pytest.raises(ValueError, match=r"bf16=True, but .* Set bf16=False \(--bf16 false"):
        tiny_config(tmp_path, bf16=True, use_cpu=False)
    assert tiny_config(tmp_path, bf16=True, use_cpu=True).bf16


@pytest.mark.parametrize(("asked", "expected"), [("no", "no"), ("bf16", "bf16"), ("fp16", "fp16")])
def test_the_launch_s_precision_counts_unless_a_setting_does(
    asked: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rdm_rl.trainers.processes.LAUNCHED_PRECISION", asked)
    config = tiny_config(tmp_path)
    assert (config.bf16, config.fp16) == (expected == "bf16", expected == "fp16")
    config = tiny_config(tmp_path, bf16=True)
    assert (config.bf16, config.fp16) == (True, False)
