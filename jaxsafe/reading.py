"""Files that others made: whatever goes wrong in reading one becomes one line that names it."""

import contextlib
import os
from collections.abc import Iterator


@contextlib.contextmanager
def reading(path: str | os.PathLike, what: str) -> Iterator[None]:
    """What is raised inside becomes a ValueError of one line: that `path` cannot be read as `what`, and why.

    A missing file stays FileNotFoundError, and a lack of memory MemoryError; a ValueError that names the path stays
    as it is. Libraries raise errors of many families at files that hold something else, panics of Rust among them.
    """
    try:
        yield
    except BaseException as error:
        ours = isinstance(error, Exception) or type(error).__name__ == "PanicException"
        named = isinstance(error, ValueError) and str(path) in str(error)
        # A library's own lack of memory is a size that the file claims.
        if not ours or named or isinstance(error, FileNotFoundError) or type(error) is MemoryError:
            raise
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        line = " ".join(reason.split()) or type(error).__name__
        raise ValueError(f"{path} cannot be read as {what}: {line[:300]}") from error
