"""Requests a run of the published pipeline through Pub/Sub (make request).

python -m level_2_cicd.request [--event TEXT] [--set hyperparameters.epochs=50]

The parameters are checked against the published version before anything is sent; the trigger
function starts the run. SET may hold several KEY=VALUE. With PUBSUB_EMULATOR_HOST, requests go to
the emulator, without credentials.
"""

import argparse
import json
import os
import shlex
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from core.errors import UserError, run_command
from gcp import pipeline_template, pipeline_version
from gcp.client import NO_CREDENTIALS
from gcp.environment import Environment, resolve_environment
from level_2_cicd.trigger_function_container.request import RunMessage, merge_parameters, parse
from project.settings import load_settings


def compose(
    event: str,
    parameters: Mapping[str, Any] | None = None,
    version: str = "",
    actor: str = "",
    attempt: int = 1,
) -> dict[str, Any]:
    """Compose a request; see RunMessage. The default actor is this process's user."""
    return {
        "event": event,
        "version": version,
        "parameters": json.dumps(parameters or {}, ensure_ascii=False),
        "actor": actor or os.environ.get("USER") or "unknown",
        "attempt": attempt,
    }


def publish(environment: Environment, message: Mapping[str, Any]) -> str:
    """Send a request; returns its Pub/Sub id. Idempotent: one event starts one run."""
    from gcp import client as api

    parse(RunMessage, message, "request")
    data = json.dumps(message, ensure_ascii=False).encode()
    topic = environment.topic("requests")
    try:
        response = api.call(
            _client().publish,
            {"topic": topic, "messages": [{"data": data}]},
            f"requesting a run at {topic}",
        )
    except api.ApiError as error:
        if error.code != 404:
            raise
        raise UserError(
            f"topic {topic} not found. Terraform creates it: "
            f"`make foundation ENVIRONMENT={environment.environment}`"
        ) from None
    return str(response.message_ids[0])


def _client() -> Any:
    from google.auth.credentials import AnonymousCredentials
    from google.auth.exceptions import DefaultCredentialsError
    from google.pubsub_v1 import PublisherClient

    emulator = os.environ.get("PUBSUB_EMULATOR_HOST", "")
    if emulator:
        transport = PublisherClient.get_transport_class("rest")
        return PublisherClient(
            transport=transport(
                host=emulator, url_scheme="http", credentials=AnonymousCredentials()
            )
        )
    try:
        return PublisherClient()
    except DefaultCredentialsError:
        raise UserError(NO_CREDENTIALS) from None


def options() -> argparse.ArgumentParser:
    """Define the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m level_2_cicd.request",
        description="Request a run of the published pipeline.",
    )
    add = parser.add_argument
    add(
        "--event",
        default="",
        help="what happened; the same event never starts two runs; otherwise user and time",
    )
    add("--version", default="", help="a published version; otherwise the current one")
    add(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a published parameter; after SET's",
    )
    add("--actor", default="", help="who requests it; otherwise the user")
    add("--attempt", type=int, default=1, help="2 and more: rerun the same event")
    add("--environment", help="of project.yaml; otherwise the first one")
    add("--dry-run", action="store_true", help="check and print the message without sending it")
    return parser


def main() -> None:
    """Check and send a request."""
    args = options().parse_args()
    # SET is for the run, and not for project.yaml.
    environment = resolve_environment(load_settings(""), args.environment)
    if environment.by_hand:
        raise UserError(
            f"environment {environment.environment} was created manually (bucket in project.yaml) "
            "and has no trigger function. `make level1 RUNNER=vertex` starts a run."
        )
    try:
        assignments = shlex.split(os.environ.get("SET", ""))
    except ValueError as error:
        raise UserError(f"SET: {os.environ['SET']!r} cannot be read: {error}.") from None
    version = pipeline_version.read(pipeline_version.templates_folder(environment), args.version)
    changes = dict(
        pipeline_template.assigned(version.spec, text) for text in [*assignments, *args.set]
    )
    merge_parameters(version, changes)
    user = os.environ.get("USER") or "unknown"
    event = args.event or f"request {user} {datetime.now(UTC):%Y-%m-%dT%H:%M:%S.%fZ}"
    message = compose(event, changes, args.version, args.actor, args.attempt)
    parse(RunMessage, message, "request")
    if args.dry_run:
        print(json.dumps(message, indent=2, ensure_ascii=False))
        return
    identity = publish(environment, message)
    print(
        f"requested a run of version {version.version}: message {identity} on "
        f"{environment.topic('requests')}, event '{event}'"
    )


if __name__ == "__main__":
    run_command(main)
