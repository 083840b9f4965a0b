"""The network: scaling, and that it can learn."""

import math

import numpy as np
import pytest
import torch

from core.schema import Column, Schema
from trainer import distributed
from trainer.config import Hyperparameters
from trainer.evaluate import score
from trainer.model import Network, Standardizer
from trainer.train import as_one_vector, fit, run_epoch

NUMBERS = Schema("y", (Column("a", "numeric"), Column("b", "numeric", optional=True)), (0, 1))


def test_scaling_standardises_imputes_and_flags():
    features = np.array([[1.0, 10.0], [2.0, math.nan], [3.0, 30.0], [4.0, 50.0]])
    standardizer = Standardizer(NUMBERS)
    standardizer.fit(features)
    scaled = standardizer(torch.from_numpy(features)).numpy()
    assert np.allclose(scaled[:, 0].mean(), 0, atol=1e-6)
    assert np.allclose(scaled[:, 0].std(), 1)
    filled = np.array([10, 30, 30, 50])  # 30 is the median
    assert np.allclose(scaled[:, 1], (filled - filled.mean()) / filled.std(), atol=1e-6)
    assert scaled[:, 2].tolist() == [0, 1, 0, 0]


@pytest.mark.parametrize(
    "numbers",
    [
        [7.0] * 4,
        [1e308, -1e308, 1e308, -1e308],
        [0, 0, 0, 1e-300],
        [1e308, 1, 2, 3],
        [5e-324, 0, 0, 0],
        [1e16, 1e16, 1e16, 1e16 + 2],
    ],
)
def test_scaling_never_gives_nan(numbers):
    features = np.array([[x, x] for x in numbers])
    standardizer = Standardizer(NUMBERS)
    with np.errstate(over="raise", invalid="raise"):
        standardizer.fit(features)
    queries = torch.tensor([[x, x] for x in [*numbers, 1e308, -1e308, 0.0]], dtype=torch.float64)
    scaled = standardizer(queries)
    assert torch.isfinite(scaled).all()
    assert scaled.abs().max() <= Standardizer.LIMIT


def test_no_64_bit_number_is_sent_to_the_device(monkeypatch):
    """MPS refuses them."""
    schema, features, labels = blobs(60)
    sent = []
    to = torch.nn.Module.to
    monkeypatch.setattr(
        torch.nn.Module,
        "to",
        lambda module, *given: sent.extend(module.state_dict().values()) or to(module, *given),
    )
    trained(schema, features, labels, epochs=1)
    assert sent
    assert all(tensor.dtype != torch.float64 for tensor in sent)


def test_an_untrained_network_has_no_opinion_on_an_unknown_category():
    network = Network(Schema("y", (Column("c", "categorical", True, ("a", "b")),), (0, 1)))
    assert network.embeddings[0].weight[0].tolist() == [0, 0]


def blobs(count: int = 300) -> tuple[Schema, np.ndarray, np.ndarray]:
    """Three overlapping clouds of points, and a category that helps."""
    chance = np.random.default_rng(0)
    labels = chance.integers(0, 3, count)
    points = np.array([[0, 0], [3, 0], [0, 3]])[labels] + chance.normal(size=(count, 2))
    category = np.where(chance.random(count) < 0.7, labels + 1, 0)
    columns = (
        Column("x", "numeric"),
        Column("y", "numeric"),
        Column("c", "categorical", True, ("a", "b", "c")),
    )
    return (
        Schema("label", columns, (0, 1, 2)),
        np.column_stack([points, category]).astype(float),
        labels,
    )


def trained(schema, features, labels, **options):
    values = {
        "seed": 0,
        "threads": 1,
        "epochs": 30,
        "batch_size": 32,
        "learning_rate": 0.01,
        **options,
    }
    settings = Hyperparameters(**values)
    torch.manual_seed(settings.seed)
    network = Network(schema, settings.dropout)
    with distributed.start(1) as machine:
        return network, fit(network, features, labels, settings, machine)


