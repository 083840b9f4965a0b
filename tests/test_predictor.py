"""The server as a process of its own, under requests and clients that nobody wished for."""

import contextlib
import csv
import http.client
import itertools
import json
import random
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.servers import Running, our_server, running, train_model

pytestmark = pytest.mark.heavy

GOOD = {
    "instances": [
        {"width": 0.5, "height": 3, "colour": "red", "kind": "a"},
        {"height": 1, "kind": "c"},
    ]
}
BODY = json.dumps(GOOD).encode()
LARGE = json.dumps({"instances": GOOD["instances"] * 5000}).encode()


def request(body: bytes, *headers: str) -> bytes:
    """A whole request; its headers end with the body's length unless others say that."""
    lines = ["POST /predict HTTP/1.1", "Host: x", *(headers or (f"Content-Length: {len(body)}",))]
    return "\r\n".join([*lines, "", ""]).encode() + body


# ── models and servers ──────────────────────────────────────────────────────────────────────────────────────


MIXED = [["", 0.25, 0.5, 1e9], range(9), ["", "red", "blue"], "ab", ["cat", "dog"]]
UNICODE = [[0.25, 0.5, -3], ["红", "蓝", ""], range(9), "'ß", range(3), ["ja", "nein", "ну"]]


def digits(chance: random.Random) -> list[list[object]]:
    """Numbers alone, as many as the sample digits have."""
    header = [f"pixel_{row}_{column}" for row in range(8) for column in range(8)]
    return [[*header, "digit"], *([chance.randint(0, 16) for _ in range(65)] for _ in range(300))]


def mixed(chance: random.Random) -> list[list[object]]:
    """Numbers and categories, with gaps and without."""
    header = ["width", "height", "colour", "kind", "animal"]
    return [header, *([chance.choice(cells) for cells in MIXED] for _ in range(300))]


def unicode(chance: random.Random) -> list[list[object]]:
    """Names that are hard for JSON, for JSON pointers and for terminals."""
    header = ["größe", '颜色 "x"', "a/b~c", "😀", "$ref", "étiquette"]
    return [header, *([chance.choice(cells) for cells in UNICODE] for _ in range(300))]


@pytest.fixture(scope="module")
def model(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[Callable[..., list[list[object]]]], Path]:
    """Trains a model on such rows, once."""
    made: dict[str, Path] = {}

    def make(rows: Callable[..., list[list[object]]]) -> Path:
        if rows.__name__ not in made:
            folder = tmp_path_factory.mktemp(rows.__name__)
            table = rows(random.Random(0))
            with (folder / "rows.csv").open("w", newline="", encoding="utf-8") as stream:
                csv.writer(stream).writerows(table)
            made[rows.__name__] = train_model(folder / "rows.csv", str(table[0][-1]), folder)
        return made[rows.__name__]

    return make


