"""A step of the pipeline, made of a function."""

from collections.abc import Callable
from typing import Any

from kfp import dsl

RUNS_PYTHON = "_KFP_RUNTIME=true python3 "  # in the shell command that kfp makes


def component(function: Callable[..., Any], image: str) -> Any:
    """The function as a step that runs in `image`, and is told when it is to stop.

    kfp starts Python from a shell that waits for it. In a container that shell is the first process, which SIGTERM does
    not end, and which hands it on to nobody: `exec` puts Python in its place.
    """
    # The images hold kfp already: without this every step would begin by installing it.
    step = dsl.component(function, base_image=image, install_kfp_package=False)
    container = step.component_spec.implementation.container
    *before, shell, source = container.command
    if shell.count(RUNS_PYTHON) != 1:
        raise RuntimeError(f"this version of kfp starts a step in another way: {shell}")
    container.command = [*before, shell.replace(RUNS_PYTHON, f"exec env {RUNS_PYTHON}"), source]
    return step
