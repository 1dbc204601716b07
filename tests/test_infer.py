"""`python infer.py` as a person or a script runs it: processes, pipes and a real terminal."""

from __future__ import annotations

import io
import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest
import runs
import tiny
import torch
from test_chat_template import KINDS
from test_tokenizer import write_folder

import infer
from model import GPT, generate
from nanoqwen.chat import render_chat
from nanoqwen.config import load_config
from nanoqwen.errors import ConfigError, run_script
from nanoqwen.tokenizer import load_tokenizer, train_tokenizer
from nanoqwen.weights import export, load_model

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with a tokenizer of its own, as `export` writes them."""
    text = ["def add(a, b):\n    return a + b\n" * 20, "a user asks, an assistant answers. " * 30]
    tokenizer = train_tokenizer(text, 300)
    path = tmp_path_factory.mktemp("source") / "model"
    gpt = tiny.model(vocab_size=320, max_position_embeddings=128)  # 20 ids more than the tokenizer has
    export(gpt, tokenizer, path)
    return path


def process(*arguments: str, stdin: str = "", cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "infer.py"), "--run.dtype=float32", *arguments]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, cwd=cwd)


def run(folder: Path | None, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """The script within this process, which saves the seconds that importing torch takes."""
    argv = ["infer.py", "--run.dtype=float32", *(["--ckpt", str(folder)] if folder else []), *arguments]
    streams = {"stdin": io.TextIOWrapper(io.BytesIO(stdin.encode()), "utf-8")}
    streams |= {name: io.TextIOWrapper(io.BytesIO(), "utf-8") for name in ("stdout", "stderr")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", argv)
        for name, stream in streams.items():
            patch.setattr(sys, name, stream)
        with pytest.raises(SystemExit) as left:
            run_script(infer.main)
    out, err = (streams[name].seek(0) or streams[name].read() for name in ("stdout", "stderr"))
    return subprocess.CompletedProcess(argv, left.value.code, out, err)


def expected_text(folder: Path, ids: list[int], **params) -> str:
    gpt, tokenizer = load_model(folder)
    params = {"max_new_tokens": 12, "eos": tokenizer.stop_ids, "banned": range(tokenizer.n_vocab, 320), **params}
    new = generate(gpt, [ids], **params)[0][len(ids) :]
    return tokenizer.decode(new, skip_special=True)


def test_i01_stdout_is_the_continuation_and_nothing_else(folder: Path):
    """The prompt was once cut off as a number of characters of the decoded whole, which is not always the prompt."""
    tokenizer = load_tokenizer(folder)
    for prompt in ("def add", "e\u0301\u0323 cafe\u0301", "tabs\tand  spaces \n"):
        done = run(folder, f"--prompt={prompt}", "--max_new_tokens=12", "--temperature=0")
        assert done.returncode == 0, done.stderr
        assert done.stdout == expected_text(folder, tokenizer.encode(prompt), temperature=0.0)
        assert "tokens/s" in done.stderr
        assert "M parameters on" in done.stderr


def test_i01_i04_instruct_is_the_renderer_of_training(folder: Path):
    tokenizer = load_tokenizer(folder)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why <|im_end|>?"}]
    ids, _ = render_chat(messages, tokenizer, generate=True)
    start, end = tokenizer.special["<|im_start|>"], tokenizer.special["<|im_end|>"]
    assert ids.count(end) == 2  # the one in the user's words is text
    golden = [start, *tokenizer.encode("system\nBe brief."), end, *tokenizer.encode("\n")]
    golden += [start, *tokenizer.encode("user\nWhy <|im_end|>?"), end, *tokenizer.encode("\n")]
    assert ids == [*golden, start, *tokenizer.encode("assistant\n")]
    options = ["--instruct", "--system=Be brief.", "--prompt=Why <|im_end|>?", "--max_new_tokens=12"]
    done = run(folder, *options, "--top_k=5", "--repetition_penalty=1.3", "--top_p=1", "--seed=4")
    assert done.returncode == 0, done.stderr
    params = {"top_k": 5, "repetition_penalty": 1.3, "seed": 4, "temperature": 0.8}
    assert done.stdout == expected_text(folder, ids, **params)


@pytest.mark.parametrize(("kind", "options"), [("trimmed", []), ("thinking", []), ("thinking", ["--thinking=false"])])
def test_a_folder_is_asked_by_its_own_chat_template(kind: str, options: list[str], tmp_path: Path):
    """Llama 3's template writes the BOS that stands before a text without one: it was once doubled."""
    family, template = KINDS[kind]
    spec, config = family()
    tokenizer = load_tokenizer(write_folder(tmp_path / "tokenizer", spec, config | {"chat_template": template}))
    export(tiny.model(vocab_size=tokenizer.n_vocab, max_position_embeddings=128), tokenizer, tmp_path / "model")
    question = [{"role": "user", "content": "Why?"}]
    ids, _ = render_chat(question, tokenizer, generate=True, thinking=not options)
    done = run(tmp_path / "model", "--instruct", "--prompt=Why?", "--max_new_tokens=12", "--temperature=0", *options)
    assert done.returncode == 0, done.stderr
    assert done.stdout == expected_text(tmp_path / "model", ids, temperature=0.0)
    assert ids.count(tokenizer.bos_id) == (tokenizer.bos_id is not None)
    assert ("<think>" in tokenizer.decode(ids)) == bool(options)


