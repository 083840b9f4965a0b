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
# Train
An explicit PyTorch training loop with early stopping on a validation split and a checkpoint after every epoch.

Run it cell by cell, or as a program:

    python -m trainer.train --train train.parquet --model-dir model

In the project's folder, the hyperparameters come from project.yaml. Elsewhere, pass them as JSON:
`--hyperparameters '{"seed": 0, "threads": 1, "epochs": 40, "batch_size": 128, "learning_rate": 0.003}'`.
On a machine with several GPUs, the program restarts itself under torchrun with one process per GPU.
"""

# %% tags=["active-ipynb"]
"""
import notebooks

notebooks.require_in_sync()
"""

# %%
import argparse
import copy
import inspect
import math
import os
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from core.errors import UserError, run_command
from core.manifest import sha256
from core.paths import local_path
from trainer import distributed, export
from trainer.config import Hyperparameters
from trainer.data import read_origin, read_rows, read_schema
from trainer.model import Network

# %% [markdown]
"""
## Validation split
Early stopping needs rows that are not trained on. The test rows must not be used for it: selecting the best epoch on
them would make the test result too optimistic. So a fraction of the training rows is held out, stratified by
class and drawn with the seed.
"""


# %%
def validation_split(
    labels: np.ndarray, fraction: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices of the rows to train on and of the validation rows."""
    chance = np.random.default_rng(seed)
    validation = []
    for label in np.unique(labels):
        rows = chance.permutation(np.flatnonzero(labels == label))
        # At least one row of each class is trained on.
        validation.append(rows[: min(len(rows) - 1, math.ceil(fraction * len(rows)))])
    held = np.zeros(len(labels), dtype=bool)
    held[np.concatenate(validation)] = True
    if not held.any():
        raise UserError(
            f"{len(labels)} training rows are too few to hold any back for validation. Add rows."
        )
    return np.flatnonzero(~held), np.flatnonzero(held)


# %% [markdown]
"""
## Checkpoints
A checkpoint contains everything that is needed to resume after an interruption. The state of the random number
generator is not saved: each epoch is seeded from the run's seed and the number of the epoch. A resumed run
therefore shuffles like an uninterrupted one and ends with the same weights.
"""


# %%
@dataclass
class Progress:
    """Learning curves and best weights so far."""

    history: list[dict[str, float]] = field(default_factory=list)
    best_epoch: int = 0
    best_weights: dict[str, torch.Tensor] = field(default_factory=dict)

    def note(self, measured: dict[str, float], network: Network) -> None:
        """Add an epoch; keep its weights if its validation loss is the lowest."""
        self.history.append(measured)
        if (
            self.best_epoch == 0
            or measured["validation_loss"] < self.history[self.best_epoch - 1]["validation_loss"]
        ):
            self.best_epoch = len(self.history)
            self.best_weights = copy.deepcopy(network.state_dict())

    def should_stop(self, patience: int) -> bool:
        """Return True if the last `patience` epochs did not improve the validation loss."""
        return len(self.history) - self.best_epoch >= patience


def save_checkpoint(
    folder: Path, network: Network, optimizer: torch.optim.Optimizer, progress: Progress, facts: str
) -> None:
    """Save network, optimizer and progress."""
    # Flattened to named tensors, because safetensors stores no nested state.
    moments = {
        f"optimizer.{number}.{name}": value
        for number, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
    }
    tensors = {f"network.{k}": v for k, v in network.state_dict().items()} | moments
    tensors |= {f"best.{k}": v for k, v in progress.best_weights.items()}
    distributed.save_checkpoint(
        folder, tensors, {"history": progress.history, "best": progress.best_epoch, "facts": facts}
    )


def load_checkpoint(
    folder: Path, network: Network, optimizer: torch.optim.Optimizer, facts: str
) -> Progress:
    """Restore network and optimizer; return an empty Progress if nothing can be resumed."""
    saved = distributed.load_checkpoint(folder)
    # A checkpoint of other data, hyperparameters or code belongs to another run.
    if saved is None or saved[1]["facts"] != facts:
        return Progress()
    tensors, state = saved
    parts: dict[str, dict[str, torch.Tensor]] = {"network": {}, "best": {}, "optimizer": {}}
    for name, tensor in tensors.items():
        part, rest = name.split(".", 1)
        parts[part][rest] = tensor
    network.load_state_dict(parts["network"])
    moments: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in parts["optimizer"].items():
        number, moment = name.split(".")
        moments.setdefault(int(number), {})[moment] = tensor
    optimizer.load_state_dict(
        {"state": moments, "param_groups": optimizer.state_dict()["param_groups"]}
    )
    return Progress(state["history"], state["best"], parts["best"])


# %% [markdown]
"""
## Training loop
All rows are in memory and standardised once. For a small network, the overhead of many small operations costs more
than the arithmetic. So the rows of many steps are gathered at once, and the optimizer updates all weights as one
vector. With several ranks (GPUs), each rank processes its part of every batch and the gradients are added up, so
one and eight GPUs run the same algorithm.
"""

