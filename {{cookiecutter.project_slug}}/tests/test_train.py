"""Training as a program: repeatable, resumable, on several ranks."""

import hashlib
import json
import os
import pickle
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from core.errors import UserError
from core.paths import local_path
from trainer import data, distributed, export
from trainer import train as train_module
from trainer.config import Hyperparameters
from trainer.evaluate import evaluate
from trainer.train import train, validation_split


def weights_hash(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def run(trained, model_dir, options, *more, prefix=("-m",)):
    command = [
        sys.executable,
        *prefix,
        "trainer.train",
        "--train",
        trained / "train.parquet",
        "--model-dir",
        model_dir,
    ]
    done = subprocess.run(
        [*command, "--hyperparameters", options.to_json(), *more],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_seed_gives_the_same_bits(trained, tmp_path, options, threads):
    settings = replace(options, threads=threads)
    run(trained, tmp_path / "a", settings)
    run(trained, tmp_path / "b", settings)
    assert weights_hash(tmp_path / "a") == weights_hash(tmp_path / "b")
    assert (tmp_path / "a" / "model.json").read_text() == (
        tmp_path / "b" / "model.json"
    ).read_text()


def test_another_seed_gives_another_model(trained, tmp_path, options):
    train(trained / "train.parquet", tmp_path / "a", replace(options, seed=1))
    assert weights_hash(tmp_path / "a") != weights_hash(trained / "model")


class Stopped(Exception):
    """Stands for the end of the process."""


@pytest.mark.parametrize("after", [1, 5])
def test_an_interrupted_run_resumes_and_ends_with_the_same_weights(
    trained, tmp_path, options, monkeypatch, after
):
    saved = train_module.save_checkpoint

    def stop(folder, network, optimizer, progress, facts):
        saved(folder, network, optimizer, progress, facts)
        if len(progress.history) == after:
            raise Stopped

    monkeypatch.setattr(train_module, "save_checkpoint", stop)
    with pytest.raises(Stopped):
        train(trained / "train.parquet", tmp_path / "model", options, tmp_path / "checkpoints")
    assert not (tmp_path / "model" / "model.json").exists()
    monkeypatch.setattr(train_module, "save_checkpoint", saved)
    epochs = []
    run_epoch = train_module.run_epoch
    monkeypatch.setattr(
        train_module, "run_epoch", lambda *given: epochs.append(given[7]) or run_epoch(*given)
    )
    train(trained / "train.parquet", tmp_path / "model", options, tmp_path / "checkpoints")
    assert epochs[0] == after + 1
    assert weights_hash(tmp_path / "model") == weights_hash(trained / "model")


def test_a_checkpoint_of_another_run_or_a_broken_one_is_not_used(trained, tmp_path, options):
    train(
        trained / "train.parquet",
        tmp_path / "other",
        replace(options, learning_rate=0.02),
        tmp_path / "checkpoints",
    )
    train(trained / "train.parquet", tmp_path / "a", options, tmp_path / "checkpoints")
    (tmp_path / "checkpoints" / "checkpoint.safetensors").write_bytes(b"broken")
    train(trained / "train.parquet", tmp_path / "b", options, tmp_path / "checkpoints")
    assert (
        weights_hash(tmp_path / "a")
        == weights_hash(tmp_path / "b")
        == weights_hash(trained / "model")
    )


def test_a_model_is_not_scored_on_rows_that_it_may_have_seen(trained, tmp_path):
    data.prepare(
        trained / "animals.csv",
        "animal",
        tmp_path / "train",
        tmp_path / "test",
        ignore=["id"],
        split_seed=5,
    )
    with pytest.raises(UserError, match="divided anew"):
        evaluate(trained / "model", tmp_path / "test", tmp_path / "metrics.json")
    assert not (tmp_path / "metrics.json").exists()


def test_nothing_is_pickled_or_unpickled(trained, tmp_path, options, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("pickle")

    for name in ("load", "loads", "dump", "dumps", "Unpickler", "Pickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "save", refuse)
    monkeypatch.setattr(torch, "load", refuse)
    checkpoint = {"x": torch.arange(3)}
    distributed.save_checkpoint(tmp_path, checkpoint, {"epoch": 1})
    tensors, state = distributed.load_checkpoint(tmp_path)
    assert tensors["x"].tolist() == [0, 1, 2]
    assert state == {"epoch": 1}
    export.load(trained / "model")


def test_two_ranks_follow_the_path_of_one(trained, tmp_path, options):
    # Without dropout, whose draws differ by rank, only the order of additions is different.
    settings = replace(options, dropout=0.0, epochs=4)
    run(trained, tmp_path / "one", settings)
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m")
    out = run(trained, tmp_path / "two", settings, prefix=launch)
    assert out.count("best epoch") == 1  # one rank speaks
    one, two = (
        safetensors.torch.load_file(tmp_path / name / "model.safetensors")
        for name in ("one", "two")
    )
    for name, weights in one.items():
        assert torch.allclose(weights, two[name], atol=1e-4), name


def test_early_stopping_keeps_the_best_epoch(trained, tmp_path, options):
    settings = replace(options, epochs=200, patience=3, learning_rate=0.05)
    metrics = train(trained / "train.parquet", tmp_path / "model", settings)
    losses = [epoch["validation_loss"] for epoch in metrics["history"]]
    assert len(losses) < 200
    assert metrics["best_epoch"] == int(np.argmin(losses)) + 1 == len(losses) - 3
    assert json.loads((tmp_path / "model" / "metrics.json").read_text()) == metrics


def test_rows_held_back_are_of_every_class_and_never_learned_from():
    labels = np.array([0] * 50 + [1] * 10 + [2])
    learn, validate = validation_split(labels, 0.2, seed=0)
    assert sorted([*learn, *validate]) == list(range(61))
    assert np.bincount(labels[validate], minlength=3).tolist() == [10, 2, 0]
    assert validation_split(labels, 0.2, seed=0)[1].tolist() == validate.tolist()
    assert validation_split(labels, 0.2, seed=1)[1].tolist() != validate.tolist()
    with pytest.raises(UserError, match="too few"):
        validation_split(np.array([0, 1]), 0.2, seed=0)


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        ("{", ["--hyperparameters", "JSON"]),
        ("[1]", ["--hyperparameters"]),
        (
            '{"epochs": 0, "seed": 0, "threads": 1, "batch_size": 1, "learning_rate": 0.1}',
            ["epochs", "greater than or equal to 1", "0"],
        ),
        (
            '{"epochs": 1, "seed": 0, "threads": 1, "batch_size": 1, "learning_rate": 0.1, "epoch": 1}',
            ["epoch"],
        ),
        ('{"epochs": 1}', ["seed"]),
    ],
)
def test_wrong_hyperparameters_are_told(text, fragments):
    with pytest.raises(UserError) as told:
        Hyperparameters.from_json(text)
    for fragment in fragments:
        assert fragment in str(told.value)


def test_hyperparameters_as_json_and_back(options):
    assert Hyperparameters.from_json(options.to_json()) == options
    assert asdict(options)["dropout"] == 0.1


def test_several_machines_are_started_with_torchrun(monkeypatch):
    spec = {
        "cluster": {"workerpool0": ["host-0:2222"], "workerpool1": ["host-1:2222", "host-2:2222"]},
        "task": {"type": "workerpool1", "index": 1},
    }
    monkeypatch.setenv("CLUSTER_SPEC", json.dumps(spec))
    monkeypatch.setattr(sys, "argv", ["train", "--train", "x"])
    started = []
    monkeypatch.setattr(os, "execv", lambda _, command: started.append(command))
    distributed.restart_on_all_gpus("trainer.train")
    assert started[0][1:] == [
        *(
            "-m",
            "torch.distributed.run",
            "--nnodes=3",
            f"--nproc-per-node={max(1, torch.cuda.device_count())}",
            "--node-rank=2",
        ),
        *(
            "--rdzv-backend=static",
            "--rdzv-endpoint=host-0:2222",
            "-m",
            "trainer.train",
            "--train",
            "x",
        ),
    ]


def test_buckets_are_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("GCS_MOUNT", str(tmp_path))
    with pytest.raises(UserError, match="no bucket is mounted"):
        local_path("gs://bucket/a/b.csv")
    (tmp_path / "bucket").mkdir()
    assert local_path("gs://bucket/a/b.csv") == tmp_path / "bucket" / "a" / "b.csv"
    assert local_path("a/b.csv") == Path("a/b.csv")
