"""Writing a file so that others see either the old one or the whole new one."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from types import TracebackType
from typing import IO


class AtomicFile:
    """A temporary file beside ``path`` that takes its name on :meth:`commit`.

    As a context manager it removes the temporary file unless it was committed. A process that is
    killed leaves it: its name begins with a dot and ends in ``.partial``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
        # Not tempfile: that gives mode 0600 whatever the umask.
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
        try:
            descriptor = os.open(self._temporary, flags, 0o666)
        except OSError as error:
            error.filename = str(path)  # the name that the caller knows
            raise
        self.file: IO[bytes] = open(descriptor, "w+b")  # noqa: SIM115

    @property
    def temporary(self) -> Path:
        """Where the bytes are until the commit."""
        return self._temporary

    def commit(self) -> None:
        """Brings the bytes to the disk and renames; replaces a file of that name."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        os.replace(self._temporary, self.path)

    def __enter__(self) -> AtomicFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.file.close()
        self._temporary.unlink(missing_ok=True)