# %%
# Rows of this many steps are gathered at once: enough to save time, few enough to save memory.
STEPS_AT_ONCE = 64


def fit(
    network: Network,
    features: np.ndarray,
    labels: np.ndarray,
    options: Hyperparameters,
    machine: distributed.Runtime,
    checkpoints: Path | None = None,
    facts: str = "",
) -> Progress:
    """Train `network` on raw features (rows, columns) and labels (rows); keep the best weights."""
    learn, validate = validation_split(labels, options.validation_fraction, options.seed)
    network.standardizer.fit(features[learn])
    with torch.no_grad():
        inputs = network.standardizer(torch.from_numpy(features)).to(machine.device)
    targets = torch.from_numpy(labels).to(machine.device)
    # The standardizer stays on the CPU, because MPS has no float64.
    for part in (network.embeddings, network.layers):
        part.to(machine.device)

    weights, gradient = as_one_vector(network)
    optimizer = torch.optim.AdamW(
        [weights], lr=options.learning_rate, weight_decay=options.weight_decay, fused=True
    )
    progress = (
        load_checkpoint(checkpoints, network, optimizer, facts) if checkpoints else Progress()
    )
    if progress.history and machine.is_main:
        print(f"Resuming after epoch {len(progress.history)} from {checkpoints}")

    epochs = range(len(progress.history) + 1, options.epochs + 1)
    # To stdout, because notebooks show stderr in red, like an error.
    silent = not machine.is_main
    bar = tqdm(
        total=options.epochs,
        initial=len(progress.history),
        unit="epoch",
        ncols=100,
        file=sys.stdout,
        disable=silent,
    )
    for epoch in epochs:
        if progress.should_stop(options.patience):
            break
        # Learning rate with cosine decay: large steps first, small ones at the end.
        for group in optimizer.param_groups:
            group["lr"] = (
                options.learning_rate * 0.5 * (1 + math.cos(math.pi * (epoch - 1) / options.epochs))
            )
        train_loss = run_epoch(
            network, gradient, optimizer, inputs, targets, learn, options, epoch, machine
        )
        progress.note(
            {"train_loss": train_loss, **measure(network, inputs, targets, validate)}, network
        )
        latest = progress.history[-1]
        bar.set_postfix(
            loss=f"{latest['validation_loss']:.4f}", accuracy=f"{latest['validation_accuracy']:.4f}"
        )
        bar.update()
        if not math.isfinite(latest["validation_loss"]):
            raise UserError(
                f"the loss became {latest['validation_loss']} in epoch {epoch}. Try a smaller hyperparameters.learning_rate."
            )
        if checkpoints and machine.is_main:
            save_checkpoint(checkpoints, network, optimizer, progress, facts)
    bar.close()
    network.load_state_dict(progress.best_weights)
    return progress


def as_one_vector(network: nn.Module) -> tuple[nn.Parameter, torch.Tensor]:
    """Return the trainable weights as one vector, and its gradient; the network's become views."""
    # One vector needs one optimizer update and one all_reduce per step, not one per layer.
    weights = [weight for weight in network.parameters() if weight.requires_grad]
    vector = nn.Parameter(torch.cat([weight.detach().flatten() for weight in weights]))
    vector.grad = torch.zeros_like(vector)
    sizes = [weight.numel() for weight in weights]
    parts = zip(
        weights, torch.split(vector.detach(), sizes), torch.split(vector.grad, sizes), strict=True
    )
    for weight, values, gradient in parts:
        weight.data, weight.grad = values.view_as(weight), gradient.view_as(weight)
    return vector, vector.grad


def run_epoch(
    network: Network,
    gradient: torch.Tensor,
    optimizer: torch.optim.Optimizer,
    inputs: torch.Tensor,
    targets: torch.Tensor,
    learn: np.ndarray,
    options: Hyperparameters,
    epoch: int,
    machine: distributed.Runtime,
) -> float:
    """Train on all rows once and return the mean loss."""
    # The shuffle is the same on every rank, the dropout is different.
    chance = torch.Generator().manual_seed(options.seed * 100_003 + epoch)
    torch.manual_seed(options.seed * 100_003 + epoch + 7919 * machine.rank)
    order = torch.from_numpy(learn)[torch.randperm(len(learn), generator=chance)].to(machine.device)
    network.train()
    total = torch.zeros((), device=machine.device)
    for rows in torch.split(order, options.batch_size * STEPS_AT_ONCE):
        batches = (torch.split(part, options.batch_size) for part in (inputs[rows], targets[rows]))
        for batch, answers in zip(*batches, strict=True):
            loss = cross_entropy(
                network.from_scaled(machine.share(batch)), machine.share(answers), reduction="sum"
            )
            # Not optimizer.zero_grad(), which would discard the vector that the views share.
            gradient.zero_()
            # The sum over this rank's rows divided by the size of the whole batch, so that the
            # sum of the ranks' gradients is the gradient of the batch's mean loss.
            (loss / len(batch)).backward()  # type: ignore[no-untyped-call]
            if machine.world_size > 1:
                torch.distributed.all_reduce(gradient)
            optimizer.step()
            total += loss.detach()
    if machine.world_size > 1:
        torch.distributed.all_reduce(total)
    return float(total) / len(learn)