@pytest.fixture(scope="module")
def server(
    model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    """A server of the mixed model."""
    many_files = ["sh", "-c", 'ulimit -Sn 4096 || ulimit -Sn $(ulimit -Hn); exec "$@"', "sh"]
    with running(
        [*many_files, *our_server(model(mixed))], tmp_path_factory.mktemp("server") / "log"
    ) as started:
        yield started


@pytest.fixture(scope="module")
def idle_files(server: Running) -> int:
    """How many files the server has open while nobody asks."""
    ask(server, LARGE)
    time.sleep(0.5)
    return open_files(server)


def open_files(server: Running) -> int:
    """How many files and sockets the server has open."""
    return len(list(Path(f"/proc/{server.process.pid}/fd").iterdir()))


def memory(server: Running) -> int:
    """Bytes of memory that the server's process holds."""
    status = Path(f"/proc/{server.process.pid}/status").read_text(encoding="utf-8")
    return 1024 * int(status.split("VmRSS:")[1].split()[0])


def connect(server: Running) -> socket.socket:
    """A connection to the server."""
    return socket.create_connection(("127.0.0.1", server.port), timeout=20)


def read(connection: socket.socket) -> tuple[int, Any]:
    """The status and the document of one answer."""
    response = http.client.HTTPResponse(connection)
    response.begin()
    return response.status, json.loads(response.read())


def ask(server: Running, body: bytes = BODY) -> Any:
    """The answer to a good request, on a connection of its own."""
    with connect(server) as connection:
        connection.sendall(request(body))
        status, answer = read(connection)
    assert status == 200
    return answer


def eventually(condition: Callable[[], bool], seconds: float = 30) -> None:
    """Wait for something that is to come; fail when it does not."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.05)


@pytest.fixture
def unharmed(server: Running, idle_files: int) -> Iterator[Running]:
    """The server; afterwards it answers as before, has closed what was opened, has logged no traceback."""
    expected = ask(server)
    yield server
    assert ask(server) == expected
    eventually(lambda: open_files(server) <= idle_files)
    assert server.process.poll() is None
    assert "Traceback" not in server.log.read_text(encoding="utf-8")


# ── what OpenAPI says is what the server does ───────────────────────────────────────────────────────────────


@pytest.mark.parametrize("rows", [digits, mixed, unicode])
def test_the_server_does_what_its_openapi_says(
    rows: Any, model: Callable[..., Path], tmp_path: Path
) -> None:
    # How many bytes a body may have is no matter of its schema: here it may have very many.
    with running(our_server(model(rows)), tmp_path / "log", PREDICT_MAX_BYTES=str(10**9)) as server:
        address = f"http://127.0.0.1:{server.port}/openapi.json"
        options = ["--checks", "all", "--max-examples", "60", "--seed", "1", "--no-color"]
        command = [sys.executable, "-m", "schemathesis.cli", "run", address, *options]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
        assert "Selected: 2/2" in done.stdout
        assert "Traceback" not in server.log.read_text(encoding="utf-8")


# ── 10,000 bodies that are damaged ──────────────────────────────────────────────────────────────────────────

VALUES = [
    *(
        b"null",
        b"true",
        b'"red"',
        b'""',
        b'"\\ud800"',
        b"[]",
        b"{}",
        b"[[1]]",
        b"-0",
        b"1e400",
        b"-1e308",
        b"1.5",
    ),
    *(b"NaN", b"-Infinity", b"9" * 400, b"1e" + b"9" * 400, b"9" * 5000, b"0x10", b"01", b"1_000"),
]


def flip(chance: random.Random, body: bytearray) -> None:
    """Turn over some bits."""
    for _ in range(chance.randint(1, 4)):
        body[chance.randrange(len(body))] ^= 1 << chance.randrange(8)


def cut(chance: random.Random, body: bytearray) -> None:
    """Leave out a part, often the end."""
    start = chance.randrange(len(body))
    del body[start : chance.choice([len(body), start + chance.randint(1, 20)])]


def insert(chance: random.Random, body: bytearray) -> None:
    """Put bytes of chance, or JSON's own marks, somewhere."""
    marks = bytes(chance.choices(b'[]{}",:\\u0', k=chance.randint(1, 3)))
    environment = chance.randrange(len(body))
    body[environment:environment] = chance.choice(
        [marks, chance.randbytes(chance.randint(1, 8)), b"\xff\xfe", b"\xed\xa0\x80"]
    )


def replace_value(chance: random.Random, body: bytearray) -> None:
    """Another value, often of another type, for one of those that stand there."""
    old = chance.choice([b"0.5", b'"red"', b"3", b'"a"', b"1", b'"c"'])
    body[:] = body.replace(b": " + old, b": " + chance.choice(VALUES))


def repeat_key(chance: random.Random, body: bytearray) -> None:
    """A key twice; the last one counts."""
    key = chance.choice([b'"width"', b'"height"', b'"kind"', b'"instances"'])
    body[:] = body.replace(key, key + b": " + chance.choice(VALUES) + b", " + key)


def nest(chance: random.Random, body: bytearray) -> None:
    """A value deep inside others."""
    depth, (opening, closing) = (
        chance.choice([10, 900, 20_000]),
        chance.choice([(b"[", b"]"), (b'{"a":', b"}")]),
    )
    body[:] = body.replace(b"0.5", opening * depth + b"1" + closing * chance.choice([0, depth]))


def lengthen(chance: random.Random, body: bytearray) -> None:
    """A very long text, as a value or as a name."""
    text = chance.choice([b"x", "é".encode(), b"\\n"]) * chance.choice([100, 60_000])
    body[:] = body.replace(chance.choice([b"red", b"colour", b"instances"]), text)


DAMAGES = [flip, cut, insert, replace_value, repeat_key, nest, lengthen]


def test_10000_damaged_bodies(unharmed: Running) -> None:
    """Each is answered or refused in JSON, on a connection that is kept; good ones between them as ever."""
    chance, statuses, settled = random.Random(4), [], 0
    clients = [http.client.HTTPConnection("127.0.0.1", unharmed.port, timeout=30) for _ in range(8)]

    def post(client: http.client.HTTPConnection, body: bytes) -> tuple[int, Any]:
        client.request("POST", "/predict", body)
        response = client.getresponse()
        assert not response.will_close
        return response.status, json.loads(response.read())

    expected = post(clients[0], BODY)
    for number, client in zip(range(10_000), itertools.cycle(clients), strict=False):
        body = bytearray(BODY)
        for damage in chance.choices(DAMAGES, k=chance.randint(1, 2)):
            damage(chance, body or bytearray(BODY))
        status, answer = post(client, bytes(body))
        assert status in {200, 400}, (bytes(body), answer)
        assert set(answer) == ({"predictions", "version"} if status == 200 else {"error"}), bytes(
            body
        )
        statuses.append(status)
        if number % 20 == 0:
            assert post(client, BODY) == expected
        if number == 4_000:
            settled = memory(unharmed)
    assert memory(unharmed) - settled < 4_000_000
    assert 500 < statuses.count(200) < 9_500  # both sides are seen
    for client in clients:
        client.close()


# ── slow, broken and greedy clients ─────────────────────────────────────────────────────────────────────────


def test_a_request_may_be_slow(unharmed: Running) -> None:
    """Ten requests on one connection, each in two parts."""
    expected, whole = ask(unharmed), request(BODY)
    with connect(unharmed) as slow:
        for _ in range(10):
            slow.sendall(whole[:-5])
            time.sleep(0.3)
            slow.sendall(whole[-5:])
            assert read(slow) == (200, expected)


def test_a_client_that_stops_in_the_middle_is_not_waited_for(unharmed: Running) -> None:
    for end in (10, 60, -1):
        with connect(unharmed) as half:
            half.sendall(request(BODY)[:end])
            half.shutdown(socket.SHUT_WR)
            assert half.recv(1000) == b""


def test_requests_in_a_row_are_answered_in_their_order(unharmed: Running) -> None:
    bodies = [
        json.dumps({"instances": GOOD["instances"][:1] * count}).encode() for count in range(1, 40)
    ]
    with connect(unharmed) as connection, connection.makefile("rb") as stream:
        connection.sendall(b"".join(map(request, bodies)))
        for count in range(1, 40):
            head = b"".join(iter(stream.readline, b"\r\n")).decode().lower()
            length = int(head.split("content-length: ")[1].split()[0])
            assert len(json.loads(stream.read(length))["predictions"]) == count


def test_a_client_may_ask_before_it_sends(unharmed: Running) -> None:
    with connect(unharmed) as connection:
        connection.sendall(request(b"", f"Content-Length: {len(BODY)}", "Expect: 100-continue"))
        assert connection.recv(1000).startswith(b"HTTP/1.1 100 ")
        connection.sendall(BODY)
        assert read(connection) == (200, ask(unharmed))


def chunks(*parts: bytes) -> bytes:
    """Parts of a body whose length is not told beforehand."""
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts)


