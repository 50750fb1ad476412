"""The plan of a run's memory: against the published sizes, real passes on the CPU, and a real trainer."""

import json
import runpy
import shutil
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from torch import nn

from rdm_rl.cli.main import main
from rdm_rl.cli.plan.command import plan_command
from rdm_rl.cli.plan.memory import CARDS, GIB, Phase, Setup, fits, kept, phases
from rdm_rl.cli.plan.model_sizes import MODELS
from rdm_rl.cli.plan.passes import Cuda, Memory, Passes, encoded_prompts
from rdm_rl.cli.plan.report import TOGETHER, format_plan, make_plan
from rdm_rl.cli.plan.skeleton import make_skeleton, read_blueprint
from rdm_rl.cli.train import TrainArguments
from rdm_rl.families import StableDiffusionFamily, load_family, register_family
from rdm_rl.networks.roles import make_networks
from rdm_rl.records import Conditioning
from tests.helpers import latents, tiny_config, tiny_sd, tiny_trainer
from tests.tiny_pipelines import TINY

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
BENCHMARK = runpy.run_path(str(BENCHMARKS / "gpu.py"))


def networks_on(device, pipeline, dtype=torch.float32, rank=4):
    family = load_family(pipeline)
    family.border = lambda: "any"
    adapters = LoraConfig(r=rank) if rank else None
    return make_networks(family, None, adapters, device=torch.device(device), dtype=dtype, generator=torch.Generator())


def skeleton_of(pipeline, folder, dtype=torch.float32):
    pipeline.save_pretrained(folder)
    return make_skeleton(read_blueprint(folder), dtype)


# --- published sizes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        *(("sd15", 859.52), ("sdxl", 2567.46), ("sd35-medium", 2469.66), ("flux-dev", 11901.41)),
        *(("klein-base-4b", 3875.54), ("z-image", 6154.91), ("sana-1600m", 1604.46)),
    ],
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
        ("klein-base-4b", "text_encoder", 4022.47),
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
    pipeline = TINY[name](tmp_path)
    prompt = "3" if name == "dit" else "a red cat"
    real = load_family(pipeline).encode([prompt] * 2).tensors
    planned = encoded_prompts(load_family(skeleton_of(pipeline, tmp_path / "saved")), 2).tensors
    assert {key: (value.shape, value.dtype) for key, value in planned.items()} == {
        key: (value.shape, value.dtype) for key, value in real.items()
    }


class TwicePrompted(StableDiffusionFamily):
    """A family of a user's own: it tells the network each prompt twice."""

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        states = super().encode_prompts(prompts).tensors["encoder_hidden_states"]
        return Conditioning(tensors={"encoder_hidden_states": states.repeat(1, 2, 1)})


def test_a_family_of_the_users_own_is_planned_as_it_encodes(tmp_path) -> None:
    base = tiny_sd(tmp_path)
    base.save_pretrained(tmp_path / "base")
    args = tiny_config(tmp_path / "out")
    usual = make_plan(tmp_path / "base", arguments_of(), args)
    register_family("StableDiffusionPipeline", TwicePrompted)
    try:
        longer = make_plan(tmp_path / "base", arguments_of(), args)
    finally:
        register_family("StableDiffusionPipeline", StableDiffusionFamily)
    row = 16 * 32 * 4
    copies = args.per_device_train_batch_size * 2 * args.gradient_accumulation_steps
    assert longer.kept["recorded rollouts"] - usual.kept["recorded rollouts"] == copies * row
    assert longer.activations[0] > usual.activations[0]


# --- passes -----------------------------------------------------------------------------------------------------------


def test_memory_counts_storages_once_and_forgets_them() -> None:
    with Memory() as memory:
        first = torch.zeros(100)
        view = first[:50]
        other = first + 1
        assert memory.now == 800
        del first
        assert memory.now == 800  # The view still holds it.
        del view
        assert memory.now == 400
    assert memory.peak == 800
    assert other.shape == (100,)


def test_what_is_left_out_counts_no_longer() -> None:
    with Memory() as memory:
        kept = torch.zeros(100)
        memory.leave_out(kept[:50])
        other = torch.zeros(10)
        del kept
    assert (memory.now, memory.peak, memory.whole) == (40, 400, 440)
    assert len(other) == 10


