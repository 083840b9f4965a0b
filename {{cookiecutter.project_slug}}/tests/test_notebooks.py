"""Notebooks and modules are one; and they run without a browser."""

import json
import os
import random
import re
import sys

import jupytext
import nbformat
import pytest

from core.errors import UserError
from level_0_manual import notebooks
from level_0_manual import run as level_0
from project import runs
from trainer import model


def edit_notebook(name, old, new):
    path = notebooks.notebook_path(name)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def edit_module(name, old, new):
    path = notebooks.module_path(name)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_both_halves_are_shipped_in_step_without_outputs():
    notebooks.require_in_sync()
    for name in notebooks.ORDER:
        notebook = nbformat.read(notebooks.notebook_path(name), as_version=4)
        nbformat.validate(notebook)
        for cell in notebook.cells:
            if cell.cell_type == "code":
                assert not cell.outputs
                assert cell.execution_count is None


def test_each_notebook_names_its_own_module_only():
    for name in notebooks.ORDER:
        metadata = nbformat.read(notebooks.notebook_path(name), as_version=4).metadata
        assert metadata.jupytext.formats == "level_0_manual///ipynb,src/trainer///py:percent"
        found = jupytext.paired_paths.paired_paths(
            str(notebooks.notebook_path(name)), "ipynb", metadata.jupytext.formats
        )
        assert str(notebooks.module_path(name)) in [path for path, _ in found]


def test_an_edited_module_is_noticed_and_synced(project):
    edit_module("model", "min(50,", "min(40,")
    assert notebooks.out_of_sync() == ["model"]
    with pytest.raises(
        UserError, match=r"level_0_manual/model\.ipynb and src/trainer/model\.py.*make sync FROM"
    ):
        notebooks.require_in_sync()
    assert notebooks.sync("module") == ["model"]
    assert "min(40," in notebooks.notebook_path("model").read_text()
    assert notebooks.out_of_sync() == []


def test_an_edited_notebook_is_noticed_and_synced(project):
    edit_notebook("model", "min(50,", "min(40,")
    assert notebooks.out_of_sync() == ["model"]
    assert notebooks.sync("notebook") == ["model"]
    assert "min(40," in notebooks.module_path("model").read_text()
    assert notebooks.out_of_sync() == []


def test_the_chosen_side_wins_when_both_were_edited(project):
    edit_module("model", "min(50,", "min(30,")
    edit_notebook("model", "min(50,", "min(40,")
    notebooks.sync("module")
    assert "min(30," in notebooks.notebook_path("model").read_text()
    assert "min(40," not in notebooks.notebook_path("model").read_text()


def test_a_kernel_that_loaded_older_code_is_told_to_restart(project, monkeypatch):
    monkeypatch.setitem(
        sys.modules, "trainer.model", model
    )  # as in a kernel that has run train.ipynb
    notebooks.require_in_sync()
    edit_module("model", "min(50,", "min(40,")
    notebooks.sync("module")
    with pytest.raises(
        UserError, match=r"src/trainer/model\.py has changed since this kernel imported it.*Restart"
    ):
        notebooks.require_in_sync()


def test_modification_times_do_not_count(project):
    edit_module("train", "cosine decay", "cosine decay, slowly")
    notebooks.notebook_path("train").touch()  # newer, and yet older in what it says
    assert notebooks.out_of_sync() == ["train"]


def test_outputs_and_layout_are_no_difference(project):
    path = notebooks.notebook_path("train")
    notebook = nbformat.read(path, as_version=4)
    for number, cell in enumerate(cell for cell in notebook.cells if cell.cell_type == "code"):
        cell.execution_count = number
        cell.outputs = [nbformat.v4.new_output("stream", text="hello")]
        cell.metadata["collapsed"] = True
    nbformat.write(notebook, path)
    edit_module("train", "\n\n\n# %% [markdown]", "\n\n# %% [markdown]")
    assert notebooks.out_of_sync() == []


def test_sync_is_repeatable_and_a_missing_half_is_made(project):
    for name in notebooks.ORDER:
        notebooks.notebook_path(
            name
        ).unlink()  # saved by Jupyter, its cells may have ids that are not sync's
    notebooks.sync("module")
    before = {
        path: path.read_bytes()
        for name in notebooks.ORDER
        for path in (notebooks.notebook_path(name), notebooks.module_path(name))
    }
    for path, content in before.items():
        path.unlink()
        notebooks.sync("module" if path.suffix == ".ipynb" else "notebook")
        assert path.read_bytes() == content


