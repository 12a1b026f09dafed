"""A local web server that can fail in many ways."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Answer = Callable[[BaseHTTPRequestHandler], None]


class Server(ThreadingHTTPServer):
    """Serves `files` by name, or calls `answer` if it is set; `asked` lists the requested names."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.answer: Answer | None = None
        self.asked: list[str] = []
        self.going = threading.Event()
        """set to let waiting requests continue"""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/"

    def handle_error(self, *_: object) -> None:
        """Silent: clients that hang up are part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.asked.append(self.path[1:])
        (self.server.answer or whole)(self)

    def log_message(self, *_: object) -> None:
        pass

    @property
    def file(self) -> bytes:
        return self.server.files[self.path[1:]]


@contextmanager
def serving() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.going.set()
            server.shutdown()
            thread.join()


def send(handler: BaseHTTPRequestHandler, content: bytes, announced: int | None = None) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(content) if announced is None else announced))
    handler.end_headers()
    handler.wfile.write(content)
    handler.wfile.flush()


def whole(handler: _Handler) -> None:
    send(handler, handler.file)


def half(handler: _Handler) -> None:
    send(handler, handler.file[: len(handler.file) // 2])


def half_of_what_is_announced(handler: _Handler) -> None:
    send(handler, handler.file[: len(handler.file) // 2], len(handler.file))


def half_then_nothing(handler: _Handler) -> None:
    half_of_what_is_announced(handler)
    handler.server.going.wait()


def one_byte_differs(handler: _Handler) -> None:
    send(handler, handler.file[:-1] + bytes([handler.file[-1] ^ 1]))


def nothing(handler: _Handler) -> None:
    handler.server.going.wait()


def hangs_up(handler: _Handler) -> None:
    pass


def no_http(handler: _Handler) -> None:
    handler.wfile.write(b"220 mail.example.org ESMTP\r\n")


def in_circles(handler: _Handler) -> None:
    handler.send_response(302)
    handler.send_header("Location", handler.path)
    handler.end_headers()


def not_found(handler: _Handler) -> None:
    handler.send_error(404)


def whole_or_not_found(handler: _Handler) -> None:
    (whole if handler.path[1:] in handler.server.files else not_found)(handler)


def broken(handler: _Handler) -> None:
    handler.send_error(500)


def once_released(handler: _Handler) -> None:
    """The file, once the test sets `going`."""
    handler.server.going.wait()
    whole(handler)
