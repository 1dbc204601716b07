"""Speed and memory: tokens per second of prefill, decode and training, each beside a baseline.

    python bench.py                          the shape of config.yaml, random weights
    python bench.py --preset 30M --device cpu
    python bench.py sft                      fine-tuning: trained tokens per second, and peak memory
    python bench.py sft --peer               the same beside transformers, with peft where --lora.rank is not 0
    python bench.py routing                  routed models beside dense: training, prefill, decode, cache, FLOPs
    python bench.py prepare                  tokenising a corpus, beside tiktoken alone
    python bench.py memory --preset 0.5B --on cuda --fit 24GB    memory of a run, and what to change until it fits

Numbers are medians of several turns in which the variants alternate, so that a slow moment of the machine hits all of
them. Quote ratios rather than times.
"""

from __future__ import annotations

if __name__ == "__main__":  # Ctrl-C while torch is being imported: leave, without a traceback
    import signal

    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from data import Batch, ChatBatches, micro_batches
from model import GPT, IGNORE, KVCache
from nanoqwen import plan
from nanoqwen.chat import Example, prepare_chat
from nanoqwen.config import Config, DataConfig, check, load_config
from nanoqwen.corpus import Reader, open_corpus, prepare, tokenise
from nanoqwen.distributed import World, pick_device, pick_dtype
from nanoqwen.errors import ConfigError, run_script
from nanoqwen.flops import dense_flops_per_token, flops_per_token
from nanoqwen.lora import apply_lora
from nanoqwen.optim import Optimizers, parameter_groups
from nanoqwen.routing import RoutingConfig, build_model, penalty_weights, routing_mode
from nanoqwen.tokenizer import Tiktoken, Tokenizer
from nanoqwen.weights import export, load_model
from train import LanguageModeling, train_step

TURNS = 7
BENCH_VOCAB = 2048  # of the tokenizer for conversations; the model's may be larger, as padded vocabularies are
SFT_STEPS, SFT_TURNS = 10, 3  # optimizer steps of a process, the first of which is not timed; processes of each side
TRAIN_TOKENS = 2048  # of a training step, at least one row
NEW_TOKENS = 16  # decoded in a turn; distinct ones, since routers choose by token
SHORT_CONTEXT, LONG_CONTEXT = 64, 512  # cached tokens; the time of one more should not depend on them


def medians(actions: dict[str, Callable[[], None]], device: torch.device, turns: int = TURNS) -> dict[str, float]:
    """Median seconds of each action; the actions alternate, and the first turn is a warm-up."""
    times: dict[str, list[float]] = {name: [] for name in actions}
    for turn in range(turns + 1):
        for name, action in actions.items():
            started = time.perf_counter()
            action()
            if device.type != "cpu":
                torch.accelerator.synchronize()
            if turn:
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def random_ids(model: GPT, rows: int, tokens: int) -> torch.Tensor:
    return torch.randint(model.cfg.vocab_size, (rows, tokens), device=model.device)


def decode(model: GPT, rows: int, cached: int, dtype: torch.dtype) -> Callable[[], None]:
    """Decode NEW_TOKENS with `cached` tokens in the cache."""
    ids = random_ids(model, rows, cached)
    cache = KVCache(model.cfg, rows, dtype, length=cached + NEW_TOKENS)

    @torch.no_grad()
    def run() -> None:
        if not cache.lengths[0]:
            model(ids, cache=cache)
        for column in ids[:, :NEW_TOKENS].split(1, dim=1):
            model(column, cache=cache)
        cache.crop(cached)

    return run


def prefill(model: GPT, tokens: int) -> Callable[[], None]:
    """One forward over a row: also what each new token would cost without a cache."""
    ids = random_ids(model, 1, tokens)

    @torch.no_grad()
    def run() -> None:
        model(ids, cache=KVCache(model.cfg, 1, length=tokens))

    return run


