"""Run the steps of a Cloud Build file on this machine: substitutions, waitFor, timeouts.

`run(read("cloudbuild.yaml", values), workspace, as_process(variables))` starts each step as soon as
the steps that it waits for have succeeded; when one fails, the others are killed.
"""

import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

Json = dict[str, Any]
Command = tuple[list[str], dict[str, str]]  # a command line and its environment
StepCommand = Callable[[Json, Json], Command]  # of a build and one of its steps

BUILT_IN = {"PROJECT_ID", "PROJECT_NUMBER", "BUILD_ID", "LOCATION", "COMMIT_SHA", "SHORT_SHA"}
BUILT_IN |= {"BRANCH_NAME", "REPO_NAME", "TAG_NAME"}
VARIABLE = re.compile(r"\$(?:\$|([A-Z_][A-Z0-9_]*)|\{([A-Z_][A-Z0-9_]*)\})")


class InvalidBuild(Exception):
    """Cloud Build would reject this build; the message gives the reason."""


def read(path: Path | str, values: Mapping[str, str]) -> Json:
    """Read a Cloud Build file and fill in its substitutions."""
    document: Json = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    return resolve(document, values)


def resolve(build: Json, values: Mapping[str, str]) -> Json:
    """Fill in a build's substitutions and check the order of its steps; may raise InvalidBuild."""
    values = {**build.get("substitutions", {}), **values}
    # Cloud Build substitutes nothing in these two fields.
    template = {key: build[key] for key in build if key not in {"substitutions", "source"}}
    names = variables(template)
    if missing := ", ".join(sorted(names - set(values))):
        problem = "is not matched in the substitution data"
        raise InvalidBuild(f"key in the template {missing!r} {problem}")
    # Built-in substitutions may be unused; user-defined ones (_NAME) must be used.
    extra = ", ".join(sorted(name for name in values if name[0] == "_" and name not in names))
    if extra and build.get("options", {}).get("substitutionOption") != "ALLOW_LOOSE":
        problem = "in the substitution data is not matched in the template"
        raise InvalidBuild(f"key {extra!r} {problem}")
    result: Json = fill(template, values)
    check_order(result.get("steps", []))
    return {**build, **result}


def variables(part: Any) -> set[str]:
    """Return the names of the substitutions in a part of a build."""
    if isinstance(part, dict):
        part = list(part.values())
    if isinstance(part, list):
        return set().union(*map(variables, part))
    matches = VARIABLE.findall(part) if isinstance(part, str) else []
    return {plain or braced for plain, braced in matches if plain or braced}


def fill(part: Any, values: Mapping[str, str]) -> Any:
    """Replace $NAME and ${NAME} in a part of a build; $$ is a dollar."""
    if isinstance(part, dict):
        return {key: fill(value, values) for key, value in part.items()}
    if isinstance(part, list):
        return [fill(value, values) for value in part]
    if not isinstance(part, str):
        return part
    # VARIABLE matches $$ without a group, so it becomes a dollar.
    return VARIABLE.sub(lambda m: values[m[1] or m[2]] if m[1] or m[2] else "$", part)


def check_order(steps: Sequence[Json]) -> None:
    """Reject duplicate ids, and steps that do not wait for earlier ones."""
    if not steps:
        raise InvalidBuild("a build must have at least one step")
    ids: set[str] = set()
    # waitFor may name earlier steps only, so the steps cannot wait for each other in a cycle.
    for step in steps:
        if unknown := ", ".join(set(step.get("waitFor", [])) - ids - {"-"}):
            raise InvalidBuild(f"step {step.get('id')}: waitFor: {unknown} is no earlier step")
        if step.get("id") in ids:
            raise InvalidBuild(f"there are two steps {step['id']}")
        ids.add(step.get("id", ""))


def dependencies(steps: Sequence[Json]) -> list[set[int]]:
    """Return the indices of the steps that each step waits for."""
    # Without waitFor, a step waits for all steps before it; "-" waits for no step.
    index = {step.get("id", ""): number for number, step in enumerate(steps)}
    return [
        {index[name] for name in step["waitFor"] if name != "-"}
        if step.get("waitFor")
        else set(range(number))
        for number, step in enumerate(steps)
    ]


def critical_path(steps: Sequence[Json], seconds: Sequence[float]) -> float:
    """Return the duration of the steps in seconds if each starts as soon as it may."""
    # Steps wait for earlier ones only, so one pass in file order is enough.
    ends: list[float] = []
    for needs, own in zip(dependencies(steps), seconds, strict=True):
        ends.append(own + max((ends[number] for number in needs), default=0.0))
    return max(ends)


def seconds(duration: str | None) -> float:
    """Parse a duration such as "600s"; the default is a day."""
    return float((duration or "86400s").removesuffix("s"))


@dataclass
class Step:
    """A step's result: QUEUED, WORKING, SUCCESS, FAILURE, TIMEOUT or CANCELLED."""

    name: str
    status: str = "QUEUED"
    seconds: float = 0.0
    output: str = ""


@dataclass
class Outcome:
    """A build's result: SUCCESS, FAILURE, TIMEOUT, or KILLED from outside."""

    status: str
    steps: list[Step] = field(default_factory=list)
    document: Json = field(default_factory=dict)

    def step(self, name: str) -> Step:
        """Return a step by its id."""
        return next(step for step in self.steps if step.name == name)

    def failures(self) -> str:
        """Return the output of the steps that did not succeed."""
        failed = [step for step in self.steps if step.status not in {"SUCCESS", "QUEUED"}]
        return "\n".join(f"── {step.name}: {step.status}\n{step.output}" for step in failed)

    @property
    def critical(self) -> float:
        """Return the seconds of the critical path."""
        return critical_path(self.document["steps"], [step.seconds for step in self.steps])


