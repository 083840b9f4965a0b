"""Registers a saved model and deploys it."""

import argparse
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from core import manifest
from core.errors import UserError, run_command
from gcp import storage
from gcp.deployment import deploy, rollback
from gcp.endpoint import deploy_request, share_requests
from gcp.model_registry import (
    Serving,
    open_registry,
    upload_request,
)


def preview(serving: Serving, model: Path, run: str, address: str | None) -> dict[str, Any]:
    """What a deployment sends, in order, as far as it is known beforehand.

    Raises:
        UserError: the model is damaged, or in no bucket.
    """
    request = upload_request(serving, model, run, address)
    return {
        "models.upload": request,
        **preview_of_serving(serving, "VERSION", manifest.example(manifest.read(model)["schema"])),
    }


def preview_of_rollback(number: int, serving: Mapping[str, Any]) -> str:
    """What a rollback sends, as JSON; nothing is asked, so the rows of the version are not known.

    Raises:
        UserError: `serving` is wrong.
    """
    return shown(preview_of_serving(Serving.parse(serving), str(number), "AN EXAMPLE OF ITS ROWS"))


def shown(requests: Mapping[str, Any]) -> str:
    """Requests as a person reads them."""
    return json.dumps(requests, indent=2, ensure_ascii=False)


def preview_of_serving(serving: Serving, version: str, instance: Any) -> dict[str, Any]:
    """The same of steps 2 to 5 alone, as in a rollback."""
    endpoint = f"{serving.parent}/endpoints/{serving.endpoint}"
    traffic = share_requests(version, "CHAMPION", serving.canary_percent)
    return {
        "endpoints.deployModel": deploy_request(serving, endpoint, version),
        "endpoints.patch": {
            "endpoint": {"name": endpoint, "traffic_split": traffic},
            "update_mask": "traffic_split",
        },
        "endpoints.predict": {"endpoint": endpoint, "instances": [instance]},
        "models.mergeVersionAliases": {
            "name": f"{serving.model}@{version}",
            "version_aliases": ["champion", "default"],
        },
    }


def parser() -> argparse.ArgumentParser:
    """The command line's options."""
    command = argparse.ArgumentParser(
        prog="python -m level_1_pipeline.deploy_container.main",
        description="Register a saved model and serve it.",
    )
    command.add_argument(
        "--model-dir", help="a saved model's folder; in the cloud, a gs:// address"
    )
    command.add_argument("--metrics", help="what trainer.evaluate measured, as JSON")
    command.add_argument(
        "--registry", required=True, help="the registry's folder; in the cloud, a gs:// address"
    )
    command.add_argument("--run", default="by-hand", help="the id of the run that made it")
    command.add_argument("--reason", default="deployed by hand", help="why it becomes the champion")
    command.add_argument(
        "--serving", help="in the cloud: the endpoint and its machine, as JSON or a file of it"
    )
    command.add_argument(
        "--rollback",
        type=int,
        metavar="VERSION",
        help="in the cloud: serve this version again; registers none",
    )
    command.add_argument(
        "--dry-run",
        action="store_true",
        help="in the cloud: print what would be sent, as far as it is known",
    )
    return command


def main() -> None:
    """Command line: the gate is not asked; who types this decides."""
    arguments = parser().parse_args()
    serving = read_json(arguments.serving, "--serving") if arguments.serving else {}
    outcome = (
        _deploy(arguments, serving) if arguments.rollback is None else _rollback(arguments, serving)
    )
    if outcome is not None:
        print(
            f"version {outcome['version']}"
            + ("; it is the champion" if outcome["champion"] else f": {outcome['problem']}")
        )


def _rollback(arguments: argparse.Namespace, serving: dict[str, Any]) -> dict[str, Any] | None:
    """The same for --rollback."""
    if not arguments.registry.startswith("gs://"):
        raise UserError(
            f"--rollback is for the cloud's registry. On this machine: make rollback VERSION={arguments.rollback}"
        )
    if arguments.dry_run:
        print(preview_of_rollback(arguments.rollback, serving))
        return None
    return rollback(arguments.registry, arguments.rollback, serving)


def _deploy(arguments: argparse.Namespace, serving: dict[str, Any]) -> dict[str, Any] | None:
    """What the command line asks for; nothing where it was only to be shown."""
    if not arguments.model_dir or not arguments.metrics:
        raise UserError("say which model: --model-dir and --metrics, or --rollback VERSION.")
    metrics = read_json(arguments.metrics, "--metrics")
    address = arguments.model_dir if arguments.model_dir.startswith("gs://") else None
    with tempfile.TemporaryDirectory() as folder:
        model = storage.fetch(arguments.model_dir, Path(folder))
        if arguments.dry_run:
            print(shown(preview(Serving.parse(serving), model, arguments.run, address)))
            return None
        champion = open_registry(arguments.registry).champion_number()
        return deploy(
            arguments.registry,
            model,
            metrics,
            arguments.run,
            arguments.reason,
            champion,
            serving,
            address,
        )


def read_json(given: str, option: str) -> dict[str, Any]:
    """An option's JSON, which is given itself, or as a file's path or gs:// address.

    Raises:
        UserError: it is none.
    """
    try:
        if given.lstrip().startswith("{"):
            text = given
        else:
            with tempfile.TemporaryDirectory() as folder:
                text = storage.fetch(given, Path(folder)).read_text(encoding="utf-8")
        document = json.loads(text)
    except (OSError, ValueError) as error:
        raise UserError(f"{option} {given}: cannot be read as JSON: {error}.") from None
    if not isinstance(document, dict):
        raise UserError(f"{option} {given}: is no JSON object.")
    return document


if __name__ == "__main__":
    run_command(main)
