"""Chat templates: ids against transformers, what is learned against the answers, and what is refused."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import tiny
from test_tokenizer import LANGUAGES, QWEN25_TEMPLATE, llama2_like, llama3_like, qwen2_like, qwen3_like, write_folder

from nanoqwen.chat import fit_conversation, prepare_chat, render_chat
from nanoqwen.chat_template import text_to_answer, text_to_continue
from nanoqwen.config import ChatConfig
from nanoqwen.errors import DataError
from nanoqwen.lora import LoraConfig, apply_lora
from nanoqwen.tokenizer import CHATML_TEMPLATE, Tokenizer, load_tokenizer
from nanoqwen.weights import export, load_model, write_adapter

# Templates of the kinds that released models have, written for these tests.
TURN = "'<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n'"
HEADER = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
NAMED = (  # SmolLM2: a system message of its own
    "{% for message in messages %}{% if loop.first and message.role != 'system' %}"
    "{{ '<|im_start|>system\\nYou are small.<|im_end|>\\n' }}{% endif %}"
    "{{ " + TURN + " }}{% endfor %}" + HEADER
)
THINKING = (  # Qwen3: the reasoning of earlier answers is left out, the last one always has some
    "{% set last = namespace(question=-1) %}{% for message in messages %}"
    "{% if message.role == 'user' and not message.content.startswith('<tool_response>') %}"
    "{% set last.question = loop.index0 %}{% endif %}{% endfor %}"
    "{% for message in messages %}{% if message.role == 'assistant' %}"
    "{% set thought, answer = '', message.content %}{% if '</think>' in message.content %}"
    "{% set thought = message.content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}"
    "{% set answer = message.content.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
    "{{ '<|im_start|>assistant\\n' }}"
    "{% if loop.index0 > last.question %}{{ '<think>\\n' + thought + '\\n</think>\\n\\n' }}{% endif %}"
    "{{ answer + '<|im_end|>\\n' }}"
    "{% else %}{{ " + TURN + " }}{% endif %}{% endfor %}" + HEADER[: -len("{% endif %}")] +
    "{% if enable_thinking is defined and not enable_thinking %}"
    "{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}"
)  # fmt: skip
INSTRUCTIONS = (  # Llama 2: no control token around a question, the system message within the first one
    "{% set rest = messages[1:] if messages[0]['role'] == 'system' else messages %}"
    "{% for message in rest %}{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if message.role == 'user' %}{{ bos_token + '[INST] ' }}"
    "{% if loop.first and rest|length < messages|length %}{{ '<<' + messages[0].content.strip() + '>>\\n' }}{% endif %}"
    "{{ message.content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + message.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
TRIMMED = (  # Llama 3: BOS by the template, texts trimmed, and the header of an answer always
    "{% for message in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
    "{{ '[' + message.role + ']\\n\\n' + message.content | trim + '<|eot_id|>' }}"
    "{% endfor %}{{ '[assistant]\\n\\n' }}"
)
MARKED = (
    "{% for message in messages %}{% if message.role == 'assistant' %}{{ '<|im_start|>assistant\\n' }}"
    "{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}"
    "{% else %}{{ " + TURN + " }}{% endif %}{% endfor %}" + HEADER
)


def words_of_llama2() -> tuple[dict[str, Any], dict[str, Any]]:
    """Where a space is the beginning of a token only, as in the released file."""
    spec = llama2_like()
    spec["model"]["merges"] = [merge for merge in spec["model"]["merges"] if "▁" not in "".join(merge)[1:]]
    return spec, {"bos_token": "<s>", "eos_token": "</s>"}


KINDS = {
    "chatml": (qwen2_like, CHATML_TEMPLATE),
    "default system": (qwen2_like, QWEN25_TEMPLATE),
    "named": (qwen2_like, NAMED),
    "thinking": (qwen3_like, THINKING),
    "instructions": (words_of_llama2, INSTRUCTIONS),
    "trimmed": (llama3_like, TRIMMED),
    "marked": (qwen2_like, MARKED),
}
QUESTION, ANSWER = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root, made = tmp_path_factory.mktemp("templates"), {}
    for kind, (family, template) in KINDS.items():
        spec, config = family()
        made[kind] = write_folder(root / kind, spec, config | {"chat_template": template})
    return made


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def tokenizer(kind: str, folders: dict[str, Path]) -> Tokenizer:
    return load_tokenizer(folders[kind])


def with_template(folders: dict[str, Path], template: str, kind: str = "chatml") -> Tokenizer:
    tokenizer = load_tokenizer(folders[kind])
    tokenizer.chat_template = template
    return tokenizer


def says(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def conversations(count: int, seed: int, kind: str) -> list[list[dict[str, str]]]:
    """Of one to four questions with their answers, some after a system message."""
    rng, made = random.Random(seed), []
    joined = "\n".join(LANGUAGES)

    def text() -> str:
        at = rng.randrange(len(joined))
        return rng.choice(["", " ", "\n", "\n\n "]) + joined[at : at + rng.randint(1, 30)] + rng.choice(["", " ", "\n"])

    for _ in range(count):
        messages = [says("system", text())] if rng.random() < 0.5 else []
        for _ in range(rng.randint(1, 4)):
            thought = f"<think>\n{text()}\n</think>\n\n" if kind == "thinking" and rng.random() < 0.5 else ""
            # One that begins with a newline is no token with that of its header here, as when a model writes it.
            messages += [says("user", text()), says("assistant", thought + text().lstrip("\n"))]
        made.append(messages)
    return made


def transformers_tokenizer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder)


def learned_texts(tokenizer: Tokenizer, ids: list[int], mask: list[int]) -> list[str]:
    """The stretches that are learned."""
    stretches: list[list[int]] = []
    for at, (token_id, bit) in enumerate(zip(ids, mask, strict=True)):
        if bit and (at == 0 or not mask[at - 1] or ids[at - 1] in tokenizer.stop_ids):
            stretches.append([])
        if bit:
            stretches[-1].append(token_id)
    assert all(stretch[-1] in tokenizer.stop_ids for stretch in stretches)
    assert not any(token_id in tokenizer.stop_ids for stretch in stretches for token_id in stretch[:-1])
    # Some vocabularies lack bytes, and half a character may be left.
    return [tokenizer.decode_bytes(stretch[:-1]).decode("utf-8", "replace") for stretch in stretches]


def answers_of(kind: str, messages: list[dict[str, str]]) -> list[str]:
    """What the template makes of the answers."""
    texts = [message["content"] for message in messages if message["role"] == "assistant"]
    if kind == "instructions":
        return [f" {text.strip()} " for text in texts]
    if kind == "trimmed":
        return [text.strip() for text in texts]
    if kind == "thinking":
        thoughts, bare = zip(*(text.rpartition("</think>")[::2] for text in texts), strict=True)
        bare = [text.lstrip("\n") if thought else text for thought, text in zip(thoughts, bare, strict=True)]
        thought = thoughts[-1].removeprefix("<think>").strip("\n")
        return [*bare[:-1], f"<think>\n{thought}\n</think>\n\n{bare[-1]}"]
    return texts


def test_ids_are_those_of_transformers(kind: str, tokenizer: Tokenizer, folders: Any, monkeypatch: pytest.MonkeyPatch):
    theirs = transformers_tokenizer(folders[kind], monkeypatch)
    for messages in conversations(40, 1, kind):
        assert render_chat(messages, tokenizer)[0] == theirs.apply_chat_template(messages, return_dict=False)
        for thinking in (True, False):
            asked = {"add_generation_prompt": True, "enable_thinking": thinking, "return_dict": False}
            ids, _ = render_chat(messages[:-1], tokenizer, generate=True, thinking=thinking)
            assert ids == theirs.apply_chat_template(messages[:-1], **asked)


def test_what_is_learned_are_the_answers_and_their_stop_tokens(kind: str, tokenizer: Tokenizer):
    for messages in conversations(40, 2, kind):
        ids, mask = render_chat(messages, tokenizer)
        assert [*map(tokenizer_text(tokenizer), answers_of(kind, messages))] == learned_texts(tokenizer, ids, mask)


def tokenizer_text(tokenizer: Tokenizer) -> Any:
    """A text as the tokenizer normalises it."""
    return lambda text: tokenizer.decode(tokenizer.encode(text)) if text.strip() else text


def test_an_answer_shares_no_token_with_its_prompt_and_gains_no_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Here tokens end in a space, so that the end of a header and the beginning of its answer would be one."""
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": INSTRUCTIONS}
    tokenizer = load_tokenizer(write_folder(tmp_path, llama2_like(), config))
    theirs, joined = transformers_tokenizer(tmp_path, monkeypatch), 0
    for messages in conversations(20, 6, "instructions"):
        ids, mask = render_chat(messages, tokenizer)
        prompt, _ = render_chat(messages[:-1], tokenizer, generate=True)
        assert ids[: len(prompt)] == prompt
        assert learned_texts(tokenizer, ids, mask) == answers_of("instructions", messages)
        joined += theirs.apply_chat_template(messages, return_dict=False) != ids
    assert joined