def test_the_meta_device_casts_and_attends_as_cuda_does() -> None:
    weight = torch.zeros(8, 8, device="meta", requires_grad=True)
    x = torch.zeros(4, 8, device="meta")
    cuda, memory = Cuda(torch.bfloat16), Memory([weight, x])
    with cuda, memory:
        output = nn.functional.layer_norm(nn.functional.linear(x, weight), (8,))
        assert output.dtype == torch.float32
        # The weight and the input in half precision; the product, widened for the norm; the norm; two numbers a row.
        assert memory.now == 2 * (weight.numel() + x.numel()) + 2 * 4 * x.numel() + 2 * 4 * len(x)
    query = torch.zeros(1, 2, 1000, 4, device="meta", requires_grad=True)
    with Cuda(), Memory([query]) as memory:
        output = nn.functional.scaled_dot_product_attention(query, query, value=query)
    assert output.shape == query.shape
    assert memory.now == 4 * query.numel() + 4 * 2 * 1000  # And no matrix of 1000 by 1000.


def real_update(networks, count):
    """Bytes of what autograd saves for the backward pass of an update on real tensors, and the allocator's peak."""
    family = networks.family
    inputs = family.encode(["3"] * count)
    state, t = latents(count, *family.latent_shape), torch.full((count,), 0.5)
    network = networks.module("policy")
    existing = [*network.parameters(), *network.buffers(), state, t, *inputs.tensors.values()]
    known = {one.untyped_storage().data_ptr() for one in existing}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage  # Kept alive, so that no other gets its address.
        return tensor

    def forward():
        with networks.role("policy"):
            return family.forward(networks.module("policy"), state, t, inputs)

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    total = sum(size.nbytes() for size in {**saved, 0: output.untyped_storage()}.values())
    saved.clear()
    del output
    with BENCHMARK["allocated"]() as most:
        output = forward()
        output.backward(torch.zeros_like(output))
    return total, most[0]


# With all weights, most gradients of the first come when most activations have gone.
@pytest.mark.parametrize(("name", "rank"), [("sd", 0), ("sd", 4), ("sd3", 4), ("flux_dev", 4), ("sana", 4)])
def test_passes_without_memory_take_what_real_ones_do(name, rank, tmp_path) -> None:
    pipeline = TINY[name](tmp_path)
    passes = Passes(networks_on("meta", skeleton_of(pipeline, tmp_path / "saved"), rank=rank), torch.float32)
    kept_bytes, peak, added = passes.update("policy", 4)
    real = networks_on("cpu", pipeline, rank=rank)
    saved, most = real_update(real, 4)
    # What is alive after a forward pass is what autograd saved for the backward pass.
    assert kept_bytes == pytest.approx(saved, rel=0.01)
    assert peak + added == pytest.approx(most, rel=0.05)


@pytest.mark.usefixtures("onednn")
@pytest.mark.parametrize("name", ["sd", "sana"])
def test_a_decoder_without_memory_takes_what_a_real_one_does(name, tmp_path) -> None:
    pipeline = TINY[name](tmp_path)
    passes = Passes(networks_on("meta", skeleton_of(pipeline, tmp_path / "saved")), torch.float32)
    family = load_family(pipeline)
    noise = latents(32, *family.latent_shape)
    with BENCHMARK["allocated"]() as most, torch.no_grad():
        family.decode(noise)
    assert passes.decode(32, gradient=False) == pytest.approx(most[0], rel=0.01)
    noise.requires_grad_()
    with BENCHMARK["allocated"]() as most:
        images = family.decode(noise)
        torch.autograd.grad(images, noise, torch.zeros_like(images))
    assert passes.decode(32, gradient=True) == pytest.approx(most[0], rel=0.05)


def test_checkpointing_keeps_less_and_batches_add_up(tmp_path) -> None:
    passes = Passes(networks_on("meta", skeleton_of(TINY["sd3"](tmp_path), tmp_path / "saved")), torch.bfloat16)
    (one, *_), (three, most, _), (five, *_) = (passes.update("policy", count) for count in (1, 3, 5))
    assert five - three == pytest.approx(three - one, rel=0.03)
    passes.enable_checkpointing()
    less, peak, _ = passes.update("policy", 3)
    assert less < three / 2
    assert peak < most


def test_a_forward_pass_keeps_nothing_and_the_decoder_has_a_graph_only_for_gradients(tmp_path) -> None:
    passes = Passes(networks_on("meta", skeleton_of(tiny_sd(tmp_path), tmp_path / "saved")), torch.float32)
    assert 2 * 4 * 8 * 8 * 4 < passes.forward("policy", 2) < passes.update("policy", 2)[0]
    assert passes.forward("teacher", 8) > 1.8 * passes.forward("teacher", 4)
    assert passes.decode(2, gradient=True) > 2 * passes.decode(2, gradient=False)


