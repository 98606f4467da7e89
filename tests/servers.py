"""Servers on 127.0.0.1 for tests of remote data sets, and a proxy in front that misbehaves.

A real nginx serves files if it is installed (Debian's nginx-light; each test that used something
else says so), else a small range server written here; moto_server stands for S3. `FaultProxy`
relays to either and, by a seeded choice, answers 500 or 503, cuts a body in the middle, or delays.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import io
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import tarfile
import threading
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

START_TIMEOUT_S = 60.0
NGINX_CONF = """
daemon off;
master_process off;
pid {folder}/pid;
error_log {folder}/error.log;
events {{ worker_connections 256; }}
http {{
  access_log off;
  sendfile on;
  keepalive_timeout 5;
  client_body_temp_path {folder}; proxy_temp_path {folder}; fastcgi_temp_path {folder};
  uwsgi_temp_path {folder}; scgi_temp_path {folder};
  server {{ listen 127.0.0.1:{port}; root {root}; default_type application/octet-stream; }}
}}
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def find_nginx() -> str | None:
    return shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")


def _wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1.0):
            return
        assert process.poll() is None, f"the server ended with {process.returncode}"
        assert time.monotonic() < deadline, "the server did not come up"
        time.sleep(0.05)


@contextlib.contextmanager
def file_server(root: Path, folder: Path) -> Iterator[tuple[str, str]]:
    """Serves `root` by http; yields its URL and what serves it: "nginx" or "range server"."""
    nginx = find_nginx()
    if nginx is None:
        with _serve(_range_handler(root)) as port:
            yield f"http://127.0.0.1:{port}", "range server"
        return
    folder.mkdir(parents=True)
    port = free_port()
    conf = folder / "nginx.conf"
    conf.write_text(NGINX_CONF.format(folder=folder, port=port, root=root))
    if os.getuid() == 0:  # nginx' single process then keeps root, and may read pytest's folders
        conf.write_text("user root;\n" + conf.read_text())
    process = subprocess.Popen(
        [nginx, "-p", str(folder), "-e", str(folder / "error.log"), "-c", str(conf)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _wait_for(port, process)
        yield f"http://127.0.0.1:{port}", "nginx"
    finally:
        process.terminate()
        process.wait(30)


@contextlib.contextmanager
def s3_server() -> Iterator[str]:
    """An S3 of moto's; yields its endpoint."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _wait_for(port, process)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


def put_objects(endpoint: str, bucket: str, root: Path, *, prefix: str = "") -> None:
    """Makes a bucket of all files of a folder; moto checks no signatures."""
    host = endpoint.removeprefix("http://")
    connection = http.client.HTTPConnection(host, timeout=30)
    paths = [path for path in sorted(root.rglob("*")) if path.is_file()]
    objects = [(prefix + str(path.relative_to(root)), path.read_bytes()) for path in paths]
    for name, body in [("", b""), *objects]:
        headers = {"Authorization": "AWS test:test"}
        connection.request("PUT", f"/{bucket}/{name}".rstrip("/"), body=body, headers=headers)
        reply = connection.getresponse()
        reply.read()
        assert reply.status == 200, (name, reply.status)
    connection.close()


@contextlib.contextmanager
def _serve(handler: type[BaseHTTPRequestHandler]) -> Iterator[int]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    server.block_on_close = False
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield int(server.server_address[1])
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _range_handler(root: Path) -> type[BaseHTTPRequestHandler]:
    class Handler(SimpleHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def __init__(self, *args):
            super().__init__(*args, directory=str(root))

        def do_GET(self):
            path = Path(self.translate_path(self.path))
            asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            if asked is None or not path.is_file():
                super().do_GET()
                return
            data = path.read_bytes()
            start, stop = int(asked[1]), min(int(asked[2]) + 1, len(data))
            if start >= len(data):
                self.send_error(416)
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
            self.send_header("Content-Length", str(stop - start))
            self.end_headers()
            self.wfile.write(data[start:stop])

        def log_message(self, *args):
            pass

    return Handler


@dataclass
class Request:
    """What a proxy saw and did."""

    method: str
    path: str
    range: str
    status: int
    sent: int  # bytes of the body that were passed on
    fault: str  # "", "error", "cut" or "replaced"
    authorization: str | None = None


@dataclass
class FaultProxy:
    """Counts and spoils requests on their way to a server.

    Attributes:
        backend: host:port.
        fault_share: Share of requests that fail.
        latency_s: Longest delay of a request.
        seed: Of the choice.
        rules: Called with (method, path) before all else: a status to answer, "cut", bytes to
            answer instead, or None.
    """

    backend: str
    fault_share: float = 0.0
    latency_s: float = 0.0
    seed: int = 0
    rules: object = None
    requests: list[Request] = field(default_factory=list)
    port: int = 0

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._random = random.Random(self.seed)

    def count(self, pattern: str, *, whole: bool = True) -> Counter[str]:
        """How often each path was fetched to its end (or asked for), of those that match."""
        with self._lock:
            seen = [r for r in self.requests if r.method == "GET" and re.search(pattern, r.path)]
        return Counter(r.path for r in seen if not whole or (r.fault == "" and r.status < 300))

    @property
    def num_faults(self) -> int:
        """How many requests were spoilt."""
        with self._lock:
            return sum(request.fault != "" for request in self.requests)

    def choose(self, method: str, path: str) -> tuple[object, float]:
        """The fault and the delay of the next request."""
        with self._lock:
            fault: object = None
            if self._random.random() < self.fault_share:
                fault = self._random.choice([500, 503, "cut"])
            delay = self._random.random() * self.latency_s
        special = self.rules(method, path) if callable(self.rules) else None
        return (special if special is not None else fault), delay

    def note(self, request: Request) -> None:
        """Remembers a request."""
        with self._lock:
            self.requests.append(request)

    @contextlib.contextmanager
    def running(self) -> Iterator[str]:
        """Yields the URL to use instead of the server's."""
        with _serve(_proxy_handler(self)) as self.port:
            yield f"http://127.0.0.1:{self.port}"


def _proxy_handler(proxy: FaultProxy) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def relay(self):
            size = int(self.headers.get("Content-Length", 0))
            body = self.rfile.read(size) if size else None
            fault, delay = proxy.choose(self.command, self.path)
            time.sleep(delay)
            if isinstance(fault, int):
                self.answer(fault, {}, b"", fault="error")
                return
            if isinstance(fault, bytes):
                self.answer(200, {}, fault, fault="replaced")
                return
            connection = http.client.HTTPConnection(proxy.backend, timeout=30)
            try:
                connection.request(self.command, self.path, body=body, headers=dict(self.headers))
                reply = connection.getresponse()
                data = reply.read()
                headers = dict(reply.getheaders())
            finally:
                connection.close()
            cut = fault == "cut" and self.command == "GET" and reply.status < 300
            self.answer(reply.status, headers, data, fault="cut" if cut else "")

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = relay  # noqa: N815

        def answer(self, status, headers, data, *, fault):
            skipped = ("transfer-encoding", "connection", "server", "date")
            self.send_response(status)
            for name, value in headers.items():
                if name.lower() not in (*skipped, "content-length"):
                    self.send_header(name, value)
            length = headers.get("Content-Length") if self.command == "HEAD" else None
            self.send_header("Content-Length", length or str(len(data)))
            sent = data[: len(data) // 2] if fault == "cut" else data
            asked = self.headers.get("Range", "")
            authorization = self.headers.get("Authorization")
            # Before the headers leave: an answered client may count the requests at once.
            proxy.note(
                Request(self.command, self.path, asked, status, len(sent), fault, authorization)
            )
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(sent)
                self.wfile.flush()
            if fault == "cut":
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)

        def handle(self):
            with contextlib.suppress(ConnectionError, TimeoutError):
                super().handle()

        def log_message(self, *args):
            pass

    return Handler


@contextlib.contextmanager
def proxied(url: str, **options: object) -> Iterator[tuple[str, FaultProxy]]:
    """A `FaultProxy` in front of a server's URL; yields the URL to use and the proxy."""
    proxy = FaultProxy(url.removeprefix("http://"), **options)  # type: ignore[arg-type]
    with proxy.running() as own:
        yield own, proxy


def write_data_set(
    root: Path,
    *,
    num_shards: int,
    samples: int,
    sample_bytes: int,
    split: str = "train",
    seed: int = 7,
) -> Path:
    """A classification data set of random bytes in place of pictures, in the layout of DESIGN 3."""
    (root / split).mkdir(parents=True)
    rng = random.Random(seed)
    rows, sources = [], []
    for number in range(num_shards):
        first = number * samples
        members = []
        for key in range(first, first + samples):
            size = sample_bytes + rng.randrange(sample_bytes // 4)
            members += [(f"{key:09d}.jpg", rng.randbytes(size)), (f"{key:09d}.cls", b"1")]
            sources.append(f"{key:09d}\ta/{key}.jpg\n")
        data = _write_shard(root / split / f"{number:06d}.tar", members)
        digest = hashlib.sha256(data).hexdigest()
        row = {"url": f"{split}/{number:06d}.tar", "nsamples": samples, "filesize": len(data)}
        rows.append({**row, "sha256": digest})
    description = {"wids_version": 1, "shardlist": rows, "task": "classification"}
    description |= {"classes": ["a", "b"], "boxes": 0, "source": [], "seed": 0}
    (root / f"{split}.json").write_text(json.dumps({**description, "mbv3dist_version": "0"}))
    (root / f"{split}.sources.tsv").write_text("".join(sources))
    return root


def _write_shard(path: Path, members: list[tuple[str, bytes]]) -> bytes:
    """Writes a tar with its index and checksums; returns the tar's bytes."""
    buffer = io.BytesIO()
    lines = [f"v1.2 {len(members) // 2}"]
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            part = f"{name[-3:]} {buffer.tell() + tarfile.BLOCKSIZE} {len(data)} {name}"
            if name.endswith(".jpg"):
                lines.append(part)
            else:
                lines[-1] += f" {part}"
            tar.addfile(info, io.BytesIO(data))
    path.write_bytes(buffer.getvalue())
    path.with_suffix(".idx").write_text("\n".join(lines) + "\n")
    checksums = [zlib.crc32(data).to_bytes(4, "little") for _, data in members]
    path.with_suffix(".crc").write_bytes(b"".join(checksums))
    return buffer.getvalue()
