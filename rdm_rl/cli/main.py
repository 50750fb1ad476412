"""The command line: ``rdm-rl demo``, ``train``, ``plan``, ``sample``, ``export``, ``evaluate``, ``compare``, ..."""

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rdm_rl import __version__

_CONFIG_HELP = "pipeline that configures a base in one file; default: what the student's folder names"
DTYPES = ("float32", "bfloat16", "float16")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command: the words after ``rdm-rl``, or those of the process.

    Returns:
        The exit status: 0; 1 if ``checkpoint`` found damage; 2 for a mistake in what was asked, or a run that cannot go
        on, which is explained in one line. A signal that ends ``train`` raises ``SystemExit`` with 128 + its number.
    """
    # Both announce what is no news here: that torchvision is missing, and that an adapter has no text-encoder part.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    return _explained(lambda: _command(words), "rdm-rl", debug=debug)


def run_script(function: Callable[[Sequence[str]], None]) -> int:
    """Run the main function of a script as the commands are run, with the words after its name but ``--debug``.

    Returns:
        The exit status: 0, or 2 for a mistake in what was asked, which is explained in one line.
    """
    words = [word for word in sys.argv[1:] if word != "--debug"]
    return _explained(lambda: function(words), Path(sys.argv[0]).name, debug="--debug" in sys.argv)


def _explained(function: Callable[[], int | None], name: str, *, debug: bool) -> int:
    try:
        return function() or 0
    except SystemExit:  # A help text, for which the import below would take seconds.
        raise
    except _mistakes() as error:
        if debug:
            raise
        print(f"{name}: {error} (--debug shows where)", file=sys.stderr)
        return 2


def _mistakes() -> tuple[type[Exception], ...]:
    """What is explained in one line."""
    from rdm_rl.rewards.protocol import RewardError

    # The hub's and diffusers' errors of loading are OSErrors; a reward may need a package that is not installed.
    return ValueError, OSError, ModuleNotFoundError, RewardError, FloatingPointError


def _command(words: list[str]) -> int | None:
    """Run a command; its exit status if it has one of its own."""
    if words[:1] == ["train"] and {"-h", "--help"} & {*words}:
        from rdm_rl.cli.help import train_help

        print(train_help(), end="")
    elif words[:1] == ["train"]:  # Its options are the fields of the settings, which another parser reads.
        from rdm_rl.cli.train import train_command

        train_command(words[1:])
    elif words[:1] == ["plan"]:
        from rdm_rl.cli.plan.command import plan_command

        plan_command(words[1:])
    else:
        asks_nothing = words in ([], ["rewards"])
        options = _parser().parse_args([*words, "--help"] if asks_nothing else words)
        options.command = shlex.join(["rdm-rl", *words])
        status: int | None = options.run(options)
        return status
    return None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rdm-rl",
        description="Few-step diffusion distillation as policy optimisation.",
        epilog="--debug after any command shows the whole traceback of an error.",
    )
    parser.add_argument("--version", action="version", version=f"rdm-rl {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="command")

    demo = commands.add_parser("demo", help="distil the embedded teacher of scenes and report how well it went")
    demo.add_argument("--output_dir", type=Path, help="where everything goes; default: demo-output")
    demo.add_argument("--seed", type=int, default=0, help="seed of training and evaluation")
    judged = "judge this saved student of an embedded teacher instead of training any; repeat for more"
    demo.add_argument("--student", type=Path, action="append", help=judged)
    demo.add_argument("--seeds", type=int, nargs="+", default=[0], help="with --student: one repetition for each")
    demo.set_defaults(run=_demo)

    commands.add_parser("train", help="distil a pipeline; `rdm-rl train --help` lists every setting", add_help=False)

    commands.add_parser("plan", help="how much GPU memory a run would take, without loading weights", add_help=False)

    sample = commands.add_parser("sample", help="draw images with a saved student, through plain diffusers")
    sample.add_argument("--student", type=Path, required=True, help="folder that save_model wrote")
    sample.add_argument("--model", help="base pipeline of a LoRA student; default: what its folder names")
    sample.add_argument("--model_config", help=_CONFIG_HELP)
    sample.add_argument("--prompt", action="append", required=True, help="a prompt; repeat for more")
    sample.add_argument("--num_images", type=at_least_one, default=4, help="images of each prompt")
    sample.add_argument("--seed", type=int, default=0, help="seed of the noise")
    sample.add_argument("--device", type=usable_device, default="cpu", help="cpu, cuda, ...")
    sample.add_argument("--dtype", default="float32", choices=DTYPES, help="precision of the weights")
    sample.add_argument("--output_dir", type=Path, default=Path("samples"), help="where the PNG files go")
    sample.set_defaults(run=_sample)

    export = commands.add_parser("export", help="write a student's LoRA for ComfyUI, A1111 and kohya, or for diffusers")
    export.add_argument("student", help="folder that save_model wrote, or a LoRA's file, folder or hub name")
    export.add_argument("--format", choices=("kohya", "diffusers"), required=True, help="whose names the file has")
    export.add_argument("--model", help="base pipeline of the LoRA; default: what the student's folder names")
    export.add_argument("--model_config", help=_CONFIG_HELP)
    export.add_argument("--output", type=Path, help="the file; default: the student's name and format, here")
    export.add_argument("--dtype", default="float32", choices=DTYPES, help="precision of the weights in the file")
    export.set_defaults(run=_export)

    checkpoint = commands.add_parser("checkpoint", help="verify the checkpoints of a run, one of them, or a student")
    checkpoint.add_argument("folder", type=Path, help="a run's folder, a checkpoint, or what save_model wrote")
    checkpoint.set_defaults(run=_checkpoint)

    _add_evaluate(commands.add_parser("evaluate", help="compare students and images with their teacher, and report"))
    compare = commands.add_parser("compare", help="put evaluations side by side, paired by prompt")
    compare.add_argument("runs", nargs="+", metavar="RUN", help="folder that `evaluate` wrote, or name=folder")
    compare.add_argument("--baseline", help="'RUN: ROW' that the others are compared with; default: the first teacher")
    compare.add_argument("--output_dir", type=Path, help="also write a report here")
    compare.set_defaults(run=_compare)

    _add_rewards(commands.add_parser("rewards", help="list the rewards, or try one on images"))
    methods = commands.add_parser("methods", help="list the methods and the settings that make them")
    methods.set_defaults(run=_methods)
    env = commands.add_parser("env", help="print versions and devices, for a bug report")
    env.set_defaults(run=_env)
    return parser


def _add_evaluate(evaluate: argparse.ArgumentParser) -> None:
    what = "folder that save_model wrote, or of images; name=folder to name it"
    evaluate.add_argument("students", nargs="+", metavar="STUDENT", help=what)
    evaluate.add_argument("--prompts", help="file, folder or hub name, as --dataset of `rdm-rl train`")
    evaluate.add_argument("--prompt", action="append", help="a prompt; repeat for more")
    evaluate.add_argument("--num_prompts", type=at_least_one, help="use only the first so many")
    evaluate.add_argument("--seeds", type=int, nargs="+", default=[0], help="an image of each prompt for each")
    evaluate.add_argument("--model", help="base pipeline of LoRA students; default: what their folders name")
    evaluate.add_argument("--model_config", help=_CONFIG_HELP)
    evaluate.add_argument("--teacher", help="pipeline to compare with; default: the base of the students; or none")
    evaluate.add_argument("--teacher_steps", type=at_least_one, default=50, help="steps of the teacher")
    evaluate.add_argument("--teacher_guidance_scale", type=float, help="default: that of the first student's training")
    evaluate.add_argument("--reference", help="name of another student or folder to compare with")
    evaluate.add_argument("--real_images", type=Path, help="folder of real images to compare with, too")
    networks = "image models of transformers, or module:attribute; default: DINOv2 and CLIP, both ViT-L/14"
    default = ["facebook/dinov2-large", "openai/clip-vit-large-patch14"]
    evaluate.add_argument("--features", nargs="*", default=default, help=networks)
    evaluate.add_argument("--rewards", nargs="*", default=[], help="names, module:attribute or path.py:attribute")
    evaluate.add_argument("--reward_options", help="options by reward, as JSON")
    evaluate.add_argument("--output_dir", type=Path, default=Path("evaluation"), help="where the report goes")
    evaluate.add_argument("--cache_dir", type=Path, help="where drawn images are kept; default: images in output_dir")
    evaluate.add_argument("--batch_size", type=at_least_one, default=8, help="most images at a time")
    evaluate.add_argument("--device", type=usable_device, default="cpu", help="cpu, cuda, ...")
    evaluate.add_argument("--dtype", default="float32", choices=DTYPES, help="precision of the models")
    evaluate.set_defaults(run=_evaluate)


def _add_rewards(rewards: argparse.ArgumentParser) -> None:
    actions = rewards.add_subparsers(title="actions", required=True, metavar="action")
    listing = actions.add_parser("list", help="list the registered rewards")
    listing.add_argument("--markdown", action="store_true", help="with papers, units, ranges and licences, as Markdown")
    listing.set_defaults(run=_list_rewards)
    trial = actions.add_parser("test", help="print what a reward says of some images")
    trial.add_argument("name", help="a registered name, module:attribute or path.py:attribute")
    trial.add_argument("--image", type=Path, action="append", required=True, help="an image file; repeat for more")
    trial.add_argument("--prompt", action="append", required=True, help="one for all images, or one for each")
    trial.add_argument("--option", action="append", default=[], help="key=value for the reward, e.g. model=FOLDER")
    trial.add_argument("--column", action="append", default=[], help="key=value of a column that the reward reads")
    trial.add_argument("--device", type=usable_device, default="cpu", help="cpu, cuda, ...")
    trial.set_defaults(run=_test_reward)


def _load_silently() -> None:
    """Leave the bars to what takes time: loading the embedded teacher does not."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


