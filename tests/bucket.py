"""A file system like a bucket that is mounted as a folder: files can be renamed, folders cannot.

/usr/bin/python3 tests/bucket.py SOURCE MOUNTPOINT     shows SOURCE there until it is terminated

It needs Debian's package python3-fusepy, and runs in the Python that this belongs to.
"""

import errno
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fusepy import FUSE, FuseOSError, Operations


class Bucket(Operations):  # type: ignore[misc]
    """Hands everything to the source folder, but for the renaming of folders."""

    def __init__(self, source: Path) -> None:
        self.source = source

    def __call__(self, operation: str, path: str, *arguments: Any) -> Any:
        """Every operation comes through here."""
        return super().__call__(operation, str(self.source) + path, *arguments)

    def rename(self, old: str, new: str) -> None:
        """Refuse folders."""
        if Path(old).is_dir():
            raise FuseOSError(errno.EPERM)
        os.replace(old, str(self.source) + new)  # noqa: PTH105 (names, as the others)

    def getattr(self, path: str, _: int | None = None) -> dict[str, Any]:
        """What is known about a file."""
        found = os.lstat(path)
        names = ("st_atime", "st_ctime", "st_gid", "st_mode", "st_mtime", "st_nlink", "st_size", "st_uid")
        return {name: getattr(found, name) for name in names}

    def readdir(self, path: str, _: int) -> Iterator[str]:
        """The files in a folder."""
        yield from (".", "..", *os.listdir(path))  # noqa: PTH208

    def create(self, path: str, mode: int) -> int:
        """A new file."""
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, mode)

    def read(self, _: str, size: int, offset: int, handle: int) -> bytes:
        """Bytes of an open file."""
        return os.pread(handle, size, offset)

    def write(self, _: str, content: bytes, offset: int, handle: int) -> int:
        """Bytes for an open file."""
        return os.pwrite(handle, content, offset)

    def truncate(self, path: str, length: int, _: int | None = None) -> None:
        """Cut a file."""
        os.truncate(path, length)

    def fsync(self, _: str, __: int, handle: int) -> None:
        """Bring a file to the disk."""
        os.fsync(handle)

    def release(self, _: str, handle: int) -> None:
        """Close a file."""
        os.close(handle)

    open = staticmethod(os.open)
    mkdir = staticmethod(os.mkdir)
    rmdir = staticmethod(os.rmdir)
    unlink = staticmethod(os.unlink)
    chmod = staticmethod(os.chmod)
    utimens = staticmethod(os.utime)


if __name__ == "__main__":
    FUSE(Bucket(Path(sys.argv[1])), sys.argv[2], foreground=True, nothreads=True)
