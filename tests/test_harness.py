"""Tasks of lm-eval: the same figures as by its own backend for transformers, and what a person meets."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import runs
import tiny
import torch

import eval as suite
import train
from model import beam_search, generate
from nanoqwen.errors import ConfigError, DataError
from nanoqwen.harness import HarnessLM, find_tasks, load_tasks, run_lm_eval
from nanoqwen.routing import RoutingConfig, build_model, layers_per_token
from nanoqwen.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from nanoqwen.weights import export, load_model, resolve

CONTEXT = 64
TEXTS = [
    "The cat sat on the mat. The dog ate the bone, and then it slept by the old oven until noon.\n",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. 日本語のテキスト 🙂🙃\n",
    "def add(a, b):\n    return a + b\n\n\nclass Point:\n    x: int = 0\n",
] * 3
LONG = " ".join(TEXTS)  # several times the context
# (context, continuation)
PAIRS = [
    ("The cat sat on", " the mat."),
    ("The cat sat on ", "the mat."),  # the space belongs to the continuation
    ("The cat sat on  \n", " the"),
    ("", "The dog ate"),
    ("", " a"),
    ("", "<|endoftext|>The dog"),  # begins with what would be put in front
    ("Zwölf Boxkämpfer", " jagen Viktor 🙂"),
    ("日本", "語のテキスト"),
    ("🙂", "🙃"),
    (LONG, " noon and slept"),
    (LONG[:300], LONG[300:420]),
    ("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "Hello<|im_end|>"),
    ("A", " B C D E F G H I J K"),
    ("def add(a, b):\n", "    return a + b"),
    *((f"Question {n}: what is {n} and {n}?", f" {2 * n}") for n in range(8)),
]
CHOICES = """\
task: tiny_choices
dataset_path: json
dataset_kwargs: {{data_files: {{train: {folder}/train.jsonl, validation: {folder}/validation.jsonl}}}}
output_type: multiple_choice
training_split: train
fewshot_split: train
validation_split: validation
doc_to_text: "Q: {{{{question}}}}\\nA:"
doc_to_choice: choices
doc_to_target: label
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""
ROLLING = """\
task: tiny_rolling
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {folder}/texts.jsonl}}}}
output_type: loglikelihood_rolling
validation_split: validation
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - {{metric: word_perplexity}}
  - {{metric: byte_perplexity}}
  - {{metric: bits_per_byte}}
"""
WRITTEN = """\
task: tiny_written
dataset_path: json
dataset_kwargs: {{data_files: {{train: {folder}/train.jsonl, validation: {folder}/validation.jsonl}}}}
output_type: generate_until
training_split: train
fewshot_split: train
validation_split: validation
doc_to_text: "Q: {{{{question}}}}\\nA:"
doc_to_target: "{{{{choices[label]}}}}"
generation_kwargs: {{until: ["\\n", "Q:"], max_gen_toks: 12, do_sample: false}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""
TASKS = ["tiny_choices", "tiny_rolling", "tiny_written"]


def lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tasks with their data."""
    folder = tmp_path_factory.mktemp("tasks")
    words = ["cat", "dog", "oven", "Deich", "日本", "class"]
    rows = [
        {
            "question": f"what is number {n}, a {word}?",
            "choices": [word, words[n % 5], "no " * n + "way"],
            "label": n % 3,
        }
        for n, word in enumerate(words * 3)
    ]
    lines(folder / "train.jsonl", rows[:6])
    lines(folder / "validation.jsonl", rows[6:])
    lines(folder / "texts.jsonl", [{"text": text} for text in (*TEXTS[:3], LONG)])
    for name, text in zip(TASKS, (CHOICES, ROLLING, WRITTEN), strict=True):
        (folder / f"{name}.yaml").write_text(text.format(folder=folder), encoding="utf-8")
    return folder


