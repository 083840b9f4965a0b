"""A client that is quicker than any server beside it: prepared requests over plain sockets, timed one by one.

python tests/bench/load.py PORT SECONDS [CORE] < REQUEST      prints {"per_second": …, "seconds": [of each]}

Every one of 32 connections sends the request, reads the answer by its Content-Length, and sends it again.
A connection that the server closes is opened anew, and that time counts.
"""

import json
import os
import re
import select
import socket
import sys
import time

CONNECTIONS = 32
WARM_UP_SHARE = 0.2  # of the time: what is answered then is not counted


class Connection:
    """A socket with one request under way."""

    def __init__(self, port: int, request: bytes, poll: select.epoll) -> None:
        self.port, self.request, self.poll = port, request, poll
        self.socket: socket.socket | None = None

    def ask(self) -> None:
        """Send the request; through a new socket if there is none."""
        self.begun, self.answer, self.length = time.perf_counter(), bytearray(), 0
        if self.socket is None:
            self.socket = socket.create_connection(("127.0.0.1", self.port))
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.poll.register(self.socket, select.EPOLLIN)
        self.socket.sendall(self.request)

    def read(self) -> bool:
        """Take what has come, and tell whether the answer is whole."""
        assert self.socket
        part = self.socket.recv(1 << 18)
        self.answer += part
        if not self.length and (end := self.answer.find(b"\r\n\r\n") + 4) > 3:
            assert self.answer[9:12] == b"200", self.answer.decode()
            found = re.search(rb"(?i)\r\ncontent-length: *(\d+)", self.answer[:end])
            assert found, "no Content-Length"
            self.length = end + int(found[1])
            self.closing = (
                self.answer.startswith(b"HTTP/1.0") or b"onnection: close" in self.answer[:end]
            )
        whole = 0 < self.length == len(self.answer)
        assert whole or part, "the server hung up"
        if whole and self.closing:
            self.socket.close()
            self.socket = None
        return whole


def load(port: int, seconds: float, request: bytes) -> list[float]:
    """The time that each answered request took."""
    poll, times = select.epoll(), []
    connections = [Connection(port, request, poll) for _ in range(CONNECTIONS)]
    for connection in connections:
        connection.ask()
    begin = time.perf_counter()
    while (now := time.perf_counter()) < begin + seconds:
        waiting = {c.socket.fileno(): c for c in connections if c.socket}
        for number, _ in poll.poll():
            connection = waiting[number]
            if connection.read():
                if now > begin + WARM_UP_SHARE * seconds:
                    times.append(time.perf_counter() - connection.begun)
                connection.ask()
    return times


if __name__ == "__main__":
    port, seconds = int(sys.argv[1]), float(sys.argv[2])
    if cores := [int(core) for core in sys.argv[3:]]:
        os.sched_setaffinity(0, cores)
    times = load(port, seconds, sys.stdin.buffer.read())
    print(json.dumps({"per_second": len(times) / seconds / (1 - WARM_UP_SHARE), "seconds": times}))
