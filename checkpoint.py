"""Weights in, weights out: compare, export, upload, verify.

python checkpoint.py parity SOURCE           compare transformers' result with ours, in fp32; exit 1 if they differ
python checkpoint.py export SOURCE FOLDER    write a folder that transformers loads, with a model card (README.md)
python checkpoint.py push FOLDER OWNER/NAME  upload an exported folder in one commit; --dry_run only lists the files
python checkpoint.py gguf SOURCE FILE        write one file for llama.cpp
python checkpoint.py verify SOURCE           check all files of a checkpoint and print its digest
"""

from __future__ import annotations

if __name__ == "__main__":  # Ctrl-C while torch is being imported: leave, without a traceback
    import signal

    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import json
import random
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model import GPT, generate
from nanoqwen.errors import CheckpointError, ConfigError, run_script, say
from nanoqwen.files import disk_errors
from nanoqwen.gguf import Q8_0, write_gguf
from nanoqwen.hf_format import OWN_TYPE, model_type
from nanoqwen.runfolder import verify
from nanoqwen.share.card import AUTOTOKENIZER_NOTE, autotokenizer_fits, model_card
from nanoqwen.share.hub import check_repository, plan_upload, push
from nanoqwen.sources import is_gguf
from nanoqwen.tokenizer import Tokenizer
from nanoqwen.weights import export, export_adapter, is_adapter, load_model, read_adapter, resolve

_LOGIT_TOLERANCE = 1e-4  # as a fraction of the largest logit, in fp32
_GREEDY_TOKENS = 64

# --- parity -----------------------------------------------------------------------------------------------------------


def parity(source: str | Path, device: str = "cpu") -> dict[str, Any]:
    """Load a source with transformers and with us, in fp32, and measure how far apart they are."""
    try:
        import transformers
    except ImportError:
        raise CheckpointError("parity needs transformers: pip install transformers") from None
    folder = resolve(source)
    if is_adapter(folder):
        raise CheckpointError(f"{source}: is an adapter: compare the model that `checkpoint.py export --merge` writes")
    if is_gguf(folder):
        raise CheckpointError(f"{source}: is a GGUF file: compare the folder that `checkpoint.py export` makes of it")
    ours, tokenizer = load_model(folder, device, torch.float32)
    if model_type(ours) == OWN_TYPE:
        raise CheckpointError(f"{folder}: transformers has no class for this shape, so there is nothing to compare")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    prompt = torch.randint(ours.cfg.vocab_size, (2, 16), generator=torch.Generator().manual_seed(0)).to(device)
    new_tokens = min(_GREEDY_TOKENS, ours.cfg.max_position_embeddings - prompt.shape[1])
    tied = theirs.get_output_embeddings().weight is theirs.get_input_embeddings().weight
    result = {
        "logit_difference": _logit_difference(ours, theirs, prompt),
        "greedy_agreement": _greedy_agreement(ours, theirs, prompt, new_tokens),
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


@torch.no_grad()
def _logit_difference(ours: GPT, theirs: nn.Module, prompt: Tensor) -> float:
    """The largest difference, as a fraction of the largest logit."""
    reference = theirs(prompt).logits.float()
    return float((ours(prompt).logits - reference).abs().max() / reference.abs().max())


def _greedy_agreement(ours: GPT, theirs: nn.Module, prompt: Tensor, new_tokens: int) -> float:
    """Fraction of the new tokens that are equal."""
    greedy = {"do_sample": False, "num_beams": 1, "eos_token_id": None, "pad_token_id": 0, "repetition_penalty": 1.0}
    mask = torch.ones_like(prompt)
    expected = theirs.generate(prompt, attention_mask=mask, max_new_tokens=new_tokens, **greedy).cpu()
    ids = torch.tensor(generate(ours, prompt.tolist(), temperature=0.0, max_new_tokens=new_tokens))
    return float((ids == expected)[:, prompt.shape[1] :].float().mean())


def _tokenizer_agreement(transformers: Any, folder: Path, tokenizer: Tokenizer | None) -> float | None:
    """Fraction of 1,000 random texts that both tokenizers turn into the same ids; None without a tokenizer."""
    if tokenizer is None:
        return None
    reference = transformers.AutoTokenizer.from_pretrained(folder)
    letters = "abcdeABC 0123  \n\t.,'!?_-()äöüßéñçøžπλЖяעبहि中文日本語한국🙂👩‍🚀"
    draw = random.Random(0)
    texts = ["".join(draw.choices(letters, k=draw.randrange(1, 80))) for _ in range(1000)]
    equal = [tokenizer.encode(text) == reference.encode(text, add_special_tokens=False) for text in texts]
    return sum(equal) / len(equal)


def _print_parity(source: str, result: dict[str, Any]) -> None:
    tokenizer = result["tokenizer_agreement"]
    rows = (
        ("largest logit difference / largest logit", f"{result['logit_difference']:.2e}"),
        (f"greedy agreement over {result['greedy_tokens']} tokens", f"{result['greedy_agreement']:.1%}"),
        ("tokenizer agreement on 1,000 texts", "no tokenizer" if tokenizer is None else f"{tokenizer:.1%}"),
        ("tied head (ours, transformers)", "{}, {}".format(*result["tied_head"])),
        ("parameters (ours, transformers)", "{:,}, {:,}".format(*result["parameters"])),
        ("verdict", "equal" if result["equal"] else "DIFFERENT"),
    )
    say(f"parity of {source} with transformers, fp32", sys.stdout)
    for name, value in rows:
        print(f"  {name:42} {value}")
    print(json.dumps({"source": str(source), **result}))


# --- command line -----------------------------------------------------------------------------------------------------


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?)B?", text, re.IGNORECASE)
    size = float(match[1]) * 1000 ** " KMG".find(match[2].upper() or " ") if match else 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"expected a size such as 5GB, got {text!r}")
    return int(size)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python checkpoint.py", description="Weights in, weights out.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    parity_ = commands.add_parser("parity", help="compare a source with transformers; exit 1 if they differ")
    export_ = commands.add_parser("export", help="write a folder that transformers loads unchanged, with a card")
    push_ = commands.add_parser("push", help="upload an exported folder to the hub")
    gguf_ = commands.add_parser("gguf", help="write one file for llama.cpp")
    verify_ = commands.add_parser(
        "verify", help="check all files of a checkpoint, or of a run's newest; print its digest"
    )
    verify_.add_argument("source", help="checkpoint or run folder")
    for command in (parity_, export_, gguf_):
        command.add_argument("source", help="Hugging Face folder, checkpoint, run folder, .gguf file or hub id")
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    parity_.add_argument("--device", default="cpu", choices=[d for d in available if available[d]], help="default: cpu")
    export_.add_argument("folder", help="a new folder")
    gguf_.add_argument("file", help="a new file, .gguf")
    for command, more in ((export_, ()), (gguf_, (Q8_0,))):
        command.add_argument("--dtype", choices=("float32", "bfloat16", "float16", *more), help="default: as stored")
    export_.add_argument("--merge", action="store_true", help="an adapter: merge it into its base, write the model")
    export_.add_argument("--base", metavar="OWNER/NAME", help="an adapter: the id of its base on the hub")
    export_.add_argument("--hf", action="store_true", help="an error unless transformers has a class for the model")
    export_.add_argument("--shard_size", type=_bytes, metavar="SIZE", help="largest file of weights; default: 5GB")
    push_.add_argument("folder", help="an exported folder")
    push_.add_argument("repository", metavar="OWNER/NAME", help="on the hub; created if it does not exist")
    push_.add_argument("--private", action="store_true", help="create a private repository")
    push_.add_argument("--revision", metavar="BRANCH", help="default: main")
    push_.add_argument("--message", metavar="TEXT", help="of the commit")
    push_.add_argument("--dry_run", action="store_true", help="list the files; no request is made")
    return parser