@pytest.fixture(scope="module", autouse=True)
def cached_apart(tmp_path_factory: pytest.TempPathFactory):
    """Data sets of tasks are kept in a folder of the test."""
    import datasets

    patch = pytest.MonkeyPatch()
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("hf"))
    datasets.disable_progress_bars()
    yield
    patch.undo()


def made(folder: Path, tokenizer: Tokenizer, kind: str = "qwen2") -> Path:
    model = tiny.model(kind, vocab_size=tokenizer.n_vocab, max_position_embeddings=CONTEXT)
    export(model, tokenizer, folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen2 with a tokenizer that AutoTokenizer reads as we do."""
    return made(tmp_path_factory.mktemp("models") / "qwen2", train_tokenizer(TEXTS, 400))


def ours(folder: Path, **options: Any) -> HarnessLM:
    model, tokenizer = load_model(folder)
    return HarnessLM(model, tokenizer, **options)


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    """The judge: lm-eval's own backend, with transformers' model and tokenizer."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=4)


def query(*args: Any) -> SimpleNamespace:
    return SimpleNamespace(args=args, task_name="t")


def close(results: list[tuple[float, bool]], expected: list[tuple[float, bool]]) -> None:
    assert [greedy for _, greedy in results] == [greedy for _, greedy in expected]
    assert [value for value, _ in results] == pytest.approx([value for value, _ in expected], abs=1e-4)


# --- the same as lm-eval's own backend --------------------------------------------------------------------------------


def test_log_likelihoods_are_those_of_the_hf_backend(folder: Path, theirs: Any):
    """Cut contexts, empty ones, spaces at the seam, letters of several tokens, spelled-out control tokens."""
    requests = [query(*pair) for pair in PAIRS]
    expected = theirs.loglikelihood(requests, disable_tqdm=True)
    assert len({round(value, 3) for value, _ in expected}) > len(PAIRS) // 2
    for batch_tokens in (1, 100, 100_000):  # one by one, some, all at once
        close(ours(folder, batch_tokens=batch_tokens).loglikelihood(requests), expected)


def test_log_likelihoods_of_greedy_answers_are_marked(folder: Path, theirs: Any):
    lm = ours(folder)
    contexts = [context for context, _ in PAIRS if context]
    answers = lm.generate_until([query(context, {"max_gen_toks": 1}) for context in contexts])
    pairs = [
        pair
        for context, text in zip(contexts, answers, strict=True)
        if text
        for pair in ((context, text), (context, f"{text} on"))
    ]
    results = lm.loglikelihood([query(*pair) for pair in pairs])
    close(results, theirs.loglikelihood([query(*pair) for pair in pairs], disable_tqdm=True))
    marked = [greedy for _, greedy in results]
    assert any(one and not more for one, more in zip(marked[::2], marked[1::2], strict=True))  # all of it, not some


def test_rolling_log_likelihoods_are_those_of_the_hf_backend(folder: Path, theirs: Any):
    texts = ["", "a", "🙂", *TEXTS[:3], LONG, LONG[: len(LONG) // 2]]
    requests = [query(text) for text in texts]
    expected = theirs.loglikelihood_rolling(requests, disable_tqdm=True)
    for batch_tokens in (1, 200, 100_000):
        assert ours(folder, batch_tokens=batch_tokens).loglikelihood_rolling(requests) == pytest.approx(
            expected, rel=1e-6, abs=1e-4
        )


GENERATIONS = [
    {"until": ["\n"], "max_gen_toks": 12, "do_sample": False},
    {"until": "e", "max_gen_toks": 20, "temperature": 0.0},
    {"until": [" a", "the", "."], "max_new_tokens": 9},
    {"max_gen_toks": 30},
    {"max_gen_toks": 6, "repetition_penalty": 1.3},
]


def test_greedy_texts_are_those_of_the_hf_backend(folder: Path, theirs: Any):
    contexts = [context for context, _ in PAIRS[:14] if context]
    requests = [query(context, dict(kwargs)) for kwargs in GENERATIONS for context in contexts]
    expected = theirs.generate_until([query(*map(_copied, request.args)) for request in requests], disable_tqdm=True)
    assert len(set(expected)) > 20
    for batch_tokens in (1, 300):
        assert ours(folder, batch_tokens=batch_tokens).generate_until(requests) == expected


def _copied(value: Any) -> Any:
    return json.loads(json.dumps(value))  # the backend writes into its arguments


def test_control_tokens_that_a_model_writes_are_left_out_as_by_the_hf_backend(tmp_path: Path):
    """An end ends the answer, another one is skipped; both were never seen in answers of random models."""
    from lm_eval.models.huggingface import HFLM

    tokenizer = train_tokenizer(TEXTS, 400)
    model = tiny.model("qwen2-untied", vocab_size=tokenizer.n_vocab, max_position_embeddings=CONTEXT)
    contexts = [context for context, _ in PAIRS[:14] if context]
    prompts = [tokenizer.encode(text, allow_special=True)[-CONTEXT // 2 :] for text in contexts]
    rows = generate(model, prompts, temperature=0.0, max_new_tokens=8)
    with torch.no_grad():  # what is now written third of one answer, and fifth of another, shall be control tokens
        for row, prompt, at, name in ((rows[0], prompts[0], 2, "<|im_start|>"), (rows[3], prompts[3], 4, "<|im_end|>")):
            weight = model.lm_head.weight
            weight[tokenizer.special[name]] = weight[row[len(prompt) + at]] * 1.01
    export(model, tokenizer, tmp_path / "model")
    theirs = HFLM(pretrained=str(tmp_path / "model"), device="cpu", dtype="float32", batch_size=4)
    requests = [query(context, {"max_gen_toks": 8}) for context in contexts]
    expected = theirs.generate_until([query(*map(_copied, request.args)) for request in requests], disable_tqdm=True)
    assert ours(tmp_path / "model").generate_until(requests) == expected
    rows = generate(model, prompts, temperature=0.0, max_new_tokens=8)
    new = {token for row, prompt in zip(rows, prompts, strict=True) for token in row[len(prompt) :]}
    assert {tokenizer.special["<|im_start|>"], tokenizer.special["<|im_end|>"]} <= new


def figures(lm: Any, tasks: Path, names: list[str], num_fewshot: int, chat: bool) -> dict[str, dict[str, Any]]:
    loaded = load_tasks(find_tasks(names, str(tasks)), names, num_fewshot)
    return run_lm_eval(lm, loaded, None, chat)["results"]


@pytest.mark.parametrize(("num_fewshot", "chat"), [(0, False), (2, False), (2, True)])
def test_figures_of_tasks_are_those_of_the_hf_backend(
    folder: Path, theirs: Any, tasks: Path, num_fewshot: int, chat: bool
):
    names = [name for name in TASKS if not chat or name != "tiny_rolling"]
    expected = figures(theirs, tasks, names, num_fewshot, chat)
    results = figures(ours(folder), tasks, names, num_fewshot, chat)
    assert results.keys() == expected.keys() == set(names)
    for name in names:
        assert results[name].keys() == expected[name].keys()
        for key, value in expected[name].items():
            assert results[name][key] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-4)), key


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen2-untied", "qwen3", "llama", "gpt2"])
def test_other_shapes_answer_as_with_the_hf_backend(kind: str, tmp_path: Path):
    import transformers
    from lm_eval.models.huggingface import HFLM

    folder = made(tmp_path / kind, train_tokenizer(TEXTS, 400), kind)
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    theirs = HFLM(pretrained=str(folder), tokenizer=tokenizer, device="cpu", dtype="float32", batch_size=4)
    requests, texts = [query(*pair) for pair in PAIRS], [query(text) for text in (*TEXTS[:3], LONG)]
    lm = ours(folder, batch_tokens=200)
    assert lm.length == theirs.max_length
    close(lm.loglikelihood(requests), theirs.loglikelihood(requests, disable_tqdm=True))
    expected = theirs.loglikelihood_rolling(texts, disable_tqdm=True)
    assert lm.loglikelihood_rolling(texts) == pytest.approx(expected, rel=1e-5)
    written = [query(context, {"until": ["\n"], "max_gen_toks": 10}) for context, _ in PAIRS if context]
    expected = theirs.generate_until([query(*map(_copied, request.args)) for request in written], disable_tqdm=True)
    assert lm.generate_until(written) == expected


@pytest.mark.slow
def test_tasks_are_asked_as_the_command_line_of_lm_eval_asks_them(folder: Path, theirs: Any, tasks: Path):
    """Its own function sets seeds, examples and limits; figures of this repo can stand beside published ones."""
    from lm_eval.evaluator import simple_evaluate

    manager, limits = find_tasks(TASKS, str(tasks)), {"num_fewshot": 2, "limit": 7}
    expected = simple_evaluate(theirs, tasks=TASKS, task_manager=manager, bootstrap_iters=0, **limits)
    loaded = load_tasks(find_tasks(TASKS, str(tasks)), TASKS, 2)
    results = run_lm_eval(ours(folder), loaded, 7, False)
    for name in TASKS:
        for key, value in expected["results"][name].items():
            if "_stderr" not in key:
                assert results["results"][name][key] == (
                    value if isinstance(value, str) else pytest.approx(value, rel=1e-4)
                )
    assert results["n-shot"] == expected["n-shot"]
    assert results["n-samples"] == expected["n-samples"]


def test_a_tokenizer_with_a_bos_begins_texts_as_the_hf_backend_does(tmp_path: Path):
    """Llama's texts begin with a token of their own, but where one is there already."""
    import transformers
    from lm_eval.models.huggingface import HFLM

    plain = tmp_path / "plain"
    train_tokenizer(TEXTS, 400, special_tokens=("<|endoftext|>", "<|begin|>")).save(plain)
    for name, more in (
        ("tokenizer.json", {"post_processor": bos_processor(plain)}),
        ("tokenizer_config.json", {"bos_token": "<|begin|>"}),
    ):
        path = plain / name
        path.write_text(json.dumps(json.loads(path.read_text()) | more))
    folder = made(tmp_path / "llama", load_tokenizer(plain), "llama")
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    theirs = HFLM(pretrained=str(folder), tokenizer=tokenizer, device="cpu", dtype="float32", batch_size=4)
    lm = ours(folder)
    assert lm.prefix == theirs.prefix_token_id == tokenizer.bos_token_id
    for text in ("The cat", "<|begin|>The cat", ""):
        assert lm._encode(text) == theirs.tok_encode(text)
    pairs = [*PAIRS[:8], ("<|begin|>The cat", " sat")]
    requests = [query(*pair) for pair in pairs]
    close(lm.loglikelihood(requests), theirs.loglikelihood(requests, disable_tqdm=True))
    texts = [query(text) for text in (*TEXTS[:3], LONG)]
    expected = theirs.loglikelihood_rolling(texts, disable_tqdm=True)
    assert lm.loglikelihood_rolling(texts) == pytest.approx(expected, rel=1e-6)


def bos_processor(folder: Path) -> dict[str, Any]:
    begin = load_tokenizer(folder).special["<|begin|>"]
    named = {"<|begin|>": {"id": "<|begin|>", "ids": [begin], "tokens": ["<|begin|>"]}}
    first = {"SpecialToken": {"id": "<|begin|>", "type_id": 0}}
    single, pair = [first, {"Sequence": {"id": "A", "type_id": 0}}], [{"Sequence": {"id": "A", "type_id": 0}}]
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": named}


def test_a_bos_of_the_generation_configuration_alone_begins_no_text(tmp_path: Path):
    """Qwen2.5 names one there; transformers' tokenizer does not know it, so that EOS stands in front."""
    tokenizer = train_tokenizer(TEXTS, 300)
    tokenizer.save(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"bos_token_id": tokenizer.special["<|im_start|>"]}))
    results = load_tokenizer(tmp_path)
    assert results.bos_id == results.special["<|im_start|>"]
    assert results.named_bos is None
    model = tiny.model(vocab_size=results.n_vocab)
    assert HarnessLM(model, results).prefix == results.eos_id
    assert load_tokenizer("bytes").named_bos is None


# --- what else has to hold --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mod", "dtf", "tdtf"])
def test_a_routed_model_scores_a_request_alike_alone_and_in_a_batch(kind: str):
    """Padding that took a share of the capacity would change the score of what it stands beside."""
    tokenizer = load_tokenizer("bytes")
    torch.manual_seed(0)
    cfg = tiny.config(vocab_size=tokenizer.n_vocab, max_position_embeddings=CONTEXT)
    model = build_model(cfg, RoutingConfig(kind=kind, capacity=0.5)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10) if parameter.dim() > 1 else parameter.add_(torch.randn_like(parameter) * 0.1)
    requests = [query(*pair) for pair in PAIRS[:9]]
    alone, together = (HarnessLM(model, tokenizer, batch_tokens=n).loglikelihood(requests) for n in (1, 100_000))
    close(together, alone)
    questions = [query(context, {"max_gen_toks": 5}) for context in ("a", "the cat sat", "x" * 20)]
    texts, batched = (HarnessLM(model, tokenizer, batch_tokens=n).generate_until(questions) for n in (1, 100_000))
    assert texts == batched
    # by hand, from the logits of the model as it is used
    ids = tokenizer.encode("The cat sat on the mat.")
    with torch.no_grad():
        log_p = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    assert len(set(layers_per_token(model, ids))) > 1  # some tokens are computed by more layers than others
    cut = len("The cat sat on")
    expected = sum(float(log_p[at - 1, ids[at]]) for at in range(cut, len(ids)))
    assert alone[0][0] == pytest.approx(expected, abs=1e-4)


def test_sampled_texts_come_from_the_seed_and_a_request_that_is_repeated_draws_anew(folder: Path):
    kwargs = {"do_sample": True, "temperature": 1.0, "top_k": 50, "max_gen_toks": 8}
    requests = [query("The cat", kwargs), query("The dog", kwargs), query("The cat", kwargs)]
    first = ours(folder, seed=1).generate_until(requests)
    assert ours(folder, seed=1, batch_tokens=1).generate_until(requests) == first  # in any batch
    assert first[0] != first[2]
    assert ours(folder, seed=2).generate_until(requests) != first


def test_beams_are_those_of_beam_search(folder: Path):
    kwargs = {"num_beams": 3, "max_gen_toks": 6, "until": ["\n"]}
    lm = ours(folder)
    (text,) = lm.generate_until([query("The cat", kwargs)])
    prompt = lm.tokenizer.encode("The cat")
    ends = sorted(lm.tokenizer.stop_ids)
    best = beam_search(lm.model, [prompt], num_beams=3, max_new_tokens=6, temperature=0.0, eos=ends)[0][0]
    assert text == lm.tokenizer.decode(best.ids[len(prompt) :], skip_special=True).split("\n")[0]


def test_a_conversation_is_the_text_that_the_template_makes(folder: Path, theirs: Any):
    talk = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Wer bist du?"},
        {"role": "assistant", "content": " Ich"},
    ]
    lm = ours(folder)
    for messages, header in ((talk[:2], True), (talk, False)):
        assert lm.apply_chat_template(messages, header) == theirs.apply_chat_template(messages, header)


