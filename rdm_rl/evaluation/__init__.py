"""The evaluation of image sets, and pictures of them and of a training run."""

from typing import TYPE_CHECKING

from rdm_rl._lazy import lazy_names

__all__ = [
    "Estimate",
    "Features",
    "ImageFolder",
    "ManifoldMetrics",
    "Model",
    "Settings",
    "compare",
    "evaluate",
    "format_table",
    "frechet_distance",
    "image_grid",
    "kernel_distance",
    "load_features",
    "manifold_metrics",
    "read_results",
    "training_curves",
    "write_report",
]

# A new public name goes into `__all__` and into both branches: type checkers read the first, Python runs the second.
if TYPE_CHECKING:
    from rdm_rl.evaluation.comparison import compare
    from rdm_rl.evaluation.curves import training_curves
    from rdm_rl.evaluation.distances import ManifoldMetrics, frechet_distance, kernel_distance, manifold_metrics
    from rdm_rl.evaluation.features import Features, load_features
    from rdm_rl.evaluation.images import ImageFolder, Model
    from rdm_rl.evaluation.intervals import Estimate
    from rdm_rl.evaluation.pictures import image_grid
    from rdm_rl.evaluation.report import write_report
    from rdm_rl.evaluation.results import read_results
    from rdm_rl.evaluation.run import Settings, evaluate
    from rdm_rl.evaluation.tables import format_table
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "Estimate": "rdm_rl.evaluation.intervals",
            "Features": "rdm_rl.evaluation.features",
            "ImageFolder": "rdm_rl.evaluation.images",
            "ManifoldMetrics": "rdm_rl.evaluation.distances",
            "Model": "rdm_rl.evaluation.images",
            "Settings": "rdm_rl.evaluation.run",
            "compare": "rdm_rl.evaluation.comparison",
            "evaluate": "rdm_rl.evaluation.run",
            "format_table": "rdm_rl.evaluation.tables",
            "frechet_distance": "rdm_rl.evaluation.distances",
            "image_grid": "rdm_rl.evaluation.pictures",
            "kernel_distance": "rdm_rl.evaluation.distances",
            "load_features": "rdm_rl.evaluation.features",
            "manifold_metrics": "rdm_rl.evaluation.distances",
            "read_results": "rdm_rl.evaluation.results",
            "training_curves": "rdm_rl.evaluation.curves",
            "write_report": "rdm_rl.evaluation.report",
        },
    )