def main(argv: list[str]) -> int:
    args = _parser().parse_args(argv)
    dtype = getattr(args, "dtype", None)
    dtype = getattr(torch, dtype) if dtype not in (None, Q8_0) else dtype
    if args.command == "verify":
        say(verify(Path(args.source)), sys.stdout)
    elif args.command == "parity":
        result = parity(args.source, args.device)
        _print_parity(args.source, result)
        return 0 if result["equal"] else 1
    elif args.command == "export":
        with disk_errors(Path(args.folder)):
            _export(args, dtype)
    elif args.command == "gguf":
        with disk_errors(Path(args.file)):
            tokenizer = write_gguf(args.source, args.file, dtype)
        say(f"wrote {args.file}: llama-cli -m {shlex.quote(args.file)} loads it", sys.stdout)
        if tokenizer.engine.nfc:
            print(
                "note: llama.cpp does not normalise text to NFC, as this tokenizer does; ids differ where that matters"
            )
    elif args.dry_run:
        check_repository(args.repository)
        target = f"{args.repository}{f' at {args.revision}' if args.revision else ''}{', private' * args.private}"
        say(f"would upload to {target}:\n{plan_upload(Path(args.folder))}", sys.stdout)
    else:
        options = {"private": args.private, "revision": args.revision, "message": args.message}
        say(f"uploaded: {push(args.folder, args.repository, **options)}", sys.stdout)
    return 0


def _export(args: argparse.Namespace, dtype: torch.dtype | None) -> None:
    source, name = args.source, Path(args.folder).name
    folder = resolve(source)
    adapter = read_adapter(folder) if is_adapter(folder) else None
    for option in ("merge", "base"):
        if getattr(args, option) and not adapter:
            raise ConfigError(f"--{option}: expected an adapter as the source, {source} is a whole model")
    if adapter and not args.merge:
        adapter = adapter._replace(base=args.base or adapter.base)

        def describe(model: GPT, tokenizer: Tokenizer | None) -> str:
            return model_card(name, source, model, tokenizer, dtype, adapter, apart=True)

        export_adapter(source, args.folder, dtype, base=args.base, describe=describe)
        say(f"wrote {args.folder}: PeftModel.from_pretrained(base, {args.folder!r}) loads it", sys.stdout)
        return
    model, tokenizer = load_model(source)
    own = model_type(model) == OWN_TYPE
    if args.hf and own:
        reason = "transformers has no class for this shape"
        if model.routing:
            reason = f"its {len(model.routers)} routed layers would compute all tokens there, which is another model"
        raise ConfigError(f"--hf: {source} cannot be a Hugging Face model: {reason}")
    text = model_card(name, source, model, tokenizer, dtype, adapter)
    export(model, tokenizer, args.folder, dtype, shard_bytes=args.shard_size, card=text)
    if own:
        say(f"wrote {args.folder}: transformers has no class for this shape; load_model loads it", sys.stdout)
    else:
        say(f"wrote {args.folder}: AutoModelForCausalLM.from_pretrained({args.folder!r}) loads it", sys.stdout)
        if tokenizer is not None and not autotokenizer_fits(model, tokenizer):
            print(f"note: {AUTOTOKENIZER_NOTE}")


if __name__ == "__main__":
    run_script(main)
