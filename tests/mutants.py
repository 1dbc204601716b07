"""Small bugs, planted one at a time in a copy of the project: does the fast suite notice each?

    python tests/mutants.py                  all of them, a table, exit code 1 if one survives
    python tests/mutants.py --only NAME      those whose name holds NAME
    python tests/mutants.py --list           what there is

The tests nearest to a bug run first; only if they pass does the whole fast suite. `make mutants` does the same.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
FAST = ["-m", "not slow and not gpu and not real and not torture"]
# Those that see the change of text itself, or the load of the machine.
BLIND = ["--ignore=tests/test_mutants.py", "-k", "not time_of_a_cached_token"]
LIMIT = 900  # seconds for the tests of one bug; a hang counts as noticed


class Mutant(NamedTuple):
    name: str
    file: str
    old: str  # stands in the file exactly once
    new: str
    tests: str  # the nearest ones: files, or FILE::test


MUTANTS = [
    # --- the model
    Mutant(
        "rotation turns the other way",
        "model.py",
        "first * cos - second * sin, second * cos + first * sin",
        "first * cos + second * sin, second * cos - first * sin",
        "test_model.py test_parity.py",
    ),
    Mutant(
        "one norm without its epsilon",
        "model.py",
        "wide.square().mean(-1, keepdim=True) + self.eps)",
        "wide.square().mean(-1, keepdim=True))",
        "test_model.py",
    ),
    Mutant(
        "a key sees the query behind it",
        "model.py",
        "mask = k_slots <= last_key[:, None, :, None]",
        "mask = k_slots <= last_key[:, None, :, None] + 1",
        "test_model.py",
    ),
    Mutant(
        "documents see each other",
        "model.py",
        "mask = mask & (runs[:, None, :, None] == runs[:, None, None, :])",
        "mask = mask & (runs >= 0)[:, None, None]",
        "test_model.py",
    ),
    Mutant(
        "positions go on across documents",
        "model.py",
        "runs, positions = _document_runs(documents)",
        "runs, _ = _document_runs(documents)",
        "test_model.py",
    ),
    Mutant(
        "a cache forgets its last token",
        "model.py",
        "self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]",
        "self.lengths = [length + max(count - 1, 1) for length, count in zip(self.lengths, counts, strict=True)]",
        "test_model.py",
    ),
    Mutant(
        "rows of a cache are not reordered",
        "model.py",
        "                    tensors[layer] = tensor[torch.tensor(rows, device=tensor.device)]\n",
        "                    tensors[layer] = tensor[: len(rows)]\n",
        "test_model.py test_generation.py",
    ),
    Mutant(
        "gelu without its approximation",
        "model.py",
        'F.gelu(self.up_proj(x), approximate="tanh")',
        "F.gelu(self.up_proj(x))",
        "test_parity.py",
    ),
    Mutant(
        "residual matrices start as wide as the others",
        "model.py",
        "INIT_STD / math.sqrt(2 * layers) if residual else INIT_STD",
        "INIT_STD",
        "test_model.py",
    ),
    Mutant(
        "the gradient of z-loss is halved",
        "model.py",
        "(counted + 2 * z_loss * log_z)",
        "(counted + z_loss * log_z)",
        "test_model.py",
    ),
    Mutant(
        "dynamic scaling looks at padding",
        "model.py",
        "torch.where(real, positions + 1, 1)",
        "positions + 1",
        "test_model.py test_generation.py",
    ),
    # --- choosing tokens
    Mutant(
        "top-p keeps one token too many",
        "model.py",
        "keep &= before < top_p",
        "keep &= before <= top_p + 0.02",
        "test_generation.py",
    ),
    Mutant(
        "a penalty makes negative logits likelier",
        "model.py",
        "torch.where(logits < 0, logits * penalty, logits / penalty)",
        "logits / penalty",
        "test_generation.py",
    ),
    Mutant(
        "the minimum length is one short",
        "model.py",
        "new_tokens < sampling.min_new_tokens:",
        "new_tokens < sampling.min_new_tokens - 1:",
        "test_generation.py",
    ),
    Mutant(
        "beams are not divided by their length",
        "model.py",
        "pool.append(Beam(ids, score / length**sampling.length_penalty))",
        "pool.append(Beam(ids, score))",
        "test_generation.py",
    ),
    Mutant("two equal prompts get one text", "model.py", "        copies[row] += 1\n", "", "test_generation.py"),
    Mutant(
        "equal logits are taken from the end",
        "model.py",
        "room = k - above.sum(-1, keepdim=True)\n    keep = above | (equal & (equal.cumsum(-1) <= room))",
        "room = k - above.sum(-1, keepdim=True)\n    last = equal.flip(-1).cumsum(-1).flip(-1)\n"
        "    keep = above | (equal & (last <= room))",
        "test_generation.py",
    ),
    # --- a step
    Mutant(
        "a loss is divided by the micro-batch",
        "train.py",
        "weight = all_reduce_sum(sum((micro.targets != IGNORE).sum() for micro in micros).float(), world).clamp(min=1)",
        "weight = all_reduce_sum((micros[0].targets != IGNORE).sum().float(), world).clamp(min=1)",
        "test_train.py",
    ),
    Mutant(
        "gradients travel at the first micro-batch",
        "train.py",
        "now=number == len(micros))",
        "now=number == 1)",
        "test_distributed.py test_train.py",
    ),
    Mutant(
        "ranks are not averaged back",
        "train.py",
        "scaler.scale(loss * world.size).backward()",
        "scaler.scale(loss).backward()",
        "test_distributed.py test_train.py",
    ),
    Mutant(
        "every rank draws rank 0's dropout",
        "train.py",
        'f"{seed} {step} {rank}".encode()',
        'f"{seed} {step}".encode()',
        "test_train.py",
    ),
    Mutant(
        "dropout ignores the run's seed",
        "train.py",
        'f"{seed} {step} {rank}".encode()',
        'f"{step} {rank}".encode()',
        "test_train.py",
    ),
    Mutant(
        "a rank stops alone",
        "train.py",
        "distributed.any_rank(stop.requested, world)",
        "stop.requested",
        "test_distributed.py test_train.py",
    ),
    Mutant(
        "a step that is not finite moves the weights",
        "train.py",
        "skip = (~norm.isfinite()).float()",
        "skip = (~norm.isfinite()).float() * 0",
        "test_train.py",
    ),
    Mutant(
        "the norm of this rank's shard decides",
        "train.py",
        "norm = full_tensor(nn.utils.clip_grad_norm_([p for p in optimizers.names if p.grad is not None], clip))\n"
        "    skip = (~norm.isfinite()).float()",
        "own = [getattr(p.grad, '_local_tensor', p.grad) for p in optimizers.names if p.grad is not None]\n"
        "    own = nn.utils.get_total_norm(own)\n"
        "    norm = full_tensor(nn.utils.clip_grad_norm_([p for p in optimizers.names if p.grad is not None], clip))\n"
        "    skip = (~own.isfinite()).float()",
        "test_distributed.py",
    ),
    Mutant(
        "patience starts anew on resume",
        "train.py",
        'self.step, self.best, self.stale, self.result = (state[k] for k in ("step", "best", "stale", "result"))',
        'self.step, self.best, self.result = (state[k] for k in ("step", "best", "result"))',
        "test_train.py",
    ),
    Mutant(
        "the fp16 scale is not restored",
        "train.py",
        '    trainer.scaler.load_state_dict(state["scaler"])\n',
        "",
        "test_defaults.py",
    ),
    Mutant(
        "an extended run warms up again",
        "train.py",
        "self.loop = replace(self.loop, warmup_steps=min(self.pace.warmup_steps, self.loop.steps))",
        "pass",
        "test_train.py",
    ),
    # --- the optimizer
    Mutant(
        "vectors decay",
        "nanoqwen/optim.py",
        'DECAYING = ("decay", "prior")',
        'DECAYING = ("decay", "prior", "plain")',
        "test_train.py",
    ),
    Mutant(
        "beta2 is beta1",
        "nanoqwen/optim.py",
        "betas = (cfg.beta1, cfg.beta2)",
        "betas = (cfg.beta1, cfg.beta1)",
        "test_train.py",
    ),
    Mutant(
        "a warm-up begins at 0",
        "nanoqwen/optim.py",
        "return cfg.lr * (step + 1) / cfg.warmup_steps",
        "return cfg.lr * step / cfg.warmup_steps",
        "test_train.py",
    ),
    Mutant(
        "a plateau does not cool down",
        "nanoqwen/optim.py",
        "self.bad, self.cooldown = 0, self.cfg.plateau_cooldown",
        "self.bad = 0",
        "test_train.py",
    ),
    Mutant(
        "moments are zero after a resume",
        "nanoqwen/optim.py",
        "else shard_like(t, p) for key, t in entry.items()",
        "else shard_like(t * 0, p) for key, t in entry.items()",
        "test_train.py",
    ),
    # --- data
    Mutant(
        "targets are not shifted",
        "data.py",
        "(windows[:, :-1], windows[:, 1:])",
        "(windows[:, :-1], windows[:, :-1])",
        "test_data.py",
    ),
    Mutant(
        "the first token of a document is learned from the last",
        "data.py",
        "    targets[ends] = IGNORE",
        "    pass",
        "test_data.py",
    ),
    Mutant(
        "each epoch has the same order",
        "data.py",
        "random_key(self.seed, which, epoch)",
        "random_key(self.seed, which, 0)",
        "test_data.py",
    ),
    Mutant(
        "neighbouring windows share no token",
        "data.py",
        ".window(place * self.seq_len, self.seq_len + 1)",
        ".window(place * (self.seq_len + 1), self.seq_len + 1)",
        "test_data.py",
    ),
    Mutant(
        "a question is learned",
        "data.py",
        "np.where(example.mask[1:], example.ids[1:], IGNORE)",
        "example.ids[1:]",
        "test_chat.py",
    ),
    Mutant(
        "an answer is learned one token early",
        "data.py",
        "np.where(example.mask[1:], example.ids[1:], IGNORE)",
        "np.where(example.mask[:-1], example.ids[1:], IGNORE)",
        "test_chat.py",
    ),
    Mutant(
        "documents end without EOS",
        "nanoqwen/corpus.py",
        "        if piece.ends:\n            ids = np.append",
        "        if not piece.ends:\n            ids = np.append",
        "test_corpus.py",
    ),
    Mutant(
        "a question is in both splits", "nanoqwen/chat.py", "if digest in val_digests:", "if False:", "test_chat.py"
    ),
    Mutant(
        "user text becomes a control token",
        "nanoqwen/tokenizer.py",
        "allow_special: bool = False) -> list[int]:",
        "allow_special: bool = True) -> list[int]:",
        "test_tokenizer.py",
    ),
    # --- adapters and routing
    Mutant(
        "a merge rounds twice",
        "nanoqwen/lora.py",
        "return torch.addmm(self.weight.to(self.lora_A.dtype), self.lora_B, self.lora_A, alpha=self.scale)",
        "return (self.weight + (self.lora_B @ self.lora_A * self.scale).to(self.weight.dtype)).to(self.lora_A.dtype)",
        "test_lora.py",
    ),
    Mutant(
        "an adapter's dropout acts on the base",
        "nanoqwen/lora.py",
        "        y = super().forward(x)\n",
        "        y = super().forward(F.dropout(x, self.dropout) if self.training and self.dropout > 0 else x)\n",
        "test_lora.py",
    ),
    Mutant(
        "a tie is selected",
        "nanoqwen/routing.py",
        "mask = logits.sigmoid() > self.causal_router.threshold",
        "mask = logits.sigmoid() >= self.causal_router.threshold",
        "test_routing.py",
    ),
    Mutant(
        "a gate weighs the token, not its update",
        "nanoqwen/routing.py",
        "delta = delta * gate.flatten().index_select(0, flat).view(*shape, 1)",
        "delta = (delta + inputs) * gate.flatten().index_select(0, flat).view(*shape, 1) - inputs",
        "test_routing.py",
    ),
    Mutant(
        "selected tokens get new positions",
        "nanoqwen/routing.py",
        "cos, sin = (None if t is None else _at(t[:, 0], rows, index)[:, None] for t in (ctx.cos, ctx.sin))",
        "cos, sin = (None if t is None else t[:, :, : index.shape[1]] for t in (ctx.cos, ctx.sin))",
        "test_routing.py",
    ),
    # --- files
    Mutant(
        "a checkpoint is listed before it is whole",
        "nanoqwen/runfolder.py",
        "        sync(path)\n    entries",
        "        pass\n    entries",
        "test_runfolder.py test_torture.py",
    ),
    Mutant(
        "a changed file goes unnoticed",
        "nanoqwen/manifest.py",
        "if hashes and name not in unread and",
        "if not hashes and name not in unread and",
        "test_runfolder.py test_damage.py",
    ),
    Mutant(
        "the best checkpoint is pruned",
        "nanoqwen/runfolder.py",
        "wanted = {best, *[step,",
        "wanted = {*[step,",
        "test_runfolder.py",
    ),
    Mutant(
        "a file is written in place",
        "nanoqwen/files.py",
        "        with complete_or_absent(path) as temporary:\n            write_new(temporary, data)\n"
        "        sync(path.parent)",
        "        path.write_bytes(data)",
        "test_runfolder.py test_torture.py",
    ),
    Mutant(
        "q, k and v of GPT-2 change places",
        "nanoqwen/hf_format.py",
        'zip("qkv", tensor.chunk(3), strict=True)',
        'zip("kqv", tensor.chunk(3), strict=True)',
        "test_parity.py",
    ),
    Mutant(
        "a head that is not tied is dropped",
        "nanoqwen/weights.py",
        'if stored == "lm_head.weight" and stored not in expected:',
        'if stored == "lm_head.weight":',
        "test_parity.py",
    ),
    Mutant(
        "a GGUF file forgets its base frequency",
        "nanoqwen/gguf.py",
        "    writer.add_rope_freq_base(cfg.rope_theta)\n",
        "",
        "test_gguf.py",
    ),
    Mutant(
        "codes of 8 bits are cut, not rounded",
        "nanoqwen/quantize.py",
        "codes[part] = (weight[part].float() / scales[part]).round()",
        "codes[part] = (weight[part].float() / scales[part]).trunc()",
        "test_cpu_kernels.py",
    ),
    Mutant(
        "the compiled step writes one slot late",
        "nanoqwen/cpu_kernels.py",
        "slots = [old + i for old, new in",
        "slots = [old + i + (old > 20) for old, new in",
        "test_cpu_kernels.py",
    ),
    # --- what is said
    Mutant(
        "bits per byte are per token",
        "nanoqwen/evaluate.py",
        "nats / math.log(2) / max(1, size)}",
        "nats / math.log(2) / max(1, count)}",
        "test_eval.py test_train.py",
    ),
    Mutant(
        "no nearest name is told",
        "nanoqwen/config.py",
        'return f"unknown {kind}; did you mean {near[0]}?"',
        'return f"unknown {kind}"',
        "test_config.py",
    ),
    Mutant(
        "a preset goes over an option",
        "nanoqwen/config.py",
        "    values = _merge(values, options)\n    for name",
        "    values = _merge(options, values)\n    for name",
        "test_config.py",
    ),
    Mutant(
        "a secret is shown",
        "nanoqwen/redact.py",
        "    return SECRET_TEXT.sub(HIDDEN, text)",
        "    return text",
        "test_config.py test_runfolder.py",
    ),
    Mutant(
        "a leak is the first word of the system text",
        "nanoqwen/injection/score.py",
        "SECRET_WORDS = 6 ",
        "SECRET_WORDS = 1 ",
        "test_injection.py",
    ),
    Mutant(
        "a rewording is its own negative",
        "nanoqwen/injection/contrast.py",
        "candidates = (own & (stream > 0)) |",
        "candidates = (own & (stream > 1)) |",
        "test_contrast.py",
    ),
]


# --- running them -----------------------------------------------------------------------------------------------------


def planted(mutant: Mutant, root: Path) -> str:
    """The file with the bug in it; an error if the project has moved on from what the bug replaces."""
    text = (root / mutant.file).read_text(encoding="utf-8")
    if (count := text.count(mutant.old)) != 1:
        raise ValueError(f"{mutant.name}: expected its old text once in {mutant.file}, found {count}")
    return text.replace(mutant.old, mutant.new)


def copy(folder: Path) -> Path:
    """The files that git knows, as they are now, and the environment's packages."""
    known = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True).stdout
    for name in filter(None, known.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def failing(root: Path, tests: list[str]) -> str | None:
    """The first test that fails, or None."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-q",
        "-n",
        "auto",
        "-p",
        "no:cacheprovider",
        *FAST,
        *BLIND,
        *tests,
    ]
    env = os.environ | {"PYTHONPATH": str(root)}
    try:
        done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return f"(longer than {LIMIT} s)"
    if done.returncode == 0:
        return None
    named = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    return named[1] if named else f"(pytest exits with {done.returncode})"


def try_one(mutant: Mutant, root: Path) -> tuple[str | None, float]:
    """(the test that noticed the bug, seconds)"""
    whole, began = (root / mutant.file).read_text(encoding="utf-8"), time.monotonic()
    (root / mutant.file).write_text(planted(mutant, root), encoding="utf-8")
    try:
        caught = failing(root, [f"tests/{name}" for name in mutant.tests.split()]) or failing(root, [])
    finally:
        (root / mutant.file).write_text(whole, encoding="utf-8")
    return caught, time.monotonic() - began


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="those whose name holds this text")
    parser.add_argument("--list", action="store_true", help="print them, run none")
    options = parser.parse_args()
    chosen = [mutant for mutant in MUTANTS if options.only in mutant.name]
    if options.list:
        print("\n".join(f"{mutant.file:32} {mutant.name}" for mutant in chosen))
        return 0
    survivors = 0
    with TemporaryDirectory() as folder:
        root = copy(Path(folder))
        print(f"| bug ({len(chosen)}) | where | noticed by | s |\n| --- | --- | --- | --- |", flush=True)
        for mutant in chosen:
            caught, seconds = try_one(mutant, root)
            survivors += caught is None
            print(f"| {mutant.name} | {mutant.file} | {caught or 'NOTHING'} | {seconds:.0f} |", flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} noticed")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
