"""Turn a function into a pipeline step."""

from collections.abc import Callable
from typing import Any

from kfp import dsl

RUNS_PYTHON = "_KFP_RUNTIME=true python3 "  # in the shell command that kfp generates


def component(function: Callable[..., Any], image: str) -> Any:
    """Return the function as a step that runs in `image` and receives SIGTERM."""
    # The images contain kfp; without this option every step would first install it.
    step = dsl.component(function, base_image=image, install_kfp_package=False)
    container = step.component_spec.implementation.container
    *before, shell, source = container.command
    if shell.count(RUNS_PYTHON) != 1:
        raise RuntimeError(f"this version of kfp starts a step in another way: {shell}")
    # kfp starts Python from a shell. In a container the shell is process 1: it ignores SIGTERM and
    # does not forward it. `exec` replaces the shell with Python.
    container.command = [*before, shell.replace(RUNS_PYTHON, f"exec env {RUNS_PYTHON}"), source]
    return step