def test_a_file_that_is_no_notebook_is_told_and_made_anew(project):
    path = notebooks.notebook_path("data")
    before = notebooks.current_code("data", "notebook")
    path.write_text("<<<<<<< HEAD\n{}\n")
    with pytest.raises(
        UserError, match=r"data\.ipynb: not a valid notebook[\s\S]*make sync FROM=module PAIR=data"
    ):
        notebooks.out_of_sync()
    with pytest.raises(UserError, match="not a valid notebook"):
        notebooks.sync("notebook")
    assert notebooks.sync("module") == ["data"]
    assert notebooks.current_code("data", "notebook") == before


# What was edited since the last commit is right: compared by content, in the working tree.
OLD, NEW, OTHER = "min(50,", "min(40,", "min(30,"


@pytest.fixture
def committed(project, git):
    """A project in git, with one commit."""
    git("init", "--quiet")
    git("add", "--all")
    assert git("commit", "--quiet", "--message=first").returncode == 0
    return project


@pytest.mark.parametrize("half", notebooks.HALVES)
def test_the_half_edited_since_the_last_commit_counts(committed, half, capsys, monkeypatch):
    (edit_notebook if half == "notebook" else edit_module)("model", OLD, NEW)
    path, other = (notebooks.display_path("model", side) for side in (half, notebooks.OTHER[half]))
    assert notebooks.edited_half("model") == half
    monkeypatch.setattr("sys.argv", ["notebooks", "sync"])
    notebooks.main()
    assert (
        f"{other} was written from {path}. Next: git add {path} {other}" in capsys.readouterr().out
    )
    assert NEW in (committed / other).read_text()
    assert notebooks.out_of_sync() == []
    notebooks.main()
    assert capsys.readouterr().out == "already in sync\n"


def both_edited():
    edit_notebook("model", OLD, NEW)
    edit_module("model", OLD, OTHER)


def test_when_both_were_edited_a_person_decides_and_nothing_is_lost(committed):
    both_edited()
    edit_module("train", "cosine decay", "cosine decay, slowly")  # this one is clear
    with pytest.raises(
        UserError,
        match=r"both were edited[\s\S]*FROM=notebook PAIR=model[\s\S]*FROM=module PAIR=model",
    ):
        notebooks.sync_edited()
    assert notebooks.out_of_sync() == ["model"]
    assert "decay, slowly" in notebooks.notebook_path("train").read_text()
    assert NEW in notebooks.notebook_path("model").read_text()
    assert OTHER in notebooks.module_path("model").read_text()
    assert notebooks.sync("notebook", ["model"]) == ["model"]
    assert NEW in notebooks.module_path("model").read_text()


def test_a_named_pair_leaves_the_others_alone(committed):
    both_edited()
    edit_module("train", "cosine decay", "cosine decay, slowly")
    assert notebooks.sync("notebook", ["model"]) == ["model"]
    assert notebooks.out_of_sync() == ["train"]
    assert "decay, slowly" in notebooks.module_path("train").read_text()


def test_both_edited_alike_is_in_sync(committed):
    edit_notebook("model", OLD, NEW)
    edit_module("model", OLD, NEW)
    assert notebooks.out_of_sync() == []


def test_outputs_alone_are_no_edit(committed):
    path = notebooks.notebook_path("model")
    notebook = nbformat.read(path, as_version=4)
    next(cell for cell in notebook.cells if cell.cell_type == "code").outputs = [
        nbformat.v4.new_output("stream", text="hi")
    ]
    nbformat.write(notebook, path)
    edit_module("model", OLD, NEW)
    assert notebooks.edited_half("model") == "module"


def test_a_fresh_clone_with_any_dates_is_in_sync(committed, git, tmp_path, monkeypatch):
    git("clone", "--quiet", str(committed), str(tmp_path / "clone"))
    monkeypatch.chdir(tmp_path / "clone")
    chance = random.Random(0)
    for path in (
        path(name)
        for name in notebooks.ORDER
        for path in (notebooks.notebook_path, notebooks.module_path)
    ):
        os.utime(path, (chance.randrange(2**31), chance.randrange(2**31)))
    assert notebooks.out_of_sync() == []
    edit_module("model", OLD, NEW)
    os.utime(notebooks.module_path("model"), (0, 0))  # the edit is the older file
    assert notebooks.edited_half("model") == "module"


def no_git(git):
    """Nothing to compare with."""


def no_commit(git):
    git("init", "--quiet")


def only_modules_committed(git):
    git("init", "--quiet")
    git("add", "src")
    assert git("commit", "--quiet", "--message=first").returncode == 0


def committed_out_of_sync(git):
    edit_notebook("model", OLD, OTHER)
    git("init", "--quiet")
    git("add", ".")
    assert git("commit", "--quiet", "--message=first").returncode == 0


