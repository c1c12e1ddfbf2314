"""Files on S3 or on a local disk, behind one kind of name: `s3://bucket/key`, or a path.

The standard `AWS_*` variables say which S3 server is meant and who is asking
(`AWS_ENDPOINT_URL` for an S3-compatible server). A bucket is never created here: a mistyped name
should be an error and not a new bucket.
"""

import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pyarrow as pa
from pyarrow import fs

from pipeline.errors import ServiceError, UserError

CONNECT_TIMEOUT_SECONDS = 3.0
REQUEST_TIMEOUT_SECONDS = 30.0
MAX_ATTEMPTS = 4


def is_s3(uri: str) -> bool:
    """Whether `uri` names something on S3."""
    return uri.startswith("s3://")


def s3_endpoint() -> str:
    """Returns the address of the S3 server that the environment names, for messages."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "Amazon S3"


@cache
def _s3_filesystem(endpoint: str, process: int) -> fs.S3FileSystem:
    # One client a process and endpoint: a client of a parent process does not survive a fork.
    del process
    return fs.S3FileSystem(
        endpoint_override=None if endpoint == "Amazon S3" else endpoint,
        connect_timeout=CONNECT_TIMEOUT_SECONDS,
        request_timeout=REQUEST_TIMEOUT_SECONDS,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=MAX_ATTEMPTS),
    )


def open_filesystem(uri: str) -> tuple[fs.FileSystem, str]:
    """Returns the file system that holds `uri`, and the path of `uri` in it.

    Raises:
        UserError: `uri` has a scheme other than `s3` or `file`.
    """
    if is_s3(uri):
        return _s3_filesystem(s3_endpoint(), os.getpid()), uri.removeprefix("s3://").rstrip("/")
    if "://" in uri and not uri.startswith("file://"):
        raise UserError(f"{uri}: only s3:// addresses and local paths can be read and written; use one of these")
    return fs.LocalFileSystem(), str(Path(uri.removeprefix("file://")).expanduser().absolute())


def absolute(uri: str) -> str:
    """Returns the address that means the same file in every process: local paths are made absolute."""
    return uri.rstrip("/") if is_s3(uri) else open_filesystem(uri)[1]


def join(uri: str, *parts: str) -> str:
    """Returns the address of `parts` below `uri`."""
    return "/".join([uri.rstrip("/"), *parts])


@contextmanager
def explained(action: str, uri: str) -> Iterator[None]:
    """Turns an input/output error into one line that says what failed, where, and after how long.

    A missing file stays a `FileNotFoundError`: only the caller knows what its absence means.

    Raises:
        ServiceError: there was such an error.
    """
    start = time.monotonic()
    try:
        yield
    except FileNotFoundError:
        raise
    except (OSError, pa.ArrowException) as error:
        seconds = time.monotonic() - start
        where = f" (S3 server: {s3_endpoint()})" if is_s3(uri) else ""
        reason = " ".join(str(error).split())
        raise ServiceError(f"cannot {action} {uri}{where}: failed after {seconds:.1f} s: {reason}") from error


def check_reachable(uri: str) -> None:
    """Checks that the server and bucket of `uri` answer, before work is put into what could not be stored.

    Raises:
        UserError: the server does not answer, refuses the keys, or has no such bucket.
    """
    if not is_s3(uri):
        return
    filesystem, path = open_filesystem(uri)
    bucket = path.split("/", 1)[0]
    with explained("reach", f"s3://{bucket}"):
        if filesystem.get_file_info(bucket).type == fs.FileType.NotFound:
            raise UserError(f"there is no bucket s3://{bucket} on S3 server {s3_endpoint()}; create it or name another")


def exists(uri: str) -> bool:
    """Whether a file or folder is there."""
    filesystem, path = open_filesystem(uri)
    with explained("look up", uri):
        return bool(filesystem.get_file_info(path).type != fs.FileType.NotFound)


def read_bytes(uri: str) -> bytes:
    """Returns a file's content.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: the storage cannot be read.
    """
    filesystem, path = open_filesystem(uri)
    # As a file of known size and not as a stream, which would be read from S3 by a request for every small piece.
    with explained("read", uri), filesystem.open_input_file(path) as file:
        return bytes(file.read())


def write_bytes(uri: str, content: bytes) -> None:
    """Writes a file so that a reader sees all of it or none.

    Raises:
        UserError: the storage cannot be written.
    """
    filesystem, path = open_filesystem(uri)
    with explained("write", uri):
        if isinstance(filesystem, fs.LocalFileSystem):
            target = Path(path)
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
            temporary.write_bytes(content)
            temporary.replace(target)
        else:
            with filesystem.open_output_stream(path) as stream:
                stream.write(content)


def list_files(uri: str) -> list[str]:
    """Returns the addresses of all files below a folder, sorted; none if the folder is missing."""
    filesystem, path = open_filesystem(uri)
    with explained("list", uri):
        found = filesystem.get_file_info(fs.FileSelector(path, recursive=True, allow_not_found=True))
    prefix = "s3://" if is_s3(uri) else ""
    return sorted(f"{prefix}{info.path}" for info in found if info.type == fs.FileType.File)


def file_sizes(uri: str) -> dict[str, int]:
    """Returns the sizes in bytes of all files below a folder, by their paths relative to it; none if it is missing."""
    filesystem, path = open_filesystem(uri)
    with explained("list", uri):
        found = filesystem.get_file_info(fs.FileSelector(path, recursive=True, allow_not_found=True))
    return {info.path.removeprefix(f"{path}/"): info.size for info in found if info.type == fs.FileType.File}


def delete_file(uri: str) -> None:
    """Deletes a file; does nothing if it is missing."""
    filesystem, path = open_filesystem(uri)
    with explained("delete", uri):
        if filesystem.get_file_info(path).type != fs.FileType.NotFound:
            filesystem.delete_file(path)


def delete_folder(uri: str) -> None:
    """Deletes a folder and all below it; does nothing if it is missing."""
    filesystem, path = open_filesystem(uri)
    with explained("delete", uri):
        if filesystem.get_file_info(path).type != fs.FileType.NotFound:
            filesystem.delete_dir(path)
