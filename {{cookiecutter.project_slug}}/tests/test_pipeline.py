"""Level 1: the pipeline, compiled, checked and run for real. What counts is what was registered, not what kfp says."""

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import yaml
from kfp import dsl

from core.errors import UserError
from core.registry import LocalRegistry
from level_0_manual import notebooks
from level_1_pipeline import compile as pipeline_compiler
from level_1_pipeline import parameters, status
from level_1_pipeline import run as pipeline_runner
from project import runs
from tests.conftest import ROOT
from trainer.data import read_rows


@pytest.fixture
def pipeline_project(project, trained, monkeypatch) -> Path:
    """A project whose data are the mixed rows of the trained model."""
    shutil.copytree(
        ROOT / "level_1_pipeline",
        project / "level_1_pipeline",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    shutil.copy(trained / "animals.csv", project / "animals.csv")
    document = yaml.safe_load((project / "project.yaml").read_text())
    document["data"].update(source="animals.csv", label="animal", ignore=["id"])
    document["hyperparameters"].update(threads=1, epochs=12, batch_size=16, learning_rate=0.01)
    document["gate"].update(threshold=0.8)
    (project / "project.yaml").write_text(yaml.safe_dump(document))
    return project


@pytest.fixture
def registry(pipeline_project) -> LocalRegistry:
    """Its registry."""
    return LocalRegistry(runs.registry_folder())


def newest_story() -> dict:
    run = [run for run in runs.all_runs() if (run.folder / "story.json").exists()][-1]
    return runs.read_json(run.folder / "story.json")


def test_a_run_registers_what_the_trainer_makes(registry, trained, capsys):
    pipeline_runner.main()
    champion = registry.champion()
    assert champion.number == 1
    assert champion.run == newest_story()["run"]
    weights = "model.safetensors"
    assert (champion.model / weights).read_bytes() == (
        trained / "model" / weights
    ).read_bytes()  # a level adds, it never copies
    told = newest_story()
    assert told["state"] == "succeeded"
    assert [step["name"] for step in told["steps"]] == [
        "preprocess",
        "train",
        "evaluate",
        "gate",
        "register",
    ]
    assert {step["state"] for step in told["steps"]} == {"succeeded"}
    assert told["gate"]["passed"] is True
    assert "no champion yet" in told["gate"]["reason"]
    out = capsys.readouterr().out
    assert "Gate: open" in out
    assert "Registered: version 1; it is the champion" in out
    run = runs.find(champion.run)  # `make runs` and `make predict` see the run as any other
    assert json.loads(run.evaluation.read_text())["accuracy"] == champion.metrics["accuracy"]
    text = status.story(run, registry)
    assert [line.split()[0] for line in text.splitlines()] == [
        "event",
        "run",
        *["step"] * 5,
        "gate",
        "version",
        "champion",
    ]
    assert "this run's" in text
    assert runs.table("accuracy").splitlines()[1].endswith("pipeline, the champion")


def test_a_worse_model_a_tie_and_a_damaged_champion(registry, capsys, monkeypatch):
    pipeline_runner.main()
    monkeypatch.setenv(
        "SET", "hyperparameters.epochs=1 hyperparameters.learning_rate=0.0001 gate.threshold=0.1"
    )
    pipeline_runner.main()  # above the threshold, and worse than the champion
    assert [version.number for version in registry.versions()] == [1]
    assert registry.champion().number == 1
    assert newest_story()["state"] == "succeeded"
    assert newest_story()["registered"] is None
    assert "but champion 1 has" in newest_story()["gate"]["reason"]
    assert "The champion stays version 1" in capsys.readouterr().out
    champion, rejected = runs.table("accuracy").splitlines()[1:]
    assert champion.endswith("pipeline, the champion")
    assert rejected.endswith("pipeline")
    assert (
        runs.find().name == registry.champion().run
    )  # `make predict` does not ask a model that was turned down
    monkeypatch.setenv("SET", "")
    pipeline_runner.main()  # the same model once more: not worse
    assert registry.champion().number == 2
    assert (
        sum(line.endswith("pipeline, version 1") for line in runs.table("accuracy").splitlines())
        == 1
    )
    (registry.champion().model / "model.safetensors").write_bytes(b"x")
    pipeline_runner.main()
    assert registry.champion().number == 3
    assert "champion 2 cannot be compared" in newest_story()["gate"]["reason"]


def test_a_run_that_only_tests_runs_all_steps_and_leaves_the_champion(registry, monkeypatch):
    pipeline_runner.main()
    given = parameters.from_settings
    monkeypatch.setattr(
        parameters, "from_settings", lambda *those: {**given(*those), "register": False}
    )
    pipeline_runner.main()
    assert [version.number for version in registry.versions()] == [1]
    assert registry.champion().number == 1
    told = newest_story()
    assert [step["name"] for step in told["steps"]] == ["preprocess", "train", "evaluate", "gate"]
    assert told["gate"]["passed"] is False
    assert told["gate"]["reason"].startswith(
        "this run only tests, and registers nothing; otherwise: accuracy"
    )


def test_a_wrong_column_is_told_before_anything_runs(registry, monkeypatch):
    monkeypatch.setenv("SET", "data.label=plant")
    with pytest.raises(UserError, match="no label column 'plant'"):
        pipeline_runner.main()
    assert runs.all_runs() == []


@pytest.mark.parametrize(
    "edit",
    [("hidden // 2", "hidden // 4"), ("nn.ReLU()", "nn.Sigmoid()")],
    ids=["shape", "meaning"],
)
def test_the_champion_is_scored_as_it_is_served_whatever_became_of_the_model(
    pipeline_project, registry, edit
):
    pipeline_runner.main()
    served = registry.champion().metrics["accuracy"]
    model = pipeline_project / "src" / "trainer" / "model.py"
    assert edit[0] in model.read_text()
    model.write_text(model.read_text().replace(*edit))
    notebooks.sync("module")
    environment = {**os.environ, "PYTHONPATH": str(pipeline_project / "src")}
    done = subprocess.run(
        [sys.executable, "-m", "level_1_pipeline.run"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "champion_problem" not in newest_story()
    scores = pipeline_runner.output(
        runs.Run(runs.runs_folder() / newest_story()["run"]), "evaluate", "scores"
    )
    assert runs.read_json(scores)["champion"]["accuracy"] == served


def test_a_users_mistake_in_a_step_is_told_in_one_message(pipeline_project, registry, monkeypatch):
    with (pipeline_project / "animals.csv").open("a", newline="") as stream:
        stream.write("n301,1.5,tall,red,cat\r\n")
    with pytest.raises(
        UserError,
        match=r"step 'preprocess' failed.*\nrow 301, column 'height': 'tall' is not a finite number",
    ):
        pipeline_runner.main()
    assert registry.versions() == []
    told = newest_story()
    assert (told["state"], told["steps"][-1]["name"], told["steps"][-1]["state"]) == (
        "failed",
        "preprocess",
        "failed",
    )
    assert "column 'height'" in told["problem"]


def test_a_step_that_breaks_is_named_with_its_last_lines(pipeline_project, registry):
    trainer = pipeline_project / "src" / "trainer" / "train.py"
    trainer.write_text(
        trainer.read_text() + "\n\ndef train(*_):\n    raise RuntimeError('the fan stopped')\n"
    )
    notebooks.sync("module")
    environment = {**os.environ, "PYTHONPATH": str(pipeline_project / "src")}
    done = subprocess.run(
        [sys.executable, "-m", "level_1_pipeline.run"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "error: step 'train' failed" in done.stderr
    assert "RuntimeError: the fan stopped" in done.stderr
    assert "pipeline.log" in done.stderr
    assert "✓ preprocess" in done.stdout
    assert "✗ train" in done.stdout
    assert registry.versions() == []
    assert newest_story()["state"] == "failed"


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        (
            "level_1_pipeline.run",
            ["torch", "rfc3987_syntax.syntax_helpers"],
        ),  # a second and more each
        ("trainer.evaluate", ["torch", "kfp"]),
        ("core.registry", ["torch", "kfp", "numpy"]),
    ],
)
def test_a_process_imports_no_more_than_it_needs(module, absent):
    command = f"import sys, {module}; print(*sys.modules, sep=chr(10))"
    imported = subprocess.run(
        [sys.executable, "-c", command], capture_output=True, text=True, check=True
    ).stdout.split()
    assert module in imported
    assert not set(absent) & set(imported)


def test_two_runs_at_once_leave_one_champion(registry):
    command = [sys.executable, "-m", "level_1_pipeline.run"]
    both = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for _ in range(2)
    ]
    outs = [process.communicate(timeout=240)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outs
    assert [version.number for version in registry.versions()] == [1, 2]
    changes = registry.history()
    assert [change["replaces"] for change in changes] == [
        None,
        *(change["version"] for change in changes[:-1]),
    ]
    assert registry.champion().number == changes[-1]["version"]
    assert len({version.run for version in registry.versions()}) == 2


def test_success_without_outputs_is_no_success(pipeline_project, registry, monkeypatch):
    def nothing(run, *_, **options):
        (run.folder / "steps").mkdir()

    monkeypatch.setattr(pipeline_runner, "run_steps", nothing)
    with pytest.raises(UserError, match="step 'preprocess' ended without its output 'train_data'"):
        pipeline_runner.main()
    assert newest_story()["state"] == "failed"


@dsl.component(install_kfp_package=False, base_image="example:1")
def yes(named: dsl.OutputPath(str)) -> bool:
    """Has a named output and an unnamed one."""
    return True


@dsl.component(install_kfp_package=False, base_image="example:1")
def act() -> None:
    """Does nothing."""


def test_the_compiled_pipeline_is_what_it_should_be(pipeline_project, tmp_path):
    pipeline = pipeline_compiler.load_definition().make_pipeline(
        train_image="example:1", deploy_image="other:1"
    )
    spec = pipeline_compiler.compile_pipeline(pipeline, tmp_path / "p.yaml")
    executors = spec.deployment_spec["executors"]
    images = {
        name.removeprefix("exec-"): executors[name]["container"]["image"] for name in executors
    }
    assert images.pop("register") == "other:1"
    assert images == dict.fromkeys(("preprocess", "train", "evaluate", "gate"), "example:1")
    assert "pip install" not in (tmp_path / "p.yaml").read_text()
    assert set(spec.root.dag.tasks) == {"preprocess", "train", "evaluate", "gate", "condition-1"}
    conditional = spec.components[spec.root.dag.tasks["condition-1"].component_ref.name]
    assert set(conditional.dag.tasks) == {"register"}


def test_on_vertex_ai_only_the_train_step_differs(pipeline_project, tmp_path):
    definition = pipeline_compiler.load_definition()
    plain = pipeline_compiler.compile_pipeline(definition.make_pipeline(), tmp_path / "plain.yaml")
    vertex = pipeline_compiler.compile_pipeline(
        definition.make_pipeline(vertex_train_image="other:1"), tmp_path / "vertex.yaml"
    )
    assert set(vertex.root.dag.tasks) == {*plain.root.dag.tasks, "vertex-train"} - {"train"}
    for step in ("preprocess", "evaluate", "gate", "register"):
        before, after = (s.deployment_spec["executors"][f"exec-{step}"] for s in (plain, vertex))
        assert before == after


def test_the_clouds_train_step_gets_the_jobs_and_the_runs_own_name(pipeline_project, tmp_path):
    images = {name: f"example.com/{name}@sha256:{'0' * 64}" for name in parameters.STEP_IMAGES}
    spec = pipeline_compiler.compile_for_cloud(images, tmp_path / "cloud.yaml")
    given = spec.root.dag.tasks["vertex-train"].inputs
    assert given.parameters["jobs"].component_input_parameter == "jobs"
    assert (
        given.parameters["pipeline_job"].runtime_value.constant.string_value
        == "{{$.pipeline_job_resource_name}}"
    )
    assert given.artifacts["train_data"].task_output_artifact.producer_task == "preprocess"
    assert (
        spec.root.dag.tasks["evaluate"].inputs.artifacts["model"].task_output_artifact.producer_task
        == "vertex-train"
    )


def test_a_condition_on_a_named_output_is_refused(tmp_path):
    @dsl.pipeline(name="wrong")
    def wrong() -> None:
        with dsl.If(yes().outputs["named"] == "x"):
            act()

    with pytest.raises(UserError, match="rests on the output 'named' of step 'yes'"):
        pipeline_compiler.compile_pipeline(wrong, tmp_path / "wrong.yaml")


def test_a_condition_on_the_unnamed_output_is_accepted(tmp_path):
    @dsl.pipeline(name="right")
    def right() -> None:
        with dsl.If(yes().outputs["Output"] == True):  # noqa: E712
            act()

    pipeline_compiler.compile_pipeline(right, tmp_path / "right.yaml")


def test_a_misspelt_field_and_a_platform_spec_are_refused(pipeline_project, tmp_path):
    path = tmp_path / "p.yaml"
    pipeline_compiler.compile_pipeline(pipeline_compiler.load_definition().make_pipeline(), path)
    good = path.read_text()
    path.write_text(good.replace("pipelineInfo:", "pipelineInformation:"))
    with pytest.raises(UserError, match="pipelineInformation"):
        pipeline_compiler.check(path)
    path.write_text(good + "\n---\nplatforms:\n  kubernetes: {}\n")
    with pytest.raises(UserError, match="platform spec for kubernetes"):
        pipeline_compiler.check(path)


def test_the_exercise_of_the_readme_works(pipeline_project, registry):
    text = (ROOT / "level_1_pipeline" / "README.md").read_text()
    step, use = (
        textwrap.dedent(block)
        for block in re.findall(r"    ```python\n(.*?)    ```", text, re.DOTALL)
    )
    path = pipeline_project / "level_1_pipeline" / "pipeline.py"
    source = path.read_text()
    source = source.replace("\n\ndef train(", f"\n\n{step}\n\ndef train(")
    source = source.replace(
        "        model = train_step(", textwrap.indent(use, " " * 8) + "        model = train_step("
    )
    path.write_text(source)
    pipeline_runner.main()
    assert "count-classes" in [step["name"] for step in newest_story()["steps"]]
    run = runs.find(registry.champion().run)
    counts = runs.read_json(pipeline_runner.output(run, "count-classes", "counts"))
    assert set(counts) == {"cat", "dog", "emu"}
    assert sum(counts.values()) == len(read_rows(run.train_data)["animal"])
