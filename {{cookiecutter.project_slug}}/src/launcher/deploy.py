"""Registers a saved model as a new version, and deploys it: makes it the champion, which is what the server serves.

python -m launcher.deploy --model-dir runs/ID/model --metrics runs/ID/evaluation.json --registry registry --run ID
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from project.errors import UserError, run_command
from project.registry import Overtaken, open_registry


def deploy(
    registry: str,
    model: Path,
    metrics: Mapping[str, Any],
    run: str,
    reason: str,
    replaces: int | None,
    serving: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Register a model, and make it the champion unless the champion is no longer `replaces`.

    Args:
        serving: in the cloud, the endpoint and its machine; on a laptop a server looks into the registry by itself.

    Returns:
        version: its number; champion: whether it is served; problem: why not.

    Raises:
        UserError: the model is damaged.
    """
    models = open_registry(registry)
    numbers = {name: value for name, value in metrics.items() if isinstance(value, (int, float))}
    registered = models.register(model, numbers, run)
    try:
        models.promote(registered.number, reason, replaces)
    except Overtaken as overtaken:
        return {"version": registered.number, "champion": False, "problem": str(overtaken)}
    return {"version": registered.number, "champion": True, "problem": None}


def main() -> None:
    """Command line: the gate is not asked; who types this decides."""
    parser = argparse.ArgumentParser(prog="python -m launcher.deploy", description="Register a saved model and serve it.")
    parser.add_argument("--model-dir", type=Path, required=True, help="a saved model's folder")
    parser.add_argument("--metrics", type=Path, required=True, help="what trainer.evaluate measured, as JSON")
    parser.add_argument("--registry", required=True, help="the registry's folder")
    parser.add_argument("--run", default="by-hand", help="the id of the run that made it")
    parser.add_argument("--reason", default="deployed by hand", help="why it becomes the champion")
    arguments = parser.parse_args()
    try:
        metrics = json.loads(arguments.metrics.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{arguments.metrics} cannot be read as metrics: {error}.") from None
    champion = open_registry(arguments.registry).champion_number()
    outcome = deploy(arguments.registry, arguments.model_dir, metrics, arguments.run, arguments.reason, champion)
    print(f"version {outcome['version']}" + ("; it is the champion" if outcome["champion"] else f": {outcome['problem']}"))


if __name__ == "__main__":
    run_command(main)