# --- what a person meets ----------------------------------------------------------------------------------------------


def options(folder: Path, tasks: Path, *more: str) -> list[str]:
    return [f"--ckpt={folder}", f"--include_path={tasks}", "--run.device=cpu", "--run.dtype=float32", *more]


def test_figures_are_printed_and_written_with_what_they_depend_on(
    folder: Path, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    output = tmp_path / "figures.json"
    arguments = ["--tasks=tiny_choices,tiny_rolling", "--tasks=tiny_written", "--num_fewshot=1", "--limit=5"]
    suite.main(options(folder, tasks, f"--output={output}", *arguments))
    printed, record = capsys.readouterr().out, json.loads(output.read_text())
    again = json.loads(output.read_text())["results"]
    suite.main(options(folder, tasks, f"--output={output}", *arguments, "--batch_tokens=64"))
    assert json.loads(output.read_text())["results"] == again  # the same command, the same figures
    rows = {tuple(re.split(r" *\| *", line)[1:5]): line for line in printed.splitlines() if line.startswith("| tiny")}
    assert set(rows) == {
        ("tiny_choices", "1", "5", "acc"),
        ("tiny_choices", "1", "5", "acc_norm"),
        ("tiny_rolling", "1", "4", "bits_per_byte"),
        ("tiny_rolling", "1", "4", "byte_perplexity"),
        ("tiny_rolling", "1", "4", "word_perplexity"),
        ("tiny_written", "1", "5", "exact_match"),
    }
    accuracy = record["results"]["tiny_choices"]
    line = rows["tiny_choices", "1", "5", "acc"]
    assert line.endswith(f"| {accuracy['acc,none']:.4f} | {accuracy['acc_stderr,none']:.4f} |")
    assert printed.endswith(f"wrote {output}\n")
    assert record["model"] == str(folder)
    assert record["asked"] == {"tasks": TASKS, "include_path": str(tasks), "num_fewshot": 1, "limit": 5, "chat": False}
    assert record["seeds"] == {"random": 0, "numpy": 1234, "torch": 1234, "fewshot": 1234}
    assert {"commit", "changes", "versions", "lm_eval", "seed", "dtype", "device", "configs"} <= record.keys()
    assert record["cut"] > 0  # of the long texts' questions


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks=tiny_choises"], r"^eval\.tasks: tiny_choises: no such task .*; did you mean tiny_choices\?$"),
        (
            ["--tasks=tiny_choices", "--include_path=nowhere"],
            r"^eval\.include_path: expected a folder with tasks, got no",
        ),
        (
            ["--tasks=tiny_choices", "--output=nowhere/out.json"],
            r"^eval\.output: expected a file in a folder that exis",
        ),
        (
            ["--tasks=tiny_choices", "--suite=heldout", "--output=a.json"],
            r"^eval\.output: expected one of suite and ta",
        ),
        (["--tasks=tiny_choices", "--ckpt=nowhere"], r"^nowhere: no such folder"),
        (["--tasks=tiny_choices", "--limit=-1"], r"^eval: limit: expected int >= 0 or null, got -1$"),
        (["--tasks=tiny_choices,"], r"^eval: tasks: expected names, one per option or with commas between them"),
        (["--tasks=tiny_choices", "--num_fewshot=1000"], r"^eval\.tasks: failed: .*[Ss]ample"),
    ],
)
def test_a_mistake_is_one_line(
    folder: Path, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
):
    monkeypatch.setattr("lm_eval.tasks.manager.Path", lambda _: tasks)  # where lm-eval's own tasks are: thousands
    monkeypatch.chdir(tmp_path)
    listed = dict(option.split("=", 1) for option in [*options(folder, tasks), *arguments])
    with pytest.raises(Exception, match=message) as error:
        suite.main([f"{key}={value}" for key, value in listed.items()])
    assert error.value.exit_code in (2, 3, 4)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_task_whose_data_is_missing_is_one_line(folder: Path, tasks: Path, tmp_path: Path):
    (tmp_path / "lost.yaml").write_text(CHOICES.format(folder=tmp_path).replace("tiny_choices", "lost"))
    with pytest.raises(DataError, match=r"^eval\.tasks: cannot be loaded: FileNotFoundError: ") as error:
        suite.main(options(folder, tmp_path, "--tasks=lost", f"--output={tmp_path}/out.json"))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out.json").exists()


