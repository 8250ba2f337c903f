"""An S3-compatible server for tests, with real HTTP, objects in memory and faults on request.

It knows the requests that pyarrow makes and nothing else. Other servers for tests (moto, through
botocore) need an older python-dateutil than the one to which the project is pinned.
"""

import hashlib
import threading
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import formatdate
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

KEY_ID, SECRET = "test-key", "test-secret"


@dataclass
class Bucket:
    """Objects by key, what was asked for, and what is refused."""

    objects: dict[str, bytes] = field(default_factory=dict)
    written: dict[str, float] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)
    """Method and key of each request that changes something or reads a whole object."""
    refuses: Callable[[str, str], bool] = lambda method, key: False
    """Whether a request (method, key) is denied."""

    def put(self, key: str, content: bytes) -> None:
        """Keep an object."""
        self.objects[key] = content
        self.written[key] = time.time()

    def under(self, prefix: str) -> dict[str, bytes]:
        """Objects by their keys without the prefix; those that only mark a folder are left out."""
        found = {key: content for key, content in self.objects.items() if key.startswith(prefix)}
        return {
            key.removeprefix(prefix): content
            for key, content in found.items()
            if not key.endswith("/")
        }


@dataclass(frozen=True)
class Server:
    """A running server and its one bucket, called `bucket`."""

    url: str
    bucket: Bucket

    @property
    def environment(self) -> dict[str, str]:
        """The environment with the server's address and with credentials."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": KEY_ID,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": "us-east-1",
        }


@contextmanager
def serve() -> Iterator[Server]:
    """A server on a free port of this machine, until the block ends."""
    bucket = Bucket()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, bucket, {}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield Server(f"http://127.0.0.1:{server.server_address[1]}", bucket)
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, bucket: Bucket, uploads: dict[str, dict[int, bytes]], *args: Any) -> None:
        self._bucket = bucket
        self._uploads = uploads
        super().__init__(*args)

    def log_message(self, *args: Any) -> None:
        """Does nothing: tests read `requests`."""

    def _begin(self) -> tuple[str, dict[str, str], bytes] | None:
        """Key, query and body of a request; None if it was answered with an error."""
        split = urlsplit(self.path)
        name, _, key = unquote(split.path).lstrip("/").partition("/")
        query = {
            name: values[0]
            for name, values in parse_qs(split.query, keep_blank_values=True).items()
        }
        body = self._body()
        if f"Credential={KEY_ID}/" not in self.headers.get("Authorization", ""):
            return self._refuse(403, "InvalidAccessKeyId")
        if name != "bucket":
            return self._refuse(404, "NoSuchBucket")
        if self.command != "HEAD" and "list-type" not in query:
            self._bucket.requests.append((self.command, key))
        if self._bucket.refuses(self.command, key):
            return self._refuse(403, "AccessDenied")
        return key, query, body

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b"".join(self._chunks())
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return (
            _unchunked(body) if "aws-chunked" in self.headers.get("Content-Encoding", "") else body
        )

    def _chunks(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def _refuse(self, status: int, code: str) -> None:
        self._answer(
            status, f"<Error><Code>{code}</Code><Message>{code}</Message></Error>".encode()
        )

    def _answer(self, status: int, content: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content_Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_HEAD(self) -> None:
        """Whether a bucket or an object is there, and its size."""
        self._read()

    def do_GET(self) -> None:
        """An object or a range of it, or a list of keys."""
        self._read()

    def _read(self) -> None:
        if (begun := self._begin()) is None:
            return
        key, query, _ = begun
        if not key:
            self._answer(200, self._list(query) if "list-type" in query else b"")
        elif key not in self._bucket.objects:
            self._refuse(404, "NoSuchKey")
        else:
            content = self._bucket.objects[key]
            headers = {
                "ETag": _tag(content),
                "Last_Modified": formatdate(self._bucket.written[key], usegmt=True),
            }
            if (wanted := self.headers.get("Range")) and content:
                first, _, last = wanted.removeprefix("bytes=").partition("-")
                part = content[int(first) : int(last) + 1 if last else None]
                place = f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}"
                self._answer(206, part, Content_Range=place, **headers)
            else:
                self._answer(200, content, **headers)

    def _list(self, query: dict[str, str]) -> bytes:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        found = sorted(key for key in self._bucket.objects if key.startswith(prefix))
        folders = {
            prefix + key[len(prefix) :].split(delimiter)[0] + delimiter
            for key in found
            if delimiter and delimiter in key[len(prefix) :]
        }
        files = [key for key in found if not delimiter or delimiter not in key[len(prefix) :]]
        when = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())
        rows = [
            f"<Contents><Key>{escape(key)}</Key><LastModified>{when}</LastModified>"
            f"<Size>{len(self._bucket.objects[key])}</Size></Contents>"
            for key in files
        ]
        rows += [
            f"<CommonPrefixes><Prefix>{escape(folder)}</Prefix></CommonPrefixes>"
            for folder in sorted(folders)
        ]
        count = f"<KeyCount>{len(rows)}</KeyCount><IsTruncated>false</IsTruncated>"
        return f"<ListBucketResult>{count}{''.join(rows)}</ListBucketResult>".encode()

    def do_PUT(self) -> None:
        """An object, or a part of one."""
        if (begun := self._begin()) is None:
            return
        key, query, body = begun
        if "uploadId" in query:
            self._uploads[query["uploadId"]][int(query["partNumber"])] = body
        else:
            self._bucket.put(key, body)
        self._answer(200, ETag=_tag(body))

    def do_POST(self) -> None:
        """The start and the end of an upload in parts, and deletions of many objects."""
        if (begun := self._begin()) is None:
            return
        key, query, body = begun
        if "uploads" in query:
            upload = f"upload{len(self._uploads)}"
            self._uploads[upload] = {}
            element = "InitiateMultipartUploadResult"
            answer = f"<{element}><UploadId>{upload}</UploadId></{element}>"
        elif "uploadId" in query:
            parts = self._uploads.pop(query["uploadId"])
            self._bucket.put(key, b"".join(parts[number] for number in sorted(parts)))
            answer = "<CompleteMultipartUploadResult><ETag>x</ETag></CompleteMultipartUploadResult>"
        else:
            for element in ET.fromstring(body).iter():
                if element.tag.rpartition("}")[2] == "Key":
                    self._bucket.objects.pop(element.text or "", None)
            answer = "<DeleteResult/>"
        self._answer(200, answer.encode())

    def do_DELETE(self) -> None:
        """Deletes an object, or ends an upload that is not finished."""
        if (begun := self._begin()) is None:
            return
        self._bucket.objects.pop(begun[0], None)
        self._answer(204)


def _tag(content: bytes) -> str:
    return f'"{hashlib.md5(content).hexdigest()}"'


def _unchunked(body: bytes) -> bytes:
    """The content of a body in the AWS SDK's chunks.

    A line with the size comes before each chunk, and checksums come at the end.
    """
    content = b""
    while body:
        line, _, body = body.partition(b"\r\n")
        size = int(line.partition(b";")[0], 16)
        if not size:
            break
        content, body = content + body[:size], body[size + 2 :]
    return content
