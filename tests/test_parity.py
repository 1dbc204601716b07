"""Weights in and out, with transformers as the judge: built there, loaded here, exported, loaded there again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import runs
import tiny
import torch
import transformers
from torch import nn

import checkpoint
from model import IGNORE, generate, rope_tables
from nanoqwen import hf_format
from nanoqwen import weights as weights_file
from nanoqwen.weights import READ_BYTES, CheckpointError, export, load_model

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

SHAPE = {**tiny.SHAPE, "rms_norm_eps": 1e-6}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
GPT2 = {"vocab_size": 97, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}


t = transformers
BUILDERS = {
    "qwen2": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**SHAPE, rope_theta=1e6, tie_word_embeddings=True)),
    "qwen2-untied": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**SHAPE, rope_theta=1e6, tie_word_embeddings=False)),
    "qwen2-yarn": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**SHAPE, rope_parameters={"rope_theta": 1e6, **YARN})),
    "qwen3": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**SHAPE, head_dim=16, rope_theta=1e6)),
    "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**SHAPE)),
    "llama-biased": lambda: t.LlamaForCausalLM(t.LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True)),
    "llama3": lambda: t.LlamaForCausalLM(t.LlamaConfig(**SHAPE, rope_parameters={"rope_theta": 5e5, **LLAMA3})),
    "llama-yarn": lambda: t.LlamaForCausalLM(t.LlamaConfig(**SHAPE, rope_parameters={"rope_theta": 1e4, **YARN})),
    "llama-linear": lambda: t.LlamaForCausalLM(
        t.LlamaConfig(**SHAPE, rope_parameters={"rope_theta": 1e4, "rope_type": "linear", "factor": 3.0})
    ),
    "llama-dynamic": lambda: t.LlamaForCausalLM(
        t.LlamaConfig(
            **{**SHAPE, "max_position_embeddings": 16},
            rope_parameters={"rope_theta": 1e4, "rope_type": "dynamic", "factor": 3.0},
        )
    ),
    "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(**GPT2, n_inner=80)),
}
KINDS = list(BUILDERS)
IDS = torch.randint(97, (2, 30), generator=torch.Generator().manual_seed(3))


def theirs(kind: str) -> nn.Module:
    """A random model of transformers, its weights lively enough that every part shows in the logits."""
    torch.manual_seed(0)
    model = BUILDERS[kind]().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.2) if p.dim() > 1 else p.add_(torch.randn_like(p) * 0.1)
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("published")
    for kind in KINDS:
        theirs(kind).save_pretrained(root / kind)
    return {kind: root / kind for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients_are_those_of_transformers(kind: str, folders: dict[str, Path]):
    reference, (ours, tokenizer) = theirs(kind), load_model(folders[kind])
    assert tokenizer is None
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in reference.parameters())
    expected, got = reference(IDS, use_cache=False).logits, ours(IDS).logits
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()

    labels = IDS.clone()
    labels[0, :7] = IGNORE
    loss = reference(IDS, labels=labels, use_cache=False).loss
    loss.backward()
    targets = torch.cat((labels[:, 1:], torch.full((2, 1), IGNORE)), dim=1)  # shifted once, here
    out = ours(IDS, targets)
    (out.loss / out.weight).backward()
    assert torch.allclose(out.loss / out.weight, loss, rtol=1e-5)
    kind_hf = hf_format.hf_model_type(ours.cfg)
    ours_grads = hf_format.to_hf(kind_hf, {name: p.grad for name, p in ours.named_parameters()})
    for name, p in reference.named_parameters():
        difference = (ours_grads[name] - p.grad).abs().max()
        assert difference <= 1e-4 * p.grad.abs().max() + 1e-9, name


@pytest.mark.parametrize("kind", KINDS)
def test_an_exported_folder_is_byte_for_byte_what_came_in(kind: str, folders: dict[str, Path], tmp_path: Path):
    ours, _ = load_model(folders[kind])
    export(ours, None, tmp_path / "out")
    back, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    reference = theirs(kind)
    assert type(back) is type(reference)
    for name, tensor in reference.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name
    with torch.no_grad():
        assert torch.equal(back.eval()(IDS).logits, reference(IDS).logits)
    again, _ = load_model(tmp_path / "out")
    assert again.cfg == ours.cfg
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in (tmp_path / "out").iterdir()}
    assert "model.safetensors" in modes
    assert set(modes.values()) == {"0o644"}  # all may read what is shared, nobody else may write it
    assert [p.name for p in tmp_path.iterdir()] == ["out"]  # no temporary folder stays behind


def continued(kind: str, prompts: torch.Tensor, **settings) -> list[list[int]]:
    """By transformers' generate."""
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0} | settings
    return theirs(kind).generate(prompts, attention_mask=torch.ones_like(prompts), **settings).tolist()


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama3", "gpt2"])
def test_greedy_text_is_that_of_transformers(kind: str, folders: dict[str, Path]):
    ours, _ = load_model(folders[kind])
    expected = continued(kind, IDS[:, :8], max_new_tokens=30)
    assert generate(ours, IDS[:, :8], temperature=0.0, max_new_tokens=30) == expected


