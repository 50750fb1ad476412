"""The plan of a run's memory: against the published sizes, real passes on the CPU, and a real trainer."""

import json
import runpy
import shutil
import subprocess
import sys
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from torch import nn

from rdm_rl.cli.plan.activations import LiveBytes, Rehearsal, conditioning_of, cuda_autocast
from rdm_rl.cli.plan.memory import CARDS, GIB, Phase, Settings, Sizes, fits, kept, phases
from rdm_rl.cli.plan.model_sizes import MODELS
from rdm_rl.cli.plan.report import _rehearse, format_plan, make_plan, plan_command
from rdm_rl.cli.plan.skeleton import make_skeleton, read_blueprint
from rdm_rl.cli.train import TrainArguments
from rdm_rl.families import FAMILIES, load_family
from rdm_rl.networks.roles import make_networks
from rdm_rl.rewards.registry import unregister_reward
from tests.helpers import latents, tiny_config, tiny_sd, tiny_trainer
from tests.tiny_pipelines import TINY


def networks_on(device, pipeline, *, lora=True, dtype=torch.float32, autocast=None):
    family = load_family(pipeline)
    family.border = lambda: "any"
    return make_networks(
        family,
        None,
        LoraConfig(r=4) if lora else None,
        device=torch.device(device),
        dtype=dtype,
        generator=torch.Generator(),
        **({"autocast": autocast} if autocast else {}),
    )


def skeleton_of(pipeline, folder, dtype=torch.float32):
    pipeline.save_pretrained(folder)
    return make_skeleton(read_blueprint(folder), dtype)


# --- published sizes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "millions"),
    [("sd15", 859.52), ("sdxl", 2567.46), ("sd35-medium", 2469.66), ("flux-dev", 11901.41), ("sana-1600m", 1604.46)],
)
def test_built_in_sizes_are_the_published_ones(name, millions) -> None:
    family = load_family(make_skeleton(read_blueprint(name), torch.bfloat16))
    network = family.network
    # SD3's table of positions is in its file, and so in the published count, but is no parameter.
    count = sum(one.numel() for one in [*network.parameters(), *network.buffers()])
    assert round(count / 1e6, 2) == millions
    assert {one.device.type for one in network.parameters()} == {"meta"}
    assert {one.dtype for one in network.parameters()} == {torch.bfloat16}
    assert family.decoder.dtype == torch.float32
    assert family.latent_shape[1] * family.pixels_per_latent == (512 if name == "sd15" else 1024)


@pytest.mark.parametrize(
    ("model", "encoder", "millions"),
    [
        ("sdxl", "text_encoder", 123.06),
        ("sdxl", "text_encoder_2", 694.66),
        ("flux-dev", "text_encoder_2", 4762.31),
        ("sana-1600m", "text_encoder", 2614.34),
        ("sana-1600m", "vae", 312.25),
    ],
)
def test_their_other_networks_too(model, encoder, millions) -> None:
    entry = {key: MODELS[model][key] for key in ("_class_name", encoder)}
    network = getattr(make_skeleton(entry), encoder)
    assert round(sum(one.numel() for one in network.parameters()) / 1e6, 2) == millions


# --- skeletons --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY)
def test_a_skeleton_has_the_shapes_of_the_pipeline_whose_configurations_it_read(name, tmp_path) -> None:
    pipeline = TINY[name](tmp_path)
    pipeline.save_pretrained(tmp_path / "saved")
    for weights in (tmp_path / "saved").glob("*/*.safetensors"):
        weights.unlink()
    skeleton = make_skeleton(read_blueprint(tmp_path / "saved"))
    for component, module in pipeline.components.items():
        if isinstance(module, nn.Module):
            shapes = {key: value.shape for key, value in module.named_parameters()}
            found = getattr(skeleton, component)
            assert {key: value.shape for key, value in found.named_parameters()} == shapes
    assert load_family(skeleton).student_times(2).tolist() == load_family(pipeline).student_times(2).tolist()


