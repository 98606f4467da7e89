"""What the backends of fsspec raise, told apart: worth another try, or not, and why."""

from __future__ import annotations

from mbv3dist.data.urls import redact

# Exceptions of these that are no OSError: connections cut or timed out, unless a status says more.
_NETWORK_MODULES = {"aiohttp", "botocore", "aiobotocore", "requests", "urllib3", "httpx", "google"}


class RemoteError(OSError):
    """A server could not be reached or answered with an error, also after retries."""


class EndedError(RemoteError):
    """A file ends before the bytes that were asked for."""


class ShortBodyError(OSError):
    """A reply held fewer bytes than were asked for."""


def has_ended(error: BaseException) -> bool:
    """Return whether an error says that a file is too short for a range of it."""
    return isinstance(error, EOFError) or _status(error) == 416


def is_absent(error: BaseException) -> bool:
    """Return whether an error says that there is no such file.

    fsspec's http says so of each question that failed, whatever the server answered.
    """
    if not isinstance(error, FileNotFoundError):
        return False
    status = _status(error)
    if status is not None:
        return status in (404, 410)
    return error.__cause__ is None or not is_transient(error.__cause__)


def is_transient(error: BaseException) -> bool:
    """Return whether an error of a filesystem may be gone at the next try."""
    status = _status(error)
    if status is not None:
        return status in (408, 425, 429) or (status >= 500 and status not in (501, 505))
    if isinstance(error, FileNotFoundError) and error.__cause__ is not None:
        return is_transient(error.__cause__)
    final = (FileNotFoundError, PermissionError, IsADirectoryError, ValueError, EOFError)
    if isinstance(error, final):
        return False
    if "Credential" in type(error).__name__:
        return False
    return isinstance(error, OSError) or (
        type(error).__module__.partition(".")[0] in _NETWORK_MODULES
    )


def _status(error: BaseException | None) -> int | None:
    """Return the HTTP status that an error, or the one it came from, carries."""
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        else:
            status = getattr(response, "status_code", None) or getattr(error, "status", None)
            if type(error).__module__.startswith(("gcsfs", "google")):  # elsewhere it is no answer
                status = status or getattr(error, "code", None)
        if isinstance(status, int) and 100 <= status < 600:
            return status
        error = error.__cause__
    return None


def reason_of(error: BaseException) -> str:
    """Return in a few words, without credentials, what went wrong."""
    status = _status(error)
    if status is not None:
        return f"the server answered {status}"
    if isinstance(error, FileNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(redact(str(error)).split())[:200]
    clear = isinstance(error, (ShortBodyError, ValueError, EOFError))
    return text if clear else f"{type(error).__name__} {text}".rstrip()