def train_rows(seq_len: int) -> int:
    return max(1, TRAIN_TOKENS // seq_len)


def train(cfg: Config, device: torch.device, dtype: torch.dtype) -> Callable[[], None]:
    """One optimizer step, by the train_step of train.py."""
    model = build_model(cfg.model, cfg.routing).to(device).train()
    objective = LanguageModeling(model, penalty_weights(cfg.routing))
    optimizers = Optimizers(parameter_groups(model, cfg.train), cfg.train, model.routing)
    ids = random_ids(model, train_rows(cfg.train.seq_len), cfg.train.seq_len + 1)
    autocast = torch.autocast(device.type, dtype) if dtype != torch.float32 else nullcontext()
    scaler, alone = torch.amp.GradScaler(device.type, enabled=False), World(0, 0, 1, device)
    micros = [Batch(ids[:, :-1], ids[:, 1:], None)]

    def run() -> None:
        train_step(objective, optimizers, micros, alone, clip=1.0, scaler=scaler, autocast=autocast)

    return run


def speed(argv: list[str]) -> None:
    """Rates of one shape, and ratios that tell whether the cache works."""
    cfg = load_shape(argv, "train", usage_of(""))
    check(cfg)
    device = pick_device(cfg.run.device)
    dtype, reason = pick_dtype(cfg.run.dtype, device)
    torch.manual_seed(cfg.run.seed)
    model = GPT(cfg.model).to(device, dtype).eval()
    length = min(LONG_CONTEXT, cfg.model.context - NEW_TOKENS)
    actions = {
        "decode, short": decode(model, 1, SHORT_CONTEXT, dtype),
        "decode, long": decode(model, 1, length, dtype),
        "decode, long, batch 8": decode(model, 8, length, dtype),
        "prefill": prefill(model, length),
        "train": train(cfg, device, dtype),
    }
    seconds = medians(actions, device)
    train_rate = train_rows(cfg.train.seq_len) * cfg.train.seq_len / seconds["train"]
    result = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "prefill_tokens_per_s": length / seconds["prefill"],
        "decode_tokens_per_s": NEW_TOKENS / seconds["decode, long"],
        "decode_tokens_per_s_batch_8": 8 * NEW_TOKENS / seconds["decode, long, batch 8"],
        "decode_far_over_near": seconds["decode, long"] / seconds["decode, short"],
        "recompute_over_decode": NEW_TOKENS * seconds["prefill"] / seconds["decode, long"],
        "train_tokens_per_s": train_rate,
        "train_gflop_per_s": train_rate * dense_flops_per_token(cfg.model, cfg.train.seq_len) / 1e9,
    }
    print(f"{device}, {str(dtype).removeprefix('torch.')} ({reason}); {length} cached tokens, medians of {TURNS} turns")
    for name, value in result.items():
        print(f"  {name:28} {value:14,.2f}")
    print(json.dumps(result))


# --- fine-tuning, beside transformers and peft ------------------------------------------------------------------------


def sft_batches(cfg: Config, tokenizer: Tokenizer) -> ChatBatches:
    loop = cfg.finetune
    return ChatBatches(prepare_chat(cfg.chat, tokenizer, loop.seq_len).train, loop.seq_len, loop.rows, cfg.run.seed)


def sft_ours(cfg: Config, folder: Path) -> tuple[Callable[[int], None], ChatBatches]:
    """Optimizer steps by train.py's train_step, on packed rows."""
    loop, device = cfg.finetune, pick_device(cfg.run.device)
    model, tokenizer = load_model(folder, dtype=torch.float32)
    batches = sft_batches(cfg, tokenizer)
    apply_lora(model, cfg.lora)
    objective, alone = LanguageModeling(model.to(device).train(), {}), World(0, 0, 1, device)
    optimizers = Optimizers(parameter_groups(model, loop), loop)
    scaler, rows = torch.amp.GradScaler(device.type, enabled=False), plan.micro_rows(cfg, model, loop, alone)

    def step(number: int) -> None:
        micros = micro_batches(batches(number), rows, device)
        train_step(objective, optimizers, micros, alone, clip=loop.clip, scaler=scaler, autocast=nullcontext())

    return step, batches