@pytest.mark.parametrize("prompt", [5, 15, 22])  # the original context has 16 positions
def test_dynamic_scaling_generates_as_transformers_does(prompt: int, folders: dict[str, Path]):
    """Each step stretches by the row so far; a row that grows past the context keeps the keys that it has."""
    ours, _ = load_model(folders["llama-dynamic"])
    prompts = IDS[:, :prompt]
    for max_new_tokens in (6, 24):
        expected = continued("llama-dynamic", prompts, max_new_tokens=max_new_tokens)
        assert generate(ours, prompts, temperature=0.0, max_new_tokens=max_new_tokens) == expected
    slowly = continued("llama-dynamic", prompts, max_new_tokens=24, use_cache=False)
    assert generate(ours, prompts, temperature=0.0, max_new_tokens=24, use_cache=False) == slowly
    beams = continued("llama-dynamic", prompts, max_new_tokens=12, num_beams=4)
    assert generate(ours, prompts, num_beams=4, max_new_tokens=12) == beams


@pytest.mark.parametrize("kind", ["qwen2-yarn", "llama3", "llama-linear", "llama-dynamic", "qwen3"])
def test_a17_rotary_tables_are_those_of_transformers(kind: str, folders: dict[str, Path]):
    ours, _ = load_model(folders[kind])
    rotary = theirs(kind).model.rotary_emb
    length = 48  # beyond the 16 positions of the dynamic one
    cos, sin = rotary(torch.zeros(1), torch.arange(length)[None])
    half = ours.cfg.head_size // 2
    mine = rope_tables(ours.cfg, length, length)
    assert (mine[0] - cos[0, :, :half]).abs().max() <= 1e-5
    assert (mine[1] - sin[0, :, :half]).abs().max() <= 1e-5


def test_sharded_folders_load_and_are_written(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    theirs("qwen2-untied").save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    ours, _ = load_model(tmp_path / "sharded")
    whole, _ = load_model(folders["qwen2-untied"])
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), whole.parameters(), strict=True))
    monkeypatch.setattr(weights_file, "SHARD_BYTES", 20_000)
    export(ours, None, tmp_path / "out")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(t, whole.state_dict()[n]) for n, t in back.state_dict().items())
    (tmp_path / "sharded" / "model-00002-of-00003.safetensors").unlink(missing_ok=True)
    next((tmp_path / "sharded").glob("model-*2-of-*"), tmp_path / "x").unlink(missing_ok=True)
    with pytest.raises(CheckpointError, match="missing weight files: model-00002"):
        load_model(tmp_path / "sharded")