def as_process(
    machine: Mapping[str, str], instead: Mapping[str, list[str]] | None = None
) -> StepCommand:
    """Run steps as local processes, with local programs instead of those of the toolbox image.

    Args:
        machine: environment variables that override the build's.
        instead: commands that replace steps, by id.
    """

    def command(build: Json, step: Json) -> Command:
        default = [step.get("entrypoint", ""), *step.get("args", [])]
        words = (instead or {}).get(step.get("id", ""), default)
        # This machine's variables come last: they lead the steps to the fakes.
        return words, {**os.environ, **environment(build, step), **machine}

    return command


def as_container(machine: Mapping[str, str], workspace: Path) -> StepCommand:
    """Run steps in containers, as Cloud Build does, with this machine's Docker inside."""

    def command(build: Json, step: Json) -> Command:
        # The fakes listen on loopback, so containers share the host's network.
        words = ["docker", "run", "--rm", "--init", "--network=host", "--workdir=/workspace"]
        words += [f"--volume={workspace}:/workspace"]
        words += ["--volume=/var/run/docker.sock:/var/run/docker.sock"]
        variables = {**environment(build, step), **machine}
        words += [f"--env={name}={value}" for name, value in variables.items()]
        words += [f"--entrypoint={step['entrypoint']}"] if step.get("entrypoint") else []
        return [*words, step["name"], *step.get("args", [])], dict(os.environ)

    return command


def environment(build: Json, step: Json) -> dict[str, str]:
    """Return the variables that a build sets for a step."""
    lines = [*build.get("options", {}).get("env", []), *step.get("env", [])]
    return dict(line.split("=", 1) for line in lines)


def run(
    build: Json, workspace: Path, command: StepCommand, kill_after: int | None = None
) -> Outcome:
    """Run the steps of a build whose substitutions are filled in.

    After `kill_after` successful steps all processes are killed, as if the machine had failed.
    """
    return _Run(build, workspace, command, kill_after).run()


class _Run:
    def __init__(
        self, build: Json, workspace: Path, command: StepCommand, kill_after: int | None
    ) -> None:
        self.build, self.workspace, self.command = build, workspace, command
        self.kill_after = kill_after
        self.steps = [Step(step.get("id") or f"step {n}") for n, step in enumerate(build["steps"])]
        self.dependencies = dependencies(build["steps"])
        self.changed = threading.Condition()
        self.processes: dict[int, subprocess.Popen[str]] = {}
        self.status = "KILLED" if kill_after == 0 else ""

    def run(self) -> Outcome:
        threads: list[threading.Thread] = []
        deadline = time.monotonic() + seconds(self.build.get("timeout"))
        # One condition guards all state; threads release it while their processes run.
        with self.changed:
            while not self.status and any(
                step.status in {"QUEUED", "WORKING"} for step in self.steps
            ):
                for number, step in enumerate(self.steps):
                    if step.status == "QUEUED" and self._is_ready(number):
                        step.status = "WORKING"
                        threads.append(threading.Thread(target=self._step, args=(number,)))
                        threads[-1].start()
                # Each step that ends wakes up this loop; no wake-up means the build timed out.
                if not self.changed.wait(timeout=max(0.0, deadline - time.monotonic())):
                    self._end("TIMEOUT")
        # Outside the lock, which the threads need to store their results.
        for thread in threads:
            thread.join()
        return Outcome(self.status or "SUCCESS", self.steps, self.build)

    def _is_ready(self, number: int) -> bool:
        def allows_next(other: int) -> bool:
            status = self.steps[other].status
            may_fail = self.build["steps"][other].get("allowFailure", False)
            return status == "SUCCESS" or (may_fail and status in {"FAILURE", "TIMEOUT"})

        return all(map(allows_next, self.dependencies[number]))

    def _step(self, number: int) -> None:
        step, spec, start = self.steps[number], self.build["steps"][number], time.monotonic()
        words, variables = self.command(self.build, spec)
        with self.changed:
            # The build may have ended between the thread's start and this line.
            if self.status:
                step.status = "CANCELLED"
                return
            process = self.processes[number] = self._start(words, variables)
        status = ""
        try:
            step.output = process.communicate(timeout=seconds(spec.get("timeout")))[0]
        except subprocess.TimeoutExpired:
            status = "TIMEOUT"
            kill(process)
            step.output = process.communicate()[0]  # the output until the timeout
        with self.changed:
            del self.processes[number]
            step.seconds = time.monotonic() - start
            # A process that was killed because the build ended did not fail by itself.
            failed = "CANCELLED" if self.status else "FAILURE"
            step.status = status or ("SUCCESS" if process.returncode == 0 else failed)
            self._after(step, spec)

    def _start(self, words: list[str], variables: dict[str, str]) -> subprocess.Popen[str]:
        return subprocess.Popen(
            words,
            cwd=self.workspace,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # its own process group, so that kill() reaches children too
        )

    def _after(self, step: Step, spec: Json) -> None:
        """End the build if a step's result requires it; the caller holds the lock."""
        successes = sum(other.status == "SUCCESS" for other in self.steps)
        if step.status in {"FAILURE", "TIMEOUT"} and not spec.get("allowFailure"):
            self._end(step.status)
        elif self.kill_after is not None and successes >= self.kill_after:
            self._end("KILLED")
        self.changed.notify_all()

    def _end(self, status: str) -> None:
        self.status = self.status or status  # the first reason counts
        for process in self.processes.values():
            kill(process)
        self.changed.notify_all()


def kill(process: subprocess.Popen[str]) -> None:
    """Kill a process and its children."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