def sft_peer(cfg: Config, folder: Path) -> tuple[Callable[[int], None], ChatBatches]:
    """The same conversations in the same steps through transformers, padded to the longest like by its collators."""
    import peft
    from transformers import AutoModelForCausalLM

    loop, device = cfg.finetune, pick_device(cfg.run.device)
    _, tokenizer = load_model(folder)
    batches = sft_batches(cfg, tokenizer)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).train()
    if cfg.lora.rank:
        lora = peft.LoraConfig(r=cfg.lora.rank, lora_alpha=cfg.lora.alpha, target_modules=list(cfg.lora.targets))
        model = peft.get_peft_model(model, lora)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=loop.lr, fused=True)

    def step(number: int) -> None:
        rows = [example for row in batches.conversations(number) for example in row]
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


def sft_side(argv: list[str]) -> None:
    """One side in a process of its own, because peak memory is a number of the process. argv: SIDE FOLDER [OPTIONS]"""
    side, folder, *options = argv
    cfg = plan.settle(load_config([*options, f"--base_ckpt={folder}"], "finetune"), "finetune")
    torch.manual_seed(cfg.run.seed)
    device = pick_device(cfg.run.device)
    step, batches = SIDES[side](cfg, Path(folder))
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


def run_side(side: str, folder: Path, argv: list[str]) -> dict[str, float]:
    command = [sys.executable, __file__, "sft-side", side, str(folder), *argv]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{side}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def sft(argv: list[str]) -> None:
    """Trained tokens per second of each side; the sides alternate, each turn in a fresh process."""
    options, argv = split_argv(argv, {"--peer": {"action": "store_true"}})
    cfg = load_shape(argv, "finetune", usage_of("sft [--peer]"))
    turns: dict[str, list[dict[str, float]]] = {side: [] for side in (["ours", "peer"] if options.peer else ["ours"])}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(cfg.finetune.base_ckpt or Path(scratch) / "base")
        if cfg.finetune.base_ckpt is None:  # random weights train at the same speed
            torch.manual_seed(cfg.run.seed)
            export(GPT(cfg.model), prepare(cfg.data, min(cfg.model.vocab_size, BENCH_VOCAB)).tokenizer, folder)
        for _ in range(SFT_TURNS):
            for side, results in turns.items():
                results.append(run_side(side, folder, argv))
    middle = {
        side: {key: statistics.median(turn[key] for turn in results) for key in results[0]}
        for side, results in turns.items()
    }
    for side, result in middle.items():
        print(f"{side}: {result['tokens_per_s']:,.0f} trained tokens/s, peak {result['peak_mb']:,.0f} MB "
              f"({result['grown_mb']:,.0f} MB in training)")  # fmt: skip
    if options.peer:
        speed_ratio, peak_ratio = (middle["ours"][key] / middle["peer"][key] for key in ("tokens_per_s", "peak_mb"))
        print(f"ours / peer: {speed_ratio:.2f} x tokens/s, {peak_ratio:.2f} x peak")
    print(json.dumps(middle))


# --- routed models, beside dense --------------------------------------------------------------------------------------

COLUMNS = ("train_tokens_per_s", "prefill_tokens_per_s", "decode_tokens_per_s", "decode_tokens_per_s_batch_8")


def comma_list(text: str) -> list[str]:
    return text.split(",")


def routing_name(routing: RoutingConfig) -> str:
    return "dense" if routing.kind == "dense" else f"{routing.kind} {routing.share:g}"


def routing(argv: list[str]) -> None:
    """Rates of dense and routed models; all variants of a row length alternate."""
    options, rest = split_argv(
        argv,
        {
            "--kinds": {"type": comma_list, "default": ["mod", "dtf", "tdtf"]},
            "--capacities": {"type": comma_list, "default": ["0.125", "0.25", "0.5", "0.75"]},
            "--lengths": {"type": comma_list, "default": ["1024", "4096"]},
            "--turns": {"type": int, "default": TURNS},
        },
    )
    usage = "routing [--kinds mod,dtf,tdtf] [--capacities 0.125,0.5] [--lengths 1024,4096] [--turns N]"
    cfg = load_shape(rest, "train", usage_of(usage))
    check(cfg)
    device = pick_device(cfg.run.device)
    dtype, reason = pick_dtype(cfg.run.dtype, device)
    dtype_name = str(dtype).removeprefix("torch.")
    print(f"{device}, {dtype_name} ({reason}); medians of {options.turns} turns; x: ratio to dense")
    variants = [replace(cfg.routing, kind="dense")]
    variants += [
        replace(cfg.routing, kind=kind, capacity=float(capacity))
        for kind in options.kinds
        for capacity in options.capacities
    ]
    rows = []
    for length in map(int, options.lengths):
        rows += routing_rows(cfg, variants, length, options.turns, device, dtype)
    print("| tokens | model | train tokens/s | prefill tokens/s | decode tokens/s | at batch 8 | KV MB | used | "
          "MFLOP/token |")  # fmt: skip
    print("| --- " * 9 + "|")
    dense = {row["length"]: row for row in rows if row["name"] == "dense"}
    for row in rows:
        cells = [f"{row[key]:,.0f} ({row[key] / dense[row['length']][key]:.2f} x)" for key in COLUMNS]
        cells += [f"{row['kv_bytes'] / 1e6:.2f}", f"{100 * row['used']:.1f} %", f"{row['flops_per_token'] / 1e6:.1f}"]
        print(f"| {row['length']:,} | {row['name']} | " + " | ".join(cells) + " |")
    print(json.dumps(rows))