@pytest.mark.parametrize(
    "prepare", [no_git, no_commit, only_modules_committed, committed_out_of_sync]
)
def test_without_a_commit_to_compare_with_nothing_is_written(project, git, prepare):
    prepare(git)
    edit_module("model", OLD, NEW)
    with pytest.raises(
        UserError, match=r"or there is no commit[\s\S]*make sync FROM=notebook PAIR=model"
    ):
        notebooks.sync_edited()
    assert notebooks.out_of_sync() == ["model"]


def test_a_missing_half_is_told_and_never_takes_the_other_with_it(committed):
    notebooks.module_path("model").unlink()
    with pytest.raises(
        UserError,
        match=r"src/trainer/model\.py is missing. Run make sync FROM=notebook PAIR=model",
    ):
        notebooks.sync_edited()
    assert notebooks.sync("notebook", ["model"]) == ["model"]
    assert notebooks.out_of_sync() == []


def test_an_unknown_pair_is_told(project, monkeypatch):
    monkeypatch.setattr("sys.argv", ["notebooks", "sync", "--from", "module", "modle"])
    with pytest.raises(UserError, match="unknown pair 'modle'; expected one of data, model"):
        notebooks.main()


@pytest.fixture
def quick(project, monkeypatch):
    """A project on the smallest sample, with short training."""
    monkeypatch.setenv(
        "SET",
        "data.source=sample:wine data.label=cultivar hyperparameters.epochs=15 hyperparameters.batch_size=16",
    )
    return project


def test_level0_leaves_reports_with_pictures_and_a_model(quick, capsys):
    level_0.main()
    run = runs.find()
    assert {path.name for path in run.folder.iterdir()} == {
        *(f"{name}.html" for name in notebooks.ORDER),
        *("settings.json", "train.parquet", "test.parquet", "evaluation.json", "model"),
    }
    pictures = {
        name: (run.folder / f"{name}.html").read_text().count("<img") for name in notebooks.ORDER
    }
    assert pictures["data"] >= 2
    assert pictures["model"] >= 1
    assert pictures["train"] == 1
    assert pictures["evaluate"] >= 2
    for name in notebooks.ORDER:
        report = (run.folder / f"{name}.html").read_text()
        assert not re.search(r"<script|<link|src=[\"']?http|@import", report)  # it needs no network
        assert "Traceback" not in report
    metrics = json.loads(run.evaluation.read_text())
    assert metrics["accuracy"] > metrics["baseline"]
    assert json.loads(run.settings.read_text())["hyperparameters"]["epochs"] == 15
    out = capsys.readouterr().out
    assert f"runs/{run.name}/evaluate.html" in out
    assert "make predict" in out
    assert run.name in runs.table("accuracy")


def test_a_wrong_column_is_told_before_anything_runs(quick, monkeypatch):
    monkeypatch.setenv("SET", "data.source=sample:wine data.label=vintage")
    with pytest.raises(UserError, match="no label column 'vintage'"):
        level_0.main()
    assert not (quick / "runs").exists()


def test_a_failing_notebook_is_told_with_its_report(quick, monkeypatch):
    (quick / "one_class.csv").write_text("x,y\n1,a\n2,a\n")
    monkeypatch.setenv("SET", "data.source=one_class.csv data.label=y")
    with pytest.raises(UserError, match=r"every row says 'a'[\s\S]*data\.ipynb; the report"):
        level_0.main()
    (report,) = (quick / "runs").glob("*/data.html")
    assert "every row says" in report.read_text()
    with pytest.raises(UserError, match="no trained model yet"):
        runs.find()


def test_a_notebook_run_too_early_names_the_one_before(quick):
    run = runs.current()
    with pytest.raises(UserError, match=r"Run data\.ipynb first"):
        run.require(run.train_data, "data")


def test_runs_are_listed_best_first(project):
    for name, accuracy in (("a", 0.8), ("b", 0.95), ("c", None)):
        folder = project / "runs" / name
        folder.mkdir(parents=True)
        (folder / "settings.json").write_text(
            '{"data": {"source": "x.csv"}, "train": {"epochs": 7}}'
        )
        if accuracy:
            (folder / "evaluation.json").write_text(
                json.dumps({"accuracy": accuracy, "macro_f1": 0.5, "log_loss": 1, "rows": 10})
            )
    lines = runs.table("accuracy").splitlines()
    assert [line.split()[0] for line in lines] == ["run", "b", "a", "c"]
    assert "0.9500" in lines[1]
    assert "not finished" in lines[3]
    assert lines[1].endswith("notebooks")


def test_without_runs_the_way_is_shown(project):
    with pytest.raises(UserError, match="make level0"):
        runs.table("accuracy")