def test_of_a_hub_model_only_configurations_are_fetched(tmp_path, monkeypatch) -> None:
    TINY["sd3"](tmp_path).save_pretrained(tmp_path / "saved")

    def fetch(name, allow_patterns):
        assert name == "owner/name"
        for file in (tmp_path / "saved").rglob("*.*"):
            path = str(file.relative_to(tmp_path / "saved"))
            if any(fnmatch(path, pattern) for pattern in allow_patterns):
                (tmp_path / "hub" / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, tmp_path / "hub" / path)
        return tmp_path / "hub"

    monkeypatch.setattr("rdm_rl.cli.plan.skeleton.snapshot_download", fetch)
    assert read_blueprint("owner/name") == read_blueprint(tmp_path / "saved")
    assert not [*(tmp_path / "hub").rglob("*.safetensors")]


def test_a_skeleton_with_weights_is_made_where_and_as_it_is_asked(tmp_path) -> None:
    TINY["sd3"](tmp_path).save_pretrained(tmp_path / "saved")
    usual = torch.get_default_dtype()
    pipeline = make_skeleton(read_blueprint(tmp_path / "saved"), torch.bfloat16, "cpu")
    assert torch.get_default_dtype() == usual
    assert {one.dtype for one in pipeline.transformer.state_dict().values()} == {torch.bfloat16}
    assert pipeline.vae.dtype == torch.float32
    assert pipeline.transformer.pos_embed.pos_embed.abs().max() == 1  # The table is there, not only its shape.


@pytest.mark.parametrize("name", TINY)
def test_encoded_prompts_have_the_shapes_that_the_family_gives(name, tmp_path) -> None:
    family = load_family(TINY[name](tmp_path))
    prompt = "3" if name == "dit" else "a red cat"
    real, planned = family.encode([prompt] * 2).tensors, conditioning_of(family, 2).tensors
    assert {key: (value.shape, value.dtype) for key, value in planned.items()} == {
        key: (value.shape, value.dtype) for key, value in real.items()
    }


class MyPipeline(StableDiffusionPipeline):
    """A pipeline that the plan has never heard of."""


def test_a_family_of_the_users_own_is_refused_with_a_reason(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(FAMILIES, "MyPipeline", FAMILIES["StableDiffusionPipeline"])
    base = tiny_sd(tmp_path)
    family = load_family(MyPipeline(**base.components, requires_safety_checker=False))
    with pytest.raises(ValueError, match="MyPipeline's encoded prompts are not known"):
        conditioning_of(family, 1)


def test_every_family_of_the_library_is_known(tmp_path) -> None:
    covered = {type(TINY[name](tmp_path)).__name__ for name in TINY} | {"DDIMPipeline"}
    assert covered >= {*FAMILIES}


# --- activations ------------------------------------------------------------------------------------------------------


def test_live_bytes_counts_storages_once_and_forgets_them() -> None:
    with LiveBytes() as live:
        first = torch.zeros(100)
        view = first[:50]
        other = first + 1
        assert live.now == 800
        del first
        assert live.now == 800  # The view still holds it.
        del view
        assert live.now == 400
    assert live.peak == 800
    assert other.shape == (100,)


def test_live_bytes_sets_gradients_aside() -> None:
    with LiveBytes() as live:
        kept = torch.zeros(100)
        live.set_aside(kept)
        other = torch.zeros(10)
    assert (live.peak, live.peak_beside) == (440, 400)
    assert len(other) == 10


def real_update(networks, count, dtype):
    """Bytes of saved tensors of one update on real tensors, by storage, without weights; and live bytes."""
    family = networks.family
    conditioning = conditioning_of(family, count)
    state, t = latents(count, *family.latent_shape), torch.full((count,), 0.5)
    known = {one.untyped_storage()._cdata for one in [*family.network.parameters(), *family.network.buffers()]}
    known |= {one.untyped_storage()._cdata for one in [state, t, *conditioning.tensors.values()]}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            saved[storage._cdata] = storage  # Kept alive, so that no other gets its address.
        return tensor

    existing = [*family.network.parameters(), *family.network.buffers(), state, t, *conditioning.tensors.values()]
    with (
        LiveBytes(existing) as live,
        cuda_autocast(),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        networks.role("policy"),
        torch.autocast("cpu", dtype, enabled=dtype != torch.float32),
    ):
        output = family.forward(networks.module("policy"), state, t, conditioning)
    kept_bytes = live.now
    saved.pop(output.untyped_storage()._cdata, None)
    saved_bytes = sum(storage.nbytes() for storage in saved.values())
    saved.clear()
    with live, cuda_autocast():
        output.square().mean().backward()
    return saved_bytes, kept_bytes - output.untyped_storage().nbytes(), live.peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["sd", "sd3", "flux_dev"])
