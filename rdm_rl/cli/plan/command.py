"""``rdm-rl plan``: the command, which needs no network to show its help."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from rdm_rl.cli.plan.model_sizes import MODELS


def plan_command(words: Sequence[str]) -> None:
    """Parse, plan and print: ``--model``, ``--gpus`` and ``--json``, and every setting of ``rdm-rl train``."""
    parser = argparse.ArgumentParser(
        prog="rdm-rl plan",
        usage="%(prog)s --model MODEL [--config FILE.yaml] [--setting VALUE ...]",
        description="How much GPU memory a run takes, from configurations alone: no weights are loaded.",
        epilog="Every setting of `rdm-rl train` may follow; `rdm-rl train --help` lists them.",
        allow_abbrev=False,
    )
    parser.add_argument("--model", help=f"pipeline folder, hub name, or one of {', '.join(MODELS)}")
    parser.add_argument("--gpus", type=int, default=1, help="processes, each with a GPU; with shard they share")
    parser.add_argument("--json", type=Path, help="also write the plan here, in bytes")
    options, rest = parser.parse_known_args(list(words))
    if options.gpus < 1:
        raise ValueError(f"--gpus {options.gpus}, but a run needs at least one.")
    # Seconds of imports, for which the help need not wait.
    from rdm_rl.cli.parser import SettingsParser
    from rdm_rl.cli.plan.report import format_plan, make_plan
    from rdm_rl.cli.train import TrainArguments
    from rdm_rl.trainers.rdm_config import RDMConfig

    # What a plan does not need and training does; and no setting may ask for a GPU that is not here.
    defaults = {"dataset": "digits", "model_name_or_path": "", "output_dir": "plan"}
    settings = SettingsParser((TrainArguments, RDMConfig), "", prog="rdm-rl plan", defaults=defaults)
    arguments, args = settings.parse([*rest, "--use_cpu", "true"])
    arguments.model_name_or_path = options.model or arguments.model_name_or_path
    if not arguments.model:
        raise ValueError("--model is missing: pass it, or a --config with model_name_or_path.")
    plan = make_plan(arguments.model, arguments, args, gpus=options.gpus)
    print(format_plan(plan))
    if options.json is not None:
        options.json.write_text(json.dumps(plan.to_dict(), indent=2) + "\n", encoding="utf-8")
