"""Exit codes, the errors that carry them, and how text is printed on a terminal.

    0  done                      5  run folder busy      75  stopped by a signal and saved
    1  a defect of the program   6  disk                130  interrupted: 128 + SIGINT
    2  configuration             7  not finite          141  output closed: 128 + SIGPIPE
    3  data                      8  out of memory
    4  no usable checkpoint      9  another rank is silent

An error that the user can fix is one line on stderr; only a defect shows a traceback.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import sys
from collections.abc import Callable
from typing import NoReturn, TextIO

from tqdm import tqdm

from nanoqwen.redact import redact

# Of a disk or of what a process may have open; wherever they come up, the program is not to blame.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG, errno.EROFS, errno.EMFILE, errno.ENFILE)
DEFECT, OUT_OF_MEMORY, SILENT, PREEMPTED, INTERRUPTED, NO_READER = 1, 8, 9, 75, 130, 141


# --- text for a terminal ----------------------------------------------------------------------------------------------

# C0 but tab and newline, DEL, C1, and the marks that change the direction of writing.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def escape_terminal(text: str) -> str:
    """`text` with everything that could control a terminal spelled out."""
    return _UNSAFE.sub(lambda char: f"\\x{ord(char[0]):02x}" if char[0] < "\xff" else f"\\u{ord(char[0]):04x}", text)


def one_line(text: str) -> str:
    """Text on one line, with its control and other unprintable characters escaped."""
    line = " ".join(text.splitlines())
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in line)


def say(text: str, file: TextIO | None = None) -> None:
    """Print a line on stderr, or a file, above the progress bar if there is one; on the main rank only."""
    if os.environ.get("RANK", "0") == "0":
        file = sys.stderr if file is None else file
        tqdm.write(escape_terminal(redact(text)), file=file)
        file.flush()


def warn(text: str) -> None:
    say(f"warning: {text}")


# --- errors -----------------------------------------------------------------------------------------------------------


class UserError(Exception):
    """An error that the user can fix, in one line: what, where, expected, got."""

    exit_code = DEFECT

    def __init__(self, message: str) -> None:
        super().__init__(one_line(redact(message)))


class ConfigError(UserError):
    exit_code = 2


class WorldError(UserError):
    """Ranks and devices that do not fit together."""

    exit_code = 2


class LoraError(UserError, ValueError):
    """Adapters that do not fit a model."""

    exit_code = 2


class DataError(UserError):
    exit_code = 3


class CheckpointError(UserError):
    exit_code = 4


class FormatError(CheckpointError):
    """A complete checkpoint of another version of the program; falling back to an older one would be wrong."""


class ResumeError(CheckpointError):
    """A checkpoint that this run cannot continue from."""


class NoRunError(CheckpointError):
    """Not a run folder."""


class BusyError(UserError):
    exit_code = 5


class DiskError(UserError):
    exit_code = 6


class NonFiniteError(UserError, FloatingPointError):
    exit_code = 7


class Preempted(UserError):
    exit_code = PREEMPTED


def exit_code_of(error: BaseException) -> int:
    """The exit code of a script after an error; DEFECT means a bug of the program, which shows its traceback."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    if is_out_of_memory(error):
        return OUT_OF_MEMORY
    if isinstance(error, FloatingPointError):
        return NonFiniteError.exit_code
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        return DiskError.exit_code
    return getattr(error, "exit_code", DEFECT)


def is_out_of_memory(error: BaseException) -> bool:
    """On any device: torch raises a class of its own for CUDA and plain RuntimeErrors elsewhere."""
    if isinstance(error, RuntimeError):
        return bool(re.search(r"out of memory|can't allocate memory|not enough memory", str(error)))
    return isinstance(error, MemoryError)


def run_script(main: Callable[[list[str]], int | None]) -> NoReturn:
    """Run `main` on the command line and leave with its exit code."""
    os.umask(os.umask(0) | 0o022)  # whatever the shell's: no file that others may write
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        code = main(sys.argv[1:]) or 0
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # all is done: a stop now must not change the exit code
        sys.stdout.flush()
    except KeyboardInterrupt:
        code = INTERRUPTED
    except BrokenPipeError:  # `| head` has exited; the interpreter still flushes stdout at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = NO_READER
    except Exception as error:
        code = exit_code_of(error)
        if code == DEFECT:
            raise
        print(f"error: {redact(one_line(str(error) or type(error).__name__))}", file=sys.stderr)
    sys.exit(code)
