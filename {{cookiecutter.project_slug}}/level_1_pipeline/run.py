"""make level1: compiles the pipeline, runs it, and tells its story step by step.

python -m level_1_pipeline.run        RUNNER=local: each step is a process here; RUNNER=docker: a container; RUNNER=vertex: see
                                  level_1_pipeline.vertex.run
"""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from core.errors import UserError, run_command
from core.manifest import write_json
from core.registry import LocalRegistry
from core.run_record import Step, Story, begin, show, summary
from level_0_manual import notebooks
from level_1_pipeline import compile as pipeline_compiler
from level_1_pipeline import containers, kfp_docker, parameters
from level_1_pipeline.vertex import rows
from project import git, runs
from project.runs import Run
from project.settings import Settings, load_settings

COLOUR = re.compile(r"\x1b\[\d+m")
STARTED = re.compile(r"INFO - Executing task '([^']+)'")
FINISHED = re.compile(r"- Task '([^']+)' finished with status (\w+)")
LAST_LINES = 12


def arguments(settings: Settings, run: Run, registry: Path) -> dict[str, Any]:
    """The pipeline's parameters, from project.yaml.

    Raises:
        UserError: there is no such file, or no such column.
    """
    return {
        **parameters.from_settings(settings, str(rows.find(settings)), str(registry)),
        "run": run.name,
    }


RUNNERS = {"local": "in this environment", "docker": "in containers", "vertex": "in the cloud"}


def choose_runner() -> str:
    """Where the steps run, from the RUNNER variable.

    Raises:
        UserError: there is no such runner, or it has no DRY_RUN.
    """
    settings = os.environ.get("RUNNER") or "local"
    if settings not in RUNNERS:
        raise UserError(
            f"RUNNER={settings}: there are {', '.join(RUNNERS)}; for example make level1 RUNNER=docker"
        )
    if os.environ.get("DRY_RUN") and settings != "vertex":
        raise UserError(
            f"DRY_RUN=1 shows what would be sent to the cloud, and RUNNER={settings} sends nothing: add RUNNER=vertex."
        )
    return settings


def run_steps(
    run: Run,
    compiled: Path,
    values: dict[str, Any],
    story: Story,
    docker: dict[str, Any] | None = None,
) -> None:
    """Run the compiled pipeline, and follow its steps.

    Raises:
        UserError: a step failed; names it and shows its last lines.
    """
    write_json(run.folder / "arguments.json", values)
    root = run.folder / "steps"
    command = [
        sys.executable,
        "-m",
        "level_1_pipeline.kfp_local",
        str(compiled),
        str(run.folder / "arguments.json"),
        str(root),
    ]
    environment = {"CODE_VERSION": git.version(), **os.environ}
    if docker is not None:
        command.append(json.dumps(docker))
        # kfp's client looks at this variable alone, where the command line also knows contexts.
        environment["DOCKER_HOST"] = containers.engine()
    try:
        with subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            env=environment,
        ) as process:
            output = process.stdout
            last = follow(iter(output) if output else iter(()), run.folder / "pipeline.log", story)
    finally:
        if docker is not None:
            kfp_docker.remove(run.name)
    if process.returncode != 0:
        failed = story.steps[-1] if story.steps else Step("start")
        failed.state = "failed"
        show(failed)
        raise UserError(
            f"step '{failed.name}' failed; the champion is what it was.\n{explain(last)}\n"
            f"The whole log: {run.folder / 'pipeline.log'}"
        )


def follow(lines: Iterator[str], log: Path, story: Story) -> list[str]:
    """Keep the log, note each step's state and time, show the steps; returns the last lines of the last step."""
    last: list[str] = []
    began = time.monotonic()
    with log.open("w", encoding="utf-8") as kept:
        for coloured in lines:
            line = COLOUR.sub("", coloured.rstrip())
            kept.write(line + "\n")
            if started := STARTED.search(line):
                story.steps.append(Step(started[1]))
                began, last = time.monotonic(), []
                show(story.steps[-1])
            elif (finished := FINISHED.search(line)) and story.steps:
                step = story.steps[-1]
                step.seconds = round(time.monotonic() - began, 1)
                step.state = "succeeded" if finished[2] == "SUCCESS" else "failed"
                if step.state == "succeeded":
                    show(step)
            elif line.strip() and (
                not story.steps or story.steps[-1].state == "running"
            ):  # afterwards kfp speaks
                last = [*last, line.strip()][-LAST_LINES:]
    return last


def explain(last: list[str]) -> str:
    """A user's mistake as its one message; anything else as the step's last lines."""
    for line in last:
        if "UserError: " in line:
            return line.split("UserError: ", 1)[1]
    return "Its last lines:\n" + "\n".join(f"    {line}" for line in last)


def output(run: Run, step: str, name: str) -> Path | None:
    """The file or folder that a step wrote for one of its outputs; None if it did not."""
    return next((run.folder / "steps").glob(f"*/{step}/{name}"), None)


def conclude(run: Run, story: Story) -> None:
    """Judge the run by what its steps wrote, not by what kfp says of it; put the results where `make runs` looks.

    Raises:
        UserError: something that must be there is not.
    """
    for step, name, place in (
        ("preprocess", "train_data", run.train_data),
        ("preprocess", "test_data", run.test_data),
        ("train", "model", run.model),
    ):
        written = output(run, step, name)
        if written is None:
            raise UserError(
                f"step '{step}' ended without its output '{name}'. The whole log: {run.folder / 'pipeline.log'}"
            )
        place.symlink_to(written.relative_to(run.folder))
    scores, decision = output(run, "evaluate", "scores"), output(run, "gate", "decision")
    if scores is None or decision is None:
        raise UserError(f"the gate made no decision. The whole log: {run.folder / 'pipeline.log'}")
    write_json(run.evaluation, runs.read_json(scores)["challenger"])
    story.gate = runs.read_json(decision)
    version = output(run, "register", "version")
    story.registered = runs.read_json(version) if version else None
    if story.gate["passed"] and not story.registered:
        raise UserError(
            f"the gate passed, but nothing was registered. The whole log: {run.folder / 'pipeline.log'}"
        )


def main() -> None:
    """Compile, run, tell."""
    runner = choose_runner()
    notebooks.require_in_step()
    settings = load_settings()
    if runner == "vertex":
        from level_1_pipeline.vertex import run as vertex_run

        vertex_run.run(settings, dry_run=bool(os.environ.get("DRY_RUN")))
        return
    registry = runs.registry_folder()
    run = runs.new()
    values = arguments(settings, run, registry)
    images = kfp_docker.build_images(settings) if runner == "docker" else {}
    run.start(settings)
    story = begin(run.name)
    try:
        compiled = run.folder / "pipeline.yaml"
        pipeline_compiler.compile_pipeline(
            pipeline_compiler.load_definition().make_pipeline(**images), compiled
        )
        print(
            f"Run {run.name}: the pipeline, compiled and checked, on {settings.data.source}, {RUNNERS[runner]}"
        )
        run_steps(
            run, compiled, values, story, kfp_docker.options(values, run.name) if images else None
        )
        conclude(run, story)
        story.state = "succeeded"
    except KeyboardInterrupt:
        story.state, story.problem = "interrupted", "it was stopped by hand"
        raise
    except BaseException as error:
        story.state, story.problem = "failed", str(error) or type(error).__name__
        raise
    finally:
        story.write(run.folder)
    champion = LocalRegistry(registry).champion_number()
    print(summary(story, champion, "make serve · make predict ROW=1 · " if champion else ""))


if __name__ == "__main__":
    run_command(main)