def test_old_pickled_files_load_and_malicious_ones_do_not_run(folders: dict[str, Path], tmp_path: Path):
    for kind, prefix in (("gpt2", ""), ("gpt2", "transformer."), ("qwen2", "model.")):
        folder = tmp_path / f"{kind}{prefix}"
        folder.mkdir()
        (folder / "config.json").write_bytes((folders[kind] / "config.json").read_bytes())
        state = {n.removeprefix("transformer.") if not prefix else n: t for n, t in theirs(kind).state_dict().items()}
        state.pop("lm_head.weight") if not prefix else None
        if kind == "gpt2":  # old files carry the causal mask as if it were a weight
            name = "h.0.attn.bias" if not prefix else "transformer.h.0.attn.bias"
            state[name] = torch.ones(1, 1, 64, 64, dtype=torch.uint8).tril()
        for zipped in (True, False):  # torch before 1.6 wrote no zip files
            torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
            ours, _ = load_model(folder)
            with torch.no_grad():
                expected = theirs(kind)(IDS).logits
                assert (ours(IDS).logits - expected).abs().max() <= 1e-5 * expected.abs().max()

    canary = tmp_path / "canary"

    class Malicious:
        def __reduce__(self):
            return Path.touch, (canary,)

    torch.save({"model.norm.weight": Malicious()}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin: refused"):
        load_model(folder)
    (folder / "pytorch_model.bin").rename(folder / "model.safetensors")  # under a trusted name
    with pytest.raises(CheckpointError, match=r"model.safetensors: not a readable safetensors file"):
        load_model(folder)
    assert not canary.exists()


def damaged(source: Path, target: Path, change) -> Path:
    from safetensors.torch import load_file, save_file

    target.mkdir()
    (target / "config.json").write_bytes((source / "config.json").read_bytes())
    state = load_file(source / "model.safetensors")
    change(state)
    save_file(state, target / "model.safetensors")
    return target


def test_i03_keys_that_do_not_fit_are_listed(folders: dict[str, Path], tmp_path: Path, monkeypatch):
    """Missing keys were once a warning, and the model answered with random weights."""

    def spoil(state: dict[str, torch.Tensor]) -> None:
        del state["model.norm.weight"]
        state["model.layers.0.mlp.extra.weight"] = torch.ones(2)
        state["model.layers.1.mlp.up_proj.weight"] = torch.ones(3, 3)

    folder = damaged(folders["qwen2"], tmp_path / "damaged", spoil)
    with pytest.raises(CheckpointError) as refusal:
        load_model(folder)
    message = str(refusal.value)
    assert "missing: model.norm.weight;" in message
    assert "unexpected: model.layers.0.mlp.extra.weight" in message
    assert "mis-shaped: model.layers.1.mlp.up_proj.weight (3, 3) instead of (48, 32)" in message
    assert "\n" not in message
    warnings: list[str] = []
    monkeypatch.setattr(weights_file, "warn", warnings.append)
    ours, _ = load_model(folder, allow_mismatch=True)
    assert len(warnings) == 3
    with torch.no_grad():
        assert ours(IDS).logits.isfinite().all()
        embedding = theirs("qwen2").model.embed_tokens.weight
        assert torch.equal(ours.model.embed_tokens.weight, embedding)  # what fits is loaded


def test_tensors_that_are_there_twice_or_hold_no_floats(folders: dict[str, Path], tmp_path: Path):
    from safetensors.torch import save_file

    folder = damaged(folders["qwen2"], tmp_path / "twice", lambda state: None)
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    save_file({"model.norm.weight": torch.zeros(32)}, folder / "b.safetensors")
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"twice: model\.norm\.weight"):
        load_model(folder)
    for weight_map in ([], None, {"x": 5}, {"x": ["a.safetensors"]}, "a.safetensors"):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(CheckpointError, match="weight_map: expected names of files"):
            load_model(folder)
    ints = {"model.norm.weight": torch.ones(32, dtype=torch.int64)}
    whole = damaged(folders["qwen2"], tmp_path / "ints", lambda state: state.update(ints))
    with pytest.raises(CheckpointError, match=r"mis-shaped: model\.norm\.weight, which does not hold floating-point"):
        load_model(whole)


def test_files_of_mixed_precision_are_made_alike(folders: dict[str, Path], tmp_path: Path):
    def halve(state: dict[str, torch.Tensor]) -> None:
        for name in list(state)[::2]:
            state[name] = state[name].bfloat16()

    ours, _ = load_model(damaged(folders["qwen2"], tmp_path / "mixed", halve))
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    ours(IDS)


@pytest.mark.parametrize(
    "change",
    [{"hidden_size": 10**20}, {"head_dim": 16.0}, {"rope_theta": 1.0}, {"rope_theta": "x"}, {"num_hidden_layers": True},
     {"rope_scaling": {"type": "yarn", "factor": 2.0, "beta_fast": 0}},
     {"rope_scaling": {"type": "yarn", "factor": 2.0, "attention_factor": "x"}}],
    ids=str,
)  # fmt: skip
def test_nonsense_in_a_config_json_is_one_line(change: dict):
    with pytest.raises(CheckpointError) as refusal:
        hf_format.config_from_hf({"model_type": "qwen2", **SHAPE, **change})
    assert "\n" not in str(refusal.value)


