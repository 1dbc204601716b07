"""Before the first step: the bytes that are announced are those that are there, and a step is cut so that it fits."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import bench
from model import GPT, KVCache, ModelConfig
from nanoqwen import optim, plan
from nanoqwen.config import load_config
from nanoqwen.distributed import World
from nanoqwen.errors import ConfigError
from nanoqwen.injection.contrast import ProjectionHead
from nanoqwen.lora import LoraConfig, apply_lora
from nanoqwen.routing import RoutingConfig, build_model

ALONE = World(0, 0, 1, torch.device("cpu"))


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_weights_gradients_and_state_are_counted_to_the_byte(optimizer: str, rank: int):
    """The estimate once counted moments of every weight, of which an adapter trains one in twenty."""
    cfg = replace(load_config([], "train").train, optimizer=optimizer, seq_len=16, batch_tokens=64)
    model = tiny.model().train()
    apply_lora(model, LoraConfig(rank=rank))
    optimizers = optim.Optimizers(optim.parameter_groups(model, cfg), cfg)
    ids = torch.randint(97, (4, 17))
    model(ids[:, :-1], ids[:, 1:]).loss.backward()
    gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    optimizers.step(torch.tensor(0.0))
    state = sum(t.nbytes for t in optimizers.state().values() if t.dim())  # each step count is four bytes more
    found = plan.memory_estimate(model, cfg, rows=4)
    assert found["weights"] == sum(p.nbytes for p in model.parameters())
    assert found["gradients"] == gradients
    assert found["optimizer"] == state
    shared = plan.memory_estimate(model, cfg, rows=4, shards=2)
    assert shared["optimizer"] == state / 2
    assert shared["activations"] == found["activations"]  # each rank has rows of its own
    assert shared["gradients"] == gradients / 2
    assert plan.memory_estimate(model, cfg, rows=4, shards=2, accumulated=True)["gradients"] == gradients
    assert plan.memory_estimate(model, cfg, rows=4, bucketed=True)["gradients"] == 2 * gradients
    assert found["gathered"] == 0 < shared["gathered"] < found["weights"]


def test_activations_grow_with_the_rows_and_shrink_when_recomputed():
    cfg, model = load_config([], "train").train, tiny.model()
    one, four = (plan.memory_estimate(model, cfg, rows)["activations"] for rows in (1, 4))
    assert four == 4 * one
    assert plan.memory_estimate(model, replace(cfg, checkpoint_activations=True), 4)["activations"] < four / 1.5


@pytest.mark.parametrize("rows", [16, 4, 1])
def test_the_micro_batch_is_the_largest_share_that_fits(rows: int, monkeypatch: pytest.MonkeyPatch):
    cfg, model = load_config(["--batch_tokens=2048", "--seq_len=128"], "train"), tiny.model(max_position_embeddings=128)
    enough = sum(plan.memory_estimate(model, cfg.train, rows).values()) / 0.8
    monkeypatch.setattr(plan, "free_memory", lambda device: enough + 1)
    found = plan.micro_rows(cfg, model, cfg.train, ALONE)
    assert cfg.train.rows % found == 0
    assert found == rows
    asked = replace(cfg.train, micro_batch=3)
    assert plan.micro_rows(cfg, model, asked, ALONE) == 3


# A step of contrastive fine-tuning in a process of its own. What torch and its libraries need by themselves is there
# after a step of a tiny model, and is not counted.
MEASURED = """
import json, sys
sys.path.insert(0, {root!r})
import torch
from contextlib import nullcontext
from pathlib import Path
import finetune, train
from nanoqwen import optim, plan
from nanoqwen.config import FinetuneConfig
from nanoqwen.injection.contrast import ProjectionHead
from data import micro_batches
from nanoqwen.distributed import World
from nanoqwen.lora import LoraConfig, apply_lora
from model import GPT, IGNORE, ModelConfig
from nanoqwen.injection.triplets import TripletBatch
from nanoqwen.config import ContrastConfig

ALONE, GROUPS = World(0, 0, 1, torch.device("cpu")), 12

