"""Decoding by compiled code on a CPU, beside the plain model; and weights in 8 and 4 bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch

from model import GPT, KVCache, generate
from nanoqwen import cpu_kernels
from nanoqwen.cpu_kernels import lanes
from nanoqwen.fast import CPUFastGPT, FastGPT, fast
from nanoqwen.quantize import GROUP, Int4, Int8, fit_groups, quantize_model

OTHER_LAYERS = {"gpt2", "j-branch", "dynamic"}  # decode by torch
KNOWN = sorted(set(tiny.ARCHITECTURES) - OTHER_LAYERS)

needs_compiler = pytest.mark.skipif(cpu_kernels.library() is None, reason="no C++ compiler with OpenMP")


def stored(name: str, weights: str) -> GPT:
    model = tiny.model(name)
    if weights == "bfloat16":
        return model.bfloat16()
    return model if weights == "float32" else quantize_model(model, weights, lanes())


def twin_of(model: GPT) -> CPUFastGPT:
    twin = fast(model)
    assert isinstance(twin, CPUFastGPT)
    return twin


@torch.no_grad()
def logits(model: GPT | CPUFastGPT, counts: list[int], steps: list[torch.Tensor], dtype=None) -> torch.Tensor:
    """Of each step behind prompts of `counts` tokens."""
    ids = torch.randint(97, (len(counts), max(counts)), generator=torch.Generator().manual_seed(0))
    cache = model.new_cache(len(counts), dtype, max(counts) + sum(step.shape[1] for step in steps))
    model(ids, cache=cache, lengths=counts)
    return torch.cat([model(step, cache=cache).logits for step in steps], dim=1)


def steps_of(rows: int, tokens: int = 3) -> list[torch.Tensor]:
    return list(torch.randint(97, (rows, tokens), generator=torch.Generator().manual_seed(1)).split(1, dim=1))


@needs_compiler
@pytest.mark.parametrize("weights", ["float32", "int8", "int4"])
@pytest.mark.parametrize("name", KNOWN)
def test_a_step_is_that_of_the_model(name: str, weights: str):
    """The plain model has the same rounded weights; the order of sums is all that differs."""
    model = stored(name, weights)
    for counts in ([9], [9, 4, 2], [5] * 11):
        steps = steps_of(len(counts))
        close = {"rtol": 0, "atol": 2e-5}
        torch.testing.assert_close(logits(twin_of(model), counts, steps), logits(model, counts, steps), **close)


@needs_compiler
def test_bf16_weights_are_multiplied_in_fp32():
    """So the step is nearer to the model in fp32 than torch's own in bf16 is."""
    half = stored("qwen2", "bfloat16")
    wide = tiny.model()
    wide.load_state_dict({name: tensor.float() for name, tensor in half.state_dict().items()})
    steps = steps_of(2)
    exact = logits(wide, [9, 4], steps)
    ours, theirs = (
        (logits(model, [9, 4], steps, torch.float32).float() - exact).abs().mean() for model in (twin_of(half), half)
    )
    assert ours < 0.7 * theirs


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_cache_of_any_type(dtype: torch.dtype):
    model, steps = tiny.model(), steps_of(2)
    ours, plain = (logits(each, [9, 4], steps, dtype) for each in (twin_of(model), model))
    torch.testing.assert_close(ours, plain, rtol=0, atol=2e-5 if dtype != torch.bfloat16 else 2e-2)