def test_without_lm_eval_a_line_says_how_to_get_it(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError) as error:  # also where the source is no model: before anything is loaded
        suite.main(["--ckpt=nowhere", "--tasks=hellaswag"])
    assert error.value.exit_code == 2
    assert str(error.value) == (
        'eval.tasks: needs lm-eval, which is not installed: pip install -e ".[eval]" -c constraints.txt'
    )


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"max_gen_toks": CONTEXT}, "64 new tokens leave no room for a question in 64 tokens"),
        ({"do_sample": True}, "expected a temperature above 0 beside do_sample: true"),
        ({"top_kk": 3}, r"top_kk is not known here; did you mean top_k\?"),
    ],
)
def test_generation_settings_that_cannot_be_are_refused(folder: Path, kwargs: dict[str, Any], message: str):
    with pytest.raises(DataError, match=message):
        ours(folder).generate_until([query("The cat", kwargs)])


@pytest.mark.parametrize("continuation", ["", LONG])
def test_a_continuation_without_tokens_or_longer_than_the_context_is_refused(folder: Path, continuation: str):
    with pytest.raises(DataError, match="a continuation: expected 1 to 64 tokens"):
        ours(folder).loglikelihood([query("The cat", continuation)])


def test_without_control_tokens_there_is_no_chat(tasks: Path, tmp_path: Path):
    plain = made(tmp_path / "plain", train_tokenizer(TEXTS, 300, special_tokens=("<|endoftext|>",)))
    with pytest.raises(ConfigError, match=r"^eval\.chat: expected a tokenizer with a chat template"):
        suite.main(options(plain, tasks, "--tasks=tiny_choices", "--chat", f"--output={tmp_path}/out.json"))


