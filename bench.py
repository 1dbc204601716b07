"""How fast it is: tokens per second of reading, writing and training, each beside what it is compared with.

    python bench.py                          the shape of config.yaml, random weights
    python bench.py --preset 50M --device cpu

Figures are medians of several turns in which the things compared alternate, so that a slow moment of the machine hits
all of them. Quote ratios rather than times.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext

import torch

from config import Config, check, load_config, run_script
from data import Batch
from distributed import World, pick_device, pick_dtype
from model import GPT, KVCache, flops_per_token
from optim import Optimizers, parameter_groups
from train import LanguageModeling, train_step

TURNS = 7
NEAR, FAR = 64, 512  # cached tokens between which the time of one more should not grow


def medians(actions: dict[str, Callable[[], None]], device: torch.device) -> dict[str, float]:
    """Median seconds of each action, taken in turn, after one turn that does not count."""
    times: dict[str, list[float]] = {name: [] for name in actions}
    for turn in range(TURNS + 1):
        for name, action in actions.items():
            started = time.perf_counter()
            action()
            if device.type != "cpu":
                torch.accelerator.synchronize()
            if turn:
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def decoding(model: GPT, batch: int, cached: int, dtype: torch.dtype) -> Callable[[], None]:
    """Ten tokens behind `cached` ones."""
    device = model.get_input_embeddings().weight.device
    ids = torch.randint(model.cfg.vocab_size, (batch, cached), device=device)
    cache = KVCache(model.cfg, batch, dtype, length=cached + 16)

    @torch.no_grad()
    def run() -> None:
        if not cache.lengths[0]:
            model(ids, cache=cache)
        for _ in range(10):
            model(ids[:, :1], cache=cache)
        cache.crop(cached)

    return run


def reading(model: GPT, tokens: int) -> Callable[[], None]:
    """One forward over a whole row: a prefill, and what each token would cost without a cache."""
    ids = torch.randint(model.cfg.vocab_size, (1, tokens), device=model.get_input_embeddings().weight.device)

    @torch.no_grad()
    def run() -> None:
        model(ids, cache=KVCache(model.cfg, 1, length=tokens))

    return run


def training(cfg: Config, device: torch.device, dtype: torch.dtype) -> Callable[[], None]:
    """One optimizer step of the real loop."""
    model = GPT(cfg.model).to(device).train()
    objective, rows = LanguageModeling(model, {}), max(1, 2048 // cfg.train.seq_len)
    optimizers = Optimizers(parameter_groups(model, cfg.train), cfg.train)
    ids = torch.randint(cfg.model.vocab_size, (rows, cfg.train.seq_len + 1), device=device)
    autocast = torch.autocast(device.type, dtype) if dtype != torch.float32 else nullcontext()
    scaler, alone = torch.amp.GradScaler(device.type, enabled=False), World(0, 0, 1, device)
    micros = [Batch(ids[:, :-1], ids[:, 1:], None)]

    def run() -> None:
        train_step(objective, optimizers, micros, alone, clip=1.0, scaler=scaler, autocast=autocast)

    return run


def main(argv: list[str]) -> None:
    cfg = load_config(argv, "train", usage="python bench.py [FILE.yaml] [--preset NAME] [--key=value ...]")
    check(cfg)
    device = pick_device(cfg.run.device)
    dtype, reason = pick_dtype(cfg.run.dtype, device)
    torch.manual_seed(cfg.run.seed)
    model = GPT(cfg.model).to(device, dtype).eval()
    far = min(FAR, cfg.model.context - 16)
    step_tokens = max(1, 2048 // cfg.train.seq_len) * cfg.train.seq_len
    seconds = medians(
        {
            "near": decoding(model, 1, NEAR, dtype),
            "far": decoding(model, 1, far, dtype),
            "far8": decoding(model, 8, far, dtype),
            "read": reading(model, far),
            "train": training(cfg, device, dtype),
        },
        device,
    )
    speed = step_tokens / seconds["train"]
    result = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "prefill_tokens_per_s": far / seconds["read"],
        "decode_tokens_per_s": 10 / seconds["far"],
        "decode_tokens_per_s_batch_8": 80 / seconds["far8"],
        "decode_far_over_near": seconds["far"] / seconds["near"],
        "recompute_over_decode": 10 * seconds["read"] / seconds["far"],
        "train_tokens_per_s": speed,
        "train_gflop_per_s": speed * flops_per_token(cfg.model, cfg.train.seq_len) / 1e9,
    }
    print(f"{device}, {str(dtype).removeprefix('torch.')} ({reason}); {far} cached tokens, medians of {TURNS} turns")
    for name, value in result.items():
        print(f"  {name:28} {value:14,.2f}")
    print(json.dumps(result))


if __name__ == "__main__":
    run_script(main)