def _demo(options: argparse.Namespace) -> None:
    _load_silently()
    from rdm_rl.cli.embedded import EMBEDDED, named_model, spare_threads
    from rdm_rl.demo.run import evaluate_students, run_demo

    if options.student:
        spare_threads(named_model(EMBEDDED[0]))
        evaluate_students(options.student, options.seeds, options.output_dir)
    else:
        run_demo(options.output_dir or "demo-output", seed=options.seed)


def _sample(options: argparse.Namespace) -> None:
    import torch

    from rdm_rl.student import load_student, model_config_of

    dtype: torch.dtype = getattr(torch, options.dtype)
    config = options.model_config or model_config_of(options.student)
    student = load_student(options.student, base_model(options.student, options.model), dtype, config)
    student.pipeline.to(options.device)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(options.seed)
    torch.manual_seed(options.seed)  # Stock pipelines of flow models draw their steps' noise from the global generator.
    for number, prompt in enumerate(options.prompt):
        images = student.draw([prompt] * options.num_images, generator=generator)
        for index, image in enumerate(images):
            file = options.output_dir / f"{number:03d}-{index:02d}.png"
            image.save(file)
            print(file)


def _export(options: argparse.Namespace) -> None:
    import torch

    from rdm_rl.cli.export import export_adapter
    from rdm_rl.student import base_of, model_config_of

    source = Path(options.student)
    model = base_model(source, options.model) if options.model or base_of(source) else None
    name = source.resolve().name.removesuffix(".safetensors")
    output = options.output or Path(f"{name}-{options.format}.safetensors")
    config = options.model_config or model_config_of(source)
    export_adapter(options.student, model, options.format, output, getattr(torch, options.dtype), config)
    print(output)


