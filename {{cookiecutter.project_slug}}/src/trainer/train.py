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
An explicit loop: shuffle, step, measure, keep the best. Early stopping on rows held back from training; a checkpoint after every epoch.

Run it here cell by cell, or as a program:
`python -m trainer.train --train train.parquet --model-dir model --hyperparameters '{"seed": 0, "threads": 1, "epochs": 40, "batch_size": 128, "learning_rate": 0.003}'`
(in the project's folder the last argument may be left out: project.yaml says it). On several GPUs the program starts itself once for each.
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
## Rows held back
Early stopping needs rows that training does not see, and the test rows must not be used for it: choosing on them would make the test too
kind. So a part of the training rows is held back, drawn with the seed, the same part of each class.
"""


# %%
def validation_split(
    labels: np.ndarray, fraction: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the rows to learn from, and of the rows to validate on; a class with one row is only learned from."""
    chance = np.random.default_rng(seed)
    validation = []
    for label in np.unique(labels):
        rows = chance.permutation(np.flatnonzero(labels == label))
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
## The state of training
All that is needed to go on after an interruption. Chance is not part of it: each epoch draws anew from the seed and its own number, so a
resumed run shuffles as an undisturbed one would, and ends with the same weights.
"""


# %%
@dataclass
class Progress:
    """What training knows after an epoch: curves so far, and the best weights."""

    history: list[dict[str, float]] = field(default_factory=list)
    best_epoch: int = 0
    best_weights: dict[str, torch.Tensor] = field(default_factory=dict)

    def note(self, measured: dict[str, float], network: Network) -> None:
        """Add an epoch; keep its weights if its validation loss is the lowest so far."""
        self.history.append(measured)
        if (
            self.best_epoch == 0
            or measured["validation_loss"] < self.history[self.best_epoch - 1]["validation_loss"]
        ):
            self.best_epoch = len(self.history)
            self.best_weights = copy.deepcopy(network.state_dict())

    def should_stop(self, patience: int) -> bool:
        """True when the last `patience` epochs brought nothing better."""
        return len(self.history) - self.best_epoch >= patience


def save_checkpoint(
    folder: Path, network: Network, optimizer: torch.optim.Optimizer, progress: Progress, facts: str
) -> None:
    """Keep network, optimiser and progress."""
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
    """Put network and optimiser back where they were; an empty Progress when there is nothing to resume.

    A checkpoint of other data or hyper-parameters (`facts`) is of another run, and is not used.
    """
    saved = distributed.load_checkpoint(folder)
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
## The loop
The rows fit in memory, scaled once. What a step of a small network costs is less its arithmetic than its many small operations, so there
are few of them: rows are gathered for many steps at once, and the optimiser sees all weights as one vector. With several ranks each takes its
share of every batch, and their gradients are added up, so one GPU and eight follow the same path.
"""

# %%
STEPS_AT_ONCE = (
    64  # whose rows are gathered together: enough to cost little, few enough to need little memory
)


def fit(
    network: Network,
    features: np.ndarray,
    labels: np.ndarray,
    options: Hyperparameters,
    machine: distributed.Runtime,
    checkpoints: Path | None = None,
    facts: str = "",
) -> Progress:
    """Train `network` on raw features (rows, columns) and labels (rows), and leave the best epoch's weights in it."""
    learn, validate = validation_split(labels, options.validation_fraction, options.seed)
    network.standardizer.fit(features[learn])
    with torch.no_grad():
        inputs = network.standardizer(torch.from_numpy(features)).to(machine.device)
    targets = torch.from_numpy(labels).to(machine.device)
    for part in (
        network.embeddings,
        network.layers,
    ):  # the standardizer stays on the CPU: its 64-bit numbers are unknown to MPS
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
    # To standard output: a notebook would show standard error on red, as if something had failed.
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
        for (
            group
        ) in optimizer.param_groups:  # cosine decay: large steps first, small ones to settle
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
    """All weights that learn as one vector, and its gradient; the network's own become views of these two."""
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
    """One pass over the rows to learn from; returns the mean loss."""
    chance = torch.Generator().manual_seed(options.seed * 100_003 + epoch)  # the same on every rank
    torch.manual_seed(
        options.seed * 100_003 + epoch + 7919 * machine.rank
    )  # for dropout: its own on each rank
    order = torch.from_numpy(learn)[torch.randperm(len(learn), generator=chance)].to(machine.device)
    network.train()
    total = torch.zeros((), device=machine.device)
    for rows in torch.split(order, options.batch_size * STEPS_AT_ONCE):
        batches = (torch.split(part, options.batch_size) for part in (inputs[rows], targets[rows]))
        for batch, answers in zip(*batches, strict=True):
            loss = cross_entropy(
                network.from_scaled(machine.share(batch)), machine.share(answers), reduction="sum"
            )
            gradient.zero_()
            # Summed over the share and divided by the whole batch: the ranks' gradients then simply add up.
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
    """Loss and accuracy on the rows held back."""
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
Everything that made the model is written down beside it: the data's hash, the hyper-parameters, the code's version.
"""


# %%
def train(
    train_path: Path, model_dir: Path, options: Hyperparameters, checkpoints: Path | None = None
) -> dict[str, Any]:
    """Train on a Parquet file of trainer.data and save the model; returns what metrics.json says."""
    with distributed.start(options.threads) as machine:
        schema, rows, origin = (
            read_schema(train_path),
            read_rows(train_path),
            read_origin(train_path),
        )
        features, labels = schema.encode(rows), schema.encode_labels(rows[schema.label])
        torch.manual_seed(options.seed)
        network = Network(schema, options.dropout)
        code = sha256(
            Path(inspect.getfile(Network))
        )  # a checkpoint of another network is of no use
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
Both losses should fall together. When the validation loss turns upwards while the training loss goes on falling, the network has begun to
learn the rows by heart; the dashed line marks the epoch whose weights were kept.
"""

# %% tags=["active-ipynb"]
"""
plots.learning_curve(metrics["history"], metrics["best_epoch"])
"""


# %% tags=["active-py"]
def main() -> None:
    """Command line."""
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
