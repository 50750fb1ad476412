"""Few-step diffusion distillation as policy optimisation.

The few-step student is the policy; distribution matching and any other reward model are rewards. Start reading with
`rdm_rl.rdm`, the algorithm in pure functions, or with `rdm_rl.trainers`, what a training script uses.
"""

from typing import TYPE_CHECKING

from rdm_rl._lazy import lazy_names

__version__ = "0.1.0.dev0"

__all__ = ["RDMConfig", "RDMTrainer", "ReDiFConfig", "ReDiFTrainer", "__version__"]

# A new public name goes into `__all__` and into both branches: type checkers read the first, Python runs the second.
if TYPE_CHECKING:
    from rdm_rl.trainers.rdm_config import RDMConfig
    from rdm_rl.trainers.rdm_trainer import RDMTrainer
    from rdm_rl.trainers.redif_trainer import ReDiFConfig, ReDiFTrainer
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "RDMConfig": "rdm_rl.trainers.rdm_config",
            "RDMTrainer": "rdm_rl.trainers.rdm_trainer",
            "ReDiFConfig": "rdm_rl.trainers.redif_trainer",
            "ReDiFTrainer": "rdm_rl.trainers.redif_trainer",
        },
    )
