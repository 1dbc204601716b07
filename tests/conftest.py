"""What every test shares."""

import os

# One thread a process: the models are tiny, and two workers with two threads each fight over two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Nothing is downloaded by a test; a library that tries is told no at once.
os.environ["HF_HUB_OFFLINE"] = "1"

from collections.abc import Iterator
from pathlib import Path

import pytest
import runs
import torch
from corpora import VOCAB

from nanoqwen.config import DataConfig
from nanoqwen.corpus import Prepared, prepare

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    torch.manual_seed(0)


@pytest.fixture
def build(tmp_path: Path):
    """Prepares sources of tmp_path with the byte tokenizer."""

    def run(*train: str, **options: object) -> Prepared:
        options = {"tokenizer": "bytes", "val_fraction": 0.2, "cache_dir": str(tmp_path / "cache")} | options
        sources = tuple(source if ":" in source else str(tmp_path / source) for source in train)
        return prepare(DataConfig(train=sources, **options), VOCAB, progress=False)

    return run


@pytest.fixture
def quiet_datasets(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    datasets.disable_progress_bars()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty short documents, for tiny runs."""
    return runs.write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def starter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[runs.Starter]:
    starter = runs.Starter(tmp_path_factory.mktemp("starts"))
    yield starter
    starter.close()


@pytest.fixture(scope="session")
def reference(corpus: Path, starter: runs.Starter, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny run, never stopped: what every stopped one has to equal to the bit."""
    run = tmp_path_factory.mktemp("runs") / "straight"
    starter.run(*runs.options(corpus, run))
    return run
