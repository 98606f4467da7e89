"""Data sets behind URLs: what is taken, what is asked, what is asked again, what is never said."""

import errno
import hashlib
import logging
import multiprocessing
import os
import sys
import threading
from functools import partial
from pathlib import Path

import pytest
import servers

from mbv3dist.data import remote as remote_module
from mbv3dist.data.idx import DamagedShardError
from mbv3dist.data.remote import (
    Remote,
    RemoteError,
    fetch_metadata,
    mirror_folder,
)

QUICK = {"backoff_s": 0.01, "timeout_s": 10.0}
SECRET = "wJalrXUtnFEMI"  # part of the example key in AWS's documentation


@pytest.fixture
def plain_environment(monkeypatch):
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name.startswith("AWS_"):
            monkeypatch.delenv(name)


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "data"
    (root / "train").mkdir(parents=True)
    (root / "train/000000.tar").write_bytes(bytes(range(256)) * 400)
    (root / "train.json").write_text('{"version": 1}')
    return root


@pytest.fixture
def server(folder, tmp_path, plain_environment):
    with servers.file_server(folder, tmp_path / "server") as (url, _), servers.proxied(url) as pair:
        yield pair


# -- requests -----------------------------------------------------------------------------------


def test_sizes_bytes_and_ranges(server, folder):
    url, proxy = server
    remote = Remote(url, **QUICK)
    data = (folder / "train/000000.tar").read_bytes()
    assert remote.size("train/000000.tar") == len(data)
    assert remote.read("train/000000.tar") == data
    for start, stop in [(0, 1), (5, 900), (len(data) - 3, len(data)), (7, 7)]:
        assert remote.read_range("train/000000.tar", start, stop) == data[start:stop]
    assert remote.exists("train.json")
    assert remote.counts.retries == 0
    assert remote.counts.requests == len(proxy.requests)
    assert sum(r.sent for r in proxy.requests if r.range) < 1000, "ranges are asked for as such"
    assert not remote.exists("val.json")
    for call in (remote.list, partial(remote.upload, folder / "train.json", "x")):
        with pytest.raises(ValueError, match="web server"):
            call()


def test_the_server_that_stands_in_for_nginx(folder, tmp_path, plain_environment, monkeypatch):
    monkeypatch.setattr(servers, "find_nginx", lambda: None)
    data = (folder / "train/000000.tar").read_bytes()
    with servers.file_server(folder, tmp_path / "server") as (url, kind):
        assert kind == "range server"
        remote = Remote(url, **QUICK)
        assert remote.read("train/000000.tar") == data
        assert remote.read_range("train/000000.tar", 5, 900) == data[5:900]
        assert remote.counts.bytes_downloaded == len(data) + 895
        assert remote.size("train/000000.tar") == len(data) and not remote.exists("val.json")
        with pytest.raises(RemoteError, match="416"):
            remote.read_range("train/000000.tar", len(data), len(data) + 5)


@pytest.mark.parametrize("fault", [500, 502, 503, 429, 408, "cut"])
def test_passing_faults_are_tried_again(server, folder, fault):
    url, proxy = server
    left = [fault] * 3
    proxy.rules = lambda method, path: left.pop() if left and method == "GET" else None
    remote = Remote(url, **QUICK)
    assert remote.read("train/000000.tar") == (folder / "train/000000.tar").read_bytes()
    assert remote.counts.retries == 3


@pytest.mark.parametrize(("status", "tries"), [(403, 1), (401, 1), (400, 1), (503, 4)])
def test_lasting_faults_are_one_clear_line(server, status, tries):
    url, proxy = server
    proxy.rules = lambda method, path: status
    remote = Remote(url, retries=3, **QUICK)
    with pytest.raises(RemoteError, match=f"the server answered {status}") as caught:
        remote.read("train/000000.tar")
    assert "train/000000.tar" in str(caught.value) and "\n" not in str(caught.value)
    assert len(proxy.requests) == tries
    proxy.rules = None
    with pytest.raises(FileNotFoundError, match=r"val\.json does not exist"):
        remote.read("val.json")


def test_pauses_grow_and_differ(monkeypatch):
    remote = Remote("http://127.0.0.1:1/x", retries=5, backoff_s=0.5)
    pauses = []
    monkeypatch.setattr(remote._stopped, "wait", pauses.append)
    with pytest.raises(RemoteError, match="after 6 tries"):
        remote.read("train.json")
    assert len(pauses) == 5
    for number, pause in enumerate(pauses):
        assert 0.25 * 2**number <= pause <= 0.5 * 2**number
    assert len({pause / 2**number for number, pause in enumerate(pauses)}) == 5


def test_a_stopped_remote_does_not_wait():
    remote = Remote("http://127.0.0.1:1/x", backoff_s=60.0)
    timer = threading.Timer(0.2, remote.stop)
    timer.start()
    with pytest.raises(RemoteError, match="stopped"):
        remote.read("train.json")
    timer.join()


