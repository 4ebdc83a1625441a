"""Work that is done, entry by entry, in a file that survives being killed in the middle of an entry.

    with contextlib.closing(Journal("work/checked")) as journal:
        journal.entries                    # what an earlier process had finished
        journal.append(b"...")             # survives this process when the call returns

Entries are framed as TFRecords are: what is behind the last whole one is cut off when the file is opened. A crash of
the machine may take the last entries with it, as nothing waits for the disk: work that is done twice is all it costs.
"""

import struct
import threading

from distfit.data.records import masked_crc

_LENGTH = struct.Struct("<Q")
_CRC = struct.Struct("<I")


class Journal:
    """A file of entries that only grows; `append` may be called from several threads.

    Args:
        path: of the file; made if it is not there.

    Attributes:
        entries: those that were whole when it was opened.
    """

    def __init__(self, path: str) -> None:
        self._file = open(path, "a+b")  # noqa: SIM115 - closed by `close`
        self._lock = threading.Lock()
        self._file.seek(0)
        self.entries, whole = _whole(self._file.read())
        self._file.truncate(whole)

    def append(self, entry: bytes) -> None:
        """Adds an entry."""
        length = _LENGTH.pack(len(entry))
        with self._lock:
            self._file.write(length + _CRC.pack(masked_crc(length)) + entry + _CRC.pack(masked_crc(entry)))
            self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def _whole(data: bytes) -> tuple[list[bytes], int]:
    """The whole entries, and where the last of them ends."""
    entries: list[bytes] = []
    at = 0
    while True:
        start = at + _LENGTH.size + _CRC.size
        header = data[at:start]
        if len(header) < start - at or _CRC.unpack_from(header, _LENGTH.size)[0] != masked_crc(header[: _LENGTH.size]):
            return entries, at
        stop = start + _LENGTH.unpack_from(header)[0]
        entry, crc = data[start:stop], data[stop : stop + _CRC.size]
        if len(crc) < _CRC.size or _CRC.unpack(crc)[0] != masked_crc(entry):
            return entries, at
        entries.append(entry)
        at = stop + _CRC.size