def test_activations_without_memory_are_those_of_real_tensors(name, dtype, tmp_path) -> None:
    pipeline = TINY[name](tmp_path)
    network = load_family(pipeline).network_name
    skeleton = skeleton_of(pipeline, tmp_path / "saved", dtype)
    getattr(pipeline, network).to(dtype)
    rehearsal = Rehearsal(networks_on("meta", skeleton, dtype=dtype), dtype)
    planned = rehearsal.update("policy", 2)
    real = networks_on("cpu", pipeline, dtype=dtype)
    saved, alive, peak = real_update(real, 2, dtype)
    output = 4 * 2 * torch.Size(real.family.latent_shape).numel()
    assert planned.kept - output == alive
    # What is alive after a forward pass is what autograd saved for the backward pass.
    assert saved == pytest.approx(alive, rel=0.01)
    assert planned.peak == peak


def test_checkpointing_keeps_less_and_batches_add_up(tmp_path) -> None:
    rehearsal = Rehearsal(networks_on("meta", skeleton_of(TINY["sd3"](tmp_path), tmp_path / "saved")), torch.float32)
    one, three, five = (rehearsal.update("policy", count) for count in (1, 3, 5))
    assert five.kept - three.kept == pytest.approx(three.kept - one.kept, rel=0.03)
    rehearsal.networks.enable_activation_checkpointing()
    less = rehearsal.update("policy", 3)
    assert less.kept < three.kept / 2
    assert less.peak < three.peak


def test_a_forward_pass_keeps_nothing_and_the_decoder_has_a_graph_only_for_gradients(tmp_path) -> None:
    rehearsal = Rehearsal(networks_on("meta", skeleton_of(tiny_sd(tmp_path), tmp_path / "saved")), torch.float32)
    update, forward = rehearsal.update("policy", 2), rehearsal.forward("policy", 2)
    assert forward.kept == 2 * 4 * 8 * 8 * 4
    assert forward.peak < update.kept
    assert rehearsal.decode(2, gradient=True).peak > 2 * rehearsal.decode(2, gradient=False).peak


def test_no_patch_is_left_behind() -> None:
    before = nn.functional.layer_norm
    with pytest.raises(KeyError), cuda_autocast():
        assert nn.functional.layer_norm is not before
        raise KeyError
    assert nn.functional.layer_norm is before


# --- the memory model -------------------------------------------------------------------------------------------------


def test_phases_add_what_stays_to_what_works() -> None:
    sizes = Sizes(frozen=1000, policy=100, fake_score=100, decoder=50, text_encoders=400, rewards=300)
    found = phases(sizes, Settings(averages=2), {"rollout": 7, "reward images": 9})
    stays = 1000 + 100 + 100 + 2 * 200 + 2 * 100 + 50 + 400 + 300
    assert found["rollout"] == Phase(stays=stays, working=7)
    assert found["optimiser step"].peak == stays + 2 * 100
    away = Settings(averages=2, offload=frozenset({"text_encoders", "rewards"}))
    found = phases(sizes, away, {"encode prompts": 0, "rollout": 7, "reward images": 9})
    assert found["encode prompts"].peak == stays - 300
    assert found["rollout"].peak == stays - 700 + 7
    assert found["reward images"].peak == stays - 400 + 9
    # All at the start: networks, decoder and text encoders alone.
    found = phases(sizes, replace(away, caches_prompts=True), {"encode prompts": 0})
    assert found["encode prompts"].peak == 1000 + 100 + 100 + 50 + 400


