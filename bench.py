"""How fast it is: tokens per second of reading, writing and training, each beside what it is compared with.

    python bench.py                          the shape of config.yaml, random weights
    python bench.py --preset 50M --device cpu
    python bench.py sft                      fine-tuning: trained tokens per second, and memory at its peak
    python bench.py sft --peer               and beside it transformers, with peft where --lora.rank is not 0

Figures are medians of several turns in which the things compared alternate, so that a slow moment of the machine hits
all of them. Quote ratios rather than times.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch

from chat import ChatBatches, Example, prepare_chat
from checkpoint import export, load_model
from config import Config, check, load_config, run_script
from corpus import prepare
from data import Batch
from distributed import World, pick_device, pick_dtype
from lora import apply_lora
from model import GPT, IGNORE, KVCache, flops_per_token
from optim import Optimizers, parameter_groups
from plan import micro_rows
from train import LanguageModeling, micro_batches, train_step

TURNS = 7
IDS = 2048  # of the tokenizer that conversations are cut with; the model may have more, as padded vocabularies do
SFT_STEPS, SFT_TURNS = 10, 3  # optimizer steps of a turn, the first of which does not count; processes of each side
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


# --- fine-tuning, beside its peer -------------------------------------------------------------------------------------


def sft_ours(cfg: Config, folder: Path) -> tuple[Callable[[int], None], ChatBatches]:
    """An optimizer step of the real loop, on packed rows."""
    loop, device = cfg.finetune, pick_device(cfg.run.device)
    model, tokenizer = load_model(folder, dtype=torch.float32)
    batches = ChatBatches(prepare_chat(cfg.chat, tokenizer, loop.seq_len).train, loop.seq_len, loop.rows, cfg.run.seed)
    apply_lora(model, cfg.lora)
    objective, alone = LanguageModeling(model.to(device).train(), {}), World(0, 0, 1, device)
    optimizers = Optimizers(parameter_groups(model, loop), loop)
    scaler, rows = torch.amp.GradScaler(device.type, enabled=False), micro_rows(cfg, model, loop, alone)

    def step(number: int) -> None:
        micros = micro_batches(batches(number), rows, device)
        train_step(objective, optimizers, micros, alone, clip=loop.clip, scaler=scaler, autocast=nullcontext())

    return step, batches


def sft_peer(cfg: Config, folder: Path) -> tuple[Callable[[int], None], ChatBatches]:
    """The same conversations in the same steps through transformers, padded to the longest as its collators do."""
    import peft
    from transformers import AutoModelForCausalLM

    loop, device = cfg.finetune, pick_device(cfg.run.device)
    _, tokenizer = load_model(folder)
    batches = ChatBatches(prepare_chat(cfg.chat, tokenizer, loop.seq_len).train, loop.seq_len, loop.rows, cfg.run.seed)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).train()
    if cfg.lora.rank:
        lora = peft.LoraConfig(r=cfg.lora.rank, lora_alpha=cfg.lora.alpha, target_modules=list(cfg.lora.targets))
        model = peft.get_peft_model(model, lora)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=loop.lr, fused=True)

    def step(number: int) -> None:
        rows = [example for row in batches.conversations(number, 0, loop.rows) for example in row]
        model(**padded(rows, device)).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, loop.clip)
        optimizer.step()
        optimizer.zero_grad()

    return step, batches


def padded(rows: list[Example], device: torch.device) -> dict[str, torch.Tensor]:
    longest = max(len(example.ids) for example in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    labels, mask = torch.full_like(ids, IGNORE), torch.zeros_like(ids)
    for row, example in enumerate(rows):
        count = len(example.ids)
        ids[row, :count] = torch.from_numpy(example.ids).long()
        labels[row, :count] = torch.where(torch.from_numpy(example.mask), ids[row, :count], IGNORE)
        mask[row, :count] = 1
    return {name: t.to(device) for name, t in (("input_ids", ids), ("labels", labels), ("attention_mask", mask))}


SIDES = {"ours": sft_ours, "peer": sft_peer}


def sft_side(name: str, folder: Path, argv: list[str]) -> None:
    """One side, in a process of its own, because its peak of memory is read at the end."""
    cfg = load_config(argv, "finetune")
    torch.manual_seed(cfg.run.seed)
    device = pick_device(cfg.run.device)
    step, batches = SIDES[name](cfg, folder)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step(0)
    started, trained = time.perf_counter(), 0
    for number in range(1, SFT_STEPS):
        step(number)
        trained += int((batches(number).targets != IGNORE).sum())
    if device.type != "cpu":
        torch.accelerator.synchronize()
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if device.type == "cuda":
        before, peak = 0, torch.cuda.max_memory_allocated() / 1024
    print(json.dumps({"tokens_per_s": trained / seconds, "peak_mb": peak / 1024, "grown_mb": (peak - before) / 1024}))


def sft(argv: list[str]) -> None:
    """Trained tokens per second of each side, in turn, each in fresh processes."""
    sides = ["ours", "peer"] if "--peer" in argv else ["ours"]
    argv = [word for word in argv if word != "--peer"]
    cfg = load_config(
        argv, "finetune", usage="python bench.py sft [--peer] [FILE.yaml] [--preset NAME] [--key=value ...]"
    )
    found: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(cfg.finetune.base_ckpt or Path(scratch) / "base")
        if cfg.finetune.base_ckpt is None:  # random weights train as fast
            torch.manual_seed(cfg.run.seed)
            export(GPT(cfg.model), prepare(cfg.data, min(cfg.model.vocab_size, IDS)).tokenizer, folder)
        for _ in range(SFT_TURNS):
            for side in sides:
                command = [sys.executable, __file__, "sft-side", side, str(folder), *argv]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    raise RuntimeError(f"{side}: {done.stderr.strip().splitlines()[-1]}")
                found[side].append(json.loads(done.stdout.splitlines()[-1]))
    medians = {
        side: {key: statistics.median(turn[key] for turn in turns) for key in turns[0]} for side, turns in found.items()
    }
    for side, figures in medians.items():
        print(f"{side}: {figures['tokens_per_s']:,.0f} trained tokens/s, peak {figures['peak_mb']:,.0f} MB "
              f"({figures['grown_mb']:,.0f} MB in training)")  # fmt: skip
    if "peer" in medians:
        print(f"ours / peer: {medians['ours']['tokens_per_s'] / medians['peer']['tokens_per_s']:.2f} x tokens/s, "
              f"{medians['ours']['peak_mb'] / medians['peer']['peak_mb']:.2f} x peak")  # fmt: skip
    print(json.dumps(medians))


def main(argv: list[str]) -> None:
    if argv[:1] == ["sft"]:
        return sft(argv[1:])
    if argv[:1] == ["sft-side"]:
        return sft_side(argv[1], Path(argv[2]), argv[3:])
    return speed(argv)


def speed(argv: list[str]) -> None:
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
    rate = step_tokens / seconds["train"]
    result = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "prefill_tokens_per_s": far / seconds["read"],
        "decode_tokens_per_s": 10 / seconds["far"],
        "decode_tokens_per_s_batch_8": 80 / seconds["far8"],
        "decode_far_over_near": seconds["far"] / seconds["near"],
        "recompute_over_decode": 10 * seconds["read"] / seconds["far"],
        "train_tokens_per_s": rate,
        "train_gflop_per_s": rate * flops_per_token(cfg.model, cfg.train.seq_len) / 1e9,
    }
    print(f"{device}, {str(dtype).removeprefix('torch.')} ({reason}); {far} cached tokens, medians of {TURNS} turns")
    for name, value in result.items():
        print(f"  {name:28} {value:14,.2f}")
    print(json.dumps(result))


if __name__ == "__main__":
    run_script(main)