def test_i02_the_same_seed_gives_the_same_bytes(folder: Path):
    arguments = ["--prompt=def", "--max_new_tokens=20", "--temperature=1.5", "--top_p=1"]
    source = f"--ckpt={folder}"
    first, second = (process(source, *arguments, "--seed=3").stdout for _ in range(2))
    other = run(folder, *arguments, "--seed=4").stdout
    assert first == second
    assert first != other
    assert run(folder, *arguments, "--seed=3", "--stream=false").stdout == first


def test_i02_an_empty_answer_stays_empty(folder: Path, tmp_path: Path):
    """An empty output once made the program draw again with another seed."""
    gpt, tokenizer = load_model(folder)
    with torch.no_grad():
        gpt.model.norm.weight.zero_()  # all logits equal: greedy takes id 0 ...
        gpt.model.embed_tokens.weight.zero_()
    export(gpt, tokenizer, tmp_path / "flat")
    done = run(tmp_path / "flat", "--prompt=x", "--temperature=0", "--max_new_tokens=0")
    assert done.returncode == 0
    assert done.stdout == ""
    assert done.stderr.count("tokens read") == 1


def test_several_prompts_samples_files_and_stdin(folder: Path, tmp_path: Path):
    (tmp_path / "prompt.txt").write_text("def add\n")
    common = ["--max_new_tokens=8", "--temperature=0"]
    single = run(folder, "--prompt=def add", *common).stdout
    assert run(folder, f"--prompt_file={tmp_path / 'prompt.txt'}", *common).stdout == single
    assert run(folder, "--prompt=-", *common, stdin="def add").stdout == single
    assert run(folder, "--prompt_file=-", *common, stdin="def add\n").stdout == single
    both = run(folder, "--prompt=def add", "--prompt=user", "--num_samples=2", *common)
    assert both.stderr.count("--- prompt") == 4
    assert both.stdout.startswith(f"{single}\n{single}\n")
    sampled = run(folder, "--prompt=def", "--num_samples=2", "--max_new_tokens=20", "--temperature=2", "--top_p=1")
    notes = sampled.stderr.split("--- prompt 1, sample")
    assert len(notes) == 3
    beams = run(folder, "--prompt=def add", "--num_beams=3", "--max_new_tokens=8", "--no_repeat_ngram_size=2")
    assert beams.returncode == 0, beams.stderr


def test_a_stop_string_is_cut_to_the_letter(folder: Path):
    arguments = ["--prompt=def add", "--max_new_tokens=40", "--temperature=0"]
    whole = run(folder, *arguments).stdout
    stop = whole[9:12]
    assert run(folder, *arguments, f"--stop={stop}").stdout == whole[: whole.index(stop)]
    assert run(folder, *arguments, f"--stop={stop}", "--stream=false").stdout == whole[: whole.index(stop)]


MISTAKES = [
    ((), 2, "expected a text to continue"),
    (("--prompt=",), 2, "prompt 1 of 1 is empty"),
    (("--prompt=x", "--temperture=1"), 2, "--temperature"),
    (("--prompt=x", "--temperature=-1"), 2, "temperature: expected float >= 0, got -1"),
    (("--prompt=x", "--top_k=five"), 2, "--top_k: expected int >= 0, got 'five'"),
    (("--prompt=x", "--max_new_tokens=500"), 2, "exceed the context of 128"),
    (("--prompt=x", "--device=cuda:7"), 2, "run.device"),
    (("--prompt_file=/nowhere/at/all",), 2, "No such file"),
    (("--prompt=x", "--num_beams=2", "--stop=y"), 2, "stop and num_beams (2)"),
    (("--prompt=x", "--num_beams=2", "--num_samples=2"), 2, "infer.num_samples: expected 1"),
    (("--chat", "--prompt=x"), 2, "infer.chat: reads its questions"),
]


