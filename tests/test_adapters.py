"""Adapters and the names of their tensors: those of the unwrapped network, all loaded or the file refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from rdm_rl.families import load_family
from rdm_rl.networks.roles import AdapterNetworks
from tests.helpers import QUICK, latents, quick_trainer, same, tiny_sd, trained_weights
from tests.tiny_pipelines import tiny_sd3

FILE = "pytorch_lora_weights.safetensors"
CONFIG = LoraConfig(r=2, lora_alpha=6, target_modules=["conv_in", "to_q"])


def saved_student(pipeline: Any, folder: Path) -> dict[str, Tensor]:
    networks = AdapterNetworks(load_family(pipeline), CONFIG, torch.Generator())
    networks.family.save_lora(str(folder), *networks.export())
    return load_file(folder / FILE)


def test_a_compiled_network_s_student_has_the_names_of_the_plain_one(tmp_path: Path) -> None:
    plain = saved_student(tiny_sd(tmp_path), tmp_path / "plain")
    compiled = tiny_sd(tmp_path)
    compiled.unet = torch.compile(compiled.unet, backend="eager")
    assert saved_student(compiled, tmp_path / "compiled").keys() == plain.keys()
    partly = tiny_sd(tmp_path, whole=True)
    partly.unet.mid_block = torch.compile(partly.unet.mid_block, backend="eager")
    with pytest.raises(ValueError, match="'mid_block' of the pipeline's unet is compiled"):
        load_family(partly)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # The tracer looks at all of them.
def test_blocks_that_were_compiled_in_place_train_as_plain_ones(tmp_path: Path) -> None:
    """Roles, and passes with and without a gradient, are switched in compiled blocks, too."""
    weights, names = [], []
    for compiled in (False, True):
        pipeline, folder = tiny_sd(tmp_path), tmp_path / str(compiled)
        if compiled:
            # No compiler of C++ is needed.
            pipeline.unet.compile_repeated_blocks(backend="eager")
        trainer = quick_trainer(pipeline, folder, "rdm", **{**QUICK, "max_steps": 1})
        trainer.train()
        trainer.save_model()
        weights.append(trained_weights(trainer))
        names.append(load_file(folder / FILE).keys())
    torch.compiler.reset()
    assert same(*weights)
    assert names[0] == names[1]


def test_a_whole_network_that_is_compiled_in_place_is_refused_on_a_cpu(tmp_path: Path) -> None:
    pipeline = tiny_sd(tmp_path)
    pipeline.unet.compile(backend="eager")
    with pytest.raises(ValueError, match="UNet2DConditionModel is compiled as a whole"):
        quick_trainer(pipeline, tmp_path / "student", "rdm", **QUICK)


def without(part: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda state: {name: value for name, value in state.items() if part not in name}


def renamed(old: str, new: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda state: {name.replace(old, new): value for name, value in state.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (renamed("unet.", "unet._orig_mod."), r"of its \d+ tensors belong to no layer .*'_orig_mod.*wrapped network"),
        (renamed("unet.", "transformer."), "belong to no layer of the UNet2DConditionModel, such as 'transformer.conv"),
        (renamed("conv_in", "conv_of_another_base"), "2 of its .* tensors belong to no layer .*conv_of_another_base"),
        (without("conv_in.lora_B"), "is incomplete: .*'conv_in.lora_B'"),
        (lambda state: {}, "0 of its 0 tensors"),
    ],
    ids=["compiled", "transformer", "one-layer", "incomplete", "empty"],
)
@pytest.mark.filterwarnings("ignore:No LoRA keys")
def test_a_file_that_is_not_all_of_an_adapter_is_refused(
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]], message: str, tmp_path: Path
) -> None:
    save_file(change(saved_student(tiny_sd(tmp_path), tmp_path)), tmp_path / FILE)
    with pytest.raises(ValueError, match=f"policy_init='.*' .*{message}"):
        load_family(tiny_sd(tmp_path)).load_adapter(str(tmp_path), "policy", "policy_init")


def unet_output(unet: Any) -> Tensor:
    output: Tensor = unet(latents(2, 4, 8, 8), torch.tensor([999, 499]), latents(2, 16, 32, seed=1), return_dict=False)[
        0
    ]
    return output


def transformer_output(transformer: Any) -> Tensor:
    inputs = latents(2, 16, 8, 8), latents(2, 5, 64, seed=1), latents(2, 48, seed=2), torch.tensor([999, 499])
    output: Tensor = transformer(*inputs, return_dict=False)[0]
    return output


@torch.no_grad()
@pytest.mark.parametrize(
    ("make", "name", "ask"),
    [(tiny_sd, "unet", unet_output), (tiny_sd3, "transformer", transformer_output)],
    ids=["sd", "sd3"],
)
def test_a_folder_of_peft_is_what_peft_makes_of_it(
    make: Any, name: str, ask: Callable[[Any], Tensor], tmp_path: Path
) -> None:
    config = LoraConfig(
        r=4,
        lora_alpha=12,
        target_modules=r".*\.(to_q|to_out\.0)",
        rank_pattern={"to_q": 2},
        alpha_pattern={"to_q": 5},
        init_lora_weights=False,
    )
    by_peft = get_peft_model(getattr(make(tmp_path), name), config)
    by_peft.save_pretrained(tmp_path / "lora")
    expected = ask(PeftModel.from_pretrained(by_peft.unload(), tmp_path / "lora"))
    family = load_family(make(tmp_path))
    plain = ask(family.network)
    family.load_adapter(str(tmp_path / "lora"), "policy")
    assert not torch.allclose(plain, expected, atol=1e-3)
    torch.testing.assert_close(ask(family.network), expected, rtol=1e-5, atol=1e-5)
    family.pipeline.unload_lora_weights()
    family.fuse_adapter(str(tmp_path / "lora" / "adapter_model.safetensors"))
    torch.testing.assert_close(ask(family.network), expected, rtol=1e-4, atol=1e-4)


def test_a_folder_of_peft_without_its_alpha(tmp_path: Path) -> None:
    get_peft_model(tiny_sd(tmp_path).unet, CONFIG).save_pretrained(tmp_path / "lora")
    (tmp_path / "lora" / "adapter_config.json").unlink()
    with pytest.raises(OSError, match=r"policy_init='.*without the adapter_config\.json in which PEFT keeps its alpha"):
        load_family(tiny_sd(tmp_path)).load_adapter(str(tmp_path / "lora"), "policy", "policy_init")
