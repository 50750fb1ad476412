"""How much memory a run takes, before it is started: ``rdm-rl plan``.

======================================  ==============================================================================
:mod:`rdm_rl.cli.plan.memory`               the memory model: pure arithmetic
:mod:`rdm_rl.cli.plan.skeleton`             pipelines without weights, from configurations
:mod:`rdm_rl.cli.plan.activations`          the memory of forward and backward passes, found with tensors without memory
:mod:`rdm_rl.cli.plan.report`               the command, its table and its JSON
======================================  ==============================================================================
"""

from rdm_rl.cli.plan.report import Plan, make_plan

__all__ = ["Plan", "make_plan"]