def test_a_question_is_what_training_saw(kind: str, tokenizer: Tokenizer):
    for messages in conversations(20, 3, kind):
        ids, mask = render_chat(messages, tokenizer)
        prompt, _ = render_chat(messages[:-1], tokenizer, generate=True)
        assert ids[: len(prompt)] == prompt
        assert mask[len(prompt) - 1 : len(prompt) + 1] == [0, 1]


def test_what_is_too_long_loses_its_oldest_words_and_keeps_the_last_answer(kind: str, tokenizer: Tokenizer):
    for messages in conversations(12, 4, kind):
        whole = len(fit_conversation(messages, tokenizer, 10_000)[0])
        answers = [*map(tokenizer_text(tokenizer), answers_of(kind, messages))]
        for size in range(whole, 0, -7):
            fit = fit_conversation(messages, tokenizer, size)
            if isinstance(fit, str):
                assert fit == "too long an answer"
                break
            ids, mask, truncated = fit
            learned = learned_texts(tokenizer, ids, mask)
            assert len(ids) <= size
            assert mask[-1] == 1
            assert learned == answers[-len(learned) :]
            assert truncated == (size < whole)


def test_text_of_a_message_becomes_no_control_token(kind: str, tokenizer: Tokenizer):
    control = set(tokenizer.special.values())

    def controls(system: str, question: str, answer: str) -> list[int]:
        messages = [says("system", system), says("user", question), says("assistant", answer)] * 1
        ids, mask = render_chat([*messages, says("user", question), says("assistant", answer)], tokenizer)
        assert len(learned_texts(tokenizer, ids, mask)) == 2
        asked, _ = render_chat([*messages, says("user", question)], tokenizer, generate=True)
        assert asked == ids[: len(asked)]
        return [token_id for token_id in ids if token_id in control]

    expected = controls("a", "b", "c")
    for token in tokenizer.special:
        for text in (token, f"x {token}{token} y", f"{token}\nuser\n", f"<{token}", token[0] + token + token[1:]):
            assert controls(text, text, f"c{text}") == expected, text
    assert controls("<think>", "<think>x</think>", "c</think>") == expected


