"""Runs the steps of a Cloud Build file on this machine: substitutions, waitFor, variables, time-outs, and an end at any moment.

`run(read("level_2_cicd/cloudbuild.yaml", values), workspace, as_process(variables))` starts each step as soon as those that it
waits for have succeeded, as Cloud Build does; when one fails, the others are ended. A step is a process of this machine, or
a container, in the workspace.
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
Command = tuple[list[str], dict[str, str]]  # a command line, and its environment

BUILT_IN = (
    "PROJECT_ID",
    "PROJECT_NUMBER",
    "BUILD_ID",
    "LOCATION",
    "COMMIT_SHA",
    "SHORT_SHA",
    "BRANCH_NAME",
    "REPO_NAME",
    "TAG_NAME",
)
VARIABLE = re.compile(r"\$(?:\$|([A-Z_][A-Z0-9_]*)|\{([A-Z_][A-Z0-9_]*)\})")


class InvalidBuild(Exception):
    """What Cloud Build would refuse; says what."""


# ── a build as it is written ────────────────────────────────────────────────────────────────────────────────────────
def read(path: Path | str, values: Mapping[str, str]) -> Json:
    """A Cloud Build file with its substitutions filled in.

    Raises:
        InvalidBuild: a substitution is missing, or not needed; or the steps do not fit together.
    """
    document: Json = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    return resolve(document, values)


def resolve(build: Json, values: Mapping[str, str]) -> Json:
    """A build with its substitutions filled in, and its steps' ids and order checked.

    Raises:
        InvalidBuild: see `read`.
    """
    given = {**build.get("substitutions", {}), **values}
    unchanged = {"substitutions", "source"}
    used = variables({key: value for key, value in build.items() if key not in unchanged})
    own = {name for name in given if name.startswith("_")}
    loose = build.get("options", {}).get("substitutionOption") == "ALLOW_LOOSE"
    if missing := sorted(name for name in used if name not in given):
        raise InvalidBuild(f"key in the template {', '.join(missing)!r} is not matched in the substitution data")
    if (extra := sorted(own - used)) and not loose:
        raise InvalidBuild(f"key {', '.join(extra)!r} in the substitution data is not matched in the template")
    filled: Json = {key: value if key in unchanged else fill(value, given) for key, value in build.items()}
    check_order(filled.get("steps", []))
    return filled


def variables(part: Any) -> set[str]:
    """The names of the substitutions that a part of a build uses."""
    if isinstance(part, dict):
        return set().union(*map(variables, part.values()))
    if isinstance(part, list):
        return set().union(*map(variables, part))
    found = VARIABLE.findall(part) if isinstance(part, str) else []
    return {plain or braced for plain, braced in found if plain or braced}


def fill(part: Any, values: Mapping[str, str]) -> Any:
    """A part of a build with values in the place of $NAME and ${NAME}; $$ is a dollar."""
    if isinstance(part, dict):
        return {key: fill(value, values) for key, value in part.items()}
    if isinstance(part, list):
        return [fill(value, values) for value in part]
    if not isinstance(part, str):
        return part
    return VARIABLE.sub(lambda found: values[found[1] or found[2]] if found[1] or found[2] else "$", part)


def check_order(steps: Sequence[Json]) -> None:
    """Ids are unique, and each step waits for earlier ones.

    Raises:
        InvalidBuild: says which does not.
    """
    if not steps:
        raise InvalidBuild("a build must have at least one step")
    seen: set[str] = set()
    for step in steps:
        unknown = [name for name in step.get("waitFor", []) if name != "-" and name not in seen]
        if unknown:
            raise InvalidBuild(f"step {step.get('id')}: waitFor names {', '.join(unknown)}, which is no earlier step")
        if step.get("id") in seen:
            raise InvalidBuild(f"there are two steps {step['id']}")
        seen.add(step.get("id", ""))


def waits(steps: Sequence[Json]) -> list[set[int]]:
    """For each step, those that it waits for: with no waitFor, all before it."""
    places = {step.get("id", ""): place for place, step in enumerate(steps)}
    return [
        {places[name] for name in step["waitFor"] if name != "-"} if step.get("waitFor") else set(range(place))
        for place, step in enumerate(steps)
    ]


def critical_path(steps: Sequence[Json], seconds: Sequence[float]) -> float:
    """How long the steps take at least, when nothing is waited for but other steps."""
    ends: list[float] = []
    for needed, own in zip(waits(steps), seconds, strict=True):
        ends.append(own + max((ends[place] for place in needed), default=0.0))
    return max(ends)


# ── running ─────────────────────────────────────────────────────────────────────────────────────────────────────────
@dataclass
class Step:
    """What became of a step: QUEUED, WORKING, SUCCESS, FAILURE, TIMEOUT or CANCELLED."""

    name: str
    status: str = "QUEUED"
    seconds: float = 0.0
    output: str = ""


@dataclass
class Outcome:
    """What became of a build: SUCCESS, FAILURE, TIMEOUT, or KILLED where it was ended from outside."""

    status: str
    steps: list[Step] = field(default_factory=list)
    document: Json = field(default_factory=dict)

    def step(self, name: str) -> Step:
        """A step by its id."""
        return next(step for step in self.steps if step.name == name)

    def failures(self) -> str:
        """What the steps wrote that did not succeed, for a test's message."""
        return "\n".join(
            f"── {step.name}: {step.status}\n{step.output}" for step in self.steps if step.status not in {"SUCCESS", "QUEUED"}
        )

    @property
    def critical(self) -> float:
        """The critical path's seconds."""
        return critical_path(self.document["steps"], [step.seconds for step in self.steps])