def test_sharding_cuts_copies_and_leaves_adapters_whole() -> None:
    sizes = Sizes(frozen=1000, policy=100, fake_score=100, gathered=30)
    adapters = kept(sizes, Settings(shards=4))
    assert (adapters["frozen networks"], adapters["policy"], adapters["gathered blocks"]) == (250, 100, 30)
    copies = kept(sizes, Settings(shards=4, full=True))
    assert (copies["policy"], copies["optimiser state"], copies["averaged policy"]) == (25, 100, 25)
    assert kept(sizes, Settings())["gathered blocks"] == 0


def test_a_fake_score_that_is_never_trained_has_no_state() -> None:
    sizes = Sizes(frozen=0, policy=10, fake_score=10)
    assert kept(sizes, Settings(trains_fake_score=False))["optimiser state"] == 20


def test_a_card_holds_less_than_its_name_says() -> None:
    assert [fits(15 * GIB, card) for card in CARDS] == [False, True, True, True, True]
    assert not fits(int(132.5 * GIB), 141)


# --- against a real trainer -------------------------------------------------------------------------------------------


def size_of(tensors):
    return sum(one.numel() * one.element_size() for one in tensors)


def arguments_of(**overrides):
    return TrainArguments(**{"model_name_or_path": "", "dataset": "digits", "lora_r": 4, **overrides})


@pytest.mark.parametrize("lora", [True, False])
def test_what_a_trainer_keeps_is_what_the_plan_says(lora, tmp_path) -> None:
    base = tiny_sd(tmp_path)
    base.save_pretrained(tmp_path / "base")
    trainer = tiny_trainer(base, tmp_path / "out", lora=lora, max_steps=1, beta=0.1, warm_start="none")
    trainer.train()
    args = tiny_config(tmp_path / "plan", beta=0.1)
    plan = make_plan(tmp_path / "base", arguments_of(full=not lora), args)
    parts = kept(plan.sizes, plan.settings)

    networks = trainer.networks
    moments = [
        value
        for role in ("policy", "fake_score")
        for state in trainer.optimizers[role].optimizer.state.values()
        for key, value in state.items()
        if key != "step"
    ]
    own = [value for name, value in base.unet.named_parameters() if "lora_" not in name]
    assert parts["policy"] == size_of(networks.parameters("policy"))
    assert parts["fake score"] == size_of(networks.parameters("fake_score"))
    assert parts["optimiser state"] == size_of(moments)
    assert parts["averaged policy"] == size_of(
        [*trainer.average.tensors().values(), *trainer.reference.tensors().values()]
    )
    assert parts["frozen networks"] == size_of([*own, *base.unet.buffers()])
    assert parts["decoder"] == size_of(base.vae.parameters())
    assert parts["text encoders"] == size_of([*base.text_encoder.parameters(), *base.text_encoder.buffers()])
    rollout = trainer._last_rollout
    told = rollout.batch.conditioning.tensors.values()
    assert parts["recorded rollouts"] >= size_of([rollout.states, rollout.x_0, *told])


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flux")
    TINY["flux_dev"](folder).save_pretrained(folder / "base")
    return folder / "base"


def planned(folder, tmp_path, *words):
    file = tmp_path / "plan.json"
    base = ["--reward_funcs", "rdm", "ink", "--per_device_train_batch_size", "16", "--num_generations", "8"]
    plan_command(["--model", str(folder), "--json", str(file), "--lora_r", "4", *base, *words])
    return json.loads(file.read_text())


