"""Weights in, weights out: compare, export, push, verify.

python checkpoint.py parity SOURCE           loaded by transformers and by us, in fp32; exit 1 if they differ
python checkpoint.py export SOURCE FOLDER    the folder gets a README.md, which a hub shows as the model's card
python checkpoint.py push FOLDER OWNER/NAME  what is complete is uploaded in one commit; --dry_run only tells what
python checkpoint.py gguf SOURCE FILE        one file for llama.cpp
python checkpoint.py verify SOURCE           the digest of a checkpoint that is whole
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shlex
from pathlib import Path
from typing import Any

import torch

from model import generate
from nanoqwen.errors import CheckpointError, ConfigError, run_script
from nanoqwen.files import disk_errors
from nanoqwen.gguf import write_gguf
from nanoqwen.hf_format import OWN_TYPE, model_type
from nanoqwen.runfolder import verify
from nanoqwen.share.card import AUTOTOKENIZER_NOTE, auto_reads, card
from nanoqwen.share.hub import check_repository, parcel, push
from nanoqwen.tokenizer import Tokenizer
from nanoqwen.weights import export, export_adapter, is_adapter, load_model, read_adapter, resolve

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


# --- command line -----------------------------------------------------------------------------------------------------


def _devices() -> list[str]:
    present = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    return [name for name, there in present.items() if there]


def _bytes(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?)B?", text, re.IGNORECASE)
    size = float(found[1]) * 1000 ** "KMG".find(found[2].upper()) * (1000 if found[2] else 1) if found else 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"expected a size such as 5GB, got {text!r}")
    return int(size)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python checkpoint.py", description="Weights in, weights out.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    compare = commands.add_parser("parity", help="compare a source with transformers; exit 1 if they differ")
    write = commands.add_parser("export", help="write a folder that transformers loads unchanged, with a card")
    upload = commands.add_parser("push", help="upload an exported folder to the hub")
    single = commands.add_parser("gguf", help="write one file for llama.cpp")
    whole = commands.add_parser("verify", help="print the digest of a checkpoint, or of a run's newest, if it is whole")
    whole.add_argument("source", help="checkpoint or run folder")
    for command in (compare, write, single):
        command.add_argument("source", help="Hugging Face folder, checkpoint, run folder or hub id")
    compare.add_argument("--device", default="cpu", choices=_devices(), help="default: cpu")
    write.add_argument("folder", help="a new folder")
    single.add_argument("file", help="a new file, .gguf")
    for command in (write, single):
        command.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: as stored")
    write.add_argument("--merge", action="store_true", help="an adapter: write the model that it makes of its base")
    write.add_argument("--base", metavar="OWNER/NAME", help="an adapter: the id of its base on the hub")
    write.add_argument("--hf", action="store_true", help="an error unless transformers has a class for the model")
    write.add_argument("--shard_size", type=_bytes, metavar="SIZE", help="of a file of weights at most; default: 5GB")
    upload.add_argument("folder", help="an exported folder")
    upload.add_argument("repository", metavar="OWNER/NAME", help="on the hub; it is made if it is missing")
    upload.add_argument("--private", action="store_true", help="make a repository that others do not see")
    upload.add_argument("--revision", metavar="BRANCH", help="default: main")
    upload.add_argument("--message", metavar="TEXT", help="of the commit")
    upload.add_argument("--dry_run", action="store_true", help="say what would go; no request is made")
    return parser


def main(argv: list[str]) -> int:
    args = _parser().parse_args(argv)
    dtype = getattr(torch, args.dtype) if getattr(args, "dtype", None) else None
    if args.command == "verify":
        print(verify(Path(args.source)))
    elif args.command == "parity":
        result = parity(args.source, args.device)
        show_parity(args.source, result)
        return 0 if result["equal"] else 1
    elif args.command == "export":
        with disk_errors(Path(args.folder)):
            print(_export(args, dtype))
    elif args.command == "gguf":
        with disk_errors(Path(args.file)):
            tokenizer = write_gguf(args.source, args.file, dtype)
        print(f"wrote {args.file}: llama-cli -m {shlex.quote(args.file)} loads it")
        if tokenizer.nfc:
            print("note: llama.cpp does not bring text to NFC, as this tokenizer does; other text gets other ids there")
    elif args.dry_run:
        check_repository(args.repository)
        where = f"{args.repository}{f' at {args.revision}' if args.revision else ''}{', private' * args.private}"
        print(f"would go to {where}:\n{parcel(Path(args.folder))}")
    else:
        how = {"private": args.private, "revision": args.revision, "message": args.message}
        print(f"shared: {push(args.folder, args.repository, **how)}")
    return 0


def _export(args: argparse.Namespace, dtype: torch.dtype | None) -> str:
    """Write what is asked for; returns what to tell the person."""
    source, name = args.source, Path(args.folder).name
    folder = resolve(source)
    adapter = read_adapter(folder) if is_adapter(folder) else None
    for option in ("merge", "base"):
        if getattr(args, option) and not adapter:
            raise ConfigError(f"--{option}: expected an adapter as the source, {source} is a whole model")
    if adapter and not args.merge:
        apart = adapter._replace(base=args.base or adapter.base)
        export_adapter(
            source,
            args.folder,
            dtype,
            base=args.base,
            describe=lambda model, tokenizer: card(name, source, model, tokenizer, dtype, apart, apart=True),
        )
        return f"wrote {args.folder}: PeftModel.from_pretrained(base, {args.folder!r}) loads it"
    model, tokenizer = load_model(source)
    own = model_type(model) == OWN_TYPE
    if args.hf and own:
        reason = "transformers has no class for this shape"
        if model.routing:
            reason = f"its {len(model.routers)} routed layers would compute all tokens there, which is another model"
        raise ConfigError(f"--hf: {source} cannot be a Hugging Face model: {reason}")
    text = card(name, source, model, tokenizer, dtype, adapter)
    export(model, tokenizer, args.folder, dtype, shard_bytes=args.shard_size, card=text)
    loads = f"AutoModelForCausalLM.from_pretrained({args.folder!r}) loads it"
    if own:
        loads = "transformers has no class for this shape; load_model loads it"
    elif tokenizer is not None and not auto_reads(model, tokenizer):
        loads += "\n" + AUTOTOKENIZER_NOTE
    return f"wrote {args.folder}: {loads}"


if __name__ == "__main__":
    run_script(main)
