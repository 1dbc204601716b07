"""How fast it is: tokens per second of reading, writing and training, each beside what it is compared with.

    python bench.py                          the shape of config.yaml, random weights
    python bench.py --preset 50M --device cpu
    python bench.py sft                      fine-tuning: trained tokens per second, and memory at its peak
    python bench.py sft --peer               and beside it transformers, with peft where --lora.rank is not 0
    python bench.py routing                  routed layers beside dense ones: training, prefill, decoding, cache, FLOPs
    python bench.py routing --quality        what they learn: validation loss at equal steps and at equal FLOPs
    python bench.py memory --preset 0.5B --on cuda --fit 24GB    what a run needs, and what to change until it fits

Figures are medians of several turns in which the things compared alternate, so that a slow moment of the machine hits
all of them. Quote ratios rather than times.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from data import Batch, ChatBatches, micro_batches
from model import GPT, IGNORE, KVCache, flops_per_token
from nanoqwen import plan
from nanoqwen.chat import Example, prepare_chat
from nanoqwen.config import Config, check, load_config
from nanoqwen.corpus import prepare
from nanoqwen.distributed import World, pick_device, pick_dtype
from nanoqwen.errors import ConfigError, run_script
from nanoqwen.lora import apply_lora
from nanoqwen.optim import Optimizers, parameter_groups
from nanoqwen.routing import RoutingConfig, build_model, penalty_weights, routed_by
from nanoqwen.routing import flops_per_token as routed_flops
from nanoqwen.weights import export, load_model
from train import LanguageModeling, train_step

TURNS = 7
IDS = 2048  # of the tokenizer that conversations are cut with; the model may have more, as padded vocabularies do
SFT_STEPS, SFT_TURNS = 10, 3  # optimizer steps of a turn, the first of which does not count; processes of each side
NEW = 16  # tokens that are decoded in a turn: other ones each, as routers choose by token
NEAR, FAR = 64, 512  # cached tokens between which the time of one more should not grow


def medians(actions: dict[str, Callable[[], None]], device: torch.device, turns: int = TURNS) -> dict[str, float]:
    """Median seconds of each action, taken in turn, after one turn that does not count."""
    times: dict[str, list[float]] = {name: [] for name in actions}
    for turn in range(turns + 1):
        for name, action in actions.items():
            started = time.perf_counter()
            action()
            if device.type != "cpu":
                torch.accelerator.synchronize()
            if turn:
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def decoding(model: GPT, batch: int, cached: int, dtype: torch.dtype) -> Callable[[], None]:
    """NEW tokens behind `cached` ones."""
    device = model.get_input_embeddings().weight.device
    ids = torch.randint(model.cfg.vocab_size, (batch, cached), device=device)
    cache = KVCache(model.cfg, batch, dtype, length=cached + NEW)

    @torch.no_grad()
    def run() -> None:
        if not cache.lengths[0]:
            model(ids, cache=cache)
        for new in ids[:, :NEW].split(1, dim=1):
            model(new, cache=cache)
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
    model = build_model(cfg.model, cfg.routing).to(device).train()
    objective = LanguageModeling(model, penalty_weights(cfg.routing))
    rows = max(1, 2048 // cfg.train.seq_len)
    optimizers = Optimizers(parameter_groups(model, cfg.train), cfg.train, model.routing)
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
    scaler, rows = torch.amp.GradScaler(device.type, enabled=False), plan.micro_rows(cfg, model, loop, alone)

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


# --- routed layers, beside dense ones ---------------------------------------------------------------------------------


@dataclass
class Variant:
    """One way to route, and what it needs to be measured."""

    routing: RoutingConfig
    length: int

    @property
    def name(self) -> str:
        share = "" if self.routing.kind == "dense" else f" {self.routing.share:g}"
        return f"{self.routing.kind}{share}"


def listed(text: str) -> list[str]:
    return text.split(",")


def routing_options(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """(options of this benchmark, the others, which are those of config.yaml)"""
    parser = argparse.ArgumentParser(prog="python bench.py routing", add_help=False, allow_abbrev=False)
    parser.add_argument("--quality", action="store_true")
    parser.add_argument("--kinds", type=listed, default=["mod", "dtf", "tdtf"])
    parser.add_argument("--capacities", type=listed, default=None)
    parser.add_argument("--lengths", type=listed, default=["1024", "4096"])
    parser.add_argument("--turns", type=int, default=TURNS)
    parser.add_argument("--seeds", type=listed, default=["1337", "1", "2"])
    return parser.parse_known_args(argv)


def variants(cfg: Config, options: argparse.Namespace, length: int) -> list[Variant]:
    shares = [float(share) for share in options.capacities or ["0.125", "0.25", "0.5", "0.75"]]
    ways = [replace(cfg.routing, kind="dense")]
    ways += [replace(cfg.routing, kind=kind, capacity=share) for kind in options.kinds for share in shares]
    return [Variant(way, length) for way in ways]


def routing_speed(argv: list[str]) -> None:
    """Rates of each variant in one run, medians of turns in which all variants alternate."""
    options, rest = routing_options(argv)
    usage = "python bench.py routing [--kinds mod,dtf,tdtf] [--capacities 0.125,0.5] [--lengths 1024,4096] [--turns N]"
    cfg = load_config(rest, "train", usage=f"{usage} [FILE.yaml] [--preset NAME] [--key=value ...]")
    check(cfg)
    device = pick_device(cfg.run.device)
    dtype, reason = pick_dtype(cfg.run.dtype, device)
    print(
        f"{device}, {str(dtype).removeprefix('torch.')} ({reason}); medians of {options.turns} turns; x: beside dense"
    )
    results = [row for text in options.lengths for row in at_length(cfg, options, int(text), device, dtype)]
    columns = ("train_tokens_per_s", "prefill_tokens_per_s", "decode_tokens_per_s", "decode_tokens_per_s_batch_8")
    print("| tokens | model | train tokens/s | prefill tokens/s | decode tokens/s | at batch 8 | KV MB | used | "
          "MFLOP/token |")  # fmt: skip
    print("| --- " * 9 + "|")
    plain = {row["length"]: row for row in results if row["name"] == "dense"}
    for row in results:
        rates = [f"{row[key]:,.0f} ({row[key] / plain[row['length']][key]:.2f} x)" for key in columns]
        rates += [f"{row['kv_bytes'] / 1e6:.2f}", f"{100 * row['used']:.1f} %", f"{row['flops_per_token'] / 1e6:.1f}"]
        print(f"| {row['length']:,} | {row['name']} | " + " | ".join(rates) + " |")
    print(json.dumps(results))


def at_length(
    cfg: Config, options: argparse.Namespace, length: int, device: torch.device, dtype: torch.dtype
) -> list[dict[str, Any]]:
    """The figures of all variants at rows of `length` tokens."""
    shape = replace(cfg.model, max_position_embeddings=max(cfg.model.max_position_embeddings, length + NEW))
    loop = replace(cfg.train, seq_len=length, batch_tokens=length, micro_batch="auto")
    ways, actions, models = variants(cfg, options, length), {}, {}
    for way in ways:
        torch.manual_seed(cfg.run.seed)
        model = models[way.name] = build_model(shape, way.routing).to(device, dtype).eval()
        model.routers.float()
        calibrate_on_noise(model, length)
        own = replace(cfg, model=shape, train=loop, routing=way.routing)
        actions[way.name, "train"] = training(own, device, dtype)
        actions[way.name, "read"] = reading(model, length)
        actions[way.name, "one"] = decoding(model, 1, length, dtype)
        actions[way.name, "eight"] = decoding(model, 8, length, dtype)
    seconds = medians(actions, device, options.turns)
    rows = max(1, 2048 // length) * length
    found = []
    for way in ways:
        nbytes, used = cache_of(models[way.name], length, dtype)
        found.append({
            "length": length, "name": way.name, "kv_bytes": nbytes, "used": used,
            "train_tokens_per_s": rows / seconds[way.name, "train"],
            "prefill_tokens_per_s": length / seconds[way.name, "read"],
            "decode_tokens_per_s": NEW / seconds[way.name, "one"],
            "decode_tokens_per_s_batch_8": 8 * NEW / seconds[way.name, "eight"],
            "flops_per_token": routed_flops(shape, way.routing, length),
        })  # fmt: skip
    return found


@torch.no_grad()
def calibrate_on_noise(model: GPT, length: int) -> None:
    """Random weights on random tokens, so that a causal router computes its capacity's share of them."""
    ids = torch.randint(model.cfg.vocab_size, (1, length), device=model.get_input_embeddings().weight.device)
    with routed_by(model, "calibrate"):
        model(ids, length=length + NEW)


