"""Documents in tar and zip archives, read as streams: nothing is extracted to disk, no name in them becomes a path."""

import ntpath
import stat
import tarfile
import zipfile
from collections.abc import Iterator
from typing import Any, BinaryIO, cast

from crocodil.data.records import Record, Wanted, damage_counted
from crocodil.data.streams import STREAM_ERRORS

TAR_ERRORS = (*STREAM_ERRORS, tarfile.TarError, ValueError, OverflowError)  # numbers in damaged headers
ZIP_ERRORS = (*STREAM_ERRORS, zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError)
MAX_HEADER_BYTES = 2**20
BLOCK_BYTES = 2**17
READABLE_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # zipfile sets no limit to what a step of others yields
ENCRYPTED = 1


def read_tar(stream: BinaryIO, wanted: Wanted, start: int = 0) -> Iterator[tuple[int, str, Record]]:
    """Records of the members of a tar archive; those before any damage are kept.

    Args:
        stream: the archive, uncompressed; it is read once, from its beginning to its end.
        wanted: of each member.
        start: members that are passed over.

    Yields:
        Index of the member, directories and unfit ones counted; ":" and its name; the record.
    """
    with damage_counted(wanted.skipped, *TAR_ERRORS):
        for index, (archive, member) in enumerate(_members(stream)):
            if index < start or member.isdir():
                continue
            if not member.isreg() or not is_safe(member.name):
                wanted.skipped.unsafe += 1
            elif member.size > wanted.max_bytes:
                wanted.skipped.too_large += 1
            elif (record := wanted.of_document(cast(BinaryIO, archive.extractfile(member)).read())) is not None:
                yield index, f":{shown(member.name)}", record


def _members(stream: BinaryIO) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    metered = _MeteredStream(stream)
    with tarfile.open(fileobj=cast(Any, metered), mode="r|", bufsize=BLOCK_BYTES, tarinfo=_StrictHeader) as archive:
        while (member := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined]  # not in typeshed; a TarFile remembers all members
            metered.limit = archive.offset + MAX_HEADER_BYTES
            yield archive, member


class _MeteredStream:
    """Lets a TarFile read up to the end of a member and no more than `MAX_HEADER_BYTES` beyond.

    For the headers of the next one it would read, and keep, as much as a hostile archive tells it to.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._position = 0
        self.limit = MAX_HEADER_BYTES

    def read(self, num_bytes: int) -> bytes:
        content = self._stream.read(num_bytes)
        self._position += len(content)
        if self._position > self.limit + BLOCK_BYTES:
            raise tarfile.ReadError(f"a header of more than {MAX_HEADER_BYTES} bytes")
        return content


class _StrictHeader(tarfile.TarInfo):
    """A TarFile takes a damaged header for the end of the archive; this one tells them apart."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> "_StrictHeader":
        try:
            return super().fromtarfile(tarfile_)  # type: ignore[return-value]  # typeshed: it returns cls
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # not in typeshed; the mark of the end
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from error


def read_zip(file: BinaryIO, wanted: Wanted, start: int = 0) -> Iterator[tuple[int, str, Record]]:
    """Records of the members of a zip archive; a damaged member costs itself alone.

    Args:
        file: the archive; its table of contents is held in memory.
        wanted: of each member.
        start: members that are passed over.

    Yields:
        Index of the member, directories and unfit ones counted; ":" and its name; the record.
    """
    with damage_counted(wanted.skipped, *ZIP_ERRORS), zipfile.ZipFile(file) as archive:
        for index, member in enumerate(archive.infolist()[start:], start):
            if not member.filename.endswith("/") and (record := _of_member(archive, member, wanted)) is not None:
                yield index, f":{shown(member.filename)}", record


def _of_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, wanted: Wanted) -> Record | None:
    kind = stat.S_IFMT(member.external_attr >> 16)
    if kind not in (0, stat.S_IFREG) or not is_safe(member.filename):
        wanted.skipped.unsafe += 1
    elif member.flag_bits & ENCRYPTED or member.compress_type not in READABLE_METHODS:
        wanted.skipped.unreadable += 1
    elif member.file_size > wanted.max_bytes:
        wanted.skipped.too_large += 1
    else:
        with damage_counted(wanted.skipped, *ZIP_ERRORS), archive.open(member) as content:
            return wanted.of_document(content.read(wanted.max_bytes + 1))
    return None


def is_safe(name: str) -> bool:
    """Whether the name of a member stays inside its archive, on every system: no root, no drive, no "..".

    Args:
        name: as the archive has it.
    """
    drive, path = ntpath.splitdrive(name)  # not pathlib, which keeps every name it is given in a table of the process
    path = path.replace("\\", "/")
    return not drive and not path.startswith("/") and ".." not in path.split("/")


def shown(name: str) -> str:
    """A name as records have it: with forward slashes, and "?" for what is no Unicode.

    Args:
        name: of a file or a member, as the system or the archive gives it.
    """
    return name.replace("\\", "/").encode(errors="replace").decode()
