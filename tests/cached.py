"""Support for tests of the cache: a server played by a folder, and what lies in a cache."""

import contextlib
import dataclasses
from collections import Counter

from mbv3dist.data.cache import ShardCache
from mbv3dist.data.cache_folder import locked
from mbv3dist.data.index import open_split
from mbv3dist.data.needs import Need
from mbv3dist.data.remote import Remote, mirror_folder

URL = "http://example.invalid/set"
NUM_SHARDS, SAMPLES = 12, 40


class FolderRemote(Remote):
    """A server played by a folder: counts what is asked for and can be told to fail."""

    def __init__(self, root, url=URL):
        super().__init__(url, retries=2, backoff_s=0.001)
        self.root = root
        self.asked = Counter()
        self.before = lambda path: None

    def _make_filesystem(self):
        return FolderService(self)


class FolderService:
    """The part of fsspec's interface that is used."""

    def __init__(self, remote):
        self.remote = remote

    def invalidate_cache(self):
        """Nothing is kept."""

    def _file(self, url):
        path = url.removeprefix(URL.rpartition("/")[0] + "/").partition("/")[2]
        self.remote.before(path)
        return self.remote.root / path

    def info(self, url):
        """Size of a file."""
        return {"size": self._file(url).stat().st_size}

    def cat_file(self, url, start=None, end=None):
        """Bytes of a file."""
        path = self._file(url)
        self.remote.asked[path.name if start in (0, None) else f"{path.name} {start}"] += 1
        return path.read_bytes()[start:end]


def as_remote(root, folder, url=URL):
    """A split of a folder as if it had been opened by its URL."""
    return dataclasses.replace(
        open_split(root, "train"), remote=url, root=mirror_folder(url, folder)
    )


def files_of(folder):
    return [path for path in folder.rglob("*") if path.is_file() and path.parent != folder]


def bytes_in(folder):
    with locked(folder / ".lock"):  # files come, change and go under it only
        return sum(path.stat().st_size for path in files_of(folder))


def shards_in(folder):
    return sorted(int(path.name[:6]) for path in files_of(folder) if path.suffix == ".tar")


@contextlib.contextmanager
def opened(split, source, folder, **options):
    """A cache that fetches from `source` and is closed at the end."""
    remote = FolderRemote(source, split.remote)
    cache = ShardCache(split, folder=folder, remote=remote, **options)
    try:
        yield cache, remote
    finally:
        cache.close()


def unit_bytes(source, shards):
    """Bytes that the cache holds for some shards."""
    names = [f"{shard:06d}{suffix}" for shard in shards for suffix in (".tar", ".idx", ".crc")]
    return sum((source / "train" / name).stat().st_size for name in names)


def one_at_a_time(order, steps=1):
    return iter([Need(s, n * steps, n * steps + steps - 1, SAMPLES) for n, s in enumerate(order)])
