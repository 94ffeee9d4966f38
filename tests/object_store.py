"""An S3 endpoint on loopback: moto's, behind a door that counts what goes through and can refuse."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

BUCKET = "bucket"


@dataclass(frozen=True)
class Request:
    """`sent`: bytes of the answer's body."""

    method: str
    path: str
    range: str
    status: int
    sent: int


@dataclass
class ObjectStore:
    """`refuse`: answers a request in place of the store, with a status and an error code, where it returns one."""

    port: int = 0
    requests: list[Request] = field(default_factory=list)
    refuse: Callable[[str, str], tuple[int, str] | None] = lambda method, path: None

    @property
    def environment(self) -> dict[str, str]:
        """What standard clients read, and nothing of a person's own."""
        return {
            "AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{self.port}",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_MAX_ATTEMPTS": "1",  # one request a try
        }

    def gets(self) -> list[Request]:
        """Requests for objects since the last call."""
        found = [one for one in self.requests if one.method == "GET" and one.path.count("/") > 1]
        self.requests.clear()
        return found

    def upload(self, folder: Path, prefix: str) -> str:
        """Every file of `folder`; returns the URL."""
        import fsspec

        s3 = fsspec.filesystem("s3", skip_instance_cache=True)
        for path in folder.iterdir():
            s3.pipe_file(f"{BUCKET}/{prefix}/{path.name}", path.read_bytes())
        self.requests.clear()
        return f"s3://{BUCKET}/{prefix}"

    def app(self, inner: Callable[..., Iterable[bytes]]) -> Callable[..., Iterable[bytes]]:
        def answer(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
            method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
            statuses: list[int] = []

            def started(status: str, headers: list[tuple[str, str]], *rest: Any) -> Any:
                statuses.append(int(status.split()[0]))
                return start(status, headers, *rest)

            if refused := self.refuse(method, path):
                body = f"<Error><Code>{refused[1]}</Code><Message>as the test wants it</Message></Error>".encode()
                started(f"{refused[0]} refused", [("Content-Type", "text/xml"), ("Content-Length", str(len(body)))])
                chunks = [body]
            else:
                chunks = list(inner(environ, started))
            sent = sum(map(len, chunks)) if method != "HEAD" else 0
            self.requests.append(Request(method, path, environ.get("HTTP_RANGE", ""), statuses[-1], sent))
            return chunks

        return answer


@contextlib.contextmanager
def object_store() -> Iterator[ObjectStore]:
    """With a bucket, and the environment of this process set to reach it."""
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        def log(self, *args: Any) -> None:
            pass

    store = ObjectStore()
    app = store.app(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, app, threaded=True, request_handler=Quiet)
    store.port = server.server_port
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        with mock.patch.dict(os.environ, store.environment):
            import fsspec

            # moto keeps its buckets for as long as the process lives.
            fsspec.filesystem("s3", skip_instance_cache=True).makedirs(BUCKET, exist_ok=True)
            yield store
    finally:
        server.shutdown()
        thread.join()