def routing_rows(
    cfg: Config, variants: list[RoutingConfig], length: int, turns: int, device: torch.device, dtype: torch.dtype
) -> list[dict[str, Any]]:
    """One row of the table per variant, at rows of `length` tokens."""
    shape = replace(cfg.model, max_position_embeddings=max(cfg.model.max_position_embeddings, length + NEW_TOKENS))
    loop = replace(cfg.train, seq_len=length, batch_tokens=length, micro_batch="auto")
    actions, models = {}, {}
    for variant in variants:
        name = routing_name(variant)
        torch.manual_seed(cfg.run.seed)
        model = models[name] = build_model(shape, variant).to(device, dtype).eval()
        model.routers.float()
        calibrate_on_noise(model, length)
        actions[name, "train"] = train(replace(cfg, model=shape, train=loop, routing=variant), device, dtype)
        actions[name, "prefill"] = prefill(model, length)
        actions[name, "decode"] = decode(model, 1, length, dtype)
        actions[name, "decode, batch 8"] = decode(model, 8, length, dtype)
    seconds = medians(actions, device, turns)
    rows = []
    for variant in variants:
        name = routing_name(variant)
        kv_bytes, used = cache_usage(models[name], length, dtype)
        rows.append({
            "length": length, "name": name, "kv_bytes": kv_bytes, "used": used,
            "train_tokens_per_s": train_rows(length) * length / seconds[name, "train"],
            "prefill_tokens_per_s": length / seconds[name, "prefill"],
            "decode_tokens_per_s": NEW_TOKENS / seconds[name, "decode"],
            "decode_tokens_per_s_batch_8": 8 * NEW_TOKENS / seconds[name, "decode, batch 8"],
            "flops_per_token": flops_per_token(shape, variant, length),
        })  # fmt: skip
    return rows


@torch.no_grad()
def calibrate_on_noise(model: GPT, length: int) -> None:
    """Set causal thresholds on random tokens, so that random weights compute as many tokens as the capacity says."""
    with routing_mode(model, "calibrate"):
        model(random_ids(model, 1, length))


@torch.no_grad()
def cache_usage(model: GPT, length: int, dtype: torch.dtype) -> tuple[int, float]:
    """(bytes of the cache of one row, fraction of the tokens that routed layers compute)"""
    cache = KVCache(model.cfg, 1, dtype, length=length)
    stats = model(random_ids(model, 1, length), cache=cache).stats
    fractions = [float(value) for name, value in stats.items() if name.endswith("selected_fraction")]
    return cache.nbytes, statistics.mean(fractions or [1.0])


# --- tokenising, beside tiktoken --------------------------------------------------------------------------------------

PREPARE_CHARACTERS, PREPARE_TURNS = 32 << 20, 5  # tokenised in a turn; turns