@torch.no_grad()
def cache_of(model: GPT, length: int, dtype: torch.dtype) -> tuple[int, float]:
    """(bytes of the cache of one row, share of the tokens that routed layers computed)"""
    cache = KVCache(model.cfg, 1, dtype, length=length)
    ids = torch.randint(model.cfg.vocab_size, (1, length), device=model.get_input_embeddings().weight.device)
    stats = model(ids, cache=cache).stats
    shares = [float(value) for name, value in stats.items() if name.endswith("selected_fraction")]
    return cache.nbytes, statistics.mean(shares or [1.0])


def routing_quality(argv: list[str]) -> None:
    """Runs of train.py, each in a process and folder of its own, with as many steps and with as many FLOPs as dense."""
    options, rest = routing_options(argv)
    usage = "python bench.py routing --quality [--kinds mod,dtf,tdtf] [--capacities 0.5] [--seeds 1337,1,2]"
    cfg = load_config(rest, "train", usage=f"{usage} [FILE.yaml] [--preset NAME] [--key=value ...]")
    whole = routed_flops(cfg.model, None, cfg.train.seq_len)
    runs = [("dense", "", "steps", cfg.train.steps)]
    for kind in options.kinds:
        for share in options.capacities or ["0.5"]:
            routing = replace(cfg.routing, kind=kind, capacity=float(share))
            equal = round(cfg.train.steps * whole / routed_flops(cfg.model, routing, cfg.train.seq_len))
            runs += [(kind, share, "steps", cfg.train.steps), (kind, share, "FLOPs", max(1, equal))]
    print("| model | equal | steps | val/loss, causal | val/loss, top-k | tokens used | causal BCE / baseline |")
    print("| --- " * 7 + "|", flush=True)
    for kind, share, equal, steps in runs:
        ends = [one_run(rest, kind, share, steps, seed) for seed in options.seeds]
        losses = [spread([end.get(key, end["val/loss"]) for end in ends]) for key in ("val/loss", "val/loss_topk")]
        told = "-"
        if kind != "dense":
            bce = [end["val/router/mean/causal_bce"] / end["val/router/mean/causal_bce_baseline"] for end in ends]
            told = spread(bce)
        used = 100 * statistics.mean(end.get("val/used", 1.0) for end in ends)
        print(f"| {kind} {share} | {equal} | {steps} | {losses[0]} | {losses[1]} | {used:.1f} % | {told} |", flush=True)