@torch.inference_mode()
def measure(
    network: Network, inputs: torch.Tensor, targets: torch.Tensor, rows: np.ndarray
) -> dict[str, float]:
    """Return loss and accuracy on the validation rows."""
    network.eval()
    held_out = torch.from_numpy(rows).to(inputs.device)
    logits = network.from_scaled(inputs[held_out])
    right = (logits.argmax(dim=1) == targets[held_out]).float().mean()
    return {
        "validation_loss": float(cross_entropy(logits, targets[held_out])),
        "validation_accuracy": float(right),
    }


# %% [markdown]
"""
## From Parquet to a saved model
The model's origin is saved with it: the hash of the data, the hyperparameters and the code version.
"""


# %%
def train(
    train_path: Path, model_dir: Path, options: Hyperparameters, checkpoints: Path | None = None
) -> dict[str, Any]:
    """Train on a Parquet file of trainer.data, save the model and return its metrics."""
    with distributed.start(options.threads) as machine:
        schema, rows, origin = (
            read_schema(train_path),
            read_rows(train_path),
            read_origin(train_path),
        )
        features, labels = schema.encode(rows), schema.encode_labels(rows[schema.label])
        torch.manual_seed(options.seed)
        network = Network(schema, options.dropout)
        # Part of `facts`, because a checkpoint of another network cannot be resumed.
        code = sha256(Path(inspect.getfile(Network)))
        facts = f"{origin['sha256']} {origin['split']} {options.to_json()} {code}"
        progress = fit(network, features, labels, options, machine, checkpoints, facts)
        metrics = {
            "rows": len(labels),
            "best_epoch": progress.best_epoch,
            "history": progress.history,
        }
        if machine.is_main:
            made_from = {
                "data_sha256": origin["sha256"],
                "data_split": origin["split"],
                "hyperparameters": asdict(options),
                "code_version": os.environ.get("CODE_VERSION", "unknown"),
                "torch": torch.__version__,
                "device": machine.device.type,
            }
            export.save(model_dir, network, schema, metrics, made_from)
        return metrics


# %% [markdown]
"""
## Try it
"""

# %% tags=["active-ipynb"]
"""
from project import runs
from project.settings import load_settings
from trainer import plots

settings = load_settings()
run = runs.current()
metrics = train(run.require(run.train_data, "data"), run.model, settings.hyperparameters)
best = metrics["history"][metrics["best_epoch"] - 1]
print(f"best epoch {metrics['best_epoch']} of {len(metrics['history'])}: validation accuracy {best['validation_accuracy']:.4f}")
"""

# %% [markdown]
"""
Both losses should fall together. If the validation loss rises while the training loss still falls, the network
overfits. The dashed line marks the epoch with the lowest validation loss; its weights are kept.
"""

# %% tags=["active-ipynb"]
"""
plots.learning_curve(metrics["history"], metrics["best_epoch"])
"""


# %% tags=["active-py"]
def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer.train", description="train.parquet → saved model"
    )
    parser.add_argument(
        "--train", required=True, help="rows to train on, as trainer.data writes them"
    )
    parser.add_argument(
        "--model-dir", default=os.environ.get("AIP_MODEL_DIR"), help="where the saved model goes"
    )
    parser.add_argument(
        "--checkpoint-dir",
        default=os.environ.get("AIP_CHECKPOINT_DIR"),
        help="where to keep and resume checkpoints",
    )
    parser.add_argument(
        "--hyperparameters", help="one JSON object; without it, the train block of project.yaml"
    )
    arguments = parser.parse_args()
    if not arguments.model_dir:
        parser.error("--model-dir is needed (or AIP_MODEL_DIR)")
    distributed.restart_on_all_gpus("trainer.train")
    if arguments.hyperparameters:
        options = Hyperparameters.from_json(arguments.hyperparameters)
    else:
        options = Hyperparameters.from_project()
    checkpoints = local_path(arguments.checkpoint_dir) if arguments.checkpoint_dir else None
    model_dir = local_path(arguments.model_dir)
    with distributed.stoppable(checkpoints):
        metrics = train(local_path(arguments.train), model_dir, options, checkpoints)
    if int(os.environ.get("RANK", "0")) == 0:
        best = metrics["history"][metrics["best_epoch"] - 1]
        print(
            f"best epoch {metrics['best_epoch']}, validation accuracy {best['validation_accuracy']:.4f} → {model_dir}"
        )


if __name__ == "__main__":
    run_command(main)
