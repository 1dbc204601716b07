"""Text from a model: continue prompts, answer as an assistant, or talk in turns.

    python infer.py --prompt "def add(a, b):"                 the newest run continues the text
    python infer.py --ckpt FOLDER --instruct --prompt "Why?"  any Hugging Face folder answers
    python infer.py --chat                                    a conversation on the terminal
    python infer.py --show_routing --prompt "    def"            which tokens a routed model spends its layers on

stdout carries what the model wrote and nothing else; notes and speed go to stderr.
"""

from __future__ import annotations

if __name__ == "__main__":  # Ctrl-C while torch is being imported: leave, without a traceback
    import signal

    signal.signal(signal.SIGINT, signal.SIG_DFL)

import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from model import RequestError, Sampling, generate, stream
from nanoqwen.chat import render_chat
from nanoqwen.config import Config, check, load_config
from nanoqwen.cpu_kernels import lanes
from nanoqwen.distributed import pick_device, pick_dtype
from nanoqwen.errors import ConfigError, escape_terminal, run_script, say
from nanoqwen.fast import CPUFastGPT, fast
from nanoqwen.manifest import checkpoints
from nanoqwen.quantize import quantize_model
from nanoqwen.routing import layers_per_token
from nanoqwen.tokenizer import StreamDecoder, Tokenizer, pieces_of
from nanoqwen.weights import CheckpointError, load_model

RUNS = Path("runs")
CHAT_HELP = "/help lists the commands, /reset forgets the conversation, Ctrl-C cuts an answer short, Ctrl-D ends"