@pytest.fixture(scope="module")
def usual(folder, tmp_path_factory):
    return planned(folder, tmp_path_factory.mktemp("usual"))


def test_the_command_prints_a_table_and_writes_the_same_numbers(folder, tmp_path, capsys) -> None:
    (tmp_path / "run.yaml").write_text(
        f"model_name_or_path: {folder}\nreward_funcs: [rdm, hpsv2]\nbf16: true\nprompt_cache_dir: cache\n"
        "sampler: flow_sde\n"
    )
    file = tmp_path / "plan.json"
    plan_command(["--config", str(tmp_path / "run.yaml"), "--json", str(file)])
    found, text = json.loads(file.read_text()), capsys.readouterr().out
    assert [*found["phases"]] == [
        "encode prompts",
        "rollout",
        "fake-score update",
        "teacher and fake score",
        "reward images",
        "reward gradient",
        "policy update",
        "optimiser step",
    ]
    assert found["peak"] == max(phase["peak"] for phase in found["phases"].values())
    assert found["fits"] == {f"{card} GB": True for card in CARDS}
    for words in ("bfloat16", "reward gradient", "not yet measured on a GPU", "141 GB yes", "only while it is used"):
        assert words in text
    # HPSv2's network is counted by its published parameters, in float32.
    assert found["kept"]["reward models"] == pytest.approx(4 * 986e6, rel=0.01)
    assert found["activations"]["with_checkpointing"] < found["activations"]["without_checkpointing"]


def test_settings_that_move_or_drop_what_is_kept(folder, usual, tmp_path) -> None:
    words = ["--offload", "text_encoders", "--optim", "sgd", "--ema_decay", "0", "--eval_strategy", "steps"]
    found = planned(folder, tmp_path, *words)
    assert found["kept"]["optimiser state"] == found["kept"]["averaged policy"] == 0
    gone = sum(usual["kept"][name] for name in ("optimiser state", "averaged policy", "text encoders"))
    assert usual["phases"]["rollout"]["stays"] - found["phases"]["rollout"]["stays"] == gone
    # SGD is not fused, so its step needs a copy.
    assert found["phases"]["optimiser step"]["working"] == 2 * usual["kept"]["policy"]
    # A grid of 8 pictures is decoded in parts, as rewards' images are.
    assert found["phases"]["sample grid"]["working"] == usual["phases"]["reward images"]["working"]
    assert "sample grid" not in usual["phases"]


def test_settings_that_lower_working_memory(folder, usual, tmp_path) -> None:
    words = ["--activation_checkpointing", "true", "--decode_batch_size", "1"]
    found = planned(folder, tmp_path, *words)
    both = usual["phases"], found["phases"]
    update, again = (phases["policy update"] for phases in both)
    assert again["working"] < update["working"] / 2
    images, again = (phases["reward images"] for phases in both)
    assert again["working"] == pytest.approx(images["working"] / 4, rel=0.01)
    smaller = planned(folder, tmp_path, "--per_device_train_batch_size", "8")["phases"]["policy update"]
    assert smaller["working"] == pytest.approx(update["working"] / 2, rel=0.1)


def test_remedies_are_what_the_changed_run_would_take(folder, usual, tmp_path) -> None:
    found = planned(folder, tmp_path, "--activation_checkpointing", "true")
    assert usual["remedies"]["activation_checkpointing: true"] == found["peak"]
    together = "all of activation_checkpointing, prompt_cache_dir, per_device_train_batch_size"
    assert min(usual["remedies"], key=usual["remedies"].get) == together
    assert "decode_batch_size: 1" not in usual["remedies"]  # The policy update is what takes the most.


