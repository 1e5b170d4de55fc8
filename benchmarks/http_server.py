"""A file server on loopback with the latency and bandwidth of a distant one."""

import functools
import multiprocessing
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

_BLOCK = 1 << 16


class _Link:
    """A rate shared by all connections: every block is given its time slot."""

    def __init__(self, bytes_per_s: float) -> None:
        self.bytes_per_s = bytes_per_s
        self._free_at = 0.0
        self._lock = threading.Lock()

    def wait(self, size: int) -> None:
        with self._lock:
            self._free_at = max(time.monotonic(), self._free_at) + size / self.bytes_per_s
            until = self._free_at
        time.sleep(max(0.0, until - time.monotonic()))


class _Handler(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, *args: Any, latency_s: float, link: _Link, **kwargs: Any) -> None:
        self.latency_s, self.link = latency_s, link
        super().__init__(*args, **kwargs)

    def do_GET(self) -> None:
        time.sleep(self.latency_s)
        super().do_GET()

    def copyfile(self, source: Any, outputfile: Any) -> None:
        while block := source.read(_BLOCK):
            self.link.wait(len(block))
            outputfile.write(block)

    def log_message(self, format: str, *args: Any) -> None:
        del format, args


def _serve(folder: str, latency_s: float, bytes_per_s: float, port: Any) -> None:
    link = _Link(bytes_per_s)
    handler = functools.partial(_Handler, directory=folder, latency_s=latency_s, link=link)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    port.send(server.server_address[1])
    server.serve_forever()


@contextmanager
def limited_server(folder: Path, latency_s: float, bytes_per_s: float) -> Iterator[str]:
    """The address of a server of a folder, in a process of its own while the context lasts."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    arguments = (str(folder), latency_s, bytes_per_s, there)
    process = context.Process(target=_serve, args=arguments, daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{here.recv()}"
    finally:
        process.terminate()
        process.join()
