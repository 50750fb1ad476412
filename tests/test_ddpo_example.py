"""``examples/ddpo.py``, run as a script, and what a DDPO run must never do."""

import json
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file

from rdm_rl import RDMConfig
from rdm_rl.trainers.inherited import HONOURED
from rdm_rl.trainers.methods import method_settings
from tests.helpers import (
    EXAMPLES,
    PROMPTS,
    WITHOUT_RDM,
    changed,
    example,
    quick_trainer,
    run_example,
    table_rows,
    tiny_sd,
    trained_weights,
)

# The fields of TRL 0.23.1's configurations.
SHARED_FIELDS = """
exp_name run_name seed log_with tracker_kwargs accelerator_kwargs project_kwargs tracker_project_name logdir num_epochs
save_freq num_checkpoint_limit mixed_precision allow_tf32 resume_from sample_num_steps sample_eta sample_guidance_scale
train_batch_size train_use_8bit_adam train_learning_rate train_adam_beta1 train_adam_beta2 train_adam_weight_decay
train_adam_epsilon train_gradient_accumulation_steps train_max_grad_norm negative_prompts push_to_hub
""".split()
DDPO_FIELDS = """
sample_batch_size sample_num_batches_per_epoch train_num_inner_epochs train_cfg train_adv_clip_max train_clip_range
train_timestep_fraction per_prompt_stat_tracking per_prompt_stat_tracking_buffer_size
per_prompt_stat_tracking_min_count async_reward_computation max_workers
""".split()
ALIGN_PROP_FIELDS = """
log_image_freq truncated_backprop_rand truncated_backprop_timestep truncated_rand_backprop_minmax
""".split()

SMALL = {**WITHOUT_RDM, "num_inference_steps": 4, "num_replayed_steps": 3, "guidance_scale": 1.0, "num_generations": 4}
FLAGS = "--num_inference_steps 4 --num_replayed_steps 3 --num_generations 4 --per_device_train_batch_size 8"
SHORT = f"{FLAGS} --max_steps 2 --logging_steps 1 --num_judged 4 --lora_r 2 --disable_tqdm true --use_cpu".split()


@pytest.fixture
def ddpo() -> ModuleType:
    return example("ddpo")


def settings(**overrides: object) -> dict[str, object]:
    return {**method_settings("ddpo"), **SMALL, "per_device_train_batch_size": 8, "weight_decay": 0.0, **overrides}


