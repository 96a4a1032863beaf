"""A Hugging Face hub with one data set, `org/poems`, on this machine."""

import hashlib
import http.server
import io
import json
import threading
from contextlib import contextmanager

import pyarrow
import pyarrow.parquet

POEMS = [f"poem {i}" for i in range(60)]
COMMIT = "0123456789" * 4
PATH = "data/train-00000-of-00001.parquet"


def parquet():
    """Returns the content of the data set's only file."""
    file = io.BytesIO()
    pyarrow.parquet.write_table(
        pyarrow.table({"text": POEMS, "line": list(range(len(POEMS)))}), file
    )
    return file.getvalue()


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers the requests that `datasets` sends to a hub."""

    content = parquet()

    def do_GET(self):
        """Sends metadata, listings of folders, and the file."""
        path = self.path.partition("?")[0]
        size, oid = len(self.content), hashlib.sha1(self.content).hexdigest()
        entry = {"type": "file", "path": PATH, "size": size, "oid": oid}
        dataset = "/api/datasets/org/poems"
        if path == dataset or path.startswith(f"{dataset}/revision/"):
            about = {"id": "org/poems", "sha": COMMIT, "private": False, "gated": False}
            self._answer(about | {"siblings": []})
        elif path == f"{dataset}/tree/{COMMIT}":
            self._answer([{"type": "directory", "path": "data", "size": 0, "oid": COMMIT}])
        elif path.startswith(f"{dataset}/tree/"):
            self._answer([entry])
        elif path.endswith(f"/resolve/{COMMIT}/{PATH}"):
            self._answer(self.content, ETag=f'"{oid}"')
        else:
            missing = "EntryNotFound" if "org/poems" in path else "RepoNotFound"
            self._answer(b"", 404, **{"X-Error-Code": missing})

    do_HEAD = do_GET

    def _answer(self, body, status=200, **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        headers = {"X-Repo-Commit": COMMIT, "Content-Length": len(body)} | headers
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *arguments):
        """Logs nothing."""


@contextmanager
def hub():
    """Runs a hub and yields its address."""
    server = http.server.ThreadingHTTPServer(("localhost", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://localhost:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
