"""The floor: uvicorn with our server's settings, and nothing behind it: python echo_server.py MODEL_DIR"""

import sys
from pathlib import Path
from typing import Any

from predictor.models import StaticModel, log
from predictor.server import Options, create_server, greeting, listen


async def echo(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """Answer every request with its own body."""
    if scope["type"] != "http":
        return
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message["body"], message["more_body"]
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


if __name__ == "__main__":
    source, options = StaticModel(Path(sys.argv[1])), Options(port=0)
    server = create_server(source, options)
    server.config.app = echo
    with listen(options.host, options.port) as listener:
        log(greeting(source.current, listener.getsockname(), options))
        server.run(sockets=[listener])
