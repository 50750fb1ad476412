"""The examples for real models: run on tiny pipelines of the true classes; and what their files say."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from rdm_rl import RDMConfig
from rdm_rl.cli.parser import SettingsParser
from rdm_rl.cli.train import TrainArguments, load_prompts
from rdm_rl.rewards.registry import find_reward
from rdm_rl.student import load_student
from rdm_rl.trainers.methods import method_settings
from tests import tiny_pipelines
from tests.helpers import EXAMPLES, WITHOUT_RDM, brightness, example, one_rollout, quick_trainer, run_example, tiny_sd

PRODUCTS = ["sd15_gndmr", "sdxl_gndm", "sd3_gndmr", "flux_gndm"]
TINY: dict[str, Callable[[Path], DiffusionPipeline]] = {
    "sd15_gndmr": tiny_sd,
    "sdxl_gndm": tiny_pipelines.tiny_sdxl,
    "sd3_gndmr": tiny_pipelines.tiny_sd3,
    "flux_gndm": tiny_pipelines.tiny_flux,
}
# What makes a run of the published settings one of a second; everything else is the YAML file's.
TINY_RUN = """
    --use_cpu --bf16 false --disable_tqdm true --logging_steps 1 --save_strategy no --eval_strategy no --lora_r 2
    --per_device_train_batch_size 2 --num_generations 2 --gradient_accumulation_steps 1 --max_steps 2
    --learning_rate 1e-2 --lr_scheduler_type constant --fake_score_warmup_steps 1 --warm_start_steps 1
    --fake_score_updates_per_policy_update 1 --warm_start_num_states 2 --warm_start_ode_steps 2
