"""An HTTP proxy in front of an MLflow server: slow or gone from one call to the next."""

import http.client
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.ports import free_port


class Proxy:
    """Down (connections refused) until ``up``; keeps its port."""

    def __init__(self, target_port: int) -> None:
        self.delay_s = 0.0
        self.slow_calls = 0
        self._target_port = target_port
        self._server: ThreadingHTTPServer | None = None
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"

    def up(self, delay_s: float = 0.0) -> None:
        """Answer, each call after ``delay_s``."""
        self.delay_s = delay_s
        if self._server is None:
            self._listen()

    def down(self) -> None:
        """Refuse connections; a call that waits for its delay is cut off."""
        if self._server is not None:
            server, self._server = self._server, None
            server.shutdown()
            server.server_close()

    def _listen(self) -> None:
        handler = type("Handler", (_Handler,), {"proxy": self, "target_port": self._target_port})
        server = ThreadingHTTPServer(("127.0.0.1", self.port), handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        self._server = server


class _Handler(BaseHTTPRequestHandler):
    proxy: Proxy
    target_port: int

    def forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.proxy.delay_s:
            time.sleep(self.proxy.delay_s)
            self.proxy.slow_calls += 1
        if self.proxy._server is not self.server:
            return  # went down meanwhile: no answer
        upstream = http.client.HTTPConnection("127.0.0.1", self.target_port, timeout=60)
        upstream.request(self.command, self.path, body, dict(self.headers))
        answer = upstream.getresponse()
        content = answer.read()
        self.send_response(answer.status)
        for key, value in answer.getheaders():
            if key.lower() not in ("transfer-encoding", "content-length", "connection"):
                self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
        upstream.close()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("do_"):  # whatever the method
            return self.forward
        raise AttributeError(name)

    def log_message(self, format: str, *args: Any) -> None:
        pass
