"""How much memory a run takes, before it is started: ``rdm-rl plan``.

==================================  ==================================================================================
:mod:`rdm_rl.cli.plan.memory`       the memory model: pure arithmetic
:mod:`rdm_rl.cli.plan.skeleton`     pipelines without weights, from configurations
:mod:`rdm_rl.cli.plan.passes`       the memory of forward and backward passes, found with tensors without memory
:mod:`rdm_rl.cli.plan.report`       the plan of a run, its table and its JSON
:mod:`rdm_rl.cli.plan.command`      the command
==================================  ==================================================================================
"""
