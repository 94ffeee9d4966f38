"""The files of a folder behind a URL, as fsspec lists and reads them: tried again where that helps, and always of one version."""

from __future__ import annotations

import errno
import os
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeVar

from pivot_megatron.errors import RunError, UserError

T = TypeVar("T")

PAUSES = (0.5, 2.0, 6.0)
"""Seconds before each further try, up to half of it less, so that ranks do not come back all at once. Drivers try again too."""

CONNECTIONS = 32

_VERSIONS = ("ETag", "etag", "generation", "md5Hash", "mtime", "LastModified", "last_modified", "updated", "created")
_LASTING = (FileNotFoundError, IsADirectoryError, NotADirectoryError, FileExistsError)
_LASTING_CODES = (errno.EINVAL, errno.EPERM, errno.ENOSYS, errno.ENAMETOOLONG)
_PASSING = (
    "aiohttp.client_exceptions.ClientError",
    "botocore.exceptions.HTTPClientError",
    "botocore.exceptions.ConnectionError",
)


@dataclass(frozen=True)
class File:
    """Its size in bytes, and what changes when its content does, as its file system tells: an ETag, else a time."""

    size: int
    version: str


class RemoteFiles:
    """The files right below `url`, as they were when this was made. For any thread; a copy in another process connects anew.

    Raises UserError where there is no folder to list: an unknown protocol, a missing package, no such bucket, no access; and
    RunError where the answer does not come.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._listing: list[dict[str, Any]] = []
        self._connected: tuple[int, Any, str] | None = None
        try:
            self._listing = tried(url, self._listed)
        except (UserError, RunError):
            raise
        except FileNotFoundError as error:
            raise UserError(f"{url}: expected a folder of shards, found none ({_line(error)})") from None
        except ImportError as error:
            raise UserError(f"{url}: {_line(error)}; run: pip install 'pivot-megatron[remote]'") from None
        except Exception as error:  # what is wrong with a URL or its options, every driver tells in its own way
            raise UserError(f"{url}: expected a URL that can be listed, found: {_line(error)}") from None
        self.files: Mapping[str, File] = {
            entry["name"].rpartition("/")[2]: _file(entry) for entry in self._listing if entry["type"] == "file"
        }

    def fetch(self, name: str, offset: int, size: int) -> bytes:
        """A range of bytes. Raises RunError where the file has gone or is another by now, UserError where access is refused."""
        what = f"{self._url}/{name}"
        try:
            return tried(
                f"{what}: bytes {offset} to {offset + size}",
                lambda: self._once(name, offset, size),
                lambda: self._require_same(name),
            )
        except (UserError, RunError):
            raise
        except FileNotFoundError:
            raise RunError(f"{what}: expected it as when the run began, found no such file") from None
        except Exception as error:
            raise RunError(f"{what}: bytes {offset} to {offset + size}: {_line(error)}") from None

    def _listed(self) -> list[dict[str, Any]]:
        fs, root = self._file_system()
        entries: list[dict[str, Any]] = fs.ls(root, detail=True)
        # Web servers list names alone.
        return [
            one if one.get("size") is not None or one["type"] != "file" else fs.info(one["name"]) for one in entries
        ]

    def _once(self, name: str, offset: int, size: int) -> bytes:
        fs, root = self._file_system()
        if _is_s3(fs):
            # What s3fs opens it reads with If-Match: one request, and refused where the object is another by now.
            with fs.open(f"{root}/{name}", "rb", cache_type="none") as file:
                file.seek(offset)
                data: bytes = file.read(size)
        else:
            data = fs.cat_file(f"{root}/{name}", start=offset, end=offset + size)
            self._require_same(name)
        if len(data) != size:
            raise EOFError(f"expected {size} bytes, found {len(data)}")
        return data

    def _require_same(self, name: str) -> None:
        """Raises RunError where the file is not the one that was listed."""
        fs, root = self._file_system()
        if _is_s3(fs):
            now = _file(fs.info(f"{root}/{name}", refresh=True))
        else:
            fs.invalidate_cache()
            now = _file(fs.info(f"{root}/{name}"))
        if now != (then := self.files[name]):
            raise RunError(
                f"{self._url}/{name}: changed since the run began: expected {then.size} bytes of version {then.version}, "
                f"found {now.size} of {now.version}; put it back, or start the run again with the index of what is there now"
            )

    def _file_system(self) -> tuple[Any, str]:
        """fsspec's, and the folder's path in it. One for each process: its event loop is a thread, which no fork takes along."""
        if self._connected is None or self._connected[0] != os.getpid():
            from fsspec.core import url_to_fs

            fs, root = url_to_fs(self._url, skip_instance_cache=True)
            root = root.rstrip("/")
            if _is_s3(fs):
                fs.config_kwargs.setdefault("max_pool_connections", CONNECTIONS)  # botocore's own 10 hold loaders up
                if self._listing:
                    fs.dircache[root] = self._listing  # what it opens is then what was listed, without a request
            self._connected = os.getpid(), fs, root
        return self._connected[1:]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_connected": None}


def tried(what: str, attempt: Callable[[], T], look: Callable[[], None] | None = None) -> T:
    """`attempt()`, again after a pause where what went wrong may pass. `look` may find, and raise, the cause.

    Raises RunError where it does not pass, UserError where access is refused, and else what `attempt` does.
    """
    for pause in (*PAUSES, None):
        try:
            return attempt()
        except (UserError, RunError):
            raise
        except PermissionError as error:
            raise UserError(f"{what}: access refused ({_line(error)}); look at the credentials") from None
        except Exception as error:
            if look is not None:
                _looked(look)
            if not _passes(error):
                raise
            if pause is None:
                raise RunError(f"{what}: {_line(error)} (tried {len(PAUSES) + 1} times)") from None
        time.sleep(pause * random.uniform(0.5, 1))
    raise AssertionError("the last try returns or raises")


def _looked(look: Callable[[], None]) -> None:
    try:
        look()
    except RunError:
        raise
    except Exception:  # no better cause than the one there is
        return


def _passes(error: Exception) -> bool:
    if isinstance(error, OSError):
        return not isinstance(error, _LASTING) and error.errno not in _LASTING_CODES
    # Drivers' packages may not be there to be imported.
    kinds = {f"{kind.__module__}.{kind.__name__}" for kind in type(error).__mro__}
    return isinstance(error, EOFError) or not kinds.isdisjoint(_PASSING)


def _file(entry: Mapping[str, Any]) -> File:
    value = next((entry[name] for name in _VERSIONS if entry.get(name)), "")
    if isinstance(value, datetime):  # listings and single look-ups do not agree on how to say a time
        value = value.timestamp()
    return File(int(entry["size"]), str(value).strip('"'))


def _is_s3(fs: Any) -> bool:
    return "s3" in (fs.protocol if isinstance(fs.protocol, tuple | list) else (fs.protocol,))


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
