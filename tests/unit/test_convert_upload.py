"""Conversion to a URL: invisible until whole, going on after kills, nothing sent twice."""

import json
import re
import shutil
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("moto")
pytest.importorskip("s3fs")
from servers import proxied, put_objects, s3_server

from mbv3dist.convert import upload as upload_module
from mbv3dist.convert.imagefolder import convert_imagefolder
from mbv3dist.convert.records import ConversionError
from mbv3dist.convert.targets import open_target
from mbv3dist.data import remote
from mbv3dist.data.index import list_splits, open_split
from mbv3dist.data.remote import Remote

NUM_PICTURES = 20
URL = "s3://bucket/sets/shapes"


class Killed(BaseException):
    """Like SIGKILL: nothing in the way of it cleans up."""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures") / "src"
    rng = np.random.default_rng(0)
    for number in range(NUM_PICTURES):
        folder = root / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8)).save(folder / f"{number}.jpg")
    return root


@pytest.fixture(scope="module")
def endpoint():
    with s3_server() as endpoint:
        yield endpoint


@pytest.fixture(scope="module")
def proxy(endpoint, tmp_path_factory):
    """A proxy in front of an S3 with a bucket."""
    put_objects(endpoint, "bucket", tmp_path_factory.mktemp("empty"))
    with proxied(endpoint) as (url, proxy), pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", url)
        patch.setenv("AWS_ACCESS_KEY_ID", "test-key-4711")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test-secret-4711")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        yield proxy


@pytest.fixture(scope="module")
def bucket(proxy):
    """The bucket's contents as fsspec shows them."""
    return Remote("s3://bucket")._get_filesystem()


@pytest.fixture
def server(proxy, bucket, tmp_path, monkeypatch):
    """The proxy and an empty bucket; the cache folder is this test's own."""
    monkeypatch.setenv("MBV3DIST_CACHE", str(tmp_path / "cache"))
    bucket.invalidate_cache()
    for name in bucket.find("bucket"):
        bucket.rm_file(name)
    proxy.requests.clear()
    yield proxy
    proxy.rules, proxy.fault_share = None, 0.0


def convert(source, out=URL, **options):
    return convert_imagefolder(
        source, out, **{"split": "train", "workers": 1, "shard_bytes": 20_000, **options}
    )


@pytest.fixture
def objects(bucket):
    """Returns all that is at the URL, by name."""

    def objects():
        bucket.invalidate_cache()
        prefix = URL.removeprefix("s3://") + "/"
        return {name.removeprefix(prefix): bucket.cat_file(name) for name in bucket.find("bucket")}

    return objects


