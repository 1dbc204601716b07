"""Text to batches: the corpus that a model is trained on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DataConfig:
    tokenizer: str = "bytes"  # bytes, gpt2, cl100k_base, o200k_base, or a folder with a tokenizer.json
