"""URLs of data sets: which are taken, how they are shown, and where their copies lie."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from mbv3dist.messages import one_line, shown

SCHEMES = ("http", "https", "s3", "gs", "gcs", "hf")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")
_IPV6_HOST = re.compile(r"\[[0-9A-Fa-f:.%]+\]")
_HIDDEN = "***"
_PATTERNS = (
    # user:password@ (or a token alone) before a host; an @ behind a slash is part of a path
    (re.compile(r"://[^/\s@]{1,4000}@"), f"://{_HIDDEN}@"),
    # the query of a URL to the next blank, quotes and all: presigned ones carry the signature there
    (re.compile(r"(://[^\s?]{1,4000}\?)\S+"), rf"\1{_HIDDEN}"),
    # Authorization: Bearer ..., X-Amz-Signature=..., "secret_access_key": "..."
    (
        re.compile(
            r"(?i)((?:authorization|signature|credential|secret|password|token|access_key_id|"
            r"accesskeyid)[\w-]{0,40}['\"]?\s{0,8}[:=]\s{0,8})(['\"]?)(?:(?:basic|bearer)\s{1,8})?"
            r"[^\s'\"&;,)]+"
        ),
        rf"\1\2{_HIDDEN}",
    ),
    (re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{12,}\b"), _HIDDEN),
    (re.compile(r"\bhf_[A-Za-z0-9]{20,}\b"), _HIDDEN),
)
_MAX_MESSAGE = 4000
_SECRET_NAME = re.compile(r"(?i)secret|token|password|access_key|api_key|credential")


def is_url(text: str) -> bool:
    """Return whether a text has a scheme, such as ``s3:``, and is not a path of this machine.

    Windows drives and ``file:///path`` are local (see ``to_local``).
    """
    scheme = _SCHEME.match(text)
    if scheme is None:
        return False
    return scheme.group().lower() != "file:" or "::" in text


def to_local(text: str) -> str:
    """Return the path of a ``file:`` URL, and any other text as it is.

    Raises:
        ValueError: if the URL names another machine.
    """
    if is_url(text) or not text.lower().startswith("file:"):
        return text
    parts = urlsplit(text)
    if parts.netloc not in ("", "localhost"):
        raise ValueError(f"{shown(text)} is on another machine; use file:///PATH or a path")
    return unquote(parts.path)


def check_url(url: str) -> str:
    """Return a data set's URL without a slash at its end.

    Raises:
        ValueError: for schemes other than `SCHEMES`, chained URLs, and URLs that could mean
            something else than a folder; in one line, without credentials.
    """

    def refuse(reason: str) -> ValueError:
        return ValueError(f"{shown(redact(url))} {reason}")

    taken = ", ".join(f"{scheme}://" for scheme in SCHEMES)
    match = _SCHEME.match(url)
    scheme = match.group()[:-1].lower() if match else ""
    if scheme == "pipe":
        raise refuse(f"would run a program, which no URL may; use {taken} or a folder")
    if "::" in _IPV6_HOST.sub("", url):
        raise refuse(f"is a chained URL; name the data set itself, by {taken} or a folder")
    if scheme not in SCHEMES:
        raise refuse(f"is no URL that can be read; use {taken} or, for a local folder, ./NAME")
    if any(character.isspace() or not character.isprintable() for character in url):
        raise refuse("has blanks or control characters; write them as %20 and the like")
    try:
        parts = urlsplit(url)
        host = parts.hostname
        _ = parts.port
    except ValueError as error:
        raise refuse(f"is no valid URL ({one_line(redact(str(error)))})") from None
    if not host or not url[len(scheme) :].startswith("://"):
        raise refuse(f"names no {'host' if scheme.startswith('http') else 'bucket or repository'}")
    if {".", ".."} & set(unquote(parts.path).split("/")):
        raise refuse("has . or .. in its path; write it out")
    if not scheme.startswith("http"):
        if "@" in parts.netloc:
            raise refuse("has credentials in it; give them by the service's environment variables")
        if parts.query:
            raise refuse("has a query; only http(s) URLs may have one")
    if parts.fragment or url.endswith("#"):
        raise refuse("has a # in it; write it as %23")
    query = f"?{parts.query}" if parts.query else ""
    return f"{scheme}://{parts.netloc}{parts.path.rstrip('/')}{query}"


def join_url(url: str, path: str) -> str:
    """Return the URL of a data set's file."""
    if not path:
        return url
    return f"{url}/{quote(path) if url.startswith('http') else path}"


def split_credentials(url: str) -> tuple[str, tuple[str, str] | None, list[tuple[str, str]]]:
    """Return a checked URL without credentials, its user and password, and its query."""
    parts = urlsplit(url)
    base = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
    user = None
    if parts.username is not None:
        user = unquote(parts.username), unquote(parts.password or "")
    return base, user, parse_qsl(parts.query, keep_blank_values=True)


def redact(text: str) -> str:
    """Return a message without user:password@, queries of URLs, keys and tokens.

    A very long one, such as a server's error page, is cut behind a word.
    """
    if len(text) > _MAX_MESSAGE:
        text = f"{text[:_MAX_MESSAGE].rpartition(' ')[0]} ..."
    for name, value in os.environ.items():
        if len(value) >= 8 and _SECRET_NAME.search(name):
            text = text.replace(value, _HIDDEN)
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    return text


def default_cache_dir() -> Path:
    """Return ``$MBV3DIST_CACHE``, or ``mbv3dist`` in the user's cache folder."""
    own = os.environ.get("MBV3DIST_CACHE")
    if own:
        return Path(own)
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "mbv3dist"


def mirror_folder(url: str, cache_dir: Path) -> Path:
    """Return the folder in the cache for a data set's URL.

    Its name has a readable part and a digest of the URL without credentials: the same data set with
    a new signature is the same folder.
    """
    base = re.sub("^gcs:", "gs:", split_credentials(check_url(url))[0])
    digest = hashlib.sha256(base.encode("utf-8")).hexdigest()[:16]
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", base.rpartition("/")[2])[:40].strip(".-")
    return cache_dir / f"{readable or 'data'}-{digest}"
