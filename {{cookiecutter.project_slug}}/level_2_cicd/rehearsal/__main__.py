"""Serve the fakes of Vertex AI and Cloud Storage until Ctrl-C. See README.md."""

import argparse
import signal
import sys
from contextlib import ExitStack
from pathlib import Path

from level_2_cicd.rehearsal.containers import Containers
from level_2_cicd.rehearsal.server import FakeServer
from level_2_cicd.rehearsal.storage import FakeStorage
from level_2_cicd.rehearsal.vertex import FakeVertex


def parse_options() -> argparse.Namespace:
    """Parse the command line."""
    description = "Fakes of Vertex AI and Cloud Storage on this machine."
    parser = argparse.ArgumentParser(prog="python -m rehearsal", description=description)
    add = parser.add_argument
    port_help = "of Vertex AI; Cloud Storage uses the next one; 0: any free port"
    add("--port", type=int, default=8090, help=port_help)
    add("--buckets", type=Path, default=Path("scratch/buckets"), help="folder of the buckets")
    add("--bucket", action="append", default=[], metavar="NAME", help="create a bucket; repeatable")
    add("--run", action="store_true", help="run training jobs and deployed models with Docker")
    return parser.parse_args()


def main() -> None:
    """Serve, and print each call and the variables that select the fakes."""
    options = parse_options()
    # Handle SIGTERM like Ctrl-C, so that containers are stopped.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    port, root = options.port, options.buckets.resolve()
    with ExitStack() as stack:
        try:
            # Storage first: model servers download their model from it.
            storage = stack.enter_context(FakeStorage(root, port and port + 1))
            containers = Containers(root, storage_address=storage.address) if options.run else None
            vertex = stack.enter_context(FakeVertex(port, containers))
        except OSError as error:
            problem = f"port {port} or {port + 1}: {error.strerror}"
            print(f"error: {problem}. Try another one: --port 8190", file=sys.stderr)
            sys.exit(2)
        for name in options.bucket:
            storage.create_bucket(name)
        for fake in (vertex, storage):
            fake.log = lambda line: print(line, flush=True)
        # Print after the buckets exist: the output shows that the fakes are ready.
        print(exports(vertex, storage), flush=True)
        try:
            signal.pause()
        except KeyboardInterrupt:
            sys.exit(0)


def exports(vertex: FakeServer, storage: FakeServer) -> str:
    """Return shell exports that point Google's clients, gcloud and this project to the fakes."""
    # The fakes accept any caller, so gcloud needs no login.
    variables = {
        "CLOUDSDK_API_ENDPOINT_OVERRIDES_AIPLATFORM": f"{vertex.address}/",
        "CLOUDSDK_API_ENDPOINT_OVERRIDES_STORAGE": f"{storage.address}/",
        "CLOUDSDK_AUTH_DISABLE_CREDENTIALS": "true",
        "STORAGE_EMULATOR_HOST": storage.address,
    }
    return "\n".join(f"export {name}={value}" for name, value in variables.items())


if __name__ == "__main__":
    main()
