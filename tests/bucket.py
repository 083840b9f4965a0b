"""A file system like a mounted bucket: files can be renamed, folders cannot.

/usr/bin/python3 tests/bucket.py SOURCE MOUNTPOINT     mounts SOURCE until it is terminated

It needs Debian's package python3-fusepy, and runs in the system's Python.
"""

import errno
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fusepy import FUSE, FuseOSError, Operations


class Bucket(Operations):  # type: ignore[misc]
    """Passes everything to the source folder except renames of folders."""

    def __init__(self, source: Path) -> None:
        self.source = source

    def __call__(self, operation: str, path: str, *arguments: Any) -> Any:
        """Prefix the path of each operation."""
        return super().__call__(operation, str(self.source) + path, *arguments)

    def rename(self, old: str, new: str) -> None:
        """Rename a file; reject folders."""
        if Path(old).is_dir():
            raise FuseOSError(errno.EPERM)
        os.replace(old, str(self.source) + new)  # noqa: PTH105 (names, as the others)

    def getattr(self, path: str, _: int | None = None) -> dict[str, Any]:
        """Return a file's attributes."""
        status = os.lstat(path)
        names = ("st_atime", "st_ctime", "st_gid", "st_mode", "st_mtime", "st_nlink", "st_size")
        return {name: getattr(status, name) for name in (*names, "st_uid")}

    def readdir(self, path: str, _: int) -> Iterator[str]:
        """List a folder."""
        yield from (".", "..", *os.listdir(path))  # noqa: PTH208

    def create(self, path: str, mode: int) -> int:
        """Create a file."""
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, mode)

    def read(self, _: str, size: int, offset: int, handle: int) -> bytes:
        """Read from an open file."""
        return os.pread(handle, size, offset)

    def write(self, _: str, content: bytes, offset: int, handle: int) -> int:
        """Write to an open file."""
        return os.pwrite(handle, content, offset)

    def truncate(self, path: str, length: int, _: int | None = None) -> None:
        """Truncate a file."""
        os.truncate(path, length)

    def fsync(self, _: str, __: int, handle: int) -> None:
        """Flush a file to the disk."""
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
