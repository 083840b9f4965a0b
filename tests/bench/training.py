"""Training on the CPU, by `trainer.train.run_epoch`, beside what one usually writes.

That is a loop over `DataLoader(TensorDataset(…), shuffle=True)` with zero_grad, backward, step and
loss.item(). Both train the same network from the same weights on the same scaled rows, with the same batch
size and hyper-parameters, and each with AdamW; the usual loop takes it as PyTorch gives it, without
options. Both have one thread: more bring nothing to a network this small. They take turns by the epoch,
with two more: forward and backward alone, on one batch, which no loop around the network can go below; and
the matrix products of a step without anything else. The median of the turns' ratios counts.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from core.schema import Column, Schema
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from trainer import train
from trainer.config import Hyperparameters
from trainer.distributed import Runtime
from trainer.model import Network

from tests.bench.report import RATIO, Figure

OPTIONS = Hyperparameters(seed=0, threads=1, epochs=1, batch_size=128, learning_rate=0.003)
# Rows, columns, classes: like the sample, but larger, with the goal; the sample's own; a narrow table.
SHAPES = {"large": (50_000, 64, 10), "small": (1_222, 64, 10), "narrow": (50_000, 12, 2)}
GOAL = "≥ 3"


class Task:
    """Rows of chance, scaled as the network takes them, and the ways to spend an epoch on them."""

    def __init__(self, rows: int, columns: int, classes: int) -> None:
        chance = torch.Generator().manual_seed(0)
        self.rows = rows
        self.schema = Schema(
            label="label",
            columns=tuple(Column(f"column {number}", "numeric") for number in range(columns)),
            classes=tuple(range(classes)),
        )
        self.inputs = torch.randn(rows, columns, generator=chance)
        self.targets = torch.randint(classes, (rows,), generator=chance)

    def network(self) -> Network:
        """The same one every time."""
        torch.manual_seed(OPTIONS.seed)
        return Network(self.schema, OPTIONS.dropout).train()

    def ours(self) -> Callable[[], Any]:
        """An epoch as `fit` runs it."""
        network = self.network()
        weights, gradient = train.as_one_vector(network)
        optimizer = torch.optim.AdamW(
            [weights], lr=OPTIONS.learning_rate, weight_decay=OPTIONS.weight_decay, fused=True
        )
        machine, learn = Runtime(torch.device("cpu")), np.arange(self.rows)
        data = (self.inputs, self.targets)
        return lambda: train.run_epoch(
            network, gradient, optimizer, *data, learn, OPTIONS, 1, machine
        )

    def usual(self) -> Callable[[], Any]:
        """An epoch as tutorials write it."""
        network = self.network()
        optimizer = torch.optim.AdamW(
            network.parameters(), lr=OPTIONS.learning_rate, weight_decay=OPTIONS.weight_decay
        )
        dataset = TensorDataset(self.inputs, self.targets)
        loader = DataLoader(dataset, batch_size=OPTIONS.batch_size, shuffle=True)

        def epoch() -> None:
            total = 0.0
            for batch, answers in loader:
                optimizer.zero_grad()
                loss = cross_entropy(network.from_scaled(batch), answers)
                loss.backward()
                optimizer.step()
                total += loss.item() * len(batch)

        return epoch

    def network_alone(self) -> Callable[[], Any]:
        """Forward and backward as often as an epoch has steps: no rows are fetched, no weights change."""
        network = self.network()
        batch, answers = self.inputs[: OPTIONS.batch_size], self.targets[: OPTIONS.batch_size]

        def epoch() -> None:
            for _ in range(0, self.rows, OPTIONS.batch_size):
                network.zero_grad()
                cross_entropy(network.from_scaled(batch), answers).backward()

        return epoch

    def products(self) -> Callable[[], Any]:
        """The matrix products of these steps: one for each layer forward, two backward, one for the first."""
        matrices = [
            weights.detach() for weights in self.network().layers.parameters() if weights.dim() == 2
        ]

        def epoch() -> None:
            for batch in self.inputs.split(OPTIONS.batch_size):
                entered = [batch]
                for matrix in matrices:
                    entered.append(entered[-1] @ matrix.T)
                gradient = entered.pop()
                for number in reversed(range(len(matrices))):
                    torch.mm(gradient.T, entered[number])
                    if number:
                        gradient = gradient @ matrices[number]

        return epoch


def seconds(epoch: Callable[[], Any]) -> float:
    """How long one takes."""
    begin = time.perf_counter()
    epoch()
    return time.perf_counter() - begin


def measure(small: bool) -> Iterator[Figure]:
    """Samples per second, and ratios; the threads are put back."""
    threads = torch.get_num_threads()
    torch.set_num_threads(OPTIONS.threads)
    try:
        for name, (rows, columns, classes) in SHAPES.items():
            task = Task(min(rows, 2_000) if small else rows, columns, classes)
            yield from figures(name, task, turns=2 if small else 500_000 // rows)
    finally:
        torch.set_num_threads(threads)


def figures(name: str, task: Task, turns: int) -> Iterator[Figure]:
    """One task's."""
    ways = {
        "ours": task.ours(),
        "usual": task.usual(),
        "network alone": task.network_alone(),
        "products": task.products(),
    }
    for epoch in ways.values():
        epoch()  # the first one warms up
    taken = [{way: seconds(epoch) for way, epoch in ways.items()} for _ in range(turns)]

    def ratio(way: str, other: str) -> float:
        return statistics.median(turn[way] / turn[other] for turn in taken)

    speed = {way: task.rows / statistics.median(turn[way] for turn in taken) for way in ways}
    goal = GOAL if name == "large" else ""
    shape = f"{task.rows:,} × {len(task.schema.columns)}, {len(task.schema.classes)} classes"
    yield Figure(f"{name}: trainer.train", speed["ours"], "samples/s", note=shape)
    yield Figure(f"{name}: the DataLoader loop", speed["usual"], "samples/s", note=shape)
    bound = f"{ratio('usual', 'network alone'):.2g} if fetching rows and the optimiser cost nothing"
    yield Figure(f"{name}: ratio", ratio("usual", "ours"), RATIO, goal, bound)
    share = 100 * ratio("products", "ours")
    yield Figure(f"{name}: matrix products", share, "%", note="of the time of trainer.train")
