"""The files of a plain tar, by offset: of every archive in it, with links followed, and without
hidden files.
"""

from __future__ import annotations

import itertools
import os
import posixpath
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

BLOCK, CHUNK = 512, 1 << 20
# The places of a header's fields.
NAME = slice(100)
SIZE = slice(124, 136)
SUM = slice(148, 156)
TYPE = 156
PREFIX = 345
SPARSE = "is stored as a sparse file; write the tar without --sparse"
_HIDDEN = re.compile(
    r"(?:.*/)?(?:\.[^/]+/?|thumbs\.db|desktop\.ini|__MACOSX/.*)", re.DOTALL | re.IGNORECASE
)


class Member(NamedTuple):
    """A file in a tar. `fault` says why its bytes cannot be read, if they cannot."""

    archive: int  # 0, 1 and so on, in a file of several concatenated tars
    name: str
    offset: int  # of its bytes in the file
    size: int
    fault: str | None = None

    def read(self, file: BinaryIO) -> bytes:
        return os.pread(file.fileno(), self.size, self.offset)


class DamagedTar(tarfile.TarError):
    """The file begins as a tar, but is damaged or cut off."""


def is_hidden(name: str) -> bool:
    """Whether this is a file that operating systems add (`._x`, .DS_Store, __MACOSX/, Thumbs.db and
    the like).
    """
    return _HIDDEN.fullmatch(name) is not None


def members(file: BinaryIO) -> Iterator[Member]:
    """The files of a plain tar in order, of all its archives, without hidden ones.

    Raises:
        DamagedTar, tarfile.TarError, OSError: it is no tar, or is cut off or damaged.
    """
    start: int | None = 0
    for archive in itertools.count():
        end = yield from _archive(file, archive, start)
        if (start := _next_block(file, end)) is None:
            return


def _archive(file: BinaryIO, number: int, start: int) -> Iterator[Member]:
    """The files of one archive. Returns the offset of its end mark."""
    file.seek(start)
    known: dict[str, Member] = {}
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for info in _headers(file, tar, start):
            # escaped, so that a name that is not UTF-8 can be shown
            name = info.name.encode(errors="backslashreplace").decode()
            if info.isreg():
                fault = SPARSE if info.issparse() else None
                member = Member(number, name, info.offset_data, info.size, fault)
            elif info.islnk() or info.issym():
                member = _linked(number, name, info, known)
            else:
                continue
            known[posixpath.normpath(info.name)] = member
            if not is_hidden(name):
                yield member
        end = tar.offset
    # tarfile also stops at a header that it cannot read, but a tar ends only at a block of zeros.
    file.seek(end)
    if file.read(BLOCK) != bytes(BLOCK):
        if start and end == start:
            raise DamagedTar(f"damaged tar: what follows its end mark, at byte {start}, is no tar")
        raise DamagedTar("truncated or damaged tar: no end mark after the last member")
    return end


def _headers(file: BinaryIO, tar: tarfile.TarFile, at: int) -> Iterator[tarfile.TarInfo]:
    """The members of `tar`, whose first header is at `at`. Headers of plain files are read here,
    which takes a third of the time; all others, also damaged ones, are left to tarfile.
    """
    tar.firstmember = None  # tarfile has read it already, and would begin with it
    while True:
        file.seek(at)
        # A global header may change what the headers after it say.
        info = None if tar.pax_headers else _plain(file.read(BLOCK))
        if info is not None:
            info.offset_data = at + BLOCK
            tar.offset = info.offset_data + -(-info.size // BLOCK) * BLOCK
        else:
            file.seek(at)
            tar.offset = at
            tar.members.clear()  # tarfile would keep all of them
            info = tar.next()
        if info is None:
            return
        at = tar.offset
        yield info


def _plain(header: bytes) -> tarfile.TarInfo | None:
    """The member of this header, if it is a file with a short name and nothing else."""
    if len(header) < BLOCK or header[TYPE] != ord("0") or header[PREFIX]:
        return None
    sum_ = sum(header) - sum(header[SUM]) + 8 * ord(" ")
    try:
        info = tarfile.TarInfo(header[NAME].partition(b"\0")[0].decode())
        info.size = int(header[SIZE].rstrip(b" \0"), 8)
        whole = int(header[SUM].rstrip(b" \0"), 8) == sum_
    except ValueError:
        return None
    return info if whole and info.size >= 0 else None


def _linked(number: int, name: str, info: tarfile.TarInfo, known: dict[str, Member]) -> Member:
    """The member of a link: it has the bytes of its target, which must come before it
    in the tar.
    """
    folder = posixpath.dirname(info.name) if info.issym() else ""
    target = known.get(posixpath.normpath(posixpath.join(folder, info.linkname)))
    if target is not None:
        return target._replace(name=name)
    fault = (
        f"is a link to {info.linkname!r}, which is not before it in this tar; write the tar with"
        " --dereference"
    )
    return Member(number, name, 0, 0, fault)


def _next_block(file: BinaryIO, at: int) -> int | None:
    """The offset of the first block from `at` on that is not all zeros; None if there is none."""
    while True:
        file.seek(at)
        if not (chunk := file.read(CHUNK)):
            return None
        if rest := chunk.lstrip(b"\0"):
            return at + (len(chunk) - len(rest)) // BLOCK * BLOCK
        at += len(chunk)


def read_at(shard: Path, offset: int, size: int) -> bytes:
    """Bytes of a member of `shard`."""
    with shard.open("rb") as file:
        return os.pread(file.fileno(), size, offset)
