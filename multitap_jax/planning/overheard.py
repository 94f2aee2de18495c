"""What native code says to standard error, past Python."""

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator


@contextlib.contextmanager
def overheard(said: list[str]) -> Iterator[None]:
    """Adds to `said` what is written to standard error meanwhile; it is not shown."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with tempfile.TemporaryFile() as file:
            os.dup2(file.fileno(), 2)
            try:
                yield
            finally:
                sys.stderr.flush()
                os.dup2(kept, 2)
                file.seek(0)
                said.append(file.read().decode(errors="replace"))
    finally:
        os.close(kept)