""".split()


def launch(script: str, *words: Any, folder: Path) -> str:
    """What a script says that accelerate launches in a folder, in fewer processes than it is asked for."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines"]
    command += ["1", "--mixed_precision", "no", "--dynamo_backend", "no", str(EXAMPLES / f"{script}.py")]
    path = os.pathsep.join([str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*command, *map(str, words)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def settings(name: str, *words: str) -> tuple[TrainArguments, RDMConfig]:
    file = EXAMPLES / f"{name}.yaml"
    parsed = SettingsParser((TrainArguments, RDMConfig), "", config=file).parse(
        ["--use_cpu", "--bf16", "false", *words]
    )
    return parsed[0], parsed[1]


# ----- run -----


@pytest.mark.parametrize("name", PRODUCTS)
def test_it_runs_as_a_script(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pipeline = TINY[name](tmp_path / "sources")
    pipeline.save_pretrained(tmp_path / "base")
    run = tmp_path / "run"
    words = [*TINY_RUN, "--model_name_or_path", tmp_path / "base", "--output_dir", run]
    if name != "sd15_gndmr":
        words += ["--resolution", 16, "--prompt_cache_dir", tmp_path / "cache"]
    if "gndmr" in name:  # Without weights to download; one of them is a file of the user's.
        (tmp_path / "mine.py").write_text(
            "def bright(images, prompts):\n    return images.mean((1, 2, 3))\nbright.differentiable = True\n"
        )
        words += ["--reward_funcs", "rdm", "ink", "mine.py:bright", "--reward_start_step", 1]
    run_example(name, *words)
    assert f"The student is in {run}" in capsys.readouterr().out

    weights = load_file(run / "pytorch_lora_weights.safetensors")
    assert any(value.any() for name, value in weights.items() if "lora_B" in name)
    call = json.loads((run / "student.json").read_text())
    assert (call["num_inference_steps"], call["guidance_scale"]) == (4, 1.0)
    assert ("sigmas" in call) == (name in ("sd3_gndmr", "flux_gndm"))
    card = (run / "README.md").read_text()
    assert "load_lora_weights" in card
    if "gndmr" in name:
        assert all(reward in card for reward in ("rdm", "ink", "bright"))

    student = load_student(run, tmp_path / "base")
    (image,) = student.draw(["a heron"])
    assert image.size == (16, 16)


def test_the_subclass_runs_as_it_is_launched(tmp_path: Path) -> None:
    words = [word for word in TINY_RUN if word not in ("--bf16", "false")]
    words += ["--reward_start_step", "0", "--output_dir", str(tmp_path / "run")]
    printed = launch("custom_trainer", *words, folder=tmp_path)
    assert re.search(r"ink: 0\.\d{3} at the end", printed)
    assert "was asked for 2 processes, but started 1" in printed
    assert "torchrun --nproc_per_node 2" in printed
    weights = load_file(tmp_path / "run" / "pytorch_lora_weights.safetensors")
    assert any(value.any() for name, value in weights.items() if "lora_B" in name)
    assert (tmp_path / "run" / "scheduler" / "scheduler_config.json").is_file()


# ----- the hook of the subclass -----


def test_a_reward_leaves_alone_what_has_enough_of_it(base: Path, tmp_path: Path) -> None:
    kind = example("custom_trainer").TargetTrainer
    rewards = [brightness(), brightness(name="again")]
    trainer = quick_trainer(base, tmp_path, rewards, kind=kind, **WITHOUT_RDM, reward_weights=[1.0, 1.0])
    rollout = one_rollout(trainer)
    judgements = trainer.compute_rewards(rollout, 0)
    before = trainer.compute_directions(rollout, 0, judgements, {})["brightness"]
    assert before.applicable.all()
    rewards = judgements["brightness"].rewards
    enough = rewards.sort().values[1:3].mean()
    trainer.reward_targets = {"brightness": float(enough)}  # Two of the four have enough.
    after = trainer.compute_directions(rollout, 0, judgements, {})
    still = after["brightness"].applicable
    assert still.tolist() == (rewards < enough).tolist()
    assert still.sum() == 2
    assert after["again"].applicable.all()
    combined = trainer.weighting.combine(after)
    assert combined.values[still].abs().sum() > 1.5 * combined.values[~still].abs().sum() > 0


def test_the_subclass_takes_the_settings_of_another_model(base: Path, tmp_path: Path) -> None:
    words = [*TINY_RUN, "--config", str(EXAMPLES / "sd15_gndmr.yaml"), "--model_name_or_path", str(base)]
    words += ["--reward_funcs", "rdm", "ink", "symmetry", "--reward_targets", '{"ink": 0.0}', "--max_steps", "1"]
    words += ["--warm_start", "none", "--reward_start_step", "0", "--reward_conflict", "project"]
    example("custom_trainer").main([*words, "--output_dir", str(tmp_path / "run")])
    assert (tmp_path / "run" / "pytorch_lora_weights.safetensors").is_file()


def test_a_target_of_no_reward_is_refused(tmp_path: Path) -> None:
    words = ["--output_dir", str(tmp_path), "--reward_targets", '{"inc": 0.3}']
    with pytest.raises(ValueError, match=r"reward_targets has \['inc'\]"):
        example("custom_trainer").main(words)


# ----- what the files say -----


@pytest.mark.parametrize("name", PRODUCTS)
def test_the_settings_are_what_their_comments_say(name: str) -> None:
    arguments, args = settings(name)
    given = yaml.safe_load((EXAMPLES / f"{name}.yaml").read_text(encoding="utf-8"))
    assert given["method"] == name.rsplit("_", 1)[1]
    for setting, value in method_settings(given["method"]).items():
        assert getattr(args, setting) == value
    assert (args.num_inference_steps, args.num_generations, args.fake_score_updates_per_policy_update) == (4, 8, 5)
    assert args.fake_score_learning_rate > args.learning_rate
    assert given["bf16"]
    for reward in arguments.reward_funcs:
        assert find_reward(reward) is not None
    if args.reward_weights is not None:
        assert len(args.reward_weights) == len(arguments.reward_funcs)
        assert 0 < args.reward_start_step < args.max_steps
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps
    text = (EXAMPLES / f"{name}.yaml").read_text(encoding="utf-8")
    assert f"# {batch} images for each update: {batch // 8} prompts with 8 images each" in text


@pytest.mark.parametrize("name", PRODUCTS)
def test_the_header_says_what_the_settings_are(name: str) -> None:
    arguments, args = settings(name)
    header = str(example(name).__doc__)
    for row in ("hardware", "memory", "time", "expected"):
        assert re.search(rf"^{row}  ", header, re.MULTILINE), row
    assert f"rdm-rl plan --model {arguments.model_name_or_path} --config examples/{name}.yaml" in header
    assert f"rdm-rl sample --student {args.output_dir} --model {arguments.model_name_or_path}" in header
    assert "Not yet measured by us." in header
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps
    teacher = 1 if name.startswith("flux") else 2  # FLUX is told its guidance; others are asked twice.
    without = args.num_inference_steps + teacher + 1
    counted = " ".join(header.split())
    assert f"{batch * without} times for an image without and {batch * 6} times with a backward pass" in counted
    assert f"({batch} images; 4 + {teacher} + 1, and 5 + 1)" in counted


def test_flags_win_and_another_file_replaces(tmp_path: Path) -> None:
    _, args = settings("sd15_gndmr", "--learning_rate", "2e-6", "--method", "dmdr")
    assert (args.learning_rate, args.dm_normalization, args.reward_weighting) == (2e-6, "sample", "fixed")
    assert args.max_steps == 4000
    file = tmp_path / "mine.yaml"
    file.write_text("model_name_or_path: mine\ndataset: digits\nmax_steps: 3\n", encoding="utf-8")
    arguments, args = settings("sd15_gndmr", "--config", str(file))
    assert (arguments.model_name_or_path, arguments.lora_r, args.max_steps) == ("mine", 64, 3)
    assert args.reward_start_step == 0


def test_the_help_of_the_named_entry_point(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        example("sd15_gndmr").main(["--help"])
    text = capsys.readouterr().out
    assert "GNDMR on Stable Diffusion 1.5" in text
    assert "Default: sd15_gndmr.yaml beside the script." in " ".join(text.split())
    assert "\nthe few-step policy:\n" in text
    assert "[rdm hpsv2.1 clip_score]" in " ".join(text.split())


def test_the_prompts_are_many_and_short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)  # They are found from anywhere.
    arguments, _ = settings("sd15_gndmr")
    prompts = [row["prompt"] for row in load_prompts(arguments)]
    assert 400 <= len(prompts) <= 600
    assert len({prompt.lower() for prompt in prompts}) == len(prompts)
    assert all(prompt.isascii() and prompt == prompt.strip() and 3 < len(prompt.split()) < 25 for prompt in prompts)
    kinds = ('"', "painting", "photograph", "three ", "red", "left", "a cat", "portrait")
    assert all(sum(kind in prompt for prompt in prompts) >= 3 for kind in kinds)