@needs_compiler
@pytest.mark.parametrize("weights", ["float32", "int8", "int4"])
def test_a_row_does_not_depend_on_its_neighbours_to_the_bit(weights: str):
    """Nor on how many tokens a call has, nor on the number of threads."""
    twin, counts = twin_of(stored("qwen2", weights)), [5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5]
    ids = torch.randint(97, (len(counts), 7), generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def run(rows: slice, *steps: int) -> torch.Tensor:
        part, start = ids[rows], 3
        cache = twin.new_cache(len(part), None, 7)
        # Not read by torch, whose products may depend on the batch.
        cache._keys, cache._values = ([torch.zeros(len(part), 2, 7, 8) for _ in range(3)] for _ in "kv")
        cache.capacity, cache.lengths = 7, [3] * len(part)
        for count in steps:
            out = twin(part[:, start : start + count], cache=cache)
            start += count
        return out.logits

    everything = run(slice(None), 1, 1)
    assert torch.equal(run(slice(4, 5), 1, 1), everything[4:5])
    assert torch.equal(run(slice(4, 5), 2), everything[4:5])
    assert torch.equal(run(slice(2, 6), 1, 1), everything[2:6])
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    assert torch.equal(run(slice(None), 1, 1), everything)
    torch.set_num_threads(threads)


@needs_compiler
@pytest.mark.parametrize("name", KNOWN)
def test_the_same_text(name: str):
    """Greedy, sampled and by beams; rows of several lengths, one of which ends early."""
    plain, twin = tiny.model(name), twin_of(tiny.model(name))
    prompts = [[1, 2, 3], [4, 5], [7, 8, 9, 10, 11]]
    ends = generate(plain, prompts, max_new_tokens=6, temperature=0.0)[0][-1]
    for options in (
        {"temperature": 0.0},
        {"temperature": 0.0, "eos": ends},
        {"seed": 1, "top_p": 0.9},
        {"num_beams": 3},
    ):
        expected = generate(plain, prompts, max_new_tokens=20, **options)
        assert generate(twin, prompts, max_new_tokens=20, **options) == expected, options


@needs_compiler
def test_logits_of_every_token_of_a_call():
    """Several tokens a row, of different counts: what a draft is verified with."""
    model, counts = tiny.model(), [3, 1]
    ids = torch.randint(97, (2, 9), generator=torch.Generator().manual_seed(0))
    twin, cache = twin_of(model), KVCache(model.cfg, 2, None, 9)
    with torch.no_grad():
        model(ids[:, :4], cache=cache)
        got = twin.decoder(ids[:, 4:7], counts, cache, every=True)
        expected = model(ids[:, :7]).logits
    torch.testing.assert_close(got, torch.cat([expected[0, 4:7], expected[1, 4:5]]), rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", sorted(OTHER_LAYERS))
def test_other_layers_decode_by_torch(name: str):
    model = tiny.model(name)
    assert fast(model) is model


def test_without_a_compiler_the_model_decodes_by_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    cpu_kernels.library.cache_clear()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = quantize_model(tiny.model(), "int4", lanes())
    assert fast(model) is model
    assert len(generate(model, [[1, 2]], max_new_tokens=3)[0]) == 5
    cpu_kernels.library.cache_clear()


@needs_compiler
def test_the_library_is_compiled_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cpu_kernels.library.cache_clear()
    monkeypatch.setattr(cpu_kernels, "FLAGS", ["-O0", *cpu_kernels.FLAGS[1:]])
    assert cpu_kernels.library() is not None
    (file,) = (tmp_path / "nanoqwen").iterdir()
    before = file.stat().st_mtime_ns
    cpu_kernels.library.cache_clear()
    assert cpu_kernels.library() is not None
    assert [path.stat().st_mtime_ns for path in (tmp_path / "nanoqwen").iterdir()] == [before]
    cpu_kernels.library.cache_clear()


# --- rounding ---------------------------------------------------------------------------------------------------------


def test_int8_is_within_half_a_step():
    weight = torch.randn(50, 70, generator=torch.Generator().manual_seed(0))
    weight[3] = 0
    error = (Int8(weight).weight() - weight).abs()
    assert (error <= weight.abs().amax(1, keepdim=True) / 254 * (1 + 1e-5)).all()


@pytest.mark.parametrize("lane_count", [8, 16])
@pytest.mark.parametrize("inputs", [32, 70, 256])
def test_int4_codes_are_packed_and_unpacked(inputs: int, lane_count: int):
    weight = torch.randn(9, inputs, generator=torch.Generator().manual_seed(0))
    matrix = Int4(weight, lane_count)
    padded = torch.nn.functional.pad(weight, (0, -inputs % matrix.block))
    codes, steps, offsets = fit_groups(padded)
    expected = codes.unflatten(1, (-1, GROUP)) * steps.float()[..., None] + offsets.float()[..., None]
    assert torch.equal(matrix.weight(), expected.flatten(1)[:, :inputs])


def test_int4_is_no_worse_than_the_plain_range_of_a_group():
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    grouped = weight.unflatten(1, (-1, GROUP))
    low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
    step = (high - low) / 15
    plain = ((grouped - low) / step).round() * step + low
    ours = Int4(weight).weight().unflatten(1, (-1, GROUP))
    assert (ours - grouped).square().mean() < 0.97 * (plain - grouped).square().mean()


def test_values_on_a_grid_of_16_stay_there():
    """As those of a Q4_1 file do, whose steps and offsets are fp16, too."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(16, (8, 8, GROUP), generator=generator).float()
    codes[..., :2] = torch.tensor([0.0, 15.0])
    steps, offsets = torch.rand(8, 8, 1, generator=generator).half(), torch.randn(8, 8, 1, generator=generator).half()
    weight = (codes * steps.float() + offsets.float()).flatten(1)
    assert torch.equal(Int4(weight).weight(), weight)


@pytest.mark.parametrize("name", ["qwen2", "qwen2-untied", "gpt2"])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_quantised_model_is_the_model_with_rounded_weights(name: str, kind: str):
    """Loss, logits and text; the copy in floats is gone."""
    rounded = quantize_model(tiny.model(name), kind)
    by_hand, ids = tiny.model(name), torch.arange(12).view(2, 6)
    with torch.no_grad():
        for one, other in zip(by_hand.model.layers, rounded.model.layers, strict=True):
            for module_name, module in one.named_modules():
                if isinstance(module, torch.nn.Linear):
                    module.weight.copy_(other.get_submodule(module_name).weight)
        by_hand.get_output_embeddings().weight.copy_(rounded.get_output_embeddings().weight)
        assert torch.equal(rounded.get_input_embeddings()(ids), by_hand.get_input_embeddings()(ids))
        torch.testing.assert_close(rounded(ids).logits, by_hand(ids).logits, rtol=0, atol=1e-5)
        torch.testing.assert_close(rounded(ids, ids).loss, by_hand(ids, ids).loss, rtol=1e-6, atol=0)
    floats = {parameter.dim() for parameter in rounded.model.layers.parameters()}
    assert floats == {1}


def test_the_graph_twin_is_for_cards():
    assert not isinstance(fast(tiny.model()), FastGPT)