# --- the memory model -------------------------------------------------------------------------------------------------

PARTS = {
    **{"frozen networks": 1000, "policy": 100, "fake score": 100, "optimiser state": 400, "averaged policy": 200},
    **{"gathered blocks": 30, "decoder": 50, "text encoders": 400, "reward models": 300},
}
WHOLE = sum(PARTS.values()) - 30
AWAY = frozenset({"text_encoders", "rewards"})


@pytest.mark.parametrize(
    ("phase", "setup", "expected"),
    [
        ("rollout", Setup(), Phase(stays=WHOLE, working=7)),
        ("rollout", Setup(offload=AWAY), Phase(stays=WHOLE - 700, working=7)),
        ("rollout", Setup(batch=3.0), Phase(stays=WHOLE, working=21)),
        ("reward images", Setup(offload=AWAY, decoded=2.0), Phase(stays=WHOLE - 400, working=18)),
        ("encode prompts", Setup(offload=AWAY), Phase(stays=WHOLE - 300, working=0)),
        # All at the start: networks, decoder and text encoders alone.
        ("encode prompts", Setup(offload=AWAY, caches_prompts=True), Phase(stays=1650, working=0)),
        ("policy update", Setup(), Phase(stays=WHOLE, working=160)),
        ("policy update", Setup(checkpointing=True), Phase(stays=WHOLE, working=120)),
        ("optimiser step", Setup(), Phase(stays=WHOLE, working=200)),
        ("optimiser step", Setup(fused=True), Phase(stays=WHOLE, working=100)),
        ("rollout", Setup(shards=4), Phase(stays=WHOLE + 30 - 750, working=7)),
        ("policy update", Setup(shards=4, full=True), Phase(stays=WHOLE + 30 - 1350, working=85)),
    ],
)
def test_phases_add_what_stays_to_what_works(phase, setup, expected) -> None:
    measured = {"rollout": (7, 7), "reward images": (9, 9), "policy update": (60, 20)}
    assert phases(PARTS, measured, setup)[phase] == expected


@pytest.mark.parametrize(
    ("setup", "working"),
    [
        (Setup(), 60 + 100),
        (Setup(accumulates=False), 60 + 30),
        (Setup(accumulates=False, checkpointing=True), 20 + 80),
        (Setup(accumulates=False, full=True, shards=2), 60 + 15),
    ],
)
def test_gradients_of_an_only_micro_batch_come_as_activations_go(setup, working) -> None:
    found = phases(PARTS, {"policy update": (60, 20)}, setup, {"policy update": (30, 80)})
    assert found["policy update"].working == working
    assert found["optimiser step"].working == 2 * kept(PARTS, setup)["policy"]


def test_sharding_cuts_copies_and_leaves_adapters_whole() -> None:
    adapters, copies = kept(PARTS, Setup(shards=4)), kept(PARTS, Setup(shards=4, full=True))
    assert (adapters["frozen networks"], adapters["policy"], adapters["gathered blocks"]) == (250, 100, 30)
    assert (copies["policy"], copies["optimiser state"], copies["averaged policy"]) == (25, 100, 50)
    assert kept(PARTS, Setup())["gathered blocks"] == 0


def test_a_card_holds_less_than_its_name_says() -> None:
    assert [fits(15 * GIB, card) for card in CARDS] == [False] * 3 + [True] * 4
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
    given = {"peft_config": LoraConfig(r=4, lora_alpha=4) if lora else None}
    trainer = tiny_trainer(base, tmp_path / "out", given=given, max_steps=1, beta=0.1, warm_start="none")
    trainer.train()
    args = tiny_config(tmp_path / "plan", beta=0.1)
    plan = make_plan(tmp_path / "base", arguments_of(full=not lora), args)
    parts = plan.kept

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
    words += ["--per_device_eval_batch_size", "16"]
    found = planned(folder, tmp_path, *words)
    assert found["kept"]["optimiser state"] == found["kept"]["averaged policy"] == 0
    gone = sum(usual["kept"][name] for name in ("optimiser state", "averaged policy", "text encoders"))
    assert usual["phases"]["rollout"]["stays"] - found["phases"]["rollout"]["stays"] == gone
    # SGD is not fused, so its step needs a copy.
    assert found["phases"]["optimiser step"]["working"] == 2 * usual["kept"]["policy"]
    # As many samples as in training pass through the same networks.
    alike = [usual["phases"][name]["working"] for name in ("rollout", "teacher and fake score", "reward images")]
    assert found["phases"]["evaluation"]["working"] == max(alike)
    assert "evaluation" not in usual["phases"]


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
    assert min(usual["remedies"], key=usual["remedies"].get) == next(iter(usual["remedies"])) == TOGETHER
    assert "decode_batch_size: 1" not in usual["remedies"]  # The policy update is what takes the most.


