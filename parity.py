"""A source loaded by transformers and by us, in fp32: logits, greedy text, tokenizer.

python checkpoint.py parity SOURCE
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch

from checkpoint import is_adapter, load_model, resolve
from model import generate
from published import OWN_TYPE, CheckpointError, model_type
from tokenizer import Tokenizer

_LOGIT_TOLERANCE = 1e-4  # of the largest logit, in fp32
_GREEDY_TOKENS = 64


def parity(source: str | Path, device: str = "cpu") -> dict[str, Any]:
    """Load a source with transformers and with us, in fp32, and measure how far apart they are."""
    try:
        import transformers
    except ImportError:
        raise CheckpointError("parity needs transformers: pip install transformers") from None
    folder = resolve(source)
    if is_adapter(folder):
        raise CheckpointError(f"{source}: is an adapter: compare what `checkpoint.py export --merge` makes of it")
    ours, tokenizer = load_model(folder, device, torch.float32)
    if model_type(ours) == OWN_TYPE:
        raise CheckpointError(f"{folder}: transformers has no class for this shape, so there is nothing to compare")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    prompt = torch.randint(ours.cfg.vocab_size, (2, 16), generator=torch.Generator().manual_seed(0)).to(device)
    new_tokens = min(_GREEDY_TOKENS, ours.cfg.max_position_embeddings - prompt.shape[1])
    with torch.no_grad():
        reference = theirs(prompt).logits.float()
        difference = (ours(prompt).logits - reference).abs().max() / reference.abs().max()
        expected = theirs.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            num_beams=1,
            max_new_tokens=new_tokens,
            eos_token_id=None,
            pad_token_id=0,
            repetition_penalty=1.0,
        )
    greedy = torch.tensor(generate(ours, prompt.tolist(), temperature=0.0, max_new_tokens=new_tokens))
    tied = theirs.get_output_embeddings().weight is theirs.get_input_embeddings().weight
    result = {
        "logit_difference": float(difference),
        "greedy_agreement": float((greedy == expected.cpu())[:, prompt.shape[1] :].float().mean()),
        "greedy_tokens": new_tokens,
        "tokenizer_agreement": _tokenizer_agreement(transformers, folder, tokenizer),
        "tied_head": [ours.cfg.tie_word_embeddings, tied],
        "parameters": [sum(p.numel() for p in model.parameters()) for model in (ours, theirs)],
    }
    result["equal"] = (
        result["logit_difference"] <= _LOGIT_TOLERANCE
        and result["greedy_agreement"] == 1.0
        and result["tokenizer_agreement"] in (1.0, None)
        and ours.cfg.tie_word_embeddings == tied
        and len(set(result["parameters"])) == 1
    )
    return result


def _tokenizer_agreement(transformers: Any, folder: Path, tokenizer: Tokenizer | None) -> float | None:
    """Share of 1,000 random texts that both tokenizers turn into the same ids; None without a tokenizer."""
    if tokenizer is None:
        return None
    reference = transformers.AutoTokenizer.from_pretrained(folder)
    letters = "abcdeABC 0123  \n\t.,'!?_-()äöüßéñçøžπλЖяעبहि中文日本語한국🙂👩‍🚀"
    draw = random.Random(0)
    texts = ["".join(draw.choices(letters, k=draw.randrange(1, 80))) for _ in range(1000)]
    equal = [tokenizer.encode(text) == reference.encode(text, add_special_tokens=False) for text in texts]
    return sum(equal) / len(equal)


def show_parity(source: str, result: dict[str, Any]) -> None:
    tokenizer = result["tokenizer_agreement"]
    rows = (
        ("largest logit difference / largest logit", f"{result['logit_difference']:.2e}"),
        (f"greedy agreement over {result['greedy_tokens']} tokens", f"{result['greedy_agreement']:.1%}"),
        ("tokenizer agreement on 1,000 texts", "no tokenizer" if tokenizer is None else f"{tokenizer:.1%}"),
        ("tied head (ours, transformers)", "{}, {}".format(*result["tied_head"])),
        ("parameters (ours, transformers)", "{:,}, {:,}".format(*result["parameters"])),
        ("verdict", "equal" if result["equal"] else "DIFFERENT"),
    )
    print(f"parity of {source} with transformers, fp32")
    for name, value in rows:
        print(f"  {name:42} {value}")
    print(json.dumps({"source": str(source), **result}))
