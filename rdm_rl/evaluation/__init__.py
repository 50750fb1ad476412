"""The evaluation of image sets, pictures of them and of a training run, and the report of the demo."""

from typing import TYPE_CHECKING

from rdm_rl._lazy import lazy_names

__all__ = [
    "ManifoldMetrics",
    "Report",
    "SamplerMetrics",
    "digit_accuracy",
    "digit_features",
    "first_of_each",
    "format_table",
    "frechet_distance",
    "image_grid",
    "judge",
    "manifold_metrics",
    "read_rows",
    "training_curves",
    "write_report",
]

# A new public name goes into `__all__` and into both branches: type checkers read the first, Python runs the second.
if TYPE_CHECKING:
    from rdm_rl.demo.judge import judge
    from rdm_rl.demo.recognisers import digit_accuracy, digit_features
    from rdm_rl.evaluation.distances import ManifoldMetrics, frechet_distance, manifold_metrics
    from rdm_rl.evaluation.metrics import SamplerMetrics
    from rdm_rl.evaluation.pictures import first_of_each, image_grid, training_curves
    from rdm_rl.evaluation.report import Report, read_rows, write_report
    from rdm_rl.evaluation.tables import format_table
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "ManifoldMetrics": "rdm_rl.evaluation.distances",
            "Report": "rdm_rl.evaluation.report",
            "SamplerMetrics": "rdm_rl.evaluation.metrics",
            "digit_accuracy": "rdm_rl.demo.recognisers",
            "digit_features": "rdm_rl.demo.recognisers",
            "first_of_each": "rdm_rl.evaluation.pictures",
            "format_table": "rdm_rl.evaluation.tables",
            "frechet_distance": "rdm_rl.evaluation.distances",
            "image_grid": "rdm_rl.evaluation.pictures",
            "judge": "rdm_rl.demo.judge",
            "manifold_metrics": "rdm_rl.evaluation.distances",
            "read_rows": "rdm_rl.evaluation.report",
            "training_curves": "rdm_rl.evaluation.pictures",
            "write_report": "rdm_rl.evaluation.report",
        },
    )