def test_a_tied_head_that_is_stored_too_must_be_the_embedding(folders: dict[str, Path], tmp_path: Path):
    same = damaged(
        folders["qwen2"],
        tmp_path / "same",
        lambda state: state.update({"lm_head.weight": state["model.embed_tokens.weight"].clone()}),
    )
    load_model(same)
    other = damaged(folders["qwen2"], tmp_path / "other", lambda s: s.update({"lm_head.weight": torch.ones(97, 32)}))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight, which differs from the embedding"):
        load_model(other)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("qwen2", {"model_type": "mamba"}, "model_type: expected one of qwen2, .* got 'mamba'"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window"),
        ("qwen2", {"hidden_act": "relu"}, "hidden_act: expected 'silu' or 'swish', got 'relu'"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 3}, "layer_types"),
        ("qwen2", {"num_key_value_heads": 3}, r"num_attention_heads \(4\).*num_key_value_heads \(3\)"),
        ("qwen2", {"hidden_size": None}, "hidden_size"),
        ("llama", {"attention_bias": True}, "attention_bias and mlp_bias"),
        ("llama", {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "longrope"),
        ("gpt2", {"activation_function": "gelu"}, "activation_function"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
    ],
)
def test_shapes_that_we_would_compute_differently_are_refused(kind, change, message, folders, tmp_path: Path):
    hf = json.loads((folders[kind] / "config.json").read_text()) | change
    with pytest.raises(CheckpointError, match=message) as refusal:
        hf_format.config_from_hf(hf)
    assert "\n" not in str(refusal.value)


def test_published_files_keep_rope_theta_at_the_top_level():
    """transformers 5 writes rope_parameters; the files of Qwen2.5 and Llama 3 have rope_theta and rope_scaling."""
    hf = {"model_type": "qwen2", **SHAPE, "rope_theta": 123_456.0}
    assert hf_format.config_from_hf(hf).rope_theta == 123_456.0
    hf["rope_scaling"] = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    assert hf_format.config_from_hf(hf).rope_scaling == tiny.YARN
    assert hf_format.config_from_hf(hf).context == 64
    hf = {"model_type": "qwen2", **SHAPE, "rope_parameters": {"rope_theta": 5.0, "rope_type": "default"}}
    assert hf_format.config_from_hf(hf).rope_theta == 5.0
    assert hf_format.config_from_hf(hf).rope_scaling is None


