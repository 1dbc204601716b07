"""Supervised fine-tuning: the loop of train.py with other batches, from weights that exist.

    python finetune.py --base_ckpt runs/base                         a run, a Hugging Face folder or a hub id
    python finetune.py --base_ckpt runs/base --lora.rank 8           adapters instead of all weights
    python finetune.py --base_ckpt runs/base --show_data             what would be trained on, and what only read

Only assistants' turns are trained, each with the token that ends it. Conversations are packed into rows in which none
sees another. After the warm-up the rate falls when the validation loss stops falling, and the run ends by `patience`.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chat import ChatBatches, ChatData, chat_windows, prepare_chat
from checkpoint import hash_weights, load_model, read_adapter, resolve, write_adapter
from config import Config, ConfigError, FinetuneConfig, check, check_context, load_config, run_script
from data import show
from distributed import World, ranks, start, stop
from log import Peak, say
from lora import LoraConfig, apply_lora, lora_state
from model import GPT
from routing import MODULES_TO_SAVE, RoutingConfig, penalty_weights
from tokenizer import Tokenizer
from train import LanguageModeling, ResumeError, RoutedModel, Trainer, WholeModel, assemble, main_first, run, written

# Frozen weights have no gradients, packed rows attend to less, and logits are computed for trained tokens alone.
UNCOUNTED = Peak(None, "n/a, since a step of fine-tuning computes less than `flops_per_token` counts")
SECTIONS = ("run", "finetune", "routing", "chat", "lora")  # of the configuration, which decide what comes out


class AdapterOnly(WholeModel):
    """A checkpoint holds what is trained, in PEFT's format, and the name and hash of the base that it belongs to."""

    loaded_by = "PeftModel.from_pretrained loads each"

    def __init__(self, lora: LoraConfig, base: str, base_hash: str):
        self.lora, self.base, self.base_hash = lora, base, base_hash
        if set(lora.modules_to_save) & {"causal_router"}:
            self.loaded_by = RoutedModel.loaded_by

    def tensors(self, model: GPT) -> dict[str, Tensor]:
        return lora_state(model)

    def write(self, trainer: Trainer, tensors: dict[str, Tensor], folder: Path) -> None:
        write_adapter(trainer.model, self.lora, self.base, trainer.tokenizer, folder, base_hash=self.base_hash,
                      state=tensors)  # fmt: skip

    def read(self, folder: Path) -> dict[str, Tensor]:
        stored = read_adapter(folder)
        if stored.base_hash != self.base_hash:
            raise ResumeError(f"{folder}: belongs to base weights {stored.base_hash}, got {self.base} {self.base_hash}")
        return stored.tensors


def base_of(loop: FinetuneConfig) -> Path:
    """The folder of the base, found before anything is written."""
    if loop.base_ckpt is None:
        raise ConfigError("finetune.base_ckpt: expected a run, a Hugging Face folder or a hub id, got nothing")
    return resolve(loop.base_ckpt)


def load_base(
    loop: FinetuneConfig, routing: RoutingConfig | None = None, seed: int = 0
) -> tuple[GPT, Tokenizer, str, str]:
    """(model in fp32, its tokenizer, the folder it came from, the hash of its weights)

    routing: kind dense leaves the base as it is; another gives a dense base routers, drawn from the seed
    """
    folder = base_of(loop)
    torch.manual_seed(seed)
    model, tokenizer = load_model(folder, dtype=torch.float32, routing=routing)
    if tokenizer is None:
        raise ConfigError(f"finetune.base_ckpt: {folder} has no tokenizer")
    check_context(loop, model.cfg)
    base_hash = hash_weights(folder)
    say(f"base       {folder}, weights {base_hash[:16]}")
    name = str(folder.resolve()) if Path(loop.base_ckpt).exists() else loop.base_ckpt  # a hub id stays one
    return model, tokenizer, name, base_hash


def refuse_own_base(cfg: Config) -> None:
    """A run in the folder of its base would prune, or with run.overwrite delete, what it is made from."""
    run = Path(cfg.run.dir).resolve()
    base = Path(cfg.finetune.base_ckpt or "").resolve()
    if cfg.finetune.base_ckpt and run in (base, *base.parents):
        raise ConfigError(f"finetune.base_ckpt: {cfg.finetune.base_ckpt} is in the run folder (--run.dir for another)")


def answer(data: ChatData) -> Any:
    """A sampler: what the model answers to the first validation prompt."""
    example = data.val[0]
    prompt = list(example.ids[: list(example.mask).index(True)])

    def sample(trainer: Trainer) -> str:
        ids = prompt[-(trainer.model.cfg.context - 1) :]
        return written(trainer, ids, sorted(trainer.tokenizer.stop_ids))

    return sample


def open_chat(cfg: Config, data: ChatData, rows: int) -> ChatBatches:
    return ChatBatches(data.train, cfg.finetune.seq_len, rows, cfg.run.seed, pack=cfg.chat.pack)


def with_routers(lora: LoraConfig, kind: str) -> LoraConfig:
    """Adapters leave routers alone: these are trained in full beside them."""
    return replace(lora, modules_to_save=tuple(dict.fromkeys((*lora.modules_to_save, *MODULES_TO_SAVE[kind]))))


def build(cfg: Config, world: World) -> Trainer:
    loop = cfg.finetune
    model, tokenizer, base, base_hash = load_base(loop, cfg.routing, cfg.run.seed)
    data = main_first(world, lambda: prepare_chat(cfg.chat, tokenizer, loop.seq_len))
    say(str(data.audit))
    batches = open_chat(cfg, data, loop.rows)
    windows = chat_windows(data.val, loop.seq_len, loop.eval_tokens)
    torch.manual_seed(cfg.run.seed)
    lora, weights = cfg.lora, {"z_loss": loop.z_loss}
    if model.routing:
        lora, weights = with_routers(lora, model.routing.kind), weights | penalty_weights(model.routing)
    apply_lora(model, lora)
    objective = LanguageModeling(model.to(world.device), weights)
    store = AdapterOnly(lora, base, base_hash) if lora.rank else RoutedModel() if model.routing else WholeModel()
    return assemble(cfg, loop, world, objective, tokenizer, batches, windows, answer(data), store, UNCOUNTED)


def show_data(cfg: Config) -> None:
    """The first rows that a run would see."""
    loop = cfg.finetune
    _, tokenizer, _, _ = load_base(loop)
    data = prepare_chat(cfg.chat, tokenizer, loop.seq_len)
    say(str(data.audit))
    batches = open_chat(cfg, data, rows=min(2, loop.rows))
    text = show(batches(0), tokenizer, sys.stdout.isatty())
    print(text.encode(sys.stdout.encoding or "utf-8", "backslashreplace").decode(sys.stdout.encoding or "utf-8"))


BUILD = {"sft": build}  # by objective


def main(argv: list[str]) -> int:
    cfg = load_config(argv, "finetune")
    if cfg.finetune.show_data:
        show_data(cfg)
        return 0
    check(cfg, ranks(), cfg.finetune)
    base_of(cfg.finetune)
    refuse_own_base(cfg)
    world = start(cfg.run.device)
    try:
        return run(
            cfg,
            world,
            BUILD[cfg.finetune.objective],
            SECTIONS,
            f'python infer.py --ckpt {cfg.run.dir} --instruct --prompt "Write a function"',
        )
    finally:
        stop(world)


if __name__ == "__main__":
    run_script(main)