def test_a_smaller_base_and_smaller_groups_are_remedies(folder, usual, tmp_path) -> None:
    small = ["--reward_funcs", "rdm", "--activation_checkpointing", "true"]
    small += ["--num_generations", "1", "--per_device_train_batch_size", "1"]
    found = planned(folder, tmp_path, *small, "--base_quantization", "int8")
    assert planned(folder, tmp_path, *small)["remedies"]["base_quantization: int8"] == found["peak"]
    assert not any(name.startswith("shard") for name in found["remedies"])  # What is quantised cannot be cut.
    words = ["--num_generations", "4", "--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "4"]
    name = "num_generations: 4, per_device_train_batch_size: 4 (more accumulation)"
    assert usual["remedies"][name] == pytest.approx(planned(folder, tmp_path, *words)["peak"], rel=0.05)
    full = planned(folder, tmp_path, *small, "--full", "true")
    assert not any(name.startswith("base_quantization") for name in full["remedies"])


def test_no_remedy_is_printed_that_does_not_change_the_figure(tmp_path, capsys) -> None:
    found = planned("scenes", tmp_path, "--num_generations", "1", "--per_device_train_batch_size", "1")
    text = capsys.readouterr().out
    changes = {name: f"{size / GIB:.2f}" != f"{found['peak'] / GIB:.2f}" for name, size in found["remedies"].items()}
    assert {*changes.values()} == {False}
    assert not any(name in text for name in changes)


def test_full_copies_can_be_cut(folder, usual, tmp_path) -> None:
    words = ["--full", "true", "--shard", "true", "--gpus", "8"]
    found = planned(folder, tmp_path, *words)
    whole = found["components"]["copy for the policy"]["size"]
    assert found["kept"]["policy"] == whole // 8
    assert found["kept"]["optimiser state"] == 4 * whole // 8
    assert 0 < found["kept"]["gathered blocks"] <= whole
    assert "8 GPUs that share" in found["title"]


def test_guidance_asks_the_teacher_twice_unless_it_is_told(tmp_path) -> None:
    tiny_sd(tmp_path).save_pretrained(tmp_path / "base")
    never = {"fake_score_updates_per_policy_update": 0, "fake_score_warmup_steps": 0}
    plain, guided = (
        make_plan(
            tmp_path / "base", arguments_of(), tiny_config(tmp_path / "out", teacher_guidance_scale=scale, **never)
        )
        for scale in (1.0, 3.0)
    )
    asked = "teacher and fake score"
    assert guided.phases[asked].working > 1.4 * plain.phases[asked].working  # Plain, the fake score takes the most.
    assert "fake-score update" not in guided.phases
    assert guided.kept["optimiser state"] == 2 * guided.kept["policy"]


@pytest.mark.parametrize("name", ["sdxl", "sana", "zimage", "dit", "unconditional"])
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


def test_the_command_line_knows_the_command(folder, capsys) -> None:
    assert main(["plan", "--model", str(folder), "--reward_funcs", "rdm"]) == 0
    printed, warned = capsys.readouterr()
    assert "policy update" in printed
    assert "Warning" not in warned


# --- the dry runs on a GPU, as far as a CPU can go --------------------------------------------------------------------


def test_a_tiny_dry_run_takes_what_the_plan_says(tmp_path, capsys) -> None:
    belongs_to_another = torch.zeros(10_000_000)  # As tests that ran before leave some behind.
    words = ["--tiny", "--updates", "2", "--models", "sd35-medium", "--output_dir", str(tmp_path)]
    (result,) = BENCHMARK["main"](words)
    assert result["finite"] and result["moved"] and result["reloads"]
    for name, phase in result["phases"].items():
        assert phase["working"] == pytest.approx(phase["planned_working"], rel=0.2), name
        assert phase["before"] == pytest.approx(phase["planned_before"], rel=0.1), name
    assert "| sd35-medium | 16x16 | 4 |" in capsys.readouterr().out
    assert belongs_to_another.numel()


def test_without_a_gpu_the_dry_runs_say_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit, match="There is no GPU here"):
        BENCHMARK["main"]([])
    text = (BENCHMARKS / "gpu.md").read_text()
    assert text.count(BENCHMARK["TABLE"][0]) == text.count(BENCHMARK["TABLE"][1]) == 1