def spread(values: list[float]) -> str:
    """Mean and standard deviation over seeds."""
    return f"{statistics.mean(values):.4f} +- {statistics.stdev(values) if len(values) > 1 else 0:.4f}"


def without(argv: list[str], options: tuple[str, ...]) -> list[str]:
    """An argument list without these options and their values."""
    kept, words = [], list(argv)
    while words:
        word = words.pop(0)
        if word.partition("=")[0] not in options:
            kept.append(word)
        elif "=" not in word and words:
            words.pop(0)
    return kept


def one_run(argv: list[str], kind: str, share: str, steps: int, seed: str) -> dict[str, float]:
    """The last evaluation of a run."""
    with tempfile.TemporaryDirectory() as scratch:
        own = [f"--run.dir={scratch}/run", f"--run.seed={seed}", f"--train.steps={steps}", f"--routing.kind={kind}"]
        own += [f"--routing.capacity={share}"] if share else []
        kept = without(argv, ("--train.steps", "--steps", "--run.seed", "--seed"))
        command = [sys.executable, str(Path(__file__).with_name("train.py")), *kept, *own, f"--run.save_every={steps}"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{kind} {share}: {done.stderr.strip().splitlines()[-1]}")
        rows = [json.loads(line) for line in (Path(scratch) / "run" / "metrics.jsonl").read_text().splitlines()]
        return [row for row in rows if "val/loss" in row][-1]


# --- memory, without using any ----------------------------------------------------------------------------------------


def memory(argv: list[str]) -> None:
    """What a run would need on each device; on a type of device other than this machine's, if --on names one."""
    section = "finetune" if argv[:1] == ["finetune"] else "train"
    parser = argparse.ArgumentParser(prog="python bench.py memory", add_help=False, allow_abbrev=False)
    parser.add_argument("--fit", type=str)
    parser.add_argument("--on", choices=("cpu", "cuda", "mps"))
    parser.add_argument("--ranks", type=int, default=1)
    options, rest = parser.parse_known_args(argv[1:] if section == "finetune" else argv)
    usage = "python bench.py memory [finetune] [--fit 24GB] [--on cpu|cuda|mps] [--ranks N]"
    cfg = load_config(rest, section, usage=f"{usage} [FILE.yaml] [--preset NAME] [--key=value ...]")
    if options.ranks < 1:
        raise ConfigError(f"--ranks: expected 1 or more, got {options.ranks}")
    free_bytes = None if options.fit is None else plan.parse_size(options.fit)
    print(json.dumps(plan.describe(plan.plan_run(cfg, section, options.ranks, options.on, free_bytes))))


def main(argv: list[str]) -> None:
    if argv[:1] == ["memory"]:
        return memory(argv[1:])
    if argv[:1] == ["routing"]:
        return routing_quality(argv[1:]) if "--quality" in argv else routing_speed(argv[1:])
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
    far = min(FAR, cfg.model.context - NEW)
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
        "decode_tokens_per_s": NEW / seconds["far"],
        "decode_tokens_per_s_batch_8": 8 * NEW / seconds["far8"],
        "decode_far_over_near": seconds["far"] / seconds["near"],
        "recompute_over_decode": NEW * seconds["read"] / seconds["far"],
        "train_tokens_per_s": rate,
        "train_gflop_per_s": rate * flops_per_token(cfg.model, cfg.train.seq_len) / 1e9,
    }
    print(f"{device}, {str(dtype).removeprefix('torch.')} ({reason}); {far} cached tokens, medians of {TURNS} turns")
    for name, value in result.items():
        print(f"  {name:28} {value:14,.2f}")
    print(json.dumps(result))


if __name__ == "__main__":
    run_script(main)