@pytest.mark.parametrize("name", list(tiny.ARCHITECTURES))
def test_own_shapes_come_back_from_disk(name: str, tmp_path: Path):
    ours = tiny.model(name)
    export(ours, None, tmp_path / "out")
    again, _ = load_model(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, ours(IDS).logits)
    assert set(again.state_dict()) == set(ours.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_weights_are_read_in_the_wanted_dtype(dtype: torch.dtype, folders, tmp_path: Path, monkeypatch):
    expected, _ = load_model(folders["qwen2"])
    monkeypatch.setattr(weights_file, "READ_BYTES", 1_000)  # pieces of a few rows
    ours, _ = load_model(folders["qwen2"], dtype=dtype)
    for p, q in zip(ours.parameters(), expected.parameters(), strict=True):
        assert p.dtype == dtype
        assert p.requires_grad
        assert torch.equal(p, q.to(dtype))


def test_damaged_files_are_one_line(folders: dict[str, Path], tmp_path: Path):
    folder = damaged(folders["qwen2"], tmp_path / "cut", lambda state: None)
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for content in (b"", whole[:1], whole[:100], whole[: len(whole) // 2], whole[:-1]):
        weights.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"model\.safetensors: not a readable") as refusal:
            load_model(folder)
        assert "\n" not in str(refusal.value)
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        load_model(folder)
    (folder / "config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="expected a JSON object"):
        load_model(folder)
    for source, message in ((tmp_path / "nowhere", "no such folder"), (tmp_path, "config.json or with checkpoints/")):
        with pytest.raises(CheckpointError, match=message):
            load_model(source)
    index = {"weight_map": {"a": "../../etc/passwd"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_bytes((folders["qwen2"] / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match="weight_map: expected names of files in the same folder"):
        load_model(folder)


def test_an_export_is_all_or_nothing(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    ours, _ = load_model(folders["qwen2"])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("precious")
    with pytest.raises(CheckpointError, match="new or empty folder"):
        export(ours, None, tmp_path / "full")
    assert (tmp_path / "full" / "thesis.tex").read_text() == "precious"

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights_file, "save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        export(ours, None, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["full"]


def test_a_run_folder_is_its_newest_checkpoint(folders: dict[str, Path], tmp_path: Path):
    ours, _ = load_model(folders["qwen2"])
    for step in (5, 12, 100):
        with torch.no_grad():
            ours.model.norm.weight.fill_(step)
        export(ours, None, tmp_path / "run" / "checkpoints" / f"step-{step:08d}")
        runs.seal(tmp_path / "run" / "checkpoints" / f"step-{step:08d}")
    newest, _ = load_model(tmp_path / "run")
    assert (newest.model.norm.weight == 100).all()
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="no checkpoint under"):
        load_model(tmp_path / "empty")


MEMORY = """
import resource, sys, torch
from nanoqwen.weights import load_model
torch.randn(8, 8) @ torch.randn(8, 8)
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
dtype = getattr(torch, sys.argv[2])
before = peak()
model, _ = load_model(sys.argv[1], dtype=dtype)
after = peak()
weights = sum(p.nbytes for p in model.parameters())
print(weights, after - before)
"""


def test_loading_needs_little_more_memory_than_the_weights(tmp_path: Path):
    """A load that first builds a random fp32 model, or keeps the file mapped beside its copy, needs twice as much."""
    from model import GPT

    with torch.device("meta"):
        ours = GPT(tiny.config(vocab_size=100_000, hidden_size=768, num_attention_heads=8)).bfloat16()
    ours = ours.to_empty(device="cpu")
    for parameter in ours.parameters():
        torch.nn.init.ones_(parameter)
    export(ours, None, tmp_path / "big")
    for dtype in ("float32", "bfloat16"):
        arguments = [sys.executable, "-c", MEMORY, str(tmp_path / "big"), dtype]
        out = subprocess.run(
            arguments, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1]
        ).stdout
        weights, extra = map(int, out.split())
        assert weights > 150e6
        assert extra <= 1.1 * weights + 2 * READ_BYTES  # the pieces are a constant, not a share


def run_checkpoint(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "checkpoint.py", *arguments], capture_output=True, text=True, cwd=Path(__file__).parents[1]
    )


def test_parity_command(folders: dict[str, Path], tmp_path: Path):
    done = run_checkpoint("parity", str(folders["qwen2"]))
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["equal"]
    assert result["greedy_agreement"] == 1.0
    assert result["greedy_tokens"] == 48
    assert result["logit_difference"] <= 1e-5
    assert result["tied_head"] == [True, True]
    assert result["parameters"][0] == result["parameters"][1]
    missing = run_checkpoint("parity", str(tmp_path / "nowhere"))
    assert missing.returncode == 4
    assert missing.stderr.count("\n") == 1
    assert "no such folder" in missing.stderr


def test_parity_says_when_they_differ(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch):
    honest = load_model

    def wrong(*args, **kwargs):
        ours, tokenizer = honest(*args, **kwargs)
        with torch.no_grad():
            ours.model.layers[1].input_layernorm.weight.mul_(1.01)
        return ours, tokenizer

    monkeypatch.setattr(checkpoint, "load_model", wrong)
    assert checkpoint.main(["parity", str(folders["llama"])]) == 1


def test_export_command(folders: dict[str, Path], tmp_path: Path):
    done = run_checkpoint("export", str(folders["qwen3"]), str(tmp_path / "out"), "--dtype", "bfloat16")
    assert done.returncode == 0, done.stderr
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert {p.dtype for p in back.parameters()} == {torch.bfloat16}


@pytest.mark.slow
def test_the_full_shape_of_qwen2_5_0_5b(tmp_path: Path):
    """Random weights in the real shape, stored as published: bfloat16, tied, rope_theta at a million."""
    torch.manual_seed(0)
    shape = {"vocab_size": 151_936, "hidden_size": 896, "intermediate_size": 4_864, "num_hidden_layers": 24}
    shape |= {"num_attention_heads": 14, "num_key_value_heads": 2, "max_position_embeddings": 32_768}
    reference = t.Qwen2ForCausalLM(t.Qwen2Config(**shape, rope_theta=1e6, tie_word_embeddings=True)).bfloat16()
    reference.save_pretrained(tmp_path / "published")
    del reference
    result = checkpoint.parity(tmp_path / "published")
    assert result["parameters"] == [494_032_768, 494_032_768]
    assert result["logit_difference"] <= 1e-5
    assert result["greedy_agreement"] == 1.0
    assert result["equal"]