# --- at the end of a run ----------------------------------------------------------------------------------------------


def test_a_run_asks_its_tasks_once_at_its_end_and_is_finished_whatever_they_do(
    corpus: Path, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setattr("nanoqwen.log.SECONDS", 0.0)  # for the measurement of this CPU's peak
    run = tmp_path / "run"
    plain = runs.options(corpus, run, "--train.steps=6", "--train.eval_every=3")
    with_tasks = [*plain, f"--eval.include_path={tasks}", "--eval.tasks=tiny_choices", "--eval.limit=3"]
    monkeypatch.setattr("lm_eval.tasks.manager.Path", lambda _: tasks)  # where lm-eval's own tasks are: thousands
    with pytest.raises(ConfigError, match=r"^eval\.tasks: nothing: no such task"):
        train.main([*with_tasks[:-2], "--eval.tasks=nothing"])  # before anything else, not after hours
    assert not run.exists()
    assert train.main(with_tasks) == 0
    record = json.loads((run / "tasks.json").read_text())
    assert record["results"]["tiny_choices"]["sample_len"] == 3
    assert record["model"] == str(resolve(run))
    assert runs.status(run)["status"] == "done"
    assert "| tiny_choices | 0 | 3 | acc |" in capsys.readouterr().out
    written = (run / "tasks.json").stat().st_mtime_ns
    assert train.main(with_tasks) == 0  # complete
    assert (run / "tasks.json").stat().st_mtime_ns == written
    assert "tasks.json has them" in capsys.readouterr().err
    assert train.main([*with_tasks[:-1], "--eval.limit=2"]) == 0  # something else is asked
    assert json.loads((run / "tasks.json").read_text())["asked"]["limit"] == 2
    capsys.readouterr()
    assert train.main([*with_tasks[:-1], "--eval.num_fewshot=1000"]) == 0
    assert "warning: eval.tasks: not evaluated: DataError: " in capsys.readouterr().err
    assert runs.status(run)["status"] == "done"
    assert train.main(plain) == 0
    assert json.loads((run / "tasks.json").read_text())["asked"]["limit"] == 2  # none asked, nothing touched
