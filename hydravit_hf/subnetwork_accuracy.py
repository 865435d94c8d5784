"""The accuracy of every width as an `evaluate.Metric`; it needs no Hub, where `evaluate.load` would."""

import datasets
import evaluate
import numpy as np


class SubnetworkAccuracy(evaluate.Metric):
    """Top-1 accuracy of every width, and their mean.

    Add the predictions of any widths in any order: `add_batch(predictions=labels, references=labels, num_heads=heads)`,
    three lists of integers of one length. `compute()` gives `{"3_heads_accuracy": 0.9, ..., "mean_accuracy": 0.95}`,
    fractions, the mean over the widths.
    """

    def _info(self):
        return evaluate.MetricInfo(
            description=type(self).__doc__,
            citation="",
            inputs_description="predictions, references: labels; num_heads: the heads that gave each prediction",
            features=datasets.Features({name: datasets.Value("int64") for name in self.inputs}),
        )

    inputs = ("predictions", "references", "num_heads")

    def _compute(self, predictions, references, num_heads):
        correct, num_heads = np.equal(predictions, references), np.asarray(num_heads)
        accuracies = {heads: float(correct[num_heads == heads].mean()) for heads in np.unique(num_heads).tolist()}
        results = {f"{heads}_heads_accuracy": accuracy for heads, accuracy in accuracies.items()}
        return results | {"mean_accuracy": float(np.mean(list(accuracies.values())))}