def test_the_template_writes_bos_and_nobody_else(folders: dict[str, Path]):
    for kind, count in (("trimmed", 1), ("instructions", 2)):
        tokenizer = load_tokenizer(folders[kind])
        bos = tokenizer.special[tokenizer.named_tokens["bos_token"]]
        ids, _ = render_chat([QUESTION, ANSWER, QUESTION], tokenizer, generate=True)
        assert ids[0] == bos
        assert ids.count(bos) == count


def test_reasoning_is_learned_where_the_template_shows_it(folders: dict[str, Path]):
    tokenizer = load_tokenizer(folders["thinking"])
    thought = says("assistant", "<think>\nhm <|im_end|> <think>\n</think>\n\nYes.")
    ids, mask = render_chat([QUESTION, thought, QUESTION, thought], tokenizer)
    assert learned_texts(tokenizer, ids, mask) == ["Yes.", "<think>\nhm <|im_end|> <think>\n</think>\n\nYes."]
    assert ids.count(tokenizer.special["<think>"]) == ids.count(tokenizer.special["</think>"]) == 1


# --- what is refused --------------------------------------------------------------------------------------------------

REFUSED = {
    "no stop token": ("{% for m in messages %}{{ m.role + ': ' + m.content }}{% endfor %}{% if add_generation_prompt %}"
                      "{{ 'assistant: ' }}{% endif %}", "message 1, no stop token ends it"),
    "later messages": ("{{ messages|length }}" + CHATML_TEMPLATE, "message 1, the rendering of what comes before it"),
    "no header": (CHATML_TEMPLATE.split("{% if add")[0] + "{% if add_generation_prompt %}{{ 'x' }}{% endif %}",
                  "message 1, the rendering of what comes before it"),
    "capitals": (CHATML_TEMPLATE.replace("message['content']", "message['content']|upper"), "rewrites the text"),
    "cut": (CHATML_TEMPLATE.replace("message['content']", "message['content'][:3]"), "rewrites the text"),
    "question in the answer": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ messages[0].content + m.content }}"
        "{{ '<|im_end|>' }}{% endgeneration %}{% endif %}{% endfor %}", "message 0, its text is on the wrong side"),
    "fewer marks": (MARKED.replace("{% generation %}", "{% if loop.index0 < 2 %}{% generation %}").replace(
        "{% endgeneration %}", "{% endgeneration %}{% endif %}"), "message 3, the rendering of what comes"),
    "more marks": (MARKED + "{% generation %}{{ '<|im_end|>' }}{% endgeneration %}", "message 4, there is none"),
    "syntax": ("{% for %}", "cannot be rendered (TemplateSyntaxError"),
    "unknown": ("{{ nothing.at.all }}", "cannot be rendered (UndefinedError"),
    "out of the sandbox": ("{{ messages.__class__.__mro__ }}", "cannot be rendered (SecurityError"),
    "changes its input": ("{{ messages.append(1) }}", "cannot be rendered (SecurityError"),
    "private names": ("{% set n = namespace(__class__=1) %}", "cannot be rendered (SecurityError"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_template_that_proves_nothing_is_refused_in_one_line(case: str, folders: dict[str, Path]):
    template, expected = REFUSED[case]
    with pytest.raises(DataError) as refused:
        render_chat([QUESTION, ANSWER, QUESTION, ANSWER], with_template(folders, template))
    assert "chat template " in str(refused.value)
    assert expected in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_conversation_that_the_template_refuses_is_left_out_and_counted(folders: dict[str, Path], tmp_path: Path):
    rows = [{"messages": [QUESTION, QUESTION, ANSWER]}, {"messages": [ANSWER]}]
    rows += [{"prompt": f"Why {n}?", "response": "So."} for n in range(20)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = load_tokenizer(folders["instructions"])
    data = prepare_chat(ChatConfig(train=(str(path),), val_fraction=0.3), tokenizer, 100)
    assert data.audit.dropped == {"refused by the chat template: roles must alternate": 2}
    assert data.audit.kept == 20
    path.write_text(json.dumps(rows[0]) + "\n")
    with pytest.raises(DataError, match=r"nothing to train on \(1 rows; 1 refused by the chat template: roles must"):
        prepare_chat(ChatConfig(train=(str(path),)), tokenizer, 100)


def test_a_row_whose_answers_are_not_proven_is_named(folders: dict[str, Path], tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": [QUESTION, ANSWER]}) + "\n")
    tokenizer = with_template(folders, REFUSED["no stop token"][0])
    with pytest.raises(
        DataError, match=r"rows\.jsonl:1: tokenizer .* its chat template does not show what the answers"
    ):
        prepare_chat(ChatConfig(train=(str(path),)), tokenizer, 100)


def test_what_cannot_be_learned_can_still_be_asked(folders: dict[str, Path]):
    tokenizer = with_template(folders, REFUSED["no header"][0])
    ids, _ = render_chat([QUESTION, ANSWER, QUESTION], tokenizer, generate=True)
    assert tokenizer.decode(ids).endswith("user\nWhy?<|im_end|>\nx")


# --- files ------------------------------------------------------------------------------------------------------------


def test_where_a_template_is_found_and_that_it_goes_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    spec, config = qwen2_like()
    source = write_folder(tmp_path / "source", spec, {**config, "chat_template": NAMED})
    names = [{"name": "tools", "template": "x"}, {"name": "default", "template": QWEN25_TEMPLATE}]
    places = {  # each is preferred to those before it
        "tokenizer_config.json": (json.dumps({**config, "chat_template": names}), QWEN25_TEMPLATE),
        "chat_template.json": (json.dumps({"chat_template": MARKED}), MARKED),
        "chat_template.jinja": (NAMED, NAMED),
    }
    for number, (name, (content, expected)) in enumerate(places.items()):
        (source / name).write_text(content)
        ours = load_tokenizer(source)
        assert ours.chat_template == expected
        saved = tmp_path / str(number)
        ours.save(saved)
        theirs = transformers_tokenizer(saved, monkeypatch)
        messages = [QUESTION, ANSWER, QUESTION]
        rendered = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert rendered == render_chat(messages, ours, generate=True)[0]
        assert load_tokenizer(saved).chat_template == expected
    (source / "chat_template.jinja").unlink()
    (source / "chat_template.json").write_text('{"chat_template": 5}')
    with pytest.raises(DataError, match=r"chat_template\.json: chat_template: expected a string, got 5$"):
        load_tokenizer(source)


def test_chatml_goes_along_where_a_tokenizer_has_its_tokens_and_no_template(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    spec, _ = qwen2_like()
    ours = load_tokenizer(write_folder(tmp_path / "source", spec, {"eos_token": "<|endoftext|>"}))
    ours.save(tmp_path / "saved")
    rendered = transformers_tokenizer(tmp_path / "saved", monkeypatch).apply_chat_template([QUESTION, ANSWER])
    assert rendered["input_ids"] == render_chat([QUESTION, ANSWER], ours)[0]


def test_stop_tokens_of_the_generation_configuration_end_answers(tmp_path: Path):
    spec, config = llama3_like()
    spec["added_tokens"][-1]["content"] = "<|over|>"  # a name that says nothing
    template = TRIMMED.replace("<|eot_id|>", "<|over|>")
    source = write_folder(tmp_path, spec, config | {"chat_template": template})
    with pytest.raises(DataError, match="no stop token ends it"):
        render_chat([QUESTION, ANSWER], load_tokenizer(source))
    over = spec["added_tokens"][-1]["id"]
    for value in (over, [over, over - 1]):
        (source / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
        tokenizer = load_tokenizer(source)
        assert tokenizer.stop_ids == {over, tokenizer.eos_id}
        ids, mask = render_chat([QUESTION, ANSWER], tokenizer)
        assert learned_texts(tokenizer, ids, mask) == ["So."]
    (source / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(DataError, match=r"generation_config\.json: eos_token_id: expected a token's number or several"):
        load_tokenizer(source)


def test_an_export_and_an_adapter_keep_the_template_and_the_stop_tokens(tmp_path: Path):
    spec, config = llama3_like()
    spec["added_tokens"][-1]["content"] = "<|over|>"
    template = TRIMMED.replace("<|eot_id|>", "<|over|>")
    source = write_folder(tmp_path / "source", spec, config | {"chat_template": template})
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": spec["added_tokens"][-1]["id"]}))
    tokenizer = load_tokenizer(source)
    model, cfg = tiny.model(vocab_size=tokenizer.n_vocab), LoraConfig(rank=2, targets=("q_proj",))
    export(model, tokenizer, tmp_path / "base")
    apply_lora(model, cfg)
    (tmp_path / "adapter").mkdir()
    write_adapter(model, cfg, tmp_path / "base", tokenizer, tmp_path / "adapter")
    for name in ("base", "adapter"):
        _, loaded = load_model(tmp_path / name)
        assert (loaded.stop_ids, loaded.chat_template) == (tokenizer.stop_ids, template)
        assert render_chat([QUESTION, ANSWER], loaded) == render_chat([QUESTION, ANSWER], tokenizer)


def test_text_for_a_harness_is_that_of_transformers(kind: str, tokenizer: Tokenizer, folders: Any, monkeypatch: Any):
    theirs = transformers_tokenizer(folders[kind], monkeypatch)
    for messages in conversations(20, 5, "without reasoning"):
        expected = theirs.apply_chat_template(messages[:-1], add_generation_prompt=True, tokenize=False)
        assert text_to_answer(messages[:-1], tokenizer) == expected
        expected = theirs.apply_chat_template(messages, continue_final_message=True, tokenize=False)
        assert text_to_continue(messages, tokenizer).rstrip() == expected.rstrip()
