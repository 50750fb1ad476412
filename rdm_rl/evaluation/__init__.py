"""The evaluation of image sets, and pictures of them and of a training run."""

from typing import TYPE_CHECKING

from rdm_rl._lazy import lazy_names

__all__ = [
    "ManifoldMetrics",
    "format_table",
    "frechet_distance",
    "image_grid",
    "manifold_metrics",
    "training_curves",
]

# A new public name goes into `__all__` and into both branches: type checkers read the first, Python runs the second.
if TYPE_CHECKING:
    from rdm_rl.evaluation.distances import ManifoldMetrics, frechet_distance, manifold_metrics
    from rdm_rl.evaluation.pictures import image_grid, training_curves
    from rdm_rl.evaluation.tables import format_table
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "ManifoldMetrics": "rdm_rl.evaluation.distances",
            "format_table": "rdm_rl.evaluation.tables",
            "frechet_distance": "rdm_rl.evaluation.distances",
            "image_grid": "rdm_rl.evaluation.pictures",
            "manifold_metrics": "rdm_rl.evaluation.distances",
            "training_curves": "rdm_rl.evaluation.pictures",
        },
    )