def test_full_copies_can_be_cut(folder, usual, tmp_path) -> None:
    words = ["--full", "true", "--shard", "true", "--gpus", "8"]
    found = planned(folder, tmp_path, *words)
    whole = found["components"]["copy for the policy"]["size"]
    assert found["kept"]["policy"] == whole // 8
    assert found["kept"]["optimiser state"] == 4 * whole // 8
    assert 0 < found["kept"]["gathered blocks"] <= whole
    assert "8 GPUs that share" in found["title"]


def test_guidance_asks_the_teacher_twice_unless_it_is_told(folder, tmp_path) -> None:
    rehearsal = Rehearsal(networks_on("meta", skeleton_of(tiny_sd(tmp_path), tmp_path / "saved")), torch.float32)
    args = tiny_config(
        tmp_path / "out", teacher_guidance_scale=3.0, fake_score_updates_per_policy_update=0, fake_score_warmup_steps=0
    )
    found = _rehearse(rehearsal, args, {}).found
    assert found["teacher and fake score"][0].peak > 1.8 * rehearsal.forward("teacher", 4).peak
    assert "fake-score update" not in found


@pytest.mark.parametrize("name", ["sdxl", "sana", "dit", "unconditional"])
def test_every_family_can_be_planned(name, tmp_path) -> None:
    TINY[name](tmp_path).save_pretrained(tmp_path / "base")
    args = tiny_config(tmp_path / "out", bf16=True)
    plan = make_plan(tmp_path / "base", arguments_of(reward_funcs=["rdm", "symmetry"]), args)
    assert plan.peak > sum(one.size for one in plan.components.values())
    assert format_plan(plan).count("\n") > 20


def test_a_separate_teacher_is_a_second_network(folder, usual, tmp_path) -> None:
    found = planned(folder, tmp_path, "--teacher", str(folder))
    assert found["kept"]["frozen networks"] == 2 * usual["kept"]["frozen networks"]
    assert found["kept"]["policy"] == usual["kept"]["policy"]
    assert "transformer of the teacher" in found["components"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "nowhere"], "neither a folder, nor a hub name"),
        (["--model", "sd15", "--gpus", "0"], "--gpus 0"),
        ([], "--model is missing"),
        (["--model", "sd15", "--rank", "3"], "rank, which is no setting"),
        (["--model", "sd15", "--sampler", "flow_sde"], "sampler='flow_sde'"),
    ],
)
def test_mistakes_get_one_clear_line(words, message) -> None:
    with pytest.raises((ValueError, OSError), match=message):
        plan_command(words)


def test_the_command_line_knows_the_command(folder) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "rdm_rl.cli.main", "plan", "--model", str(folder), "--reward_funcs", "rdm"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert "policy update" in run.stdout
    assert "Warning" not in run.stderr


# --- the dry runs on a GPU, as far as a CPU can go --------------------------------------------------------------------


BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def script():
    yield runpy.run_path(str(BENCHMARKS / "gpu.py"))
    unregister_reward("dry_run_brightness")


def test_a_tiny_dry_run_takes_what_the_plan_says(script, tmp_path, capsys) -> None:
    belongs_to_another = torch.zeros(10_000_000)  # As tests that ran before leave some behind.
    words = ["--tiny", "--updates", "2", "--models", "sd35-medium", "--output_dir", str(tmp_path)]
    (result,) = script["main"](words)
    assert result["finite"] and result["moved"] and result["reloads"]
    for name, phase in result["phases"].items():
        assert phase["working"] == pytest.approx(phase["planned_working"], rel=0.15), name
        assert phase["before"] == pytest.approx(phase["planned_before"], rel=0.1), name
    assert "| sd35-medium | 16x16 | 4 |" in capsys.readouterr().out
    assert belongs_to_another.numel()


def test_without_a_gpu_the_dry_runs_say_so(script) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit, match="There is no GPU here"):
        script["main"]([])
    text = (BENCHMARKS / "gpu.md").read_text()
    assert text.count(script["TABLE"][0]) == text.count(script["TABLE"][1]) == 1