def test_a_body_may_come_in_chunks(unharmed: Running) -> None:
    with connect(unharmed) as connection:
        connection.sendall(
            request(chunks(*(bytes([byte]) for byte in BODY), b""), "Transfer-Encoding: chunked")
        )
        assert read(connection) == (200, ask(unharmed))


def test_a_body_without_end_is_given_up(unharmed: Running) -> None:
    with connect(unharmed) as endless:
        endless.sendall(request(b"", "Transfer-Encoding: chunked"))
        sent = 0
        with contextlib.suppress(ConnectionError):
            while sent < 10_000:
                endless.sendall(chunks(b" " * 10_000))
                sent += 1
                if sent > 1100:  # it is told; who goes on all the same is not listened to for ever
                    time.sleep(0.01)
        assert 1000 <= sent < 10_000


def test_a_wrong_length_is_an_error(unharmed: Running) -> None:
    with connect(unharmed) as connection:
        connection.sendall(request(BODY, f"Content-Length: {len(BODY) - 3}"))
        status, answer = read(connection)
        assert (status, list(answer)) == (400, ["error"])


@pytest.mark.parametrize(
    "head",
    [
        request(b"", "X-Long: " + "x" * 40_000),
        request(b"", *(f"X-{number}: 1" for number in range(4_000))),
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 50 + b"\r\n\r\n",  # TLS
        b"POST /predict\r\n\r\n",
        request(BODY, "Content-Length: -1"),
        request(BODY, "Content-Length: 5", "Content-Length: 6"),
        request(b"zz\r\n", "Transfer-Encoding: chunked"),
    ],
    ids=[
        "long header",
        "many headers",
        "TLS",
        "no version",
        "negative length",
        "two lengths",
        "no chunk",
    ],
)
def test_invalid_http_gets_400(unharmed: Running, head: bytes) -> None:
    with connect(unharmed) as connection, connection.makefile("rb") as stream:
        connection.sendall(head)
        assert stream.readline().startswith(b"HTTP/1.1 400 ")


def test_a_head_without_end_is_not_read_to_its_end(unharmed: Running) -> None:
    with connect(unharmed) as connection, pytest.raises(ConnectionError):
        connection.sendall(request(b"", "X-Long: " + "x" * 100_000_000))


def test_clients_that_hang_up_in_the_middle_of_the_answer(unharmed: Running) -> None:
    for number in range(30):
        with connect(unharmed) as connection:
            connection.sendall(request(LARGE))
            if number % 2:
                connection.recv(1)
                connection.setsockopt(
                    socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0"
                )  # reset, not closed
        ask(unharmed)


def test_1000_open_connections(unharmed: Running, idle_files: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 4096)), hard))
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(connect(unharmed)) for _ in range(1000)]
        eventually(lambda: open_files(unharmed) >= idle_files + 1000)
        expected = ask(unharmed)
        for connection in connections[::100]:  # they were only idle
            connection.sendall(request(BODY))
            assert read(connection) == (200, expected)
