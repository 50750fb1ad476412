"""A value is read by its field's annotation, wherever it comes from; what cannot be read or saved is refused."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rdm_rl import RDMConfig, ReDiFConfig
from rdm_rl.cli.parser import SettingsParser
from rdm_rl.cli.train import TrainArguments, lora_config
from rdm_rl.settings import Share, check, convert, groups, setting

HOME = str(Path.home())

# A field of RDMConfig, what it is given, and what it then is.
READ: list[tuple[str, Any, Any]] = [
    # Numbers of NumPy and torch.
    ("num_inference_steps", np.int64(2), 2),
    ("max_steps", np.int32(7), 7),
    ("seed", torch.tensor(3), 3),
    ("eta", np.float32(0.5), 0.5),
    ("ema_decay", np.float64(0.5), 0.5),
    ("save_ema", np.bool_(False), False),
    ("renoise_range", np.array([0.25, 0.5]), [0.25, 0.5]),
    ("reward_weights", torch.tensor([1.0, 0.5]), [1.0, 0.5]),
    ("run_name", np.str_("night"), "night"),
    # Whole floats, and text.
    ("num_iterations", 4.0, 4),
    ("max_steps", "1e3", 1000),
    ("num_iterations", " 2 ", 2),
    ("learning_rate", "1e-5", 1e-5),
    ("guidance_scale", 3, 3),
    ("shard", "false", False),
    ("save_ema", "off", False),
    ("bf16", "yes", True),
    ("reward_timeout", "none", None),
    ("teacher_cache_gib", "null", None),
    ("teacher_cache_dir", "None", None),
    # One for a list, and numbers inside lists and mappings.
    ("reward_weights", 1, [1]),
    ("reward_weights", "1e-1", [0.1]),
    ("reward_weights", [1, "1e-1"], [1, 0.1]),
    ("reward_weights", (1.0, np.float64(0.5)), [1.0, 0.5]),
    ("offload", "rewards", ["rewards"]),
    ("lr_scheduler_kwargs", {"lr_end": "1e-9", "power": np.float64(2)}, {"lr_end": 1e-9, "power": 2.0}),
    ("lr_scheduler_kwargs", '{"power": 2}', {"power": 2}),
    # What YAML makes of `no` and `off`.
    ("warm_start", False, "none"),
    ("warm_start", None, "none"),
    ("dm_normalization", False, "none"),
    ("scale_rewards", False, "none"),
    ("step_weighting", False, "none"),
    ("report_to", False, []),
    ("save_strategy", False, "no"),
    ("eval_strategy", False, "no"),
    ("logging_strategy", False, "no"),
    ("reward_timeout", False, None),
    ("reward_decoder", False, None),
    ("resume_from_checkpoint", False, None),
    ("resume_from_checkpoint", True, "true"),
    # Paths, and the home folder.
    *(
        (name, value, HOME + "/runs")
        for name in ("output_dir", "warm_start_cache_dir", "teacher_cache_dir", "prompt_cache_dir", "reward_decoder")
        for value in ("~/runs", Path("~/runs"))
    ),
    ("resume_from_checkpoint", Path("~/runs"), HOME + "/runs"),
    ("run_name", Path("runs/night"), "runs/night"),
    # Numbers for text.
    ("run_name", 7, "7"),
    ("report_to", ("wandb", "tensorboard"), ["wandb", "tensorboard"]),
]
NEEDED: dict[str, dict[str, Any]] = {
    "eta": {"sampler": "ddim"},
    "bf16": {"use_cpu": True},
    "teacher_cache_dir": {},
    "lr_scheduler_kwargs": {"lr_scheduler_type": "polynomial"},
}


def config(**settings: Any) -> RDMConfig:
    name = next(iter(settings))
    return RDMConfig(**{"output_dir": "out", "use_cpu": True, **NEEDED.get(name, {}), **settings})


def plain(value: Any) -> Any:
    return getattr(value, "value", value)


@pytest.mark.parametrize(("name", "value", "expected"), READ, ids=str)
def test_a_value_is_read_by_its_annotation(name: str, value: Any, expected: Any) -> None:
    made = config(**{name: value})
    read = plain(getattr(made, name))
    assert read == expected
    assert type(read) is type(expected)
    if isinstance(read, list):
        assert [type(entry) for entry in read] == [type(entry) for entry in expected]
    assert plain(json.loads(made.to_json_string())[name]) == expected
    assert plain(getattr(replace(made, seed=5), name)) == (5 if name == "seed" else expected)


# A field, what it is given, and what is said of it.
UNREADABLE: list[tuple[str, Any, str]] = [
    ("num_inference_steps", 4.5, "num_inference_steps=4.5, but it must be a whole number."),
    ("num_inference_steps", "four", "num_inference_steps='four', but it must be a whole number."),
    ("num_inference_steps", True, "num_inference_steps=True, but it must be a whole number."),
    ("num_inference_steps", None, "num_inference_steps=None, but it must be a whole number."),
    ("num_inference_steps", [4], "num_inference_steps=[4], but it must be a whole number."),
    ("num_inference_steps", float("inf"), "num_inference_steps=inf, but it must be a whole number."),
    ("max_steps", 1.5, "max_steps=1.5, but it must be a whole number."),
    ("eta", "much", "eta='much', but it must be a number or None."),
    ("learning_rate", False, "learning_rate=False, but it must be a number."),
    ("save_ema", "perhaps", "save_ema='perhaps', but it must be true or false."),
    ("save_ema", 2, "save_ema=2, but it must be true or false."),
    ("reward_weights", {"rdm": 1}, "reward_weights={'rdm': 1}, but it must be a list, each entry a number or None."),
    ("reward_weights", ["a"], "reward_weights=['a'], but it must be a list, each entry a number or None."),
    ("run_name", True, "run_name=True, but it must be text or None."),
    ("project", False, "project=False, but it must be text."),
    ("reward_conflict", False, "reward_conflict=False is unknown. Use one of ('keep', 'project')."),
    ("sampler", ["ddim"], "sampler=['ddim'] is unknown."),
    ("lr_scheduler_kwargs", {"function": print}, "cannot be saved with a run: <built-in function print> is neither"),
    ("run_name", object, "run_name=<class 'object'> cannot be saved with a run"),
    ("learning_rate", 1j, "learning_rate=1j cannot be saved with a run"),
]


@pytest.mark.parametrize(("name", "value", "message"), UNREADABLE, ids=str)
def test_what_cannot_be_read_or_saved_is_refused(name: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError) as refused:
        config(**{name: value})
    assert message in str(refused.value)
    assert str(refused.value).startswith(name)


def test_a_file_and_the_command_line_are_read_alike(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        """
        model_name_or_path: digits
        dataset: ~/prompts.txt
        teacher: none
        reward_funcs: rdm
        reward_options: {rdm: {scale: 1e-1, names: [a, 2e3]}}
        lora_target_modules: all-linear
        lora_r: 1e1
        use_cpu: yes
        max_steps: 1e3
        learning_rate: 1e-5
        reward_weights: [1, 1e-1]
        warm_start: no
        save_strategy: no
        report_to: off
        reward_timeout: ~
        teacher_cache_dir: ~/images
        """,
        encoding="utf-8",
    )
    flags = """
        --model_name_or_path digits --dataset ~/prompts.txt --teacher none --reward_funcs rdm --lora_r 1e1 --use_cpu
        --lora_target_modules all-linear --max_steps 1e3 --learning_rate 1e-5 --reward_weights 1 1e-1 --warm_start none
        --save_strategy no --report_to none --reward_timeout none --teacher_cache_dir ~/images
    """.split()
    for words in (["--config", str(file)], flags):
        arguments, args = SettingsParser((TrainArguments, RDMConfig), "A run.").parse(words)
        assert (arguments.dataset, arguments.teacher) == (HOME + "/prompts.txt", None)
        assert (arguments.reward_funcs, arguments.lora_r) == (["rdm"], 10)
        assert lora_config(arguments).target_modules == "all-linear"
        assert (args.use_cpu, args.max_steps, args.learning_rate, args.reward_weights) == (True, 1000, 1e-5, [1, 0.1])
        assert (args.warm_start, args.save_strategy.value, args.report_to) == ("none", "no", [])
        assert (args.reward_timeout, args.teacher_cache_dir) == (None, HOME + "/images")
    assert SettingsParser((TrainArguments, RDMConfig), "A run.").parse(["--config", str(file)])[0].reward_options == {
        "rdm": {"scale": 0.1, "names": ["a", 2000.0]}
    }


def test_a_setting_that_follows_another_sees_it_converted() -> None:
    args = ReDiFConfig(output_dir=Path("out"), use_cpu=True, reward_gradient="pathwise", eta="0")
    assert (args.eta, args.num_generations, args.teacher_cache_dir) == (0.0, 1, "out/teacher-images")


@dataclass
class DemoSettings:
    """A demonstration.

    More of it.
    """

    share: Share | None = setting(0.5, "How much.")
    names: list[str] = setting(list, "Of what.")


@dataclass
class Derived(DemoSettings):
    share: Share | None = 0.25


def test_a_class_of_settings_needs_no_more_than_its_fields() -> None:
    assert {title: [*members] for title, members in groups(Derived).items()} == {"A demonstration": ["share", "names"]}
    assert groups(Derived)["A demonstration"]["share"].default == 0.25
    demo = Derived("2", "a")
    convert(demo)
    assert demo == Derived(2.0, ["a"])
    with pytest.raises(ValueError, match=r"^share=2.0, but it must be between 0 and 1, or None.$"):
        check(demo)
