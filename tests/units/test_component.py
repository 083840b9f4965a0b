"""The pipeline's steps, as the processes that kfp starts."""

import json
import subprocess
import sys

import pytest
import yaml
from level_1_pipeline import compile as pipeline_compiler
from level_1_pipeline import component, parameters


def tell_process() -> int:
    """The process that the step's function runs in."""
    import os

    return os.getpid()


def test_the_process_that_is_started_is_the_one_that_is_told_to_stop(tmp_path):
    """In a container it is the first process, and SIGTERM goes to that one alone."""
    command = component.component(
        tell_process, "image"
    ).component_spec.implementation.container.command
    output = tmp_path / "outputs.json"
    told = {
        "inputs": {},
        "outputs": {"parameters": {"Output": {"outputFile": "unused"}}, "outputFile": str(output)},
    }
    words = [word.replace("python3", sys.executable) for word in command[:-1]] + [command[-1]]
    words += ["--executor_input", json.dumps(told), "--function_to_execute", "tell_process"]
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        said, _ = process.communicate()
    assert process.returncode == 0, said
    assert json.loads(output.read_text())["parameterValues"] == {"Output": process.pid}


def test_every_step_of_the_cloud_is_started_so(tmp_path):
    images = {name: f"example.com/{name}@sha256:{'0' * 64}" for name in parameters.STEP_IMAGES}
    pipeline_compiler.compile_for_cloud(images, tmp_path / "pipeline.yaml")
    executors = yaml.safe_load((tmp_path / "pipeline.yaml").read_text())["deploymentSpec"][
        "executors"
    ]
    assert len(executors) == 5
    for executor in executors.values():
        *_, shell, _ = executor["container"]["command"]
        assert "\nexec env _KFP_RUNTIME=true python3 -m kfp.dsl.executor_main " in shell


def test_another_kfp_that_starts_steps_in_another_way_is_noticed(monkeypatch):
    monkeypatch.setattr(component, "RUNS_PYTHON", "python2 ")
    with pytest.raises(RuntimeError, match="starts a step in another way"):
        component.component(tell_process, "image")
