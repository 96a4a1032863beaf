"""A server with the part of Google Cloud Storage's JSON API that gcsfs and tensorstore use.

It checks preconditions on generations, which leases need, and can refuse requests for a while.
"""

import base64
import email.parser
import email.policy
import hashlib
import itertools
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl, unquote, urlsplit

BUCKET = "bucket"


class Store(ThreadingHTTPServer):
    """The objects of one bucket by name, each with its content and generation."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("localhost", 0), _Handler)
        self.objects, self.lock = {}, threading.Lock()
        self.generations, self.uploads = itertools.count(1_000_000), {}
        self.fails_next = 0  # the number of next requests that fail
        self.failure = 503  # HTTP status of requests that fail
        self.failed = 0  # number of requests that have failed

    def handle_error(self, request, client_address):
        """Prints nothing if a client closes its connection, for example because it is killed."""

    @property
    def variables(self):
        """The environment variables with which programs use this store."""
        url = f"http://localhost:{self.server_port}"
        return {
            "STORAGE_EMULATOR_HOST": url,
            "TENSORSTORE_GCS_HTTP_URL": url,
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
            "GOOGLE_CLOUD_PROJECT": "test",
        }


@contextmanager
def object_store():
    """A running `Store`."""
    with Store() as store:
        threading.Thread(target=store.serve_forever, daemon=True).start()
        yield store
        store.shutdown()


class _Refused(Exception):
    """Its argument is the HTTP status of an answer that is an error."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def _do(self):
        parts = urlsplit(self.path)
        self.query = dict(parse_qsl(parts.query, keep_blank_values=True))
        self.content = self._read()
        try:
            if self._fails():
                raise _Refused(self.server.failure)
            with self.server.lock:
                status, answer, headers = self._answer(parts.path)
        except _Refused as e:
            status, answer, headers = e.args[0], {"error": {"code": e.args[0]}}, {}
        body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        body = b"" if status in (204, 304) else body
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body if self.command != "HEAD" else b"")

    def _fails(self):
        with self.server.lock:
            fails = self.server.fails_next > 0
            self.server.fails_next -= fails
            self.server.failed += fails
        return fails

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = do_PATCH = _do

    def _read(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            content = b""
            while size := int(self.rfile.readline(), 16):
                content += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return content
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer(self, path):
        if (bucket := re.search("/b/([^/]+)", path)) and bucket[1] != BUCKET:
            raise _Refused(404)
        _, _, rest = path.partition(f"/b/{BUCKET}")
        if path.startswith("/upload/"):
            return self._upload()
        if rest in ("", "/"):
            return 200, {"name": BUCKET, "kind": "storage#bucket"}, {}
        name = unquote(rest.removeprefix("/o").removeprefix("/"))
        if not name:
            return 200, self._list(), {}
        for copy in ("/rewriteTo/b/", "/copyTo/b/", "/moveTo/o/"):
            if copy in name:
                source, _, target = name.partition(copy)
                target = target.removeprefix(f"{BUCKET}/o/")
                made = self._store(target, self._found(source)[0])
                if copy == "/moveTo/o/":
                    del self.server.objects[source]
                return 200, {"done": True, "resource": made} | made, {}
        self._check(name)
        content, generation = self._found(name)
        if self.command == "DELETE":
            del self.server.objects[name]
            return 204, b"", {}
        if self.query.get("alt") != "media":
            return 200, self._metadata(name), {}
        headers = {"x-goog-generation": generation, "Content-Type": "application/octet-stream"}
        asked = self.headers.get("Range")
        if not asked:
            return 200, content, headers
        first, _, last = asked.removeprefix("bytes=").partition("-")
        if not first:
            start, stop = max(len(content) - int(last), 0), len(content)
        else:
            start, stop = int(first), min(int(last or len(content)) + 1, len(content))
        if start >= len(content):
            raise _Refused(416)
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        return 206, content[start:stop], headers

    def _found(self, name):
        if name not in self.server.objects:
            raise _Refused(404)
        return self.server.objects[name]

    def _check(self, name):
        """Raises `_Refused` if the preconditions of the request do not hold."""
        generation = self.server.objects.get(name, (b"", 0))[1]
        if int(self.query.get("ifGenerationMatch", generation)) != generation:
            raise _Refused(412)
        if int(self.query.get("ifGenerationNotMatch", -1)) == generation:
            raise _Refused(304)

    def _store(self, name, content):
        self._check(name)
        self.server.objects[name] = content, next(self.server.generations)
        return self._metadata(name)

    def _metadata(self, name):
        content, generation = self.server.objects[name]
        now = "2026-01-01T00:00:00.000Z"
        return {
            "kind": "storage#object",
            "name": name,
            "bucket": BUCKET,
            "generation": str(generation),
            "metageneration": "1",
            "size": str(len(content)),
            "md5Hash": base64.b64encode(hashlib.md5(content).digest()).decode(),
            "timeCreated": now,
            "updated": now,
            "contentType": "application/octet-stream",
        }

    def _list(self):
        prefix, delimiter = self.query.get("prefix", ""), self.query.get("delimiter")
        names, prefixes = [], set()
        for name in sorted(self.server.objects):
            if not name.startswith(prefix):
                continue
            head, found, _ = name[len(prefix) :].partition(delimiter or "\0")
            if found:
                prefixes.add(prefix + head + delimiter)
            elif name >= self.query.get("startOffset", "") and name < self.query.get(
                "endOffset", "\U0010ffff"
            ):
                names.append(name)
        items = [self._metadata(name) for name in names]
        return {"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)}

    def _upload(self):
        kind = self.query["uploadType"]
        if kind == "media":
            return 200, self._store(self.query["name"], self.content), {}
        if kind == "multipart":
            head = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
            message = email.parser.BytesParser(policy=email.policy.HTTP).parsebytes(
                head + self.content
            )
            described, content = message.iter_parts()
            name = json.loads(described.get_payload(decode=True))["name"]
            return 200, self._store(name, content.get_payload(decode=True)), {}
        if "upload_id" not in self.query:
            number = str(len(self.server.uploads))
            name = self.query.get("name") or json.loads(self.content)["name"]
            self._check(name)
            self.server.uploads[number] = name, bytearray()
            url = f"http://localhost:{self.server.server_port}{self.path}&upload_id={number}"
            return 200, {}, {"Location": url}
        name, received = self.server.uploads[self.query["upload_id"]]
        received += self.content
        if self.headers.get("Content-Range", "").endswith("/*"):
            return 308, b"", {"Range": f"bytes=0-{len(received) - 1}"}
        return 200, self._store(name, bytes(received)), {}
