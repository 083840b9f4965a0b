#!/usr/bin/env bash
# Builds the images of all containers, or of those that are named; an unchanged one is not built again.
#
#   level_1_pipeline/build_containers.sh [NAME …] [--push [--digests FILE]] [--pin-base]
#
# What it does, and what an image's tag is made of, is in level_1_pipeline/containers.py.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${RUN_PYTHON:-.venv/bin/python}
if ! [ -x "$python" ]; then
    echo "error: $python is not there. Type first: make setup" >&2
    exit 2
fi
exec "$python" -m level_1_pipeline.containers "$@"