def write(text: str) -> None:
    """Model output, on stdout; a terminal gets it without characters that it would obey."""
    sys.stdout.write(escape_terminal(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


# --- prompts and model ------------------------------------------------------------------------------------------------


def newest_run() -> Path:
    """The run folder under runs/ whose newest checkpoint is the youngest."""
    manifests = [path / "manifest.json" for run in sorted(RUNS.glob("*")) for _, path in checkpoints(run)]
    ages = {path.parents[2]: path.stat().st_mtime for path in manifests if path.is_file()}
    if not ages:
        raise CheckpointError(f"no run under {RUNS}/: train one with `make train`, or name a source with --ckpt")
    return max(ages, key=ages.__getitem__)


def read_prompts(cfg: Config) -> list[str]:
    """The texts of --prompt and --prompt_file; `-` is standard input. One final newline of a file is not text."""
    prompts = [_read_stdin() if prompt == "-" else prompt for prompt in cfg.infer.prompt]
    if cfg.infer.prompt_file == "-":
        prompts.append(_read_stdin())
    elif cfg.infer.prompt_file is not None:
        try:
            text = Path(cfg.infer.prompt_file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
            raise ConfigError(f"infer.prompt_file: {cfg.infer.prompt_file}: {reason}") from None
        prompts.append(text.removesuffix("\n"))
    if not prompts:
        raise ConfigError("infer.prompt: expected a text to continue: --prompt TEXT, --prompt - or --chat")
    empty = [number for number, prompt in enumerate(prompts, start=1) if not prompt]
    if empty:
        raise ConfigError(f"infer.prompt: expected text, prompt {empty[0]} of {len(prompts)} is empty")
    return prompts


def _read_stdin() -> str:
    return sys.stdin.buffer.read().decode("utf-8", "replace").removesuffix("\n")


class Session:
    """A loaded model with its tokenizer and settings."""

    def __init__(self, cfg: Config):
        check(cfg)
        self.cfg, self.infer = cfg, cfg.infer
        device = pick_device(cfg.run.device)
        rounded = self.infer.weights != "auto"
        if rounded and device.type != "cpu":
            raise ConfigError(f"infer.weights: expected auto on {device.type}: {self.infer.weights} is for CPUs")
        dtype, reason = pick_dtype(cfg.run.dtype, device)
        source = self.infer.ckpt or newest_run()
        started = time.perf_counter()
        self.model, tokenizer = load_model(source, device, dtype, allow_mismatch=self.infer.allow_mismatch)
        if tokenizer is None:
            raise CheckpointError(f"{source}: no tokenizer.json in the folder")
        self.tokenizer: Tokenizer = tokenizer
        name = str(dtype).removeprefix("torch.")
        size = sum(p.numel() for p in self.model.parameters())
        if rounded:
            name = f"{name} with weights in {self.infer.weights}"
            quantize_model(self.model, self.infer.weights, lanes())
        self.decoder = fast(self.model)
        if rounded and not isinstance(self.decoder, CPUFastGPT):
            name += ", slow without compiled code"  # no compiler, or layers that it does not know
        say(f"{source}: {size / 1e6:.1f} M parameters on {device} in {name} ({reason}), "
            f"loaded in {time.perf_counter() - started:.1f} s")  # fmt: skip
        vocab = self.model.cfg.vocab_size
        self.sampling: Sampling = self.infer.for_request(
            eos=tokenizer.stop_ids,
            banned=range(tokenizer.n_vocab, vocab),  # rows of the embedding that pad it to a round size
            seed=cfg.run.seed,
        )
        self.cache_dtype = None if self.infer.cache_dtype == "auto" else getattr(torch, self.infer.cache_dtype)

    def prompt_ids(self, prompt: str) -> list[int]:
        if self.infer.instruct:
            return self.conversation_ids([{"role": "user", "content": prompt}])
        ids = self.tokenizer.encode(prompt, allow_special=self.infer.allow_special)
        return [*self.tokenizer.prefix, *ids]

    def conversation_ids(self, turns: Sequence[dict[str, str]]) -> list[int]:
        system = [{"role": "system", "content": self.infer.system}] if self.infer.system is not None else []
        ids, _ = render_chat([*system, *turns], self.tokenizer, generate=True, thinking=self.infer.thinking)
        return ids

    def pieces(self, prompts: list[list[int]]) -> Iterator[tuple[int, str]]:
        """(row, printable text) as the rows are made; beams come complete. Leaves the speed in `self.note`."""
        started, new_tokens = time.perf_counter(), 0
        decoders = [StreamDecoder(self.tokenizer, self.infer.stop) for _ in prompts]
        if self.sampling.num_beams > 1:
            rows = generate(self.decoder, prompts, self.sampling, cache_dtype=self.cache_dtype)
            new_ids = ((row, ids[len(prompts[row]) :]) for row, ids in enumerate(rows))
        else:
            events = stream(
                self.decoder, prompts, self.sampling, decode=self.tokenizer.decode, cache_dtype=self.cache_dtype
            )
            new_ids = ((event.row, [event.token]) for event in events)
        for row, ids in new_ids:
            new_tokens += len(ids)
            yield row, decoders[row].feed(ids)
        yield from ((row, decoder.flush()) for row, decoder in enumerate(decoders))
        seconds, prompt_tokens = time.perf_counter() - started, sum(map(len, prompts))
        speed = f"{new_tokens / seconds:.1f} tokens/s"
        self.note = f"{prompt_tokens} tokens read, {new_tokens} written in {seconds:.2f} s: {speed}"


# --- one answer, many answers, a conversation -------------------------------------------------------------------------


def continue_prompts(session: Session, prompts: list[str]) -> None:
    rows = [session.prompt_ids(prompt) for prompt in prompts for _ in range(session.infer.num_samples)]
    if len(rows) == 1 and session.infer.stream:
        for _, piece in session.pieces(rows):
            write(piece)
        if sys.stdout.isatty():
            write("\n")
        say(session.note)
        return
    texts = [""] * len(rows)
    for row, piece in session.pieces(rows):
        texts[row] += piece
    for row, text in enumerate(texts):
        if len(texts) > 1:
            prompt, number = divmod(row, session.infer.num_samples)
            say(f"--- prompt {prompt + 1}, sample {number + 1}")
        write(text if len(texts) == 1 and not sys.stdout.isatty() else f"{text}\n")
    say(session.note)


def shade(pieces: Sequence[tuple[str, int]], layers: int, colour: bool) -> str:
    """Each piece of a text on a grey that is brighter, the more of the `layers` computed it.

    Without colour the number of layers stands in brackets where it changes.
    """
    out, last = "", None
    for text, used in pieces:
        if colour:  # 256-colour greys: 234 is nearly black, 254 nearly white
            grey = 234 + round(20 * used / layers)
            style = f"\x1b[48;5;{grey}m\x1b[38;5;{232 if grey > 243 else 255}m"
            # A background that runs on to the end of a line would hide where the text ends.
            out += "\n".join(f"{style}{line}\x1b[0m" if line else "" for line in escape_terminal(text).split("\n"))
        else:
            out += (f"[{used}]" if used != last else "") + text
        last = used
    return out


def show_routing(session: Session, prompts: list[str]) -> None:
    layers, colour = len(session.model.routers), sys.stdout.isatty()
    if not layers:
        raise ConfigError("infer.show_routing: expected a model with routed layers, got a dense one")
    for prompt in prompts:
        start = session.prompt_ids(prompt)
        (ids,) = generate(session.model, [start], session.sampling, decode=session.tokenizer.decode)
        counts = layers_per_token(session.model, ids)
        pieces = [piece for piece in zip(pieces_of(session.tokenizer, ids), counts, strict=True) if piece[0]]
        sys.stdout.write(shade(pieces, layers, colour) + "\n")
        used = sum(counts) / (layers * len(ids))
        legend = shade([(f" {n} ", n) for n in range(layers + 1)], layers, sys.stderr.isatty())
        sys.stderr.write(f"of {layers} routed layers: {legend}\n")
        say(f"{len(ids)} tokens; routed layers computed {100 * used:.1f} % of them")


def chat(session: Session) -> None:
    """Turns of user and assistant until the input ends. Ctrl-C cuts an answer short; its beginning stays."""
    say(f"chat: {CHAT_HELP}")
    turns: list[dict[str, str]] = []
    while True:
        sys.stderr.write("> ")
        sys.stderr.flush()
        line = sys.stdin.readline()
        if not line:
            say("")
            return
        question = line.strip()
        if question == "/help":
            say(CHAT_HELP)
        elif question == "/reset":
            turns = []
        elif question.startswith("/"):
            say(f"({question.split()[0]}: no such command; /help lists them)")
        elif question:
            conversation = forget_oldest(session, [*turns, {"role": "user", "content": question}])
            try:
                turns = [*conversation, {"role": "assistant", "content": answer(session, conversation)}]
            except RequestError as error:
                say(f"({error})")


def answer(session: Session, turns: list[dict[str, str]]) -> str:
    text = ""
    try:
        for _, piece in session.pieces([session.conversation_ids(turns)]):
            text += piece
            if session.infer.stream:
                write(piece)
    except KeyboardInterrupt:
        session.note = "cut short"
    write("\n" if session.infer.stream else f"{text}\n")
    say(f"({session.note})")
    return text


def forget_oldest(session: Session, turns: list[dict[str, str]]) -> list[dict[str, str]]:
    """Drop questions with their answers from the front until the rest leaves room for an answer."""
    room = session.model.cfg.context - session.sampling.max_new_tokens
    remaining = turns
    while len(remaining) > 1 and len(session.conversation_ids(remaining)) > room:
        remaining = remaining[2:]
    if len(remaining) < len(turns):
        say(f"(the context is full: the first {len(turns) - len(remaining)} messages are forgotten)")
    return remaining


def main(argv: list[str]) -> None:
    for pipe in (sys.stdin, sys.stdout, sys.stderr):  # a locale of ASCII must not end an answer in its middle
        if pipe is not None:
            pipe.reconfigure(errors="replace" if pipe is sys.stdin else "backslashreplace")
    cfg = load_config(
        argv, "infer", usage="python infer.py [FILE.yaml] --prompt TEXT [--ckpt SOURCE] [--key=value ...]"
    )
    prompts = [] if cfg.infer.chat else read_prompts(cfg)
    if cfg.infer.chat and (cfg.infer.prompt or cfg.infer.prompt_file or cfg.infer.num_samples > 1):
        raise ConfigError("infer.chat: reads its questions from the terminal: expected no prompt and one sample")
    if cfg.infer.num_beams > 1 and cfg.infer.num_samples > 1:
        raise ConfigError("infer.num_samples: expected 1 with num_beams: beams draw nothing, so all would be alike")
    session = Session(cfg)
    try:
        if cfg.infer.chat:
            chat(session)
        elif cfg.infer.show_routing:
            show_routing(session, prompts)
        else:
            continue_prompts(session, prompts)
    except RequestError as error:
        raise ConfigError(f"infer: {error}") from None


if __name__ == "__main__":
    run_script(main)
