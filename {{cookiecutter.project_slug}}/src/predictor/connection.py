"""What uvicorn leaves open: how many connections there may be, how long a request may take, and who has only stopped writing."""

import asyncio
import contextlib
import json
import resource
from http import HTTPStatus

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

RECEIVE_SECONDS = 60  # from a request's first byte to its last; 10 MB then need 1.4 Mbit/s
FILES = 8192  # open at once, where the system allows it; half of them may be connections


def allow_files() -> None:
    """Raise this process's limit of open files: 256 on macOS and 1,024 on Linux, unless somebody raised it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def most_connections() -> int:
    """Half of the files that may be open: accepting must never fail, or asyncio fills the log and does little else."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return FILES // 2 if soft == resource.RLIM_INFINITY else soft // 2


class Connection(H11Protocol):
    """HTTP/1.1 by h11, which also bounds the length of a request's head; httptools under uvicorn does not."""

    _deadline: asyncio.TimerHandle | None = None
    _client_is_done = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A connection on which nothing comes is closed like one on which nothing more comes."""
        super().connection_made(transport)
        self.timeout_keep_alive_task = self.loop.call_later(
            self.timeout_keep_alive, self.timeout_keep_alive_handler
        )
        if len(self.connections) > most_connections():
            self._refuse(503, "there are too many connections; try again later.")

    def data_received(self, data: bytes) -> None:
        """Part of a request: the clock runs until it is whole."""
        super().data_received(data)
        if self.conn.their_state not in {h11.IDLE, h11.SEND_BODY}:
            self._stop_clock()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(RECEIVE_SECONDS, self._give_up)

    def eof_received(self) -> bool:  # type: ignore[override]
        """The client sends no more. What it has sent whole is still answered; True keeps the connection for that."""
        self._client_is_done = True
        return self.conn.their_state is h11.DONE

    def on_response_complete(self) -> None:
        """Go on with the next request, if there can be one."""
        super().on_response_complete()
        if self._client_is_done and self.conn.their_state is not h11.DONE:
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """No clock runs for a connection that is gone."""
        self._stop_clock()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """What is not HTTP is told in JSON, as all else is."""
        self._refuse(400, msg)

    def _stop_clock(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _give_up(self) -> None:
        self._refuse(408, f"the request was not complete after {RECEIVE_SECONDS} seconds.")

    def _refuse(self, status: int, error: str) -> None:
        """Say why, unless an answer has begun, and close."""
        if self.conn.our_state in {h11.IDLE, h11.SEND_RESPONSE}:
            body = json.dumps({"error": error}).encode()
            headers = [
                ("content-type", "application/json"),
                ("content-length", str(len(body))),
                ("connection", "close"),
            ]
            answer = h11.Response(
                status_code=status, headers=headers, reason=HTTPStatus(status).phrase
            )
            for event in (answer, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
