"""Serves the page: on 127.0.0.1 alone, four kinds of address, to this machine's own browsers.

    /   the page    /live   its pieces as JSON    /small/NAME, /whole/NAME   samples that are listed

A page of another site must not read it: the Host header has to name this machine, or a name that
was made to point here (DNS rebinding) would do; nothing is shared across origins; nothing can be
framed. There is no other method than GET and HEAD, and nothing that a request could change.
"""

from __future__ import annotations

import json
import logging
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

from lcp_plugin.errors import DataError, DiskError
from lcp_plugin.watch.view import View

log = logging.getLogger(__name__)

ADDRESS = "127.0.0.1"
NAMES = (ADDRESS, "localhost")  # with any port: a tunnel has another one at its near end
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "X-Frame-Options": "DENY",
}
NOTHING = "default-src 'none'; frame-ancestors 'none'; sandbox"
KEPT = "private, max-age=86400, immutable"  # an address holds the time of its picture


class Server(ThreadingHTTPServer):
    """The server of one run's page."""

    daemon_threads = True

    def __init__(self, folder: Path, port: int = 0) -> None:
        self.view = View(folder)
        try:
            super().__init__((ADDRESS, port), Handler)
        except (OSError, OverflowError) as error:
            raise DiskError(
                f"port {port} of {ADDRESS} cannot be had ({error}); leave --port out, and a free "
                "one is taken."
            ) from error

    @property
    def address(self) -> str:
        """What a browser opens."""
        return f"http://{ADDRESS}:{self.server_port}/"

    def handle_error(self, request: object, client_address: object) -> None:
        """A browser that went away is no error; others are noted, and the page goes on."""
        log.debug("a request failed", exc_info=True)


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: Server
    server_version, sys_version = "lcp", ""
    timeout = 30  # seconds that a silent browser is waited for

    def do_GET(self) -> None:
        """The four kinds of address."""
        if not self._is_for_us():
            self._send(HTTPStatus.MISDIRECTED_REQUEST, b"This page is for this machine alone.\n")
            return
        path = urlsplit(self.path).path
        kind, _, name = path.removeprefix("/").partition("/")
        try:
            if path == "/":
                page = self.server.view.write_page().encode("utf-8")
                self._send(HTTPStatus.OK, page, "text/html; charset=utf-8")
            elif path == "/live":
                found = json.dumps(self.server.view.look()).encode("utf-8")
                self._send(HTTPStatus.OK, found, "application/json")
            else:
                self._send_picture(kind, unquote(name))
        except DataError as error:
            self._send(HTTPStatus.CONFLICT, f"{error}\n".encode())
        except ConnectionError:
            raise
        except Exception as error:  # a file that is neither whole nor damaged in a known way
            log.debug("%s could not be shown", self.path, exc_info=True)
            told = f"The run could not be read just now ({type(error).__name__}).\n"
            self._send(HTTPStatus.INTERNAL_SERVER_ERROR, told.encode())

    do_HEAD = do_GET

    def _send_picture(self, kind: str, name: str) -> None:
        image = None
        if kind in ("small", "whole"):
            image = self.server.view.album.fetch(name, whole=kind == "whole")
        if image is None:
            self._send(HTTPStatus.NOT_FOUND, b"There is nothing at this address.\n")
        else:
            self._send(HTTPStatus.OK, image.data, f"image/{image.kind}", KEPT)

    def _is_for_us(self) -> bool:
        """Whether the request names this machine, and comes from our page or from no page."""
        host = self.headers.get("Host", "")
        name, colon, port = host.rpartition(":")
        if (name if colon else host) not in NAMES or (colon and not port.isdigit()):
            return False
        origin = self.headers.get("Origin")
        return origin is None or origin == f"http://{host}"

    def _send(
        self,
        status: HTTPStatus,
        data: bytes,
        kind: str = "text/plain; charset=utf-8",
        cache: str = "no-store",
    ) -> None:
        self.send_response(status)
        policy = self.server.view.policy if kind.startswith("text/html") else NOTHING
        told = {"Content-Type": kind, "Content-Length": str(len(data)), "Cache-Control": cache}
        for key, value in {**told, **HEADERS, "Content-Security-Policy": policy}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Requests are not told of."""