def tree(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def sent(proxy):
    """Paths that were put, in order."""
    return [
        re.sub(r"^/bucket/sets/shapes/|\?.*", "", request.path)
        for request in proxy.requests
        if request.method == "PUT" and request.status == 200 and not request.fault
    ]


@pytest.fixture(scope="module")
def local(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("local") / "out"
    convert(source, out)
    return tree(out)


def test_what_arrives_is_what_a_folder_would_hold(source, server, local, tmp_path, objects):
    report = convert(source)
    assert objects() == local
    assert report.out == URL and report.splits["train"].report == f"{URL}/train.report.json"
    assert sent(server)[-1] == "train.json"
    assert sorted(sent(server)) == sorted(local)  # each once
    assert not list((tmp_path / "cache/convert").iterdir())
    assert list_splits(URL) == ["train"]
    assert len(open_split(URL, "train", cache_dir=tmp_path / "cache")) == NUM_PICTURES
    before = len(sent(server))
    assert convert(source).reused and len(sent(server)) == before
    with pytest.raises(ValueError, match=r"exists at s3://bucket/sets/shapes, made from other inp"):
        convert(source, seed=1)
    with pytest.raises(ValueError, match=r"class list differs from split 'train' in 's3://bucket"):
        convert(source, split="test", classes=["a", "b", "c"])
    convert(source, split="test")
    assert list_splits(URL) == ["test", "train"]


@pytest.mark.parametrize("share", [0.0, 0.5, 0.97])
def test_a_killed_upload_is_invisible_and_goes_on(
    source, server, local, share, monkeypatch, objects
):
    real, allowed = upload_module._send, int(share * len(local))
    monkeypatch.setattr(upload_module, "_THREADS", 1)

    def stop(*args):
        nonlocal allowed
        if allowed == 0:
            raise Killed
        allowed -= 1
        real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(upload_module, "_send", stop)
        with pytest.raises(Killed):
            convert(source)
    assert len(sent(server)) == int(share * len(local))
    assert list_splits(URL) == [] if share else True
    assert "train.json" not in objects()
    convert(source)
    assert objects() == local
    assert sorted(sent(server)) == sorted(local)  # nothing twice


def test_a_file_that_did_not_arrive_whole_is_sent_again(
    source, server, local, monkeypatch, objects, bucket
):
    real = upload_module._send

    def stop_at_the_end(server, folder, path, ledger):
        if path == "train.json":
            raise Killed
        real(server, folder, path, ledger)

    with monkeypatch.context() as patch:
        patch.setattr(upload_module, "_send", stop_at_the_end)
        with pytest.raises(Killed):
            convert(source)
    bucket.pipe_file("bucket/sets/shapes/train/000001.tar", b"cut")
    bucket.rm_file("bucket/sets/shapes/train.labels.npy")
    before = len(sent(server))
    convert(source)
    assert sorted(sent(server)[before:]) == ["train.json", "train.labels.npy", "train/000001.tar"]
    assert objects() == local


def test_a_server_that_fails_is_named_and_the_upload_goes_on(
    source, server, local, monkeypatch, objects
):
    server.rules = lambda method, path: 403 if method == "PUT" and "000001.tar" in path else None
    with pytest.raises(OSError, match=r"000001.tar: cannot write it: the server answered 403") as e:
        convert(source)
    assert "4711" not in str(e.value) and "\n" not in str(e.value)
    assert "train.json" not in objects()
    server.rules = None
    convert(source)
    assert objects() == local and len(sent(server)) == len(local)


def test_faults_are_tried_again(source, server, local, monkeypatch, objects):
    monkeypatch.setattr(remote, "Remote", partial(Remote, backoff_s=0.01))
    server.fault_share = 0.1
    convert(source)
    server.fault_share = 0.0
    assert objects() == local


def test_overwrite_replaces_and_leaves_nothing_of_the_old(source, server, local, objects):
    convert(source, shard_bytes=9000)
    more = objects()
    seen = []

    def watch(method, path):
        if method == "PUT":
            seen.append("train.json" in objects_quietly())
        return None

    def objects_quietly():
        server.rules = None
        try:
            return objects()
        finally:
            server.rules = watch

    server.rules = watch
    convert(source, overwrite=True)
    server.rules = None
    assert not any(seen)  # while files were replaced, there was no split
    assert objects() == local and len(more) > len(local)


def test_parts_share_a_folder_and_the_last_sends(source, server, tmp_path, objects):
    work = tmp_path / "work"
    with pytest.raises(ValueError, match=r"--part with an --out URL needs --work DIR"):
        convert(source, part=(1, 2))
    assert convert(source, part=(2, 2), work=work).waiting == (1,)
    assert not objects()
    report = convert(source, part=(1, 2), work=work)
    assert report.splits["train"].samples == NUM_PICTURES and not work.exists()
    convert(source, tmp_path / "out", part=(1, 2))
    convert(source, tmp_path / "out", part=(2, 2))
    assert objects() == tree(tmp_path / "out")
    # Queued again, also with --overwrite: the others will not come.
    assert convert(source, part=(1, 2), work=work).reused
    assert convert(source, part=(1, 2), work=work, overwrite=True).reused
    assert not work.exists()


def test_what_was_in_the_work_folder_before_stays(source, server, local, tmp_path, objects):
    work = tmp_path / "work"
    convert(source, work)
    convert(source, work=work)
    assert tree(work) == local and objects() == local
    shutil.rmtree(work)
    convert(source, work=work, keep_local=True, overwrite=True)
    assert tree(work) == local and objects() == local


def test_killed_while_the_local_copy_is_removed(
    source, server, local, tmp_path, monkeypatch, objects
):
    def kill(*args, **kwargs):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(upload_module, "shutil", SimpleNamespace(rmtree=kill))
        with pytest.raises(Killed):
            convert(source, work=tmp_path / "work")
    assert (tmp_path / "work/train").is_dir() and objects() == local
    assert convert(source, work=tmp_path / "work").reused
    assert not (tmp_path / "work").exists()


def test_bad_input_is_not_sent(source, server, tmp_path, objects):
    broken = tmp_path / "src"
    shutil.copytree(source, broken)
    (broken / "a/0.jpg").write_bytes(b"")
    with pytest.raises(ConversionError):
        convert(broken, work=tmp_path / "work")
    assert not objects() and (tmp_path / "work/train.failed.json").is_file()
    convert(broken, work=tmp_path / "work", on_error="skip")
    report = json.loads(objects()["train.report.json"])
    assert report["counts"] == {"kept": NUM_PICTURES - 1, "problems_bad_picture": 1}
    with pytest.raises(ConversionError, match=r"listed in s3://.*/train\.report\.json\)"):
        convert(broken)


def test_a_foreign_file_at_the_url_is_left_alone(source, server, objects, bucket):
    bucket.pipe_file("bucket/sets/shapes/notes.json", b"[1, 2]")
    bucket.pipe_file("bucket/sets/shapes/train.json", b'{"annotations": []}')
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r"train.json exists and is no split of mbv3dist"):
            convert(source, overwrite=overwrite)
    bucket.rm_file("bucket/sets/shapes/train.json")
    convert(source)
    assert objects()["notes.json"] == b"[1, 2]"


@pytest.mark.parametrize(
    ("url", "match"),
    [
        ("http://127.0.0.1:1/x", "http URLs can only be read; use an s3, gs or hf URL"),
        ("https://user:sesame@host/x", "https URLs can only be read"),
        ("pipe:cat", "would run a program"),
        ("ftp://host/x", "is no URL that can be read"),
        ("s3://bucket/a::file://b", "chained"),
    ],
)
def test_urls_that_take_nothing(source, url, match):
    with pytest.raises(ValueError, match=match) as caught:
        convert(source, url)
    assert "sesame" not in str(caught.value)


def test_options_for_urls_need_one(source, tmp_path):
    for options in ({"work": tmp_path / "work"}, {"keep_local": True}):
        with pytest.raises(ValueError, match="are for an --out that is a URL"):
            convert(source, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    convert(source, (tmp_path / "out").as_uri())  # file: is a folder
    assert (tmp_path / "out/train.json").is_file()
    from mbv3dist.convert.records import Options

    assert open_target(URL, Options("train", work=tmp_path)).folder == tmp_path