def step(hidden, layers, vocab, rows, width, rank):
    model = GPT(ModelConfig(vocab_size=vocab, hidden_size=hidden, intermediate_size=3 * hidden,
                            num_hidden_layers=layers, num_attention_heads=8, num_key_value_heads=2,
                            max_position_embeddings=width)).train()
    apply_lora(model, LoraConfig(rank=rank))
    head, loop = ProjectionHead(hidden, 256), FinetuneConfig(seq_len=width, batch_tokens=rows * width)
    objective = finetune.Contrast(model, head, ContrastConfig(), {{}}, ALONE)
    optimizers = optim.Optimizers(optim.parameter_groups(model, loop, head), loop)
    tokens = torch.randint(vocab, (rows, width))
    stream = (torch.arange(rows * width) * 3 * GROUPS // (rows * width)).view(rows, width)
    targets = torch.where(torch.arange(width) % 10 == 0, tokens, IGNORE)
    batch = TripletBatch(tokens, targets, stream, torch.ones(rows, width), stream, torch.arange(GROUPS))
    for _ in range(2):
        train.train_step(objective, optimizers, micro_batches(batch, rows, ALONE.device), ALONE, clip=1.0,
                         scaler=torch.amp.GradScaler("cpu", enabled=False), autocast=nullcontext())
    estimate = plan.memory_estimate(model, loop, rows, plan.Forward(torch.float32, head, 0.1, isolated=True))
    return sum(estimate.values())

def resident(name):  # VmRSS now, VmHWM at its peak; ru_maxrss would begin at the peak of the process that started us
    return 1024 * int(Path("/proc/self/status").read_text().partition(name + ":")[2].split()[0])

step(64, 2, 300, 2, 32, 0)
before = resident("VmRSS")
estimate = step(*json.loads(sys.argv[1]))
print(estimate / (resident("VmHWM") - before))
"""
SIZES = {"small": (256, 6, 8192, 16, 256, 8), "wide": (512, 8, 32768, 8, 512, 8), "full": (768, 12, 16384, 8, 256, 0)}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("size", SIZES)
def test_q02_the_estimate_is_within_15_per_cent_of_the_peak_of_a_contrast_step(size: str):
    """The median of three processes: where the heap puts its blocks is a matter of chance."""
    program = MEASURED.format(root=str(Path(plan.__file__).parents[1]))
    command = [sys.executable, "-c", program, json.dumps(SIZES[size])]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    ratios = [float(subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout)
              for _ in range(3)]  # fmt: skip
    assert 0.85 <= statistics.median(ratios) <= 1.15, ratios


@pytest.mark.parametrize(("preset", "gigabytes"), [("1.5B", 3.1), ("7B", 15.4)])
def test_adapters_leave_a_base_as_small_as_it_is_stored(preset: str, gigabytes: float):
    """Frozen weights were once in fp32, with a copy in bf16 beside them: 9.3 GB for 1.5 B parameters."""
    words = f"--preset {preset} --lora.rank=16 --seq_len=1024 --batch_tokens=16384 --checkpoint_activations"
    cfg = load_config(words.split(), "finetune")
    run = plan.plan_run(cfg, "finetune", 1, "cuda", 24e9)
    found = run.bytes()
    assert run.dtype == torch.bfloat16
    assert found["weights"] / 1e9 == pytest.approx(gigabytes, rel=0.04)
    assert found["copies"] == 0
    assert run.fits


def test_three_streams_and_the_head_are_counted():
    cfg, model, head = load_config([], "finetune").finetune, tiny.model(), ProjectionHead(32, 16)
    plain = plan.memory_estimate(model, cfg, 4)
    found = plan.memory_estimate(model, cfg, 4, plan.Forward(torch.float32, head, 0.1, isolated=True))
    extra = 4 * sum(p.numel() for p in head.parameters())
    assert found["weights"] == plain["weights"] + extra
    assert found["optimizer"] == plain["optimizer"] + 2 * extra
    assert found["logits"] == pytest.approx(plain["logits"] / 10)
    mask = 4 * 4 * cfg.seq_len**2 * model.cfg.num_hidden_layers
    assert found["activations"] == plain["activations"] + mask
    assert plan.memory_estimate(model, cfg, 12)["activations"] == 3 * plain["activations"]


# --- what a forward keeps ---------------------------------------------------------------------------------------------

SHAPES = {
    "narrow": ({"vocab_size": 512, "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4}, 2, 128),
    "long": ({"vocab_size": 1024, "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 8}, 1, 256),
    "many heads": ({"vocab_size": 512, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4}, 4, 64),
}


def kept_by_forward(
    shape: dict[str, int], rows: int, width: int, dtype: torch.dtype, **loop: bool
) -> tuple[float, ...]:
    """(bytes that autograd keeps for the backward, parameters left out; the estimate of them)"""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": width}
    model = GPT(ModelConfig(**shape, **heads)).train()
    model.checkpoint_activations = loop.get("checkpoint_activations", False)
    own, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    ids = torch.randint(shape["vocab_size"], (rows, width))
    autocast = torch.autocast("cpu", dtype) if dtype != torch.float32 else nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
        loss = model(ids, ids).loss
    assert loss.requires_grad  # held, or what it keeps would be gone
    cfg = replace(load_config([], "train").train, seq_len=width, batch_tokens=rows * width, **loop)
    parts = plan.memory_estimate(model, cfg, rows, plan.Forward(dtype))
    # The forward has made the gradients of the head and of what it reads; logits are gone.
    return sum(s.nbytes() for s in kept.values()), parts["activations"] + parts["copies"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SHAPES)
def test_activations_and_copies_are_what_a_forward_keeps(name: str, dtype: torch.dtype):
    """Half precision does not halve them: norms keep fp32, and autocast keeps a copy of each weight."""
    found, estimate = kept_by_forward(*SHAPES[name], dtype)
    assert estimate == pytest.approx(found, rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_that_is_computed_again_keeps_its_input_alone(dtype: torch.dtype):
    shape, rows, width = SHAPES["narrow"]
    of = [kept_by_forward(shape | {"num_hidden_layers": n}, rows, width, dtype, checkpoint_activations=True)[0]
          for n in (2, 6)]  # fmt: skip
    assert (of[1] - of[0]) / 4 == 4 * rows * width * shape["hidden_size"]


# --- a run that may never happen --------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dense", "mod", "dtf", "tdtf"])
def test_the_cache_takes_the_bytes_that_are_announced(kind: str):
    model = build_model(ModelConfig(**SHAPES["narrow"][0], num_attention_heads=4, num_key_value_heads=2,
                                    max_position_embeddings=528), RoutingConfig(kind=kind, capacity=0.5))  # fmt: skip
    bench.calibrate_on_noise(model.eval(), 512)
    cache = KVCache(model.cfg, 1, torch.float32, length=512)
    model(torch.randint(512, (1, 512)), cache=cache)
    announced = plan.cache_bytes(model, 512, torch.float32)
    assert cache.nbytes == pytest.approx(announced, rel=0 if kind == "dense" else 0.1)


def printed(capsys: pytest.CaptureFixture, *argv: str) -> tuple[str, dict[str, Any]]:
    bench.main(["memory", *argv])
    out = capsys.readouterr().out
    return out, json.loads(out.splitlines()[-1])


def test_bench_memory_counts_what_it_does_not_allocate(capsys: pytest.CaptureFixture):
    out, found = printed(capsys, "--preset=3B", "--on=cuda", "--fit=96GB")
    assert found["parameters"] == 3_085_938_688
    assert found["weights"] == 4 * found["parameters"]
    assert found["optimizer"] == 8 * found["parameters"]
    assert found["cache"] == 2 * 2 * 36 * 2 * 128 * 32_768  # bf16 keys and values of 36 layers, 2 heads of 128
    assert found["fits"]
    assert "which fits into 96 GB" in out


def test_bench_memory_says_what_to_change_until_it_fits(capsys: pytest.CaptureFixture):
    asked = ["--preset=0.5B", "--on=cuda", "--fit=5GB", "--batch_tokens=65536", "--model.vocab_size=32000"]
    _, found = printed(capsys, *asked, "--seq_len=1024")
    assert not found["fits"]
    fsdp = [f"--run.parallel fsdp on {ranks} devices" for ranks in (2, 4)]
    assert found["until_it_fits"] == ["--train.checkpoint_activations", "--train.seq_len 256", *fsdp]
    for ranks, fits in (("1", False), ("2", False), ("4", True)):  # what it advises is what it says of that run
        told = ["--train.checkpoint_activations", "--run.parallel=fsdp", "--ranks", ranks, "--seq_len=1024"]
        assert printed(capsys, *asked, *told)[1]["fits"] == fits
    _, found = printed(capsys, "finetune", "--preset=1.5B", "--on=cuda", "--fit=24GB")
    assert found["until_it_fits"][-1] == "--lora.rank 16"
    out, found = printed(capsys, "--preset=3B", "--on=cuda", "--fit=2GB")
    assert found["until_it_fits"] == []
    assert "no more to change: with all this --preset 124M fits" in out


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--fit", "24"], "--fit: expected a size such as 24GB or 16GiB, got '24'"),
        (["--ranks", "0"], "--ranks: expected 1 or more, got 0"),
        (["--ranks", "3"], "8 rows of 128 tokens per step cannot be divided among 3 ranks"),
        (["--preset", "0.6B"], "--preset"),
        (["--seq_len", "1024"], "seq_len: expected at most the model's context of 512, got 1024"),
        (["finetune", "--objective", "contrast"], "finetune.objective: expected sft"),
    ],
)
def test_bench_memory_refuses_in_one_line(argv: list[str], said: str):
    with pytest.raises(ConfigError) as refused:
        bench.main(["memory", *argv])
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)