def test_a_server_without_ranges_is_read_all_the_same(folder, plain_environment, monkeypatch):
    from http.server import SimpleHTTPRequestHandler

    class Quiet(SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(folder))

        def log_message(self, *args):
            pass

    data = (folder / "train/000000.tar").read_bytes()
    monkeypatch.setattr(remote_module, "PART_BYTES", 30_000)
    with servers._serve(Quiet) as port:
        remote = Remote(f"http://127.0.0.1:{port}", **QUICK)
        assert remote.read_range("train/000000.tar", 1000, 2000) == data[1000:2000]
        target = folder / "copy"
        remote.download("train/000000.tar", target, sha256=None, num_bytes=len(data))
        assert target.read_bytes() == data


# -- whole files --------------------------------------------------------------------------------


def test_a_download_is_whole_or_absent(server, folder, tmp_path, monkeypatch):
    url, proxy = server
    monkeypatch.setattr(remote_module, "PART_BYTES", 10_000)
    data = (folder / "train/000000.tar").read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    target = tmp_path / "out.tar"
    remote = Remote(url, **QUICK)
    left = ["cut", 503, "cut"]
    proxy.rules = lambda method, path: left.pop() if left and method == "GET" else None
    remote.download("train/000000.tar", target, sha256=digest, num_bytes=len(data))
    assert target.read_bytes() == data
    sent = sum(request.sent for request in proxy.requests)
    assert sent <= len(data) + 2 * 10_000, "a cut connection costs a part, not all"
    target.unlink()
    with pytest.raises(DamagedShardError, match=r"000000\.tar: its SHA-256 is .* \(3 times\)"):
        remote.download("train/000000.tar", target, sha256="0" * 64, num_bytes=len(data))
    with pytest.raises(DamagedShardError, match=r"has 102400 bytes instead of 110000"):
        remote.download("train/000000.tar", target, sha256=digest, num_bytes=110_000)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "server"]


def test_a_wrong_checksum_on_arrival_is_fetched_once_more(server, folder, tmp_path):
    url, proxy = server
    data = (folder / "train/000000.tar").read_bytes()
    spoiled = [b"\xff" * len(data)]
    proxy.rules = lambda method, path: spoiled.pop() if spoiled and method == "GET" else None
    remote = Remote(url, **QUICK)
    digest = hashlib.sha256(data).hexdigest()
    remote.download("train/000000.tar", tmp_path / "t", sha256=digest, num_bytes=len(data))
    assert (tmp_path / "t").read_bytes() == data


