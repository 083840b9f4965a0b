"""Versions, the champion, the gate; alone and when two runs register at once."""

import json
import shutil
import subprocess
import sys

import pytest

from core.errors import UserError
from core.registry import LocalRegistry, StaleChampion
from gcp.model_registry import open_registry
from level_1_pipeline import status
from project import runs
from trainer.data import prepare
from trainer.evaluate import score_champion
from trainer.gate import decide


@pytest.fixture
def registry(tmp_path) -> LocalRegistry:
    """An empty registry."""
    return LocalRegistry(tmp_path / "registry")


def test_a_version_keeps_the_model_and_where_it_came_from(registry, trained):
    assert registry.champion() is None
    assert registry.versions() == []
    version = registry.register(trained / "model", {"accuracy": 0.9}, "run-1")
    document = json.loads((trained / "model" / "model.json").read_text())
    assert (version.number, version.metrics, version.run) == (1, {"accuracy": 0.9}, "run-1")
    assert version.data_sha256 == document["data_sha256"]
    assert {path.name for path in version.model.iterdir()} == {
        path.name for path in (trained / "model").iterdir()
    }
    assert registry.champion() is None  # registering is not promoting
    registry.promote(1, "the first", None)
    assert registry.champion() == version
    assert registry.history()[-1]["reason"] == "the first"


def test_a_damaged_model_is_neither_registered_nor_promoted(registry, trained, model_copy):
    (model_copy / "model.onnx").write_bytes(b"x")
    with pytest.raises(UserError, match="damaged"):
        registry.register(model_copy, {}, "run-1")
    assert registry.versions() == []
    version = registry.register(trained / "model", {}, "run-1")
    (version.model / "model.onnx").write_bytes(b"x")
    with pytest.raises(UserError, match="damaged"):
        registry.promote(1, "", None)
    assert registry.champion() is None


def test_a_copy_that_was_cut_off_is_no_version_and_its_number_is_not_used_again(registry, trained):
    (registry.folder / "versions" / "1" / "model").mkdir(parents=True)
    assert registry.versions() == []
    assert registry.register(trained / "model", {}, "run-1").number == 2


def test_a_stale_challenger_does_not_replace_the_new_champion(registry, trained):
    for number in (1, 2):
        assert registry.register(trained / "model", {}, f"run-{number}").number == number
    registry.promote(1, "faster", None)
    with pytest.raises(
        StaleChampion,
        match=r"compared with champion none.*another run has made 1 the champion.*rollback VERSION=2",
    ):
        registry.promote(2, "slower", None)
    assert registry.champion().number == 1
    assert len(registry.history()) == 1


def test_files_of_a_desktop_are_nothing_to_the_registry(registry, trained):
    registry.register(trained / "model", {}, "run-1")
    registry.promote(1, "the first", None)
    for folder in (registry.folder / "versions", registry.folder / "versions" / "1" / "model"):
        (folder / ".DS_Store").write_bytes(b"x")
    assert registry.register(registry.champion().model, {}, "run-2").number == 2
    assert registry.promote(2, "better", 1).number == 2


def test_a_lost_champion_can_be_replaced(project, trained):
    registry = open_registry(str(runs.registry_folder()))
    for number in (1, 2):
        registry.register(trained / "model", {"accuracy": 0.9}, f"run-{number}")
        registry.promote(number, "better", number - 1 or None)
    shutil.rmtree(registry.folder / "versions" / "2")
    found = score_champion(registry, trained / "test.parquet")
    assert found["champion"] is None
    assert found["champion_version"] == 2
    assert "no version 2" in found["champion_problem"]
    assert "The champion is lost" in status.overview(registry)
    assert status.rollback(registry, 1)
    assert registry.champion().number == 1
    for broken in ("", "[]", "{}", '{"version": "x"}'):
        (registry.folder / "champion.json").write_text(broken)
        assert "make level1" in status.overview(registry)
        assert status.rollback(registry, 1)
        assert registry.champion().number == 1


def test_many_processes_register_and_promote_at_once(registry, trained):
    code = (
        "import sys; from pathlib import Path; from core.registry import *\n"
        "registry = LocalRegistry(Path(sys.argv[1]))\n"
        "for _ in range(5):\n"
        "    version = registry.register(Path(sys.argv[2]), {}, sys.argv[3])\n"
        "    try: registry.promote(version.number, sys.argv[3], (c := registry.champion()) and c.number)\n"
        "    except StaleChampion: pass\n"
    )
    command = [sys.executable, "-c", code, str(registry.folder), str(trained / "model")]
    processes = [subprocess.Popen([*command, f"run-{number}"]) for number in range(4)]
    assert [process.wait(timeout=120) for process in processes] == [0] * 4
    versions = registry.versions()
    assert [version.number for version in versions] == list(range(1, 21))
    assert sorted(version.run for version in versions) == sorted([f"run-{n}" for n in range(4)] * 5)
    changes = registry.history()
    assert [change["replaces"] for change in changes] == [
        None,
        *(change["version"] for change in changes[:-1]),
    ]
    assert registry.champion().number == changes[-1]["version"]