@pytest.mark.parametrize(("arguments", "code", "said"), MISTAKES, ids=[said for *_, said in MISTAKES])
def test_a_mistake_is_one_line_and_an_exit_code(folder: Path, arguments: tuple[str, ...], code: int, said: str):
    done = run(folder, *arguments)
    errors = [line for line in done.stderr.splitlines() if "parameters on" not in line]
    assert done.returncode == code
    assert len(errors) == 1, done.stderr
    assert errors[0].startswith("error: ")
    assert said in errors[0]
    assert done.stdout == ""


def test_i03_a_source_that_cannot_be_used_is_exit_4(folder: Path, tmp_path: Path):
    for source, said in ((tmp_path / "nowhere", "no such folder"), (tmp_path, "config.json")):
        done = run(source, "--prompt=x")
        assert done.returncode == 4
        assert said in done.stderr
        assert done.stderr.count("\n") == 1
    nothing = process("--prompt=x", cwd=tmp_path)
    assert nothing.returncode == 4
    assert "make train" in nothing.stderr

    other = tmp_path / "other-tokenizer"
    gpt, tokenizer = load_model(folder)
    export(gpt, tokenizer, other)
    train_tokenizer(["other words altogether"], 290).save(other)
    done = run(other, "--prompt=x")
    assert done.returncode == 4
    assert "tokenizer: the model was trained with" in done.stderr
    forced = run(other, "--prompt=x", "--allow_mismatch", "--max_new_tokens=2")
    assert forced.returncode == 0
    assert "tokenizer: the model was trained with" in forced.stderr


