"""The entry point of functions-framework: each delivery of Pub/Sub calls `handle`; see events.py."""

import os
import sys

import flask
import functions_framework

from core.errors import UserError
from level_2_cicd.trigger_function_container import events

try:
    FUNCTION = events.Function.from_environment(os.environ)
except UserError as error:
    sys.exit(f"error: {error}")


@functions_framework.http
def handle(request: flask.Request) -> tuple[str, int]:
    """Handle one delivery."""
    return FUNCTION.handle(request.method, request.get_data())