def scores(challenger, champion=None, problem=None):
    def metrics(value):
        return None if value is None else {"accuracy": value, "macro_f1": value - 0.1}

    known = champion is not None or problem
    return {
        "challenger": metrics(challenger),
        "champion": metrics(champion),
        "champion_version": 7 if known else None,
        "champion_problem": problem,
    }


@pytest.mark.parametrize(
    ("measured", "threshold", "max_regression", "passed", "reason"),
    [
        (scores(0.96), 0.95, 0.0, True, "no champion yet"),
        (scores(0.95), 0.95, 0.0, True, "reaches the threshold"),
        (scores(0.94), 0.95, 0.0, False, "0.9400 does not reach the threshold 0.9500"),
        (scores(0.97, 0.96), 0.95, 0.0, True, "champion 7 has 0.9600 on the same test rows"),
        (scores(0.96, 0.96), 0.95, 0.0, True, "champion 7 has 0.9600"),  # a tie
        (scores(0.96, 0.97), 0.95, 0.0, False, "but champion 7 has 0.9700"),
        (scores(0.96, 0.97), 0.95, 0.01, True, "allowed regression 0.0100"),
        (
            scores(0.9, 0.95),
            0.5,
            0.05,
            True,
            "allowed regression 0.0500",
        ),  # exactly as much as allowed
        (
            scores(0.9, 0.97),
            0.95,
            1.0,
            False,
            "does not reach",
        ),  # the threshold holds all the same
        (
            scores(0.96, problem="weights changed"),
            0.95,
            0.0,
            True,
            "champion 7 cannot be compared: weights changed",
        ),
    ],
)
def test_the_gate(measured, threshold, max_regression, passed, reason):
    decision = decide(measured, "accuracy", threshold, max_regression)
    assert decision.passed is passed
    assert reason in decision.reason


def test_a_champion_that_predicts_something_else_is_not_replaced(
    registry, trained, make_csv, tmp_path
):
    rows = [["width", "height", "colour", "plant"]] + [
        [n, n, "red", "ab"[n % 2]] for n in range(40)
    ]
    prepare(make_csv(rows), "plant", tmp_path / "train", tmp_path / "test")
    registry.register(trained / "model", {}, "run-1")
    registry.promote(1, "the first", None)
    found = score_champion(registry, tmp_path / "test")
    assert found["champion_predicts"] == "animal"
    decision = decide({"challenger": {"accuracy": 1.0}, **found}, "accuracy", 0.5, 0.0)
    assert not decision.passed
    assert "champion 1 predicts 'animal'" in decision.reason


def test_the_gate_uses_the_metric_that_is_asked_for():
    assert decide(scores(0.96), "accuracy", 0.9, 0).passed
    assert not decide(scores(0.96), "macro_f1", 0.9, 0).passed


@pytest.fixture
def served(project, trained) -> LocalRegistry:
    """A project with two versions, of which the second is the champion."""
    registry = LocalRegistry(runs.registry_folder())
    registry.register(trained / "model", {"accuracy": 0.9, "macro_f1": 0.8}, "run-1")
    registry.register(trained / "model", {"accuracy": 0.95, "macro_f1": 0.9}, "run-2")
    registry.promote(1, "there is no champion yet", None)
    registry.promote(2, "better", 1)
    return registry


def test_status_says_which_version_is_the_champion_and_why(served):
    out = status.overview(served)
    assert "Champion: version 2" in out
    assert "because better" in out
    assert [line.split()[0] for line in out.splitlines() if "run-" in line] == ["2*", "1"]


def test_without_a_champion_status_says_how_to_get_one(project):
    assert "make level1" in status.overview(LocalRegistry(runs.registry_folder()))


def test_rollback(served, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["status", "--rollback", "1"])
    status.main()
    assert served.champion().number == 1
    assert "Version 1 is the champion" in capsys.readouterr().out
    assert "rollback from version 2" in served.history()[-1]["reason"]


@pytest.mark.parametrize(
    ("number", "message"),
    [
        ("2", "the champion already"),
        ("9", "no version 9.*there are: 1, 2"),
        ("two", "not a version number"),
    ],
)
def test_a_wrong_rollback_is_told(served, monkeypatch, number, message):
    monkeypatch.setattr(sys, "argv", ["status", "--rollback", number])
    with pytest.raises(UserError, match=message):
        status.main()
    assert served.champion().number == 2
