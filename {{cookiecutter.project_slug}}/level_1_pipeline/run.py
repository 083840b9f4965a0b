"""Compile the pipeline, run it and report each step: make level1.

RUNNER=local    each step is a process in this environment
RUNNER=docker   each step is a container
RUNNER=vertex   the pipeline runs on Vertex AI, see level_1_pipeline.vertex.run
"""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from core.errors import UserError, run_command
from core.manifest import write_json
from core.paths import project_root
from core.registry import LocalRegistry
from core.run_record import Step, Story, begin, show, summary
from level_0_manual import notebooks
from level_1_pipeline import compile as pipeline_compiler
from level_1_pipeline import containers, parameters
from level_1_pipeline.vertex.train import source_csv
from project import git, runs
from project.runs import Run
from project.settings import load_settings

RUNNERS = {"local": "in this environment", "docker": "in containers", "vertex": "in the cloud"}
# kfp's local runner reports steps only in its log: these patterns parse it.
COLOUR = re.compile(r"\x1b\[\d+m")
STARTED = re.compile(r"INFO - Executing task '([^']+)'")
FINISHED = re.compile(r"- Task '([^']+)' finished with status (\w+)")
LAST_LINES = 12
CHILD = "--execute"  # option for the child process that runs kfp


def choose_runner() -> str:
    """Return the runner named by the RUNNER variable."""
    runner = os.environ.get("RUNNER") or "local"
    if runner not in RUNNERS:
        raise UserError(
            f"RUNNER={runner}: expected {', '.join(RUNNERS)}; for example make level1 RUNNER=docker"
        )
    if os.environ.get("DRY_RUN") and runner != "vertex":
        raise UserError(
            "DRY_RUN=1 prints what would be sent to the cloud, and "
            f"RUNNER={runner} sends nothing: add RUNNER=vertex."
        )
    return runner


def docker_options(values: dict[str, Any], run: str) -> dict[str, Any]:
    """Return options for the step containers: this user, no network, no privileges, read-only root.

    Mounts are the CSV file and the registry; kfp adds the run's folder.
    """
    Path(values["registry"]).mkdir(parents=True, exist_ok=True)
    # A rootless daemon maps this user to root inside the container.
    rootless = not hasattr(os, "getuid") or "rootless" in containers.docker(
        "info", "--format", "{{.SecurityOptions}}"
    )
    return {
        "mounts": {values["csv"]: True, values["registry"]: False},  # path → read only
        "environment": {"CODE_VERSION": git.version()},
        "user": "0:0" if rootless else f"{os.getuid()}:{os.getgid()}",
        "labels": {"run": run},
        "init": True,  # so that SIGTERM always ends the container
        "read_only": True,
        "tmpfs": {"/tmp": ""},  # noqa: S108 (inside the container)
        "network_mode": "none",
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges"],
        "gpus": containers.torch_build() != "cpu",
    }


def execute(pipeline: str, arguments: str, root: str, docker: str = "") -> None:
    """Run a compiled pipeline with kfp; `docker` is the JSON of `docker_options`."""
    from kfp import components, local

    runner: Any = local.SubprocessRunner(use_venv=False)
    if docker:
        from docker.types import DeviceRequest, Mount

        options = json.loads(docker)
        mounts = [
            Mount(path, path, type="bind", read_only=read_only)
            for path, read_only in options.pop("mounts").items()
        ]
        gpus = [DeviceRequest(count=-1, capabilities=[["gpu"]])] if options.pop("gpus") else []
        runner = local.DockerRunner(mounts=mounts, device_requests=gpus, **options)
    local.init(runner, pipeline_root=root, raise_on_error=True)
    values = json.loads(Path(arguments).read_text(encoding="utf-8"))
    components.load_component_from_file(pipeline)(**values)


def run_steps(
    run: Run, compiled: Path, values: dict[str, Any], story: Story, docker: bool = False
) -> None:
    """Run the compiled pipeline in a child process and report its steps."""
    arguments, log = run.folder / "arguments.json", run.folder / "pipeline.log"
    write_json(arguments, values)
    command = [sys.executable, "-m", "level_1_pipeline.run", CHILD]
    command += [str(compiled), str(arguments), str(run.folder / "steps")]
    environment = {"CODE_VERSION": git.version(), **os.environ}
    if docker:
        command.append(json.dumps(docker_options(values, run.name)))
        # kfp's Docker client reads only this variable; the docker command also knows contexts.
        environment["DOCKER_HOST"] = containers.engine()
    pipe: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    try:
        with subprocess.Popen(command, **pipe, encoding="utf-8", env=environment) as process:
            last = follow(process.stdout or (), log, story)
    finally:
        if docker:  # a container outlives the process that started it, e.g. after Ctrl-C
            with suppress(UserError):  # without a daemon there are no containers
                left = containers.docker("ps", "--quiet", "--filter", f"label=run={run.name}")
                if left:
                    containers.docker("rm", "--force", *left.split())
    if process.returncode != 0:
        step = story.steps[-1] if story.steps else Step("start")
        step.state = "failed"
        show(step)
        raise UserError(
            f"step '{step.name}' failed; the champion is unchanged.\n{explain(last)}\n"
            f"The whole log: {log}"
        )