def tokenising_rates(
    cfg: DataConfig, tokenizer: Tokenizer, characters: int = PREPARE_CHARACTERS, turns: int = PREPARE_TURNS
) -> dict[str, float]:
    """Tokens per second of `tokenise`, from files to tokens on disk, and of tiktoken's batch call on texts in memory.

    `ratio` is of medians; `cpu_ratio` compares processor seconds, which hold still where other programs compute too.
    """
    if not isinstance(tokenizer.engine, Tiktoken):
        raise ConfigError(f'tokenizer "{tokenizer.name}": expected one that tiktoken encodes, to compare with it')
    text = open_corpus(cfg)
    inputs = [item for _, group in text.groups for item in group]
    texts = [piece.text for piece in Reader(cfg, inputs, text.split_of, limit=characters)]
    workers = cfg.workers or os.cpu_count() or 1

    def ours() -> None:
        with tempfile.TemporaryDirectory() as folder:
            tokenise(Path(folder), Reader(cfg, inputs, text.split_of, limit=characters), tokenizer, progress=False)

    def alone() -> None:
        tokenizer.engine.encoding.encode_ordinary_batch(texts, num_threads=workers)

    tokens = sum(len(tokenizer.encode_array(text)) for text in texts)
    seconds = [(*wall_and_cpu_seconds(alone), *wall_and_cpu_seconds(ours)) for _ in range(turns)]
    alone_wall, alone_cpu, ours_wall, ours_cpu = map(statistics.median, zip(*seconds, strict=True))
    return {
        "characters": sum(map(len, texts)),
        "tokens": tokens,
        "tiktoken_tokens_per_s": tokens / alone_wall,
        "prepare_tokens_per_s": tokens / ours_wall,
        "ratio": alone_wall / ours_wall,
        "cpu_ratio": alone_cpu / ours_cpu,
    }


def wall_and_cpu_seconds(action: Callable[[], None]) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    action()
    return time.perf_counter() - wall, time.process_time() - cpu


def prepare_speed(argv: list[str]) -> None:
    cfg = load_config(argv, "data", usage="python bench.py prepare [FILE.yaml] [--preset NAME] [--key=value ...]")
    for name, value in tokenising_rates(cfg.data, prepare(cfg.data, cfg.model.vocab_size).tokenizer).items():
        print(f"{name:<22} {value:14,.2f}")


# --- memory, without allocating any -----------------------------------------------------------------------------------


def memory(argv: list[str]) -> None:
    """What a run would need on each device; on a type of device other than this machine's, if --on names one."""
    section = "finetune" if argv[:1] == ["finetune"] else "train"
    options, rest = split_argv(
        argv[1:] if section == "finetune" else argv,
        {"--fit": {}, "--on": {"choices": ("cpu", "cuda", "mps")}, "--ranks": {"type": int, "default": 1}},
    )
    usage = usage_of("memory [finetune] [--fit 24GB] [--on cpu|cuda|mps] [--ranks N]")
    cfg = load_config(rest, section, usage=usage)
    if options.ranks < 1:
        raise ConfigError(f"--ranks: expected 1 or more, got {options.ranks}")
    free_bytes = None if options.fit is None else plan.parse_size(options.fit)
    print(json.dumps(plan.describe(plan.plan_run(cfg, section, options.ranks, options.on, free_bytes))))


# --- command line -----------------------------------------------------------------------------------------------------


def load_shape(argv: list[str], section: str, usage: str) -> Config:
    """The configuration of a model with random weights, whose vocabulary is a number."""
    cfg = load_config(argv, section, usage=usage)
    return replace(cfg, model=plan.model_shape(cfg))


def usage_of(command: str) -> str:
    return " ".join(f"python bench.py {command} [FILE.yaml] [--preset NAME] [--key=value ...]".split())


def split_argv(argv: list[str], options: dict[str, dict[str, Any]]) -> tuple[argparse.Namespace, list[str]]:
    """(this command's own options, the others, which are those of config.yaml)"""
    parser = argparse.ArgumentParser(prog="python bench.py", add_help=False, allow_abbrev=False)
    for name, keywords in options.items():
        parser.add_argument(name, **keywords)
    return parser.parse_known_args(argv)


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "memory": memory, "prepare": prepare_speed, "routing": routing, "sft": sft, "sft-side": sft_side,
}  # fmt: skip


def main(argv: list[str]) -> None:
    if argv and argv[0] in COMMANDS:
        return COMMANDS[argv[0]](argv[1:])
    return speed(argv)


if __name__ == "__main__":
    run_script(main)