def _checkpoint(options: argparse.Namespace) -> int:
    from rdm_rl.cli.checkpoint import print_states

    return print_states(options.folder)


def at_least_one(word: str) -> int:
    """A whole number above 0 of the command line."""
    number = int(word)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not at least 1")
    return number


def usable_device(word: str) -> str:
    """A device of the command line that this machine has."""
    if word != "cpu":
        import torch

        try:
            torch.empty(0, device=word)
        except (RuntimeError, AssertionError) as error:  # Torch without CUDA asserts that it has it.
            raise argparse.ArgumentTypeError(f"{word!r} cannot be used here: {str(error).splitlines()[0]}") from None
    return word


def base_model(student: Path, named: str | None = None) -> str:
    """The model that a student belongs to: what the command line names, or its folder, as far as that says so."""
    from rdm_rl.cli.embedded import EMBEDDED, named_model
    from rdm_rl.student import base_of

    if named is not None:
        return named_model(named)
    base = base_of(student) or EMBEDDED[0]
    if base not in EMBEDDED and not Path(base).exists() and base.count("/") != 1:
        raise ValueError(f"The student {str(student)!r} is an adapter of a model called {base!r}: give its --model.")
    return named_model(base)


def _evaluate(options: argparse.Namespace) -> None:
    _load_silently()
    from rdm_rl.cli.evaluate import evaluate_command

    evaluate_command(options, options.command)


def _compare(options: argparse.Namespace) -> None:
    from rdm_rl.cli.evaluate import compare_command

    compare_command(options, options.command)


def _list_rewards(options: argparse.Namespace) -> None:
    from rdm_rl.cli.rewards import print_rewards, rewards_as_markdown

    if options.markdown:
        print(rewards_as_markdown(), end="")
    else:
        print_rewards()


def _test_reward(options: argparse.Namespace) -> None:
    from rdm_rl.cli.rewards import parse_pairs, try_reward

    try_reward(
        options.name,
        options.image,
        options.prompt,
        options=parse_pairs(options.option, "--option"),
        columns=parse_pairs(options.column, "--column"),
        device=options.device,
    )


def _methods(options: argparse.Namespace) -> None:
    from rdm_rl.trainers.methods import METHODS

    print("rdm-rl train --method NAME, or RDMConfig.from_method(NAME):")
    for name, (description, settings) in METHODS.items():
        listed = ", ".join(f"{key}={value!r}" for key, value in settings.items())
        print(f"  {name:6} {description}\n         {listed}")


def _env(options: argparse.Namespace) -> None:
    import torch

    from rdm_rl.evaluation.page import library_versions

    for name, version in library_versions().items():
        print(f"{name:16} {version}")
    print(f"{'threads':16} {torch.get_num_threads()}")
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    print(f"{'GPUs':16} {', '.join(devices) or 'none'}")


if __name__ == "__main__":
    sys.exit(main())
