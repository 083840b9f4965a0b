"""The doubles by hand: Cloud Storage and Vertex AI, until Ctrl-C. See README.md here."""

import argparse
import signal
import sys
from contextlib import ExitStack
from pathlib import Path

from rehearsal.containers import Containers
from rehearsal.server import FakeServer
from rehearsal.storage import FakeStorage
from rehearsal.vertex import FakeVertex


def main() -> None:
    """Serve; print the variables that lead to them, and each call."""
    parser = argparse.ArgumentParser(prog="python -m rehearsal", description="Doubles of Google Cloud on this machine.")
    parser.add_argument("--port", type=int, default=8090, help="Vertex AI's; Cloud Storage has the next one; 0: any")
    parser.add_argument("--buckets", type=Path, default=Path("scratch/buckets"), help="the folder that holds the buckets")
    parser.add_argument("--bucket", action="append", default=[], metavar="NAME", help="make a bucket; may be repeated")
    parser.add_argument("--run", action="store_true", help="really run training jobs and deployed models, with Docker")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with ExitStack() as doubles:
        try:
            storage = doubles.enter_context(FakeStorage(given.buckets.resolve(), given.port and given.port + 1))
            containers = Containers(given.buckets.resolve(), storage_address=storage.address) if given.run else None
            vertex = doubles.enter_context(FakeVertex(given.port, containers))
        except OSError as error:
            print(f"error: {error.strerror}: port {given.port} or {given.port + 1}. Another: --port 8190", file=sys.stderr)
            sys.exit(2)
        for name in given.bucket:
            storage.create_bucket(name)
        for double in (vertex, storage):  # before anyone can know where they are
            double.log = lambda line: print(line, flush=True)
        print(exports(vertex, storage), flush=True)
        try:
            signal.pause()
        except KeyboardInterrupt:
            sys.exit(0)


def exports(vertex: FakeServer, storage: FakeServer) -> str:
    """What leads Google's clients, gcloud and this project here."""
    variables = {
        "CLOUDSDK_API_ENDPOINT_OVERRIDES_AIPLATFORM": f"{vertex.address}/",
        "CLOUDSDK_API_ENDPOINT_OVERRIDES_STORAGE": f"{storage.address}/",
        "CLOUDSDK_AUTH_DISABLE_CREDENTIALS": "true",
        "STORAGE_EMULATOR_HOST": storage.address,
    }
    return "\n".join(f"export {name}={value}" for name, value in variables.items())


if __name__ == "__main__":
    main()
