"""The scores of every width as an `evaluate.Metric`. It needs no Hub, which `evaluate.load` would."""

from numbers import Real

import datasets
import evaluate
import numpy as np


class SubnetworkMetric(evaluate.Metric):
    """Averages the scores of images, such as accuracy and loss, for each width.

    Add the scores of any widths in any order. `compute` returns one mean for each width and score, and the means over
    the widths. With several processes, gather the scores first, as `evaluate_subnetworks` does.

    Args:
        scores: Names of the scores.
        keep_in_memory: Whether to keep the scores in memory rather than in a file of the cache.

    Examples:
        >>> from hydravit_hf.metrics import SubnetworkMetric
        >>> metric = SubnetworkMetric(["accuracy"])
        >>> metric.add_scores([[1.0], [0.0]], num_heads=3)
        >>> metric.add_scores([[1.0], [1.0]], num_heads=6)
        >>> metric.compute()
        {'3_heads_accuracy': 0.5, '6_heads_accuracy': 1.0, 'mean_accuracy': 0.75}
    """

    def __init__(self, scores: list[str], keep_in_memory: bool = True, **kwargs):
        self.scores = list(scores)
        super().__init__(keep_in_memory=keep_in_memory, **kwargs)

    def _info(self):
        features = {"num_heads": datasets.Value("int64")} | {name: datasets.Value("float64") for name in self.scores}
        return evaluate.MetricInfo(
            description=type(self).__doc__,
            citation="",
            inputs_description="num_heads: the head count of each prediction; and one column for each score",
            features=datasets.Features(features),
        )

    def add_scores(self, scores, num_heads: int):
        """Add the scores of some images, (images, scores), at a width of `num_heads` heads."""
        columns = dict(zip(self.scores, np.asarray(scores, dtype=np.float64).T, strict=True))
        self.add_batch(num_heads=[num_heads] * len(scores), **columns)

    def _compute(self, num_heads, **scores):
        num_heads = np.asarray(num_heads)
        return name_by_width(
            {
                heads: {name: float(np.mean(np.asarray(scores[name])[num_heads == heads])) for name in self.scores}
                for heads in np.unique(num_heads).tolist()
            }
        )


def multi_label_metrics(prediction) -> dict[str, float]:
    """The metrics of images with several labels, of an `EvalPrediction` of (images, labels).

    They are `average_precision`, the mean over the labels that some image has, and `loss`, the mean cross-entropy of
    each label.

    Examples:
        >>> import numpy as np
        >>> from transformers import EvalPrediction
        >>> from hydravit_hf.metrics import multi_label_metrics
        >>> logits, labels = np.array([[2.0, 0.0], [-2.0, 0.0]]), np.array([[1, 0], [0, 0]])
        >>> multi_label_metrics(EvalPrediction(logits, labels))["average_precision"]
        1.0
    """
    from sklearn.metrics import average_precision_score

    logits, labels = prediction.predictions.astype(np.float64), prediction.label_ids
    present = (labels > 0).any(axis=0)
    precision = average_precision_score(labels[:, present] > 0, logits[:, present], average="macro")
    losses = np.logaddexp(0, logits) - labels * logits
    return {"average_precision": float(precision), "loss": float(losses.mean())}


def regression_metrics(prediction) -> dict[str, float]:
    """The metrics of a regression, of an `EvalPrediction`: `mse`, `mae`, and `r2`, averaged over the values.

    Examples:
        >>> import numpy as np
        >>> from transformers import EvalPrediction
        >>> from hydravit_hf.metrics import regression_metrics
        >>> regression_metrics(EvalPrediction(np.array([[1.0], [3.0]]), np.array([1.0, 2.0])))
        {'mse': 0.5, 'mae': 0.5, 'r2': -1.0}
    """
    from sklearn.metrics import mean_absolute_error, mean_squared_error, r2_score

    values = prediction.predictions
    pair = prediction.label_ids.reshape(values.shape), values
    metrics = {"mse": mean_squared_error, "mae": mean_absolute_error, "r2": r2_score}
    return {name: float(metric(*pair)) for name, metric in metrics.items()}


def name_by_width(metrics: dict[int, dict]) -> dict:
    """Flatten the metrics of each head count into names such as `3_heads_accuracy`, and add the means of the numbers.

    A metric that is not a number, or that some width lacks, has no mean.
    """
    named = {
        f"{num_heads}_heads_{name}": value for num_heads, values in metrics.items() for name, value in values.items()
    }
    columns = {name: [values.get(name) for values in metrics.values()] for name in next(iter(metrics.values()))}
    return named | {f"mean_{name}": float(np.mean(column)) for name, column in columns.items() if _are_numbers(column)}


def _are_numbers(values: list) -> bool:
    return all(isinstance(value, (Real, np.number)) and not isinstance(value, bool) for value in values)
