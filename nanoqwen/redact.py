"""What must not be written or shown: keys of accounts, found by the name of an option, by their form, or because an
environment variable of such a name holds them."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

SECRET_NAME = re.compile(
    r"(api|access|private|secret|auth)_?key|token|passw(or)?d|passphrase|secret|credentials?", re.I
)
# Keys by their issuers' forms; the user and password of an address; values of such a name in an address's query.
SECRET_TEXT = re.compile(
    r"\b(hf_|sk-|ghp_|github_pat_|AKIA)[\w-]{8,}|(?<=://)[^/@\s]+(?=@)"
    rf"|(?<=[?&])(?i:{SECRET_NAME.pattern})=[^\s&#]+"
)
HIDDEN = "***"
SHORTEST = 8  # characters of a value that is looked for: shorter ones are words like "true"


def names_secret(name: str) -> bool:
    """`--hub_token`, `WANDB_API_KEY`; but not `--max_new_tokens`, nor a word that only contains one."""
    last = name.replace("-", "_").rpartition(".")[2]
    return any(match.end() == len(last) for match in SECRET_NAME.finditer(last))


def redact(text: str) -> str:
    """Text without secrets."""
    for name, value in os.environ.items():
        if len(value) >= SHORTEST and names_secret(name):
            text = text.replace(value, HIDDEN)
    return SECRET_TEXT.sub(HIDDEN, text)


def redact_command(words: Sequence[str]) -> list[str]:
    """A command line without secrets, those in options that are named so included."""
    out: list[str] = []
    for previous, word in zip(["", *words], words, strict=False):
        option, equals, _ = word.partition("=")
        if names_secret(option) and equals:
            word = f"{option}={HIDDEN}"
        elif previous.startswith("-") and names_secret(previous) and not word.startswith("-"):
            word = HIDDEN
        out.append(redact(word))
    return out