def test_it_runs_as_a_script(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("cat\ndog\nhorse\n", encoding="utf-8")
    words = ["--model_name_or_path", base, "--dataset", prompts, "--output_dir", tmp_path / "run", *SHORT]
    run_example("ddpo", *words, "--guidance_scale", 5, "--save_strategy", "steps", "--save_steps", 1)
    printed = capsys.readouterr().out
    assert re.search(r"jpeg_compressibility: -\d+\.\d+ before, -\d+\.\d+ after 2 updates", printed)

    run = tmp_path / "run"
    result = json.loads((run / "result.json").read_text())
    assert [entry["step"] for entry in result["log"]] == [1, 2]
    assert all(entry["rewards/jpeg_compressibility/log_ratio_max"] == 0 for entry in result["log"])
    assert (run / "before_after.png").is_file()
    assert (run / "checkpoint-2" / "trainer_state.json").is_file()
    weights = load_file(run / "pytorch_lora_weights.safetensors")
    assert any(value.any() for name, value in weights.items() if "lora_B" in name)
    use = json.loads((run / "student.json").read_text())
    assert use == {"num_inference_steps": 4, "guidance_scale": 5.0}
    assert isinstance(DDIMScheduler.from_pretrained(run, subfolder="scheduler"), DDIMScheduler)


def test_the_help_can_be_read(ddpo: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        ddpo.parse(["--help"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0
    assert "by policy gradient (DDPO)" in " ".join(text.split())
    for flag in ("--model_name_or_path", "--reward_funcs", "--eta", "--num_replayed_steps", "--num_judged", "--lora_r"):
        assert re.search(rf"^  {flag}\b", text, re.MULTILINE), flag
    assert "--fsdp" not in text  # RDMConfig refuses it.
    assert "SUPPRESS" not in text
    assert not re.search(r"`\w+`_|:class:", text)


def test_the_settings_for_stable_diffusion_are_those_of_trl(ddpo: ModuleType) -> None:
    arguments, args = ddpo.parse(["--config", str(EXAMPLES / "ddpo.yaml"), "--use_cpu", "--bf16", "false"])
    assert arguments.model_name_or_path == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert (args.sampler, args.eta, args.num_inference_steps, args.guidance_scale) == ("ddim", 1.0, 50, 5.0)
    assert (args.learning_rate, args.weight_decay, args.max_grad_norm) == (3e-4, 1e-4, 1.0)
    assert (args.clip_range, args.advantage_clip) == ((1e-4, 1e-4), 5.0)
    assert (args.importance_sampling_level, args.scale_rewards, args.reward_baseline) == ("dimension", "group", "group")
    assert args.num_replayed_steps >= args.num_inference_steps - 1  # All random steps: timestep fraction 1.
    assert (arguments.lora_r, arguments.lora_target_modules) == (4, ["to_k", "to_q", "to_v", "to_out.0"])
    assert ddpo.parse(["--num_inference_steps", "20"])[1].num_inference_steps == 20


def test_align_prop_s_job(ddpo: ModuleType, base: Path, tmp_path: Path) -> None:
    words = ["--model_name_or_path", str(base), "--output_dir", str(tmp_path), *SHORT]
    ddpo.main([*words, "--reward_gradient", "pathwise", "--reward_funcs", "ink", "--learning_rate", "1e-2"])
    result = json.loads((tmp_path / "result.json").read_text())
    assert all(entry["rewards/ink/acted"] == 1 for entry in result["log"])
    assert not any("log_ratio" in name for entry in result["log"] for name in entry)
    assert result["after"]["ink"] > result["before"]["ink"]


@pytest.mark.parametrize("statistics", ["group", "batch"])
def test_a_constant_reward_changes_nothing(base: Path, tmp_path: Path, statistics: str) -> None:
    def weights_after(reward: object) -> set[str]:
        own = settings(reward_baseline=statistics, scale_rewards=statistics)
        trainer = quick_trainer(base, tmp_path, reward, **own)
        before = trained_weights(trainer)
        trainer.train()
        return changed(before, trained_weights(trainer))

    assert not weights_after(lambda images, prompts: [0.3] * len(images))
    assert weights_after(lambda images, prompts: images.mean((1, 2, 3)).tolist())


def test_a_reward_of_the_prompt_alone_changes_nothing_by_the_group_s_mean(base: Path, tmp_path: Path) -> None:
    def weights_after(**own: object) -> set[str]:
        reward = lambda images, prompts: [float(prompt[-1]) for prompt in prompts]  # noqa: E731
        trainer = quick_trainer(base, tmp_path, reward, **settings(**own))
        before = trained_weights(trainer)
        trainer.train()
        return changed(before, trained_weights(trainer))

    assert not weights_after()
    assert weights_after(reward_baseline="batch", scale_rewards="batch")


@pytest.mark.parametrize(("batch", "generations", "accumulation"), [(8, 4, 1), (12, 2, 1), (6, 3, 3)])
def test_statistics_never_mix_prompts(
    base: Path, tmp_path: Path, batch: int, generations: int, accumulation: int
) -> None:
    """Every advantage is that of the sample among those of its own prompt, computed anew here."""

    def far_apart(images: torch.Tensor, prompts: list[str], digit: list[int]) -> torch.Tensor:
        return 100.0 * torch.tensor(digit) + images.mean((1, 2, 3))

    own = {"per_device_train_batch_size": batch, "num_generations": generations}
    own |= {"gradient_accumulation_steps": accumulation, "max_steps": 1}
    trainer = quick_trainer(base, tmp_path, far_apart, train_dataset=PROMPTS, **settings(**own))
    trainer.train()
    assert len(trainer.experiences) == 3 * accumulation
    for one in trainer.experiences:
        rewards = trainer.compute_rewards(one.rollout, one.step)["far_apart"].rewards.double()
        advantages, prompts = one.directions["far_apart"].recorded.advantages, one.rollout.batch.prompts
        assert len(set(prompts)) == batch // generations
        for prompt in set(prompts):
            mine = torch.tensor([index for index, other in enumerate(prompts) if other == prompt])
            assert len(mine) == generations
            values = rewards[mine]
            expected = (values - values.mean()) / values.std(correction=0)
            found = advantages[mine].double()
            assert found.sum().abs() < 1e-4
            # The spread of the batch, some hundreds, has a share of 1e-4 in the denominator.
            assert torch.equal(found.argsort(), expected.argsort())
            assert torch.nn.functional.cosine_similarity(found, expected, dim=0) > 0.999


def test_the_page_has_every_old_field_beside_one_that_exists() -> None:
    rows = [cells for cells in table_rows("migration_from_trl.md") if re.match(r"`[a-z]", cells[0])]
    listed = [re.findall(r"`(\w+)`", cells[0])[0] for cells in rows]
    assert sorted(listed) == sorted([*SHARED_FIELDS, *SHARED_FIELDS, *DDPO_FIELDS, *ALIGN_PROP_FIELDS])
    ours = {name for cells in rows for name in re.findall(r"`(\w+)`", cells[1])}
    assert ours <= {*RDMConfig.__dataclass_fields__, *HONOURED}  # Older transformers lack some that are honoured.
    for cells in rows:  # Where there is nothing, the page says why.
        assert cells[1] != "-" or re.match("not (needed|offered)", cells[2]), cells
        if cells[2].startswith("same"):
            default = re.search(r"\((.*?)\)", cells[0])[1]
            name = re.findall(r"`(\w+)`", cells[1])[0]
            given = method_settings("ddpo").get(name, RDMConfig.__dataclass_fields__[name].default)
            given = 1e-4 if name == "epsilon" else given  # Of the level; tested with the YAML file.
            assert float(default) == given, name


def test_a_lora_of_trl_is_a_start(base: Path, tmp_path: Path) -> None:
    """The layers, names and file of TRL 0.23.1's DefaultDDPOStableDiffusionPipeline."""
    modules = ["to_k", "to_q", "to_v", "to_out.0"]
    old = tiny_sd(tmp_path / "source")
    old.unet.add_adapter(LoraConfig(r=4, lora_alpha=4, init_lora_weights=False, target_modules=modules))
    state = convert_state_dict_to_diffusers(get_peft_model_state_dict(old.unet))
    assert any(name.endswith("to_q.lora.down.weight") for name in state)
    StableDiffusionPipeline.save_lora_weights(tmp_path / "old", unet_lora_layers=state)

    adapter = LoraConfig(r=4, lora_alpha=4, target_modules=modules)
    given = {"policy_init": tmp_path / "old", "peft_config": adapter}
    trainer = quick_trainer(base, tmp_path, "jpeg_compressibility", given=given, **settings())
    expected = {name.replace(".default", ""): value for name, value in get_peft_model_state_dict(old.unet).items()}
    found, _ = trainer.networks.export()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
