"""URLs of data sets: which are taken, and that no message shows a secret."""

import re
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mbv3dist.data.urls import check_url, is_url, mirror_folder, redact, to_local

SECRET = "wJalrXUtnFEMI"  # part of the example key in AWS's documentation


@pytest.mark.parametrize(
    ("url", "word"),
    [
        ("pipe:curl http://x/y", "run a program"),
        ("pipe:cat /etc/passwd", "run a program"),
        ("PIPE:true", "run a program"),
        ("simplecache::s3://bucket/data", "chained"),
        ("zip://a::file:///tmp/b.zip", "chained"),
        ("file:///tmp::http://x", "chained"),
        ("http://host/x::pipe:ls", "chained"),
        ("ssh://host/data", "is no URL that can be read"),
        ("ftp://host/data", "is no URL that can be read"),
        ("sftp://host/data", "is no URL that can be read"),
        ("data:v1", "./NAME"),
        ("s3:/bucket/data", "bucket"),
        ("http:///data", "host"),
        ("https://", "host"),
        ("s3://bucket/../other", ".."),
        ("http://host/%2e%2e/x", ".."),
        ("s3://key:secret@bucket/data", "credentials"),
        ("s3://bucket/data?versionId=3", "query"),
        ("http://host/a b", "blanks"),
        ("http://host/a\nHost: evil", "blanks"),
        ("http://host/a#b", "%23"),
        ("http://host:99999/a", "valid"),
    ],
)
def test_urls_that_are_refused(url, word):
    with pytest.raises(ValueError, match=re.escape(word)) as caught:
        check_url(url)
    message = str(caught.value)
    assert "\n" not in message
    assert "secret" not in message


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://host:8080/data/", "http://host:8080/data"),
        ("https://user:pass@host/d//?sig=a%2Fb", "https://user:pass@host/d?sig=a%2Fb"),
        ("http://[::1]:80/data", "http://[::1]:80/data"),
        ("s3://bucket", "s3://bucket"),
        ("gs://bucket/a/b/", "gs://bucket/a/b"),
        ("hf://datasets/me/pictures@main/voc", "hf://datasets/me/pictures@main/voc"),
        ("S3://bucket/x", "s3://bucket/x"),
    ],
)
def test_urls_that_are_taken(url, expected):
    assert check_url(url) == expected
    assert check_url(expected) == expected


def test_what_counts_as_a_url():
    for text in ("s3://b", "pipe:x", "ssh://h", "http://h/x", "file:///a::s3://b"):
        assert is_url(text)
    for text in ("data/voc", "/abs", "C:\\data", "C:/data", "./data:v1", "a/b:c", "file:///data"):
        assert not is_url(text)
    assert to_local("file:///data/my%20set") == "/data/my set"
    assert to_local("data/voc") == "data/voc"
    with pytest.raises(ValueError, match="another machine"):
        to_local("file://nas/data")


def test_a_mirror_has_no_credentials_and_survives_new_signatures(tmp_path):
    plain = mirror_folder("https://host/sets/voc", tmp_path)
    assert plain.name.startswith("voc-") and plain.parent == tmp_path
    for other in ("https://me:pass@host/sets/voc?sig=1", "https://host/sets/voc/?sig=2"):
        assert mirror_folder(other, tmp_path) == plain
    assert mirror_folder("https://host/sets/voc2", tmp_path) != plain
    assert mirror_folder("gcs://b/x", tmp_path) == mirror_folder("gs://b/x", tmp_path)
    assert re.fullmatch(r"[A-Za-z0-9._-]+", mirror_folder("s3://b/ä'$(x)", tmp_path).name)


SECRETS = st.text(string.ascii_letters + string.digits + "%+_-.", min_size=8, max_size=30)


@given(secret=SECRETS)
def test_secrets_are_taken_out_of_any_message(secret):
    secret = f"Zq{secret}"
    for text in (
        f"GET https://me:{secret}@host/a failed",
        f"https://{secret}@host/a",
        f"404 for url (https://host/a?X-Amz-Credential=b&X-Amz-Signature={secret})",
        f"aws_secret_access_key={secret}",
        f"{{'Authorization': 'Bearer {secret}'}}",
        f"token: {secret}, status 403",
    ):
        assert secret not in redact(text)


def test_secrets_of_the_environment_are_taken_out(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("HF_TOKEN", "a-token-of-any-form")
    assert redact(f"bad {SECRET} and a-token-of-any-form") == "bad *** and ***"
    harmless = "http://host:80/data/train/000001.tar: the server answered 503, see user@host"
    assert redact(harmless) == harmless


@pytest.mark.parametrize(
    "url",
    [
        "https://h/d?a=x'SECRET",
        "https://h/d'x?a=SECRET",
        "https://us'er:SECRET@h/d",
        'https://h/d?a="b"&c=SECRET)',
    ],
)
def test_quotes_in_a_url_do_not_end_what_is_hidden(url):
    assert "SECRET" not in redact(f"cannot read {url} today") and redact("a b") == "a b"
    assert redact(f"cannot read {url} today").endswith(" today")