def as_process(machine: Mapping[str, str], instead: Mapping[str, list[str]] | None = None) -> Callable[[Json, Json], Command]:
    """Steps are processes of this machine, whose own programs stand for the toolbox's.

    Args:
        machine: environment variables that go over those of the build: where doubles are, which environment is used.
        instead: step → the command that takes its place.
    """

    def command(build: Json, step: Json) -> Command:
        words = (instead or {}).get(step.get("id", "")) or [step["entrypoint"], *step.get("args", [])]
        return words, {**os.environ, **environment(build, step), **machine}

    return command


def as_container(machine: Mapping[str, str], workspace: Path, options: Sequence[str] = ()) -> Callable[[Json, Json], Command]:
    """Steps are containers, as in Cloud Build: the workspace is /workspace, and the machine's own Docker answers in them."""

    def command(build: Json, step: Json) -> Command:
        given = {**environment(build, step), **machine}
        words = ["docker", "run", "--rm", "--init", "--network=host", f"--volume={workspace}:/workspace"]
        words += ["--volume=/var/run/docker.sock:/var/run/docker.sock", "--workdir=/workspace", *options]
        words += [f"--env={name}={value}" for name, value in given.items()]
        words += [f"--entrypoint={step['entrypoint']}"] if step.get("entrypoint") else []
        return [*words, step["name"], *step.get("args", [])], dict(os.environ)

    return command


def environment(build: Json, step: Json) -> dict[str, str]:
    """The variables that a build gives a step."""
    lines = [*build.get("options", {}).get("env", []), *step.get("env", [])]
    return dict(line.split("=", 1) for line in lines)


def seconds(duration: str | None) -> float:
    """A duration as Google writes it: "600s"; a day where there is none."""
    return float((duration or "86400s").removesuffix("s"))


def run(build: Json, workspace: Path, command: Callable[[Json, Json], Command], kill_after: int | None = None) -> Outcome:
    """Run a build's steps.

    Args:
        build: with its substitutions filled in.
        command: what runs a step; see as_process.
        kill_after: as soon as so many steps have succeeded, all that runs is killed, as if the machine were gone.
    """
    return _Run(build, workspace, command, kill_after).run()


class _Run:
    """A build under way."""

    def __init__(self, build: Json, workspace: Path, command: Callable[[Json, Json], Command], kill_after: int | None) -> None:
        self.build, self.workspace, self.command, self.kill_after = build, workspace, command, kill_after
        self.steps = [Step(step.get("id") or f"step {place}") for place, step in enumerate(build["steps"])]
        self.waits = waits(build["steps"])
        self.changed = threading.Condition()
        self.processes: dict[int, subprocess.Popen[str]] = {}
        self.ended = ""

    def run(self) -> Outcome:
        """Start what can be started, until nothing is left."""
        threads: list[threading.Thread] = []
        ends = time.monotonic() + seconds(self.build.get("timeout"))
        with self.changed:
            if self.kill_after == 0:
                self.ended = "KILLED"
            while not self.ended and any(step.status in {"QUEUED", "WORKING"} for step in self.steps):
                for place, step in enumerate(self.steps):
                    if step.status == "QUEUED" and all(self._is_passed(other) for other in self.waits[place]):
                        step.status = "WORKING"
                        threads.append(threading.Thread(target=self._step, args=(place,)))
                        threads[-1].start()
                if not self.changed.wait(timeout=max(0.0, ends - time.monotonic())):
                    self._end("TIMEOUT")
        for thread in threads:
            thread.join()
        return Outcome(self.ended or "SUCCESS", self.steps, self.build)

    def _is_passed(self, place: int) -> bool:
        """Whether those that wait for a step may begin."""
        status, may_fail = self.steps[place].status, self.build["steps"][place].get("allowFailure", False)
        return status == "SUCCESS" or (may_fail and status in {"FAILURE", "TIMEOUT"})

    def _step(self, place: int) -> None:
        """Run a step to its end."""
        step, began = self.steps[place], time.monotonic()
        wanted = self.build["steps"][place]
        words, variables = self.command(self.build, wanted)
        with self.changed:
            if self.ended:
                step.status = "CANCELLED"
                return
            # A process group of its own, so that all that it starts ends with it.
            process = subprocess.Popen(
                words,
                cwd=self.workspace,
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,
            )
            self.processes[place] = process
        late = False
        try:
            step.output = process.communicate(timeout=seconds(wanted.get("timeout")))[0]
        except subprocess.TimeoutExpired:
            late = True
            kill(process)
            step.output = process.communicate()[0]
        with self.changed:
            del self.processes[place]
            step.seconds = time.monotonic() - began
            step.status = (
                "TIMEOUT" if late else "SUCCESS" if process.returncode == 0 else "CANCELLED" if self.ended else "FAILURE"
            )
            if step.status in {"FAILURE", "TIMEOUT"} and not wanted.get("allowFailure"):
                self._end(step.status)
            elif self.kill_after is not None and sum(other.status == "SUCCESS" for other in self.steps) >= self.kill_after:
                self._end("KILLED")
            self.changed.notify_all()

    def _end(self, status: str) -> None:
        """End all that runs; under the lock."""
        self.ended = self.ended or status
        for process in self.processes.values():
            kill(process)
        self.changed.notify_all()


def kill(process: subprocess.Popen[str]) -> None:
    """End a process and all that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
