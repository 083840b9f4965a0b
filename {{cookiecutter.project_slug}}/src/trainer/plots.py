"""Draw the figures of the notebooks with matplotlib, one per function."""

import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from core.schema import Schema

BLUE, ORANGE, GREY = "#1a73e8", "#e8710a", "#80868b"
MOST_SHOWN = 20  # classes or columns in a figure

plt.rcParams.update(
    {"figure.constrained_layout.use": True, "axes.spines.top": False, "axes.spines.right": False}
)


def samples(rows: Mapping[str, np.ndarray], schema: Schema, per_class: int = 2) -> None:
    """Show rows of each class: as images if the columns are pixels, else as a table."""
    names = [str(name) for name in schema.classes][:MOST_SHOWN]
    labels = rows[schema.label].astype(str)
    settings = [int(row) for name in names for row in np.flatnonzero(labels == name)[:per_class]]
    if schema.image_shape:
        _images(rows, settings, [str(labels[row]) for row in settings], schema)
    else:
        _table(rows, settings, [str(labels[row]) for row in settings], schema)


def class_balance(train: np.ndarray, test: np.ndarray, schema: Schema) -> None:
    """Plot the number of training and test rows of each class."""
    in_train, in_test = Counter(train.astype(str)), Counter(test.astype(str))
    names = sorted(map(str, schema.classes), key=lambda name: -in_train[name])
    shown = names if len(names) <= MOST_SHOWN else names[:MOST_SHOWN]
    # Sorted by frequency only if some classes are left out; otherwise in the order of the schema.
    if schema.classes and len(shown) == len(schema.classes):
        shown = [str(name) for name in schema.classes]
    _, axes = plt.subplots(figsize=(8, 0.3 * len(shown) + 1.2))
    places = np.arange(len(shown))
    axes.barh(
        places, [in_train[name] for name in shown], color=BLUE, label=f"train ({len(train):,} rows)"
    )
    left = [in_train[name] for name in shown]
    axes.barh(
        places,
        [in_test[name] for name in shown],
        left=left,
        color=ORANGE,
        label=f"test ({len(test):,} rows)",
    )
    axes.set_yticks(places, [_short(name) for name in shown])
    axes.invert_yaxis()
    axes.set(xlabel="rows", ylabel=schema.label, title=_of("classes", len(shown), len(names)))
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    plt.show()


def columns(rows: Mapping[str, np.ndarray], schema: Schema) -> None:
    """Plot each column's distribution and missing values; for images, mean and std per pixel."""
    if schema.image_shape:
        pixels = np.stack([rows[column.name] for column in schema.columns])
        figure, both = plt.subplots(1, 2, figsize=(6, 3))
        for axes, values, title in zip(
            both, (pixels.mean(axis=1), pixels.std(axis=1)), ("mean", "std"), strict=True
        ):
            image = axes.imshow(values.reshape(schema.image_shape), cmap="Blues")
            axes.set(title=f"{title} of each pixel", xticks=[], yticks=[])
            figure.colorbar(image, ax=axes, shrink=0.8)
        plt.show()
        return
    shown = schema.columns[:MOST_SHOWN]
    height = (len(shown) + 3) // 4
    figure, grid = plt.subplots(height, 4, figsize=(12, 2.1 * height), squeeze=False)
    for axes, column in zip(grid.flat, shown, strict=False):
        values = rows[column.name]
        if column.kind == "numeric":
            present = values[~np.isnan(values)]
            # Clipped, because the histogram's range would overflow.
            with np.errstate(over="ignore"):
                axes.hist(np.clip(present, -1e300, 1e300), bins=30, color=BLUE)
        else:
            present = np.array([value for value in values if value is not None], dtype=str)
            common = Counter(present.tolist()).most_common(6)
            axes.barh(
                [_short(name, 14) for name, _ in common][::-1],
                [count for _, count in common][::-1],
                color=BLUE,
            )
        missing = 1 - len(present) / len(values)
        axes.set_title(
            _short(column.name, 26) + (f" ({missing:.0%} missing)" if missing else ""), fontsize=9
        )
        axes.tick_params(labelsize=7)
    for axes in grid.flat[len(shown) :]:
        axes.axis("off")
    figure.suptitle(_of("columns", len(shown), len(schema.columns)))
    plt.show()


def standardized(raw: np.ndarray, scaled: Any) -> None:
    """Plot the numeric columns before and after scaling."""
    if not raw.shape[1]:
        print("no numeric column: nothing to scale")
        return
    _, both = plt.subplots(1, 2, figsize=(10, 3))
    shown = slice(None, MOST_SHOWN)
    for axes, values, title in (
        (both[0], raw, "as they come"),
        (both[1], np.asarray(scaled), "scaled"),
    ):
        axes.boxplot(
            [column[~np.isnan(column)] for column in values.T[shown]], flierprops={"markersize": 1}
        )
        axes.set(
            title=title, xlabel=_of("numeric columns", min(MOST_SHOWN, raw.shape[1]), raw.shape[1])
        )
        axes.set_xticks([])
    plt.show()