def follow(lines: Iterable[str], log: Path, story: Story) -> list[str]:
    """Write the log and record each step; return the last lines of the last step."""
    last: list[str] = []
    start = time.monotonic()
    with log.open("w", encoding="utf-8") as stream:
        for coloured in lines:
            line = COLOUR.sub("", coloured.rstrip())
            stream.write(line + "\n")
            if started := STARTED.search(line):
                story.steps.append(Step(started[1]))
                start, last = time.monotonic(), []
                show(story.steps[-1])
            elif (finished := FINISHED.search(line)) and story.steps:
                step = story.steps[-1]
                step.seconds = round(time.monotonic() - start, 1)
                step.state = "succeeded" if finished[2] == "SUCCESS" else "failed"
                if step.state == "succeeded":
                    show(step)
            # Lines after a finished step are kfp's own output, not the step's.
            elif line.strip() and (not story.steps or story.steps[-1].state == "running"):
                last = [*last, line.strip()][-LAST_LINES:]
    return last


def explain(last: list[str]) -> str:
    """Return the message of the step's UserError, or else its last lines."""
    for line in last:
        if "UserError: " in line:
            return line.split("UserError: ", 1)[1]
    return "Its last lines:\n" + "\n".join(f"    {line}" for line in last)


def output(run: Run, step: str, name: str) -> Path | None:
    """Return the file or folder of a step's output, or None."""
    return next((run.folder / "steps").glob(f"*/{step}/{name}"), None)


def conclude(run: Run, story: Story) -> None:
    """Check the steps' outputs and store the results where `make runs` reads them."""
    log = f"The whole log: {run.folder / 'pipeline.log'}"
    for step, name, link in (
        ("preprocess", "train_data", run.train_data),
        ("preprocess", "test_data", run.test_data),
        ("train", "model", run.model),
    ):
        target = output(run, step, name)
        if target is None:
            raise UserError(f"step '{step}' ended without its output '{name}'. {log}")
        link.symlink_to(target.relative_to(run.folder))
    scores, decision = output(run, "evaluate", "scores"), output(run, "gate", "decision")
    if scores is None or decision is None:
        raise UserError(f"the gate made no decision. {log}")
    write_json(run.evaluation, runs.read_json(scores)["challenger"])
    story.gate = runs.read_json(decision)
    version = output(run, "register", "version")
    story.registered = runs.read_json(version) if version else None
    if story.gate["passed"] and not story.registered:
        raise UserError(f"the gate passed, but nothing was registered. {log}")


def main() -> None:
    """Compile the pipeline, run it and print a summary."""
    runner = choose_runner()
    notebooks.require_in_sync()
    settings = load_settings()
    if runner == "vertex":
        from level_1_pipeline.vertex import run as vertex_run

        vertex_run.run(settings, dry_run=bool(os.environ.get("DRY_RUN")))
        return
    registry = runs.registry_folder()
    run = runs.new()
    csv = str(source_csv(settings))
    values = {**parameters.from_settings(settings, csv, str(registry)), "run": run.name}
    images: dict[str, str] = {}
    if runner == "docker":
        steps = containers.find(project_root(), ["train", "deploy"])
        made = containers.make_all(steps, settings)
        images = {f"{name}_image": image for name, image in made.items()}
    run.start(settings)
    story = begin(run.name)
    try:
        compiled = run.folder / "pipeline.yaml"
        pipeline = pipeline_compiler.load_definition().make_pipeline(**images)
        pipeline_compiler.compile_pipeline(pipeline, compiled)
        print(f"Run {run.name}: on {settings.data.source}, {RUNNERS[runner]}", flush=True)
        run_steps(run, compiled, values, story, docker=runner == "docker")
        conclude(run, story)
        story.state = "succeeded"
    except KeyboardInterrupt:
        story.state, story.problem = "interrupted", "stopped with Ctrl-C"
        raise
    except BaseException as error:
        story.state, story.problem = "failed", str(error) or type(error).__name__
        raise
    finally:
        story.write(run.folder)
    champion = LocalRegistry(registry).champion_number()
    print(summary(story, champion, "make serve · make predict ROW=1 · " if champion else ""))


if __name__ == "__main__":
    if sys.argv[1:2] == [CHILD]:
        execute(*sys.argv[2:])
    else:
        run_command(main)
