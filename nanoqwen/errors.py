"""Exit codes, the errors that carry them, and how to talk to a terminal.

    0  done                      5  run folder busy      75  stopped by a signal and saved
    1  a defect of the program   6  disk                130  interrupted: 128 + SIGINT
    2  configuration             7  not finite          141  the reader has left: 128 + SIGPIPE
    3  data                      8  out of memory
    4  no usable checkpoint

What the user can mend is one line on stderr; only a defect shows a traceback.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from tqdm import tqdm

DEFECT, OUT_OF_MEMORY, PREEMPTED, INTERRUPTED, NO_READER = 1, 8, 75, 130, 141


# --- words for a terminal ---------------------------------------------------------------------------------------------

# C0 but tab and newline, DEL, C1, and the marks that turn the direction of writing.
_UNSAFE = (set(range(0xA0)) - set(range(0x20, 0x7F)) - {0x09, 0x0A}) | {
    *(0x061C, 0x200E, 0x200F),
    *range(0x202A, 0x202F),
    *range(0x2066, 0x206A),
}
_ESCAPES = {code: f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" for code in _UNSAFE}


def escape_terminal(text: str) -> str:
    """`text` with what could steer a terminal spelled out."""
    return text.translate(_ESCAPES)


def one_line(text: str) -> str:
    """Text on one line, its control and other unprintable characters escaped: a terminal would obey them."""
    line = " ".join(text.splitlines())
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in line)


def say(text: str) -> None:
    """A line for the person, from the main rank alone, on stderr, above the progress bar if there is one."""
    if os.environ.get("RANK", "0") == "0":
        tqdm.write(escape_terminal(text), file=sys.stderr)
        sys.stderr.flush()


def warn(text: str) -> None:
    say(f"warning: {text}")


# --- errors -----------------------------------------------------------------------------------------------------------


class UserError(Exception):
    """What the user can mend, in one line: what, where, expected, got."""

    exit_code = DEFECT

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class ConfigError(UserError):
    exit_code = 2


class WorldError(UserError):
    """Ranks and devices that do not go together."""

    exit_code = 2


class LoraError(UserError, ValueError):
    """Adapters that do not fit a model."""

    exit_code = 2


class DataError(UserError):
    exit_code = 3


class CheckpointError(UserError):
    exit_code = 4


class FormatError(CheckpointError):
    """Whole, but written by another version: an older checkpoint is no answer to that."""


class ResumeError(CheckpointError):
    """A checkpoint that this run cannot continue from."""


class NoRunError(CheckpointError):
    """A folder that is not of a run."""


class BusyError(UserError):
    exit_code = 5


class DiskError(UserError):
    exit_code = 6


class NonFiniteError(UserError, FloatingPointError):
    exit_code = 7


class Preempted(UserError):
    exit_code = PREEMPTED


def exit_code_of(error: BaseException) -> int:
    """What a script leaves with after an error; DEFECT is one of the program itself, which deserves its traceback."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    if is_out_of_memory(error):
        return OUT_OF_MEMORY
    if isinstance(error, FloatingPointError):
        return NonFiniteError.exit_code
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskError.exit_code
    return getattr(error, "exit_code", DEFECT)


def is_out_of_memory(error: BaseException) -> bool:
    """On any device: torch has one class for CUDA and plain RuntimeErrors for the others."""
    if isinstance(error, RuntimeError):
        return bool(re.search(r"out of memory|can't allocate memory|not enough memory", str(error)))
    return isinstance(error, MemoryError)


def run_script(main: Callable[[list[str]], int | None]) -> NoReturn:
    """Run `main` on the command line and leave with its exit code."""
    try:
        code = main(sys.argv[1:]) or 0
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # all is done; the code shall say so to whoever asks to stop now
        sys.stdout.flush()
    except KeyboardInterrupt:
        code = INTERRUPTED
    except BrokenPipeError:  # the reader has left (`| head`); the last flush of the interpreter must find a file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = NO_READER
    except Exception as error:
        code = exit_code_of(error)
        if code == DEFECT:
            raise
        print(f"error: {one_line(str(error) or type(error).__name__)}", file=sys.stderr)
    sys.exit(code)