def learning_curve(history: Sequence[Mapping[str, float]], best_epoch: int) -> None:
    """Plot the losses and the validation accuracy by epoch."""
    epochs = range(1, len(history) + 1)
    _, (losses, accuracy) = plt.subplots(1, 2, figsize=(11, 3.4))
    losses.plot(epochs, [epoch["train_loss"] for epoch in history], color=BLUE, label="training")
    losses.plot(
        epochs, [epoch["validation_loss"] for epoch in history], color=ORANGE, label="validation"
    )
    losses.set(xlabel="epoch", ylabel="loss (cross-entropy)", yscale="log")
    accuracy.plot(
        epochs,
        [epoch["validation_accuracy"] for epoch in history],
        color=ORANGE,
        label="validation",
    )
    accuracy.set(xlabel="epoch", ylabel="accuracy")
    for axes in (losses, accuracy):
        axes.axvline(best_epoch, color=GREY, linestyle="--", label="kept")
        axes.legend(frameon=False)
    plt.show()


def confusion(counts: Sequence[Sequence[int]], schema: Schema) -> None:
    """Plot the confusion matrix with row counts."""
    matrix = np.asarray(counts)
    # Coloured by the fraction of the true class, so that rare classes are visible too.
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    names = [_short(str(name), 12) for name in schema.classes]
    side = max(4.0, min(9.0, 0.5 * len(names) + 1.5))
    _, axes = plt.subplots(figsize=(side, side))
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel=f"answered {schema.label}", ylabel=f"true {schema.label}")
    if len(names) <= MOST_SHOWN:
        axes.set_xticks(range(len(names)), names, rotation=45 if max(map(len, names)) > 3 else 0)
        axes.set_yticks(range(len(names)), names)
        for (true, answered), count in np.ndenumerate(matrix):
            if count:
                colour = "white" if share[true, answered] > 0.5 else "black"
                axes.text(
                    answered, true, f"{count}", ha="center", va="center", color=colour, fontsize=9
                )
    plt.show()


def worst_mistakes(
    rows: Mapping[str, np.ndarray],
    probabilities: np.ndarray,
    labels: np.ndarray,
    schema: Schema,
    most: int = 10,
) -> None:
    """Show the wrong predictions with the highest confidence."""
    answers = probabilities.argmax(axis=1)
    wrong = np.flatnonzero(answers != labels)
    if not len(wrong):
        print("no mistakes on these rows")
        return
    worst = wrong[np.argsort(-probabilities[wrong, answers[wrong]], kind="stable")][:most]
    captions = [
        f"{_short(str(schema.classes[answers[row]]), 12)} ({probabilities[row, answers[row]]:.0%})\n"
        f"true: {_short(str(schema.classes[labels[row]]), 12)} ({probabilities[row, labels[row]]:.0%})"
        for row in worst
    ]
    if schema.image_shape:
        _images(rows, [int(row) for row in worst], captions, schema)
    else:
        _table(
            rows,
            [int(row) for row in worst],
            [caption.replace("\n", ", ") for caption in captions],
            schema,
        )
    print(
        f"{len(wrong)} of {len(labels):,} rows are answered wrongly; here are the {len(worst)} surest (answer, score, truth)"
    )


def calibration(probabilities: np.ndarray, labels: np.ndarray) -> None:
    """Plot the fraction of correct predictions by confidence, and a histogram of confidence."""
    sure, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    edges = np.linspace(0, 1, 11)
    bins = np.clip(np.digitize(sure, edges) - 1, 0, 9)
    centres = [sure[bins == b].mean() for b in range(10) if (bins == b).any()]
    shares = [right[bins == b].mean() for b in range(10) if (bins == b).any()]
    _, (reliability, counts) = plt.subplots(1, 2, figsize=(9, 3.4))
    reliability.plot([0, 1], [0, 1], color=GREY, linestyle="--", label="ideal")
    reliability.plot(centres, shares, marker="o", color=BLUE, label="model")
    reliability.set(
        xlabel="confidence", ylabel="share that is right", xlim=(0, 1.02), ylim=(0, 1.05)
    )
    reliability.legend(frameon=False)
    counts.hist(sure, bins=edges, color=BLUE)
    counts.set(xlabel="confidence", ylabel="answers")
    plt.show()


def _images(
    rows: Mapping[str, np.ndarray], settings: list[int], captions: list[str], schema: Schema
) -> None:
    wide = 10
    height = -(-len(settings) // wide)
    _, grid = plt.subplots(height, wide, figsize=(12, 1.75 * height), squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for axes, row, caption in zip(grid.flat, settings, captions, strict=False):
        _image(axes, rows, row, schema)
        axes.set_title(caption, fontsize=9)
    plt.show()


def _image(axes: Axes, rows: Mapping[str, np.ndarray], row: int, schema: Schema) -> None:
    pixels = np.array([rows[column.name][row] for column in schema.columns])
    axes.imshow(pixels.reshape(schema.image_shape), cmap="gray_r")


def _table(
    rows: Mapping[str, np.ndarray], settings: list[int], captions: list[str], schema: Schema
) -> None:
    names = [column.name for column in schema.columns][:6]
    header = ["row", schema.label, *names] + (["…"] if len(schema.columns) > len(names) else [])
    lines = [header]
    for row, caption in zip(settings, captions, strict=True):
        cells = [_cell(rows[name][row]) for name in names]
        lines.append([str(row + 1), caption, *cells] + [""] * (len(header) - 2 - len(cells)))
    widths = [max(len(line[position]) for line in lines) for position in range(len(header))]
    for line in lines:
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        )


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else _short(str(value), 16)


def _short(name: str, most: int = 24) -> str:
    return (
        textwrap.shorten(name, most, placeholder="…")
        if " " in name
        else name
        if len(name) <= most
        else name[: most - 1] + "…"
    )


def _of(what: str, shown: int, total: int) -> str:
    return f"{total} {what}" if shown == total else f"{shown} of {total} {what}"