def test_without_ckpt_the_newest_run_answers(folder: Path, tmp_path: Path):
    gpt, tokenizer = load_model(folder)
    for age, name in enumerate(("new", "old")):
        checkpoint = tmp_path / "runs" / name / "checkpoints" / "step-00000007"
        export(gpt, tokenizer, checkpoint)
        os.utime(runs.seal(checkpoint) / "manifest.json", (1e9 - age, 1e9 - age))
    done = process("--prompt=x", "--max_new_tokens=1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "runs/new" in done.stderr


def test_i05_an_absent_device_is_an_error_before_anything_is_loaded(folder: Path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = run(folder, "--prompt=x", "--device=cuda")
    assert done.returncode == 2
    assert "parameters" not in done.stderr


def test_help_lists_every_key_and_needs_no_model():
    done = process("--help", "all")
    assert done.returncode == 0
    for key in ("--ckpt", "--prompt ", "--top_p", "--num_beams", "--model.num_hidden_layers", "--preset 0.5B"):
        assert key in done.stdout


def on_terminal(folder: Path, *arguments: str, typed: tuple[str, ...] = (), timeout: float = 60) -> str:
    """What a person sees: stdout and stderr on one pseudo-terminal; each line of `typed` answers a `> `."""
    master, slave = pty.openpty()
    command = [sys.executable, str(ROOT / "infer.py"), "--ckpt", str(folder), *arguments]
    process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, cwd=ROOT)
    os.close(slave)
    seen, waiting, deadline = b"", list(typed), time.monotonic() + timeout
    while time.monotonic() < deadline:
        ready, _, _ = select.select([master], [], [], 0.2)
        if ready:
            try:
                chunk = os.read(master, 4096)
            except OSError:  # the other side is closed
                break
            if not chunk:
                break
            seen += chunk
        if waiting and seen.endswith(b"> "):
            os.write(master, waiting.pop(0).encode())
            seen += b"\n"
    process.kill()
    process.wait()
    os.close(master)
    return seen.decode("utf-8", "replace")


def test_s7_a_terminal_never_gets_control_characters(folder: Path, tmp_path: Path):
    """A model that has learned escape sequences must not be able to retitle, clear or type into a terminal."""
    gpt, tokenizer = load_model(folder)
    with torch.no_grad():
        gpt.model.norm.weight.zero_()
        gpt.model.embed_tokens.weight.zero_()
    export(gpt, tokenizer, tmp_path / "hostile")
    # All logits are equal: every id is as likely, those of control bytes too.
    text = on_terminal(tmp_path / "hostile", "--prompt=x", "--max_new_tokens=120", "--top_p=1", "--temperature=1")
    assert re.search(r"\\x[01][0-9a-f]", text), text
    bad = [c for c in text if (ord(c) < 0x20 and c not in "\r\n\t") or 0x7F <= ord(c) <= 0x9F or c in "\u202e\u2066"]
    assert not bad
    piped = run(tmp_path / "hostile", "--prompt=x", "--max_new_tokens=120", "--top_p=1", "--temperature=1")
    assert re.search(r"[\x00-\x08\x0b-\x1f]", piped.stdout)  # a pipe gets the bytes as they are


def test_chat_remembers_and_ends(folder: Path):
    typed = ("hello\n", "and again\n", "/reset\n", "\x04")
    seen = on_terminal(folder, "--chat", "--max_new_tokens=6", "--temperature=0", typed=typed)
    reads = [int(n) for n in re.findall(r"(\d+) tokens read", seen)]
    assert len(reads) == 2
    assert reads[1] > reads[0] + 6  # the second question is read with the first and its answer
    piped = run(folder, "--chat", "--max_new_tokens=6", "--temperature=0", stdin="hello\n")
    assert piped.returncode == 0, piped.stderr
    assert piped.stdout.endswith("\n")


def test_chat_commands_are_answered_without_the_model(folder: Path):
    done = run(folder, "--chat", "--max_new_tokens=2", stdin="/help\n/quit now\n")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("/reset forgets the conversation") == 2  # at the start, and for /help
    assert "(/quit: no such command; /help lists them)" in done.stderr
    assert "tokens read" not in done.stderr
    assert done.stdout == ""


def test_a_long_chat_forgets_its_oldest_turns(folder: Path):
    questions = "".join(f"question number {i} about addition\n" for i in range(8))
    done = run(folder, "--chat", "--system=Be brief.", "--max_new_tokens=10", "--temperature=0", stdin=questions)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("tokens read") == 8
    assert "are forgotten" in done.stderr


def test_a_question_longer_than_the_context_does_not_end_the_chat(folder: Path):
    done = run(folder, "--chat", "--max_new_tokens=10", stdin="x y z " * 200 + "\nshort\n")
    assert done.returncode == 0, done.stderr
    assert "exceed the context" in done.stderr
    assert done.stderr.count("tokens read") == 1


def test_m7_two_hundred_prompts_leave_no_memory_behind(folder: Path):
    import resource

    cfg = load_config([f"--ckpt={folder}", "--max_new_tokens=8", "--prompt=x"], "infer")
    session = infer.Session(cfg)
    ids = [session.prompt_ids("def add(a, b)")]
    for _ in range(20):
        list(session.pieces(ids))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(200):
        list(session.pieces(ids))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before <= 20 * 1024  # KiB


def test_control_tokens_in_a_prompt_need_permission(folder: Path):
    tokenizer = load_tokenizer(folder)
    for allow, count in ((False, 0), (True, 1)):
        options = [f"--ckpt={folder}", "--prompt=x", f"--allow_special={str(allow).lower()}"]
        session = infer.Session(load_config(options, "infer"))
        ids = session.prompt_ids("<|im_start|>user")
        assert ids.count(tokenizer.special["<|im_start|>"]) == count


def test_padding_of_the_vocabulary_is_never_sampled(folder: Path):
    session = infer.Session(load_config([f"--ckpt={folder}", "--prompt=x", "--temperature=5", "--top_p=1"], "infer"))
    assert session.sampling.banned == tuple(range(session.tokenizer.n_vocab, 320))


def test_prompts_are_read_before_the_model(tmp_path: Path):
    (tmp_path / "latin1.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ConfigError, match="not UTF-8 text"):
        infer.read_prompts(load_config([f"--prompt_file={tmp_path / 'latin1.txt'}"], "infer"))


def test_a_model_of_nan_is_exit_7(folder: Path, tmp_path: Path):
    gpt, tokenizer = load_model(folder)
    assert isinstance(gpt, GPT)
    with torch.no_grad():
        gpt.model.norm.weight.fill_(float("nan"))
    export(gpt, tokenizer, tmp_path / "nan")
    done = run(tmp_path / "nan", "--prompt=x", "--max_new_tokens=9")
    assert done.returncode == 7
    assert "finite" in done.stderr