def _read_in_child(remote, queue):
    queue.put(remote.read("train.json"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_reads_on_connections_of_its_own(server):
    url, _ = server
    remote = Remote(url, **QUICK)
    expected = remote.read("train.json")
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_read_in_child, args=(remote, queue))
    child.start()
    assert queue.get(timeout=30) == expected
    child.join(30)
    assert child.exitcode == 0
    assert remote.read("train.json") == expected


# -- credentials --------------------------------------------------------------------------------


def test_credentials_reach_the_server_and_nothing_else(
    folder, tmp_path, caplog, capfd, plain_environment
):
    seen = []

    def rules(method, path):
        seen.append(path)
        return 403 if "forbidden" in path else None

    with (
        servers.file_server(folder, tmp_path / "server") as (url, _),
        servers.proxied(url, rules=rules) as (own, _),
        caplog.at_level(logging.DEBUG),
    ):
        secret_url = own.replace("://", f"://me:{SECRET}@") + f"?X-Amz-Signature={SECRET}%2Fb"
        errors = []
        remote = Remote(secret_url, retries=1, **QUICK)
        assert remote.read("train.json")
        for path in ("forbidden.tar", "missing.tar"):
            with pytest.raises(OSError, match=path) as caught:
                remote.read(path)
            errors.append(caught.value)
        mirror = mirror_folder(secret_url, tmp_path / "cache")
        fetch_metadata(secret_url, ["train.json"], mirror)
        with pytest.raises(ValueError, match="web server"):
            remote.list()
    assert all(f"X-Amz-Signature={SECRET}" in path for path in seen)
    names = [str(path) for path in (tmp_path / "cache").rglob("*")]
    contents = [path.read_text() for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    said = [str(error) for error in errors] + [repr(e.__cause__) for e in errors]
    output = capfd.readouterr()
    for text in [*names, *contents, *said, caplog.text, output.out, output.err, str(mirror)]:
        assert SECRET not in text


def test_basic_authorization_is_sent(folder, tmp_path, plain_environment):
    import base64

    with servers.file_server(folder, tmp_path / "server") as (url, _):
        with servers.proxied(url) as (own, proxy):
            Remote(own.replace("://", "://me:p%40ss@"), **QUICK).read("train.json")
        expected = "Basic " + base64.b64encode(b"me:p@ss").decode()
        assert [request.authorization for request in proxy.requests] == [expected]


# -- other services -----------------------------------------------------------------------------


class StubService:
    """What fsspec makes of gs and hf here: files in a dictionary, and who asked for what."""

    calls: list = []  # noqa: RUF012
    files = {"bucket/set/train.json": b"{}", "datasets/me/set@main/train.json": b"{}"}  # noqa: RUF012
    failures: list = []  # noqa: RUF012

    def __init__(self, **options):
        StubService.options = options

    def invalidate_cache(self):
        """Nothing is kept."""

    def _find(self, url):
        path = url.partition("://")[2]
        StubService.calls.append(url)
        if StubService.failures:
            raise StubService.failures.pop()
        if path not in self.files:
            raise FileNotFoundError(url)
        return self.files[path]

    def info(self, url):
        """Size and version."""
        return {"name": url, "size": len(self._find(url)), "type": "file", "etag": "1"}

    def cat_file(self, url, start=None, end=None, **options):
        """Bytes of a file."""
        return self._find(url)[start:end]

    def ls(self, url, detail):
        """All files below."""
        inside = url.partition("://")[2] + "/"
        names = [name for name in self.files if name.startswith(inside)]
        return [{"name": name, "type": "file"} for name in names]

    def put_file(self, source, url):
        """Adds a file."""
        StubService.files[url.partition("://")[2]] = Path(source).read_bytes()

    def rm_file(self, url):
        """Removes a file."""
        self._find(url)
        del StubService.files[url.partition("://")[2]]


@pytest.mark.parametrize(
    ("url", "protocol"),
    [("gs://bucket/set", "gs"), ("gcs://bucket/set", "gs"), ("hf://datasets/me/set@main", "hf")],
)
def test_gs_and_hf_ask_fsspec_for_the_right_service(url, protocol, tmp_path, monkeypatch):
    import fsspec

    asked = []

    def filesystem(name, **options):
        asked.append(name)
        return StubService(**options)

    monkeypatch.setattr(fsspec, "filesystem", filesystem)
    monkeypatch.setattr(StubService, "files", dict(StubService.files))
    remote = Remote(url, **QUICK)
    StubService.failures = [TimeoutError(), ConnectionResetError()]
    assert remote.read("train.json") == b"{}"
    assert remote.counts.retries == 2
    assert remote.list() == ["train.json"]
    (tmp_path / "a").write_bytes(b"abc")
    remote.upload(tmp_path / "a", "val/000000.tar")
    assert remote.size("val/000000.tar") == 3
    assert remote.read_range("val/000000.tar", 1, 3) == b"bc"
    remote.delete("val/000000.tar")
    assert not remote.exists("val/000000.tar")
    with pytest.raises(FileNotFoundError):
        remote.delete("val/000000.tar")
    mirror = mirror_folder(url, tmp_path / "cache")
    fetch_metadata(url, ["train.json"], mirror)
    assert (mirror / "train.json").read_bytes() == b"{}"
    assert set(asked) == {protocol}
    assert all(call.startswith(url.replace("gcs:", "gcs:")) for call in StubService.calls[-3:])
    StubService.failures = [PermissionError(errno.EACCES, "no")] * 5
    with pytest.raises(RemoteError, match="cannot read it: PermissionError"):
        remote.read("train.json")
    assert len(StubService.failures) == 4, "a refusal is final"
    StubService.failures = []


def test_a_missing_backend_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(ValueError, match="pip install gcsfs") as caught:
        Remote("gs://bucket/set").read("train.json")
    assert "\n" not in str(caught.value)


# -- descriptions -------------------------------------------------------------------------------


def test_descriptions_are_fetched_once_while_unchanged(server, folder, tmp_path):
    url, proxy = server
    mirror = mirror_folder(url, tmp_path / "cache")
    for _ in range(3):
        fetch_metadata(url, ["train.json"], mirror)
    assert proxy.count("train.json") == {"/train.json": 1}
    (folder / "train.json").write_text('{"version": 2, "more": true}')
    fetch_metadata(url, ["train.json"], mirror)
    assert "more" in (mirror / "train.json").read_text()
    os.utime(folder / "train.json", (1, 1))  # same size, another time: another version
    (folder / "train.json").write_text('{"version": 3, "more": true}')
    os.utime(folder / "train.json", (2, 2))
    fetch_metadata(url, ["train.json"], mirror)
    assert '"version": 3' in (mirror / "train.json").read_text()
    (folder / "train.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"train\.json does not exist"):
        fetch_metadata(url, ["train.json"], mirror)
    assert not (mirror / "train.json").exists(), "a copy of what is gone must not be used"


def test_many_threads_fetch_a_description_once(server, tmp_path):
    url, proxy = server
    mirror = mirror_folder(url, tmp_path / "cache")
    threads = [
        threading.Thread(target=fetch_metadata, args=(url, ["train.json"], mirror))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert proxy.count("train.json") == {"/train.json": 1}


def test_a_source_that_cannot_be_reached_is_an_error_though_a_copy_is_there(server, tmp_path):
    url, proxy = server
    mirror = mirror_folder(url, tmp_path / "cache")
    fetch_metadata(url, ["train.json"], mirror)
    proxy.rules = lambda method, path: 403
    with pytest.raises(RemoteError, match="403"):
        fetch_metadata(url, ["train.json"], mirror)
    # One that is out of order for a while is asked again, and is not taken for a missing file.
    left = [503] * 3
    proxy.rules = lambda method, path: left.pop() if left else None
    fetch_metadata(url, ["train.json"], mirror)
    assert not left
