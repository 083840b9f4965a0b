"""Our server, beside Flask as tutorials write it, and beside a bare ASGI echo under our own uvicorn settings.

Ours and Flask's answer with the same network, of the sample digits' 64 columns and 10 classes; Flask has it
from a pickle, and runs by `app.run(threaded=True)`. The echo answers with the request: it is the floor.
One client process keeps 32 connections busy with a prepared request of 1 or 64 rows. All servers run on one
core and the client on another. Flask closes each connection after its answer; the client opens another one.
The servers take turns; medians of the turns count.
"""

import contextlib
import json
import os
import pickle
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.bench.report import RATIO, Figure
from tests.servers import our_server, running, train_model

HERE = Path(__file__).parent
BATCHES = (1, 64)
OURS, FLASK, ECHO = "our server", "Flask", "the echo"


def prepared(rows: list[tuple[float, ...]]) -> bytes:
    """A request, as it goes through the socket."""
    body = json.dumps({"instances": rows}).encode()
    head = "POST /predict HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def load(port: int, request: bytes, seconds: float, cores: list[int]) -> tuple[float, float, float]:
    """Requests in a second, and the 50th and 99th percentile of their times in milliseconds."""
    command = [sys.executable, str(HERE / "load.py"), str(port), str(seconds), *map(str, cores)]
    done = subprocess.run(command, input=request, stdout=subprocess.PIPE, check=True)
    answer = json.loads(done.stdout)
    cuts = statistics.quantiles(answer["seconds"], n=100)
    return answer["per_second"], 1000 * cuts[49], 1000 * cuts[98]


def measure(small: bool) -> Iterator[Figure]:
    """Requests answered in a second, the median time, and the time that 99 in 100 do not exceed."""
    from trainer import export
    from trainer.data import find_csv, read_rows

    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    turns, seconds = (1, 2.0) if small else (7, 2.0)
    with TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        model = train_model(find_csv("sample:digits", folder), "digit", folder)
        network, schema = export.load(model)
        table = read_rows(folder / "test.parquet")
        rows = list(zip(*(table[column.name].tolist() for column in schema.columns), strict=True))
        (folder / "model.pickle").write_bytes(pickle.dumps(network))
        commands = {
            OURS: our_server(model),
            FLASK: [sys.executable, str(HERE / "flask_server.py"), str(folder / "model.pickle")],
            ECHO: [sys.executable, str(HERE / "echo_server.py"), str(model)],
        }
        ports = {
            what: stack.enter_context(running(command, folder / f"{what}.log", cores[:1])).port
            for what, command in commands.items()
        }
        for batch in BATCHES:
            request = prepared(rows[:batch])
            runs = [
                {what: load(port, request, seconds, cores[-1:]) for what, port in ports.items()}
                for _ in range(turns)
            ]
            yield from figures(batch, runs)


def figures(batch: int, runs: list[dict[str, tuple[float, float, float]]]) -> Iterator[Figure]:
    """Medians over the turns; ratios are taken within a turn."""

    def median(what: str, number: int, over: str = "") -> float:
        return statistics.median(
            run[what][number] / (run[over][number] if over else 1) for run in runs
        )

    for what in (OURS, FLASK, ECHO):
        times = f"half within {median(what, 1):.1f} ms, 99 in 100 within {median(what, 2):.1f} ms"
        yield Figure(f"{what}, batch {batch}", median(what, 0), "requests/s", note=times)
    goal = "≥ 2" if batch == 1 else ""
    yield Figure(
        f"requests/s over Flask's, batch {batch}", median(OURS, 0, FLASK), RATIO, goal=goal
    )
    yield Figure(
        f"99th percentile over Flask's, batch {batch}", median(OURS, 2, FLASK), RATIO, goal="≤ 1"
    )
    yield Figure(
        f"requests/s over the echo's, batch {batch}",
        median(OURS, 0, ECHO),
        RATIO,
        note="the echo is the floor",
    )