def test_the_loss_falls_and_a_constant_is_beaten():
    schema, features, labels = blobs()
    network, progress = trained(schema, features, labels)
    first, best = progress.history[0], progress.history[progress.best_epoch - 1]
    assert best["validation_loss"] < 0.7 * first["validation_loss"]
    new_schema, new, truth = blobs(1000)
    with torch.inference_mode():
        metrics = score(network.eval()(torch.from_numpy(new)).softmax(1).numpy(), truth)
    assert metrics["accuracy"] > metrics["baseline"] + 0.4
    assert new_schema == schema


def test_ten_rows_are_learned_by_heart():
    schema, features, labels = blobs(14)
    _, progress = trained(
        schema,
        features,
        labels,
        epochs=300,
        patience=300,
        dropout=0.0,
        weight_decay=0.0,
        batch_size=10,
    )
    assert progress.history[-1]["train_loss"] < 0.01


def test_shuffled_labels_teach_nothing():
    schema, features, labels = blobs()
    shuffled = np.random.default_rng(1).permutation(labels)
    network, _ = trained(schema, features, shuffled)
    _, new, truth = blobs(1000)
    with torch.inference_mode():
        metrics = score(network.eval()(torch.from_numpy(new)).softmax(1).numpy(), truth)
    assert metrics["accuracy"] < 0.6


def test_metrics_are_what_they_say():
    probabilities = np.array([[0.9, 0.1, 0], [0.2, 0.8, 0], [0.6, 0.4, 0], [0.3, 0.7, 0]])
    metrics = score(probabilities, np.array([0, 1, 1, 1]))
    assert metrics["accuracy"] == 0.75
    assert metrics["confusion"] == [[1, 0, 0], [1, 2, 0], [0, 0, 0]]
    assert metrics["precision"] == [0.5, 1, 0]
    assert metrics["recall"] == pytest.approx([1, 2 / 3, 0])
    assert metrics["macro_f1"] == pytest.approx(
        (2 / 3 + 0.8) / 2
    )  # the class that neither occurs nor is answered does not count
    assert metrics["log_loss"] == pytest.approx(-np.log([0.9, 0.8, 0.4, 0.7]).mean())
    assert metrics["baseline"] == 0.75


def test_one_vector_learns_as_the_weights_would_one_by_one():
    """The loop's gathered rows, fused optimiser and joined weights are a quicker way to the same numbers."""
    schema, features, labels = blobs(150)
    options = Hyperparameters(
        seed=0, threads=1, epochs=2, batch_size=32, learning_rate=0.01, dropout=0.0
    )
    networks = []
    for _ in range(2):
        torch.manual_seed(0)
        network = Network(schema)
        network.standardizer.fit(features)
        next(network.layers.parameters()).requires_grad_(
            False
        )  # as when somebody fine-tunes: it must stay
        networks.append(network)
    quick, plain = networks
    frozen = next(plain.layers.parameters()).clone()
    inputs, targets, learn = (
        plain.standardizer(torch.from_numpy(features)),
        torch.from_numpy(labels),
        np.arange(10, len(labels)),
    )

    weights, gradient = as_one_vector(quick)
    optimizer = torch.optim.AdamW([weights], lr=0.01, fused=True)
    for epoch in (1, 2):
        run_epoch(
            quick,
            gradient,
            optimizer,
            inputs,
            targets,
            learn,
            options,
            epoch,
            distributed.Runtime(torch.device("cpu")),
        )

    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.01)
    for epoch in (1, 2):
        order = learn[
            torch.randperm(len(learn), generator=torch.Generator().manual_seed(epoch)).numpy()
        ]
        for rows in np.split(order, range(32, len(order), 32)):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(
                plain(torch.from_numpy(features[rows])), targets[rows]
            ).backward()
            optimizer.step()
    for one, other in zip(quick.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    assert torch.equal(next(quick.layers.parameters()), frozen)
