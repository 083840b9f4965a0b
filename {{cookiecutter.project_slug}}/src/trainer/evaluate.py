# ---
# jupyter:
#   jupytext:
#     cell_markers: '"""'
#     cell_metadata_filter: tags,-all
#     formats: level_0_manual///ipynb,src/trainer///py:percent
#     notebook_metadata_filter: jupytext,-jupytext.text_representation.jupytext_version,-kernelspec,-language_info
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
# ---

# %% [markdown]
"""
# Evaluate
Measure the model on the test rows, which it has not seen in training, and look at its errors.

Run it cell by cell, or as a program:

    python -m trainer.evaluate --model-dir model --test test.parquet --metrics-file evaluation.json
"""

# %% tags=["active-ipynb"]
"""
import notebooks

notebooks.require_in_sync()
"""

# %%
import argparse
from pathlib import Path
from typing import Any

import numpy as np

from core import manifest
from core.errors import UserError, run_command
from core.manifest import write_json
from core.onnx_model import Model
from core.paths import local_path
from core.registry import Registry
from trainer.data import read_origin, read_rows

# %% [markdown]
"""
## Metrics
Accuracy is easy to read but can mislead: if one class is frequent, always predicting it already gives a high accuracy.
This is the *baseline*. The macro F1 gives every class the same weight, however rare it is. The log loss also
penalises wrong predictions with a high confidence.
"""


# %%
def score(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Return the metrics of probabilities (rows, classes) for labels (rows; class indices).

    macro_f1: mean over the classes that occur or were predicted. log_loss: nats per row.
    baseline: fraction of the most frequent class. confusion: rows are true classes, columns are
    predicted classes. precision, recall, f1: one number per class.
    """
    classes = probabilities.shape[1]
    answers = probabilities.argmax(axis=1)
    confusion = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(confusion, (labels, answers), 1)
    right, true, answered = confusion.diagonal(), confusion.sum(axis=1), confusion.sum(axis=0)
    precision, recall = right / np.maximum(answered, 1), right / np.maximum(true, 1)
    f1 = 2 * right / np.maximum(true + answered, 1)
    of_label = probabilities[np.arange(len(labels)), labels].astype(np.float64)
    return {
        "rows": len(labels),
        "accuracy": float((answers == labels).mean()),
        "macro_f1": float(f1[(true + answered) > 0].mean()),
        "log_loss": float(-np.log(np.maximum(of_label, 1e-12)).mean()),
        "baseline": float(true.max() / len(labels)),
        "confusion": confusion.tolist(),
        "precision": precision.tolist(),
        "recall": recall.tolist(),
        "f1": f1.tolist(),
    }


# %% [markdown]
"""
## Predict with the saved model
The evaluation uses the model that is later served: the ONNX file of the saved model, after the manifest's checksums
are verified. It does not use `model.py`, so older models can be evaluated too, even if `model.py` has changed since.
"""


# %%
def answer(model_dir: Path, test_path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return a saved model's probabilities (rows, classes) and the labels (rows) of test rows."""
    model, rows = Model.load(model_dir), read_rows(test_path)
    if model.schema.label not in rows:
        raise UserError(
            f"the rows have no column '{model.schema.label}', which the model was trained to predict."
        )
    return model.probabilities(rows), model.schema.encode_labels(rows[model.schema.label])


def evaluate(model_dir: Path, test_path: Path, metrics_path: Path) -> dict[str, Any]:
    """Evaluate a saved model on test rows and write the metrics as JSON."""
    origin, trained_on = read_origin(test_path), manifest.read(model_dir)
    # The same data with another split: some of the test rows were training rows of this model.
    if origin["sha256"] == trained_on.get("data_sha256") and origin["split"] != trained_on.get(
        "data_split"
    ):
        raise UserError(
            "the rows were divided anew since this model was trained, so it has seen some of these. Run train.ipynb again."
        )
    probabilities, labels = answer(model_dir, test_path)
    metrics = score(probabilities, labels)
    metrics_path.parent.mkdir(parents=True, exist_ok=True)
    write_json(metrics_path, metrics)
    return metrics


# %% [markdown]
"""
## The champion on the same rows
The champion is the registered model in use. It is evaluated again on the current test rows, because its stored metrics
come from other rows and cannot be compared with those of the new model.
"""


# %%
def score_champion(registry: Registry, test_path: Path) -> dict[str, Any]:
    """Return the champion's version and metrics for the gate, or why it cannot be evaluated."""
    metrics, problem, predicts = None, None, None
    # A broken champion must not stop a new model: the gate reports the problem.
    try:
        champion = registry.champion()
        if champion:
            predicts = manifest.read(champion.model)["schema"]["label"]
            metrics = score(*answer(champion.model, test_path))
    except UserError as error:
        problem = str(error).rstrip(".")
    other = predicts if predicts != read_origin(test_path)["label"] else None
    number = registry.champion_number()
    return {
        "champion": metrics,
        "champion_version": number,
        "champion_problem": problem,
        "champion_predicts": other,
    }


# %% [markdown]
"""
## Try it
"""

# %% tags=["active-ipynb"]
"""
from project import runs
from trainer import plots

run = runs.current()
run.require(run.test_data, "data")
run.require(run.model / "model.json", "train")
metrics = evaluate(run.model, run.test_data, run.evaluation)
print(f"accuracy  {metrics['accuracy']:.4f}   (always answering the most common class: {metrics['baseline']:.4f})")
print(f"macro F1  {metrics['macro_f1']:.4f}")
print(f"log loss  {metrics['log_loss']:.4f}   on {metrics['rows']:,} test rows")
"""

# %% [markdown]
"""
Which classes does the model confuse? Rows are true classes, columns are predicted classes; all counts outside the
diagonal are errors.
"""

# %% tags=["active-ipynb"]
"""
schema = Model.load(run.model).schema
plots.confusion(metrics["confusion"], schema)
"""

# %% [markdown]
"""
The worst errors: wrong predictions with the highest confidence. Look at each: is the prediction wrong, or the label?
"""

# %% tags=["active-ipynb"]
"""
probabilities, labels = answer(run.model, run.test_data)
plots.worst_mistakes(read_rows(run.test_data), probabilities, labels, schema)
"""

# %% [markdown]
"""
Is the model calibrated? Of the predictions with a confidence of 90 %, about 90 % should be correct.
"""

# %% tags=["active-ipynb"]
"""
plots.calibration(probabilities, labels)
"""


# %% tags=["active-py"]
def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer.evaluate", description="saved model + test.parquet → metrics"
    )
    parser.add_argument("--model-dir", required=True, help="a saved model's folder")
    parser.add_argument("--test", required=True, help="test rows, as trainer.data writes them")
    parser.add_argument("--metrics-file", required=True, help="where the metrics go, as JSON")
    arguments = parser.parse_args()
    model_dir, test = local_path(arguments.model_dir), local_path(arguments.test)
    metrics = evaluate(model_dir, test, local_path(arguments.metrics_file))
    print(
        f"accuracy {metrics['accuracy']:.4f}, macro F1 {metrics['macro_f1']:.4f} on {metrics['rows']:,} rows"
    )


if __name__ == "__main__":
    run_command(main)
