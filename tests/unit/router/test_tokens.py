"""Chat templates and prompts as SGLang has them. (Real servers' counts are compared in tests/sglang.)"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from prfaas.config.router import Model
from prfaas.model.errors import ConfigError
from prfaas.router.body import Endpoint, read_body
from prfaas.router.template import ChatTemplate, TemplateError
from prfaas.router.tokens import Prompt, PromptReader
from prfaas.routing import block_hashes

K_STRING = "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
K_STRING += "{% if add_generation_prompt %}<assistant>{% endif %}"
K_PARTS = (
    "{% for message in messages %}{% for c in message['content'] %}[{{ c['type'] }}]{% endfor %}{% endfor %}"
)
K_TOOLS = "{% if tools %}{{ tools | tojson }}{% endif %}"
K_PICKY = "{% for m in messages %}{% if m.role == 'x' %}{{ raise_exception('no x') }}{% endif %}{% endfor %}"


def make(folder: Path, template: str | None) -> PromptReader:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["a b c"], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings: dict[str, Any] = {"bos_token": {"content": "<s>"}}
    if template is not None:
        settings["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return PromptReader(Model(name="m", tokenizer=str(folder)))


def ask(reader: PromptReader, endpoint: Endpoint, **fields: Any) -> Prompt:
    return reader.read(read_body(endpoint, json.dumps(fields).encode()))


def text_of(reader: PromptReader, **fields: Any) -> str:
    prompt = ask(reader, Endpoint.CHAT, **fields)
    assert prompt.exact
    assert reader._tokenizer is not None
    decoded: str = reader._tokenizer.decode(list(prompt.ids), skip_special_tokens=False)
    return decoded


def test_a_chat_is_rendered_and_gets_no_second_bos(tmp_path: Path) -> None:
    reader = make(tmp_path, K_STRING)
    messages = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert text_of(reader, messages=messages) == "<s><user>a b<assistant>"
    # As SGLang: a last assistant message is asked as the user's, or continued where the client says so.
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert text_of(reader, messages=messages) == "<s><user>a<user>b<assistant>"
    found = text_of(reader, messages=messages, continue_final_message=True)
    assert found == "<s><user>a<assistant>b"


def test_templates_that_want_parts_get_parts(tmp_path: Path) -> None:
    reader = make(tmp_path, K_PARTS)
    parts = [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "x"}}]
    assert text_of(reader, messages=[{"role": "user", "content": parts}]) == "[text][image]"


def test_tools_and_variables_reach_the_template(tmp_path: Path) -> None:
    reader = make(tmp_path, K_TOOLS + "{{ flavour }}")
    tool = {"type": "function", "function": {"name": "f", "parameters": {"é": "<"}}}
    said = text_of(reader, messages=[{"role": "u"}], tools=[tool], chat_template_kwargs={"flavour": "sweet"})
    assert json.loads(said.removesuffix("sweet"))[0]["function"]["parameters"] == {"é": "<"}
    assert text_of(reader, messages=[{"role": "u"}], tools=[tool], tool_choice="none") == ""


def test_a_bare_prompt_gets_its_bos_and_ids_are_taken_as_they_are(tmp_path: Path) -> None:
    reader = make(tmp_path, None)
    assert ask(reader, Endpoint.COMPLETIONS, prompt="abc").tokens == 1 + len(
        ask(reader, Endpoint.COMPLETIONS, prompt=[5, 6, 7]).ids
    )
    assert ask(reader, Endpoint.GENERATE, input_ids=[1, 2]).ids == [1, 2]
    batch = ask(reader, Endpoint.GENERATE, input_ids=[[1, 2], [3]])
    assert (batch.tokens, batch.prompts, batch.ids) == (3, 2, ())
    mixed = ask(reader, Endpoint.COMPLETIONS, prompt=["a", "b"])
    assert (mixed.tokens, mixed.prompts) == (4, 2)


def test_what_cannot_be_read_here_is_estimated_and_left_to_the_server(tmp_path: Path) -> None:
    for template in (None, K_PICKY):
        prompt = ask(make(tmp_path, template), Endpoint.CHAT, messages=[{"role": "x", "content": "a" * 400}])
        assert not prompt.exact
        assert 90 < prompt.tokens < 130
    prompt = ask(PromptReader(Model(name="m")), Endpoint.COMPLETIONS, prompt="a" * 400)
    assert not prompt.exact


K_WORDS = ["type", "text", "function", "name", "arguments", "role", "content", "tool_calls", "tool", "user"]
K_SHAPES = st.recursive(
    st.none() | st.booleans() | st.sampled_from([0, -1, 1 << 33, 1 << 70, 1.5]) | st.sampled_from(K_WORDS),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(K_WORDS), inner, max_size=3),
    max_leaves=6,
)
K_MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "tool"])},
        optional={"content": K_SHAPES, "tool_calls": K_SHAPES},
    ),
    min_size=1,
    max_size=2,
)
K_GREEDY = "{% for m in messages %}{{ m.role + m['content'].strip() }}{% for t in m.tool_calls %}"
K_GREEDY += (
    "{{ t.function.name }}{{ t.function.arguments | tojson }}{% endfor %}{% endfor %}{{ tools | tojson }}"
)


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, PromptReader]:
    """By template."""
    found = {}
    for template in (K_STRING, K_PARTS, K_TOOLS, K_GREEDY):
        found[template] = make(tmp_path_factory.mktemp("model"), template)
        found[template].hasher = partial(block_hashes, block_tokens=1)
    return found


@settings(max_examples=150)
@given(
    messages=K_MESSAGES,
    others=st.dictionaries(
        st.sampled_from(["tools", "tool_choice", "chat_template_kwargs", "reasoning_effort", "input_ids"]),
        K_SHAPES,
        max_size=3,
    ),
    template=st.sampled_from([K_STRING, K_PARTS, K_TOOLS, K_GREEDY]),
)
def test_whatever_shape_its_fields_have_a_chat_is_read_or_estimated(
    readers: dict[str, PromptReader], messages: list[Any], others: dict[str, Any], template: str
) -> None:
    assert ask(readers[template], Endpoint.CHAT, messages=messages, **others).tokens >= 0


def test_a_content_of_bare_words_and_one_nested_without_end_are_estimated(tmp_path: Path) -> None:
    reader = make(tmp_path, K_GREEDY)
    assert not ask(reader, Endpoint.CHAT, messages=[{"role": "user", "content": ["hello"]}]).exact
    deep = {"function": {"name": "f", "arguments": "[" * 5000 + "]" * 5000}}
    assert not ask(reader, Endpoint.CHAT, messages=[{"role": "user", "tool_calls": [deep]}]).exact


def test_a_text_of_far_too_many_tokens_is_not_read_to_its_end(tmp_path: Path) -> None:
    reader, read = make(tmp_path, K_STRING), []
    whole = reader.encode

    def encode(text: str, **wishes: Any) -> list[int]:
        read.append(len(text))
        return whole(text, **wishes)

    reader.encode = encode  # type: ignore[method-assign]
    long = "abc " * 1_000_000
    for asked in (
        read_body(Endpoint.COMPLETIONS, json.dumps({"prompt": long}).encode()),
        read_body(Endpoint.CHAT, json.dumps({"messages": [{"role": "user", "content": long}]}).encode()),
    ):
        read.clear()
        prompt = reader.read(asked, 150_000)
        assert (prompt.tokens, prompt.exact) == (150_001, False)
        assert sum(read[1:]) == 200_000, "of four million, two windows"
    prompt = reader.read(
        read_body(Endpoint.COMPLETIONS, json.dumps({"prompt": "abc " * 60_000}).encode()), 250_000
    )
    assert prompt.exact
    assert prompt.tokens == 1 + 4 * 60_000


def test_a_salted_prompt_has_no_hashes(tmp_path: Path) -> None:
    make(tmp_path, None)
    reader = PromptReader(Model(name="m", tokenizer=str(tmp_path)), lambda ids: tuple(ids))
    assert ask(reader, Endpoint.GENERATE, input_ids=[1, 2]).block_hashes == (1, 2)
    for name in ("cache_salt", "extra_key", "lora_path"):
        assert ask(reader, Endpoint.GENERATE, input_ids=[1, 2], **{name: "x"}).block_hashes == ()


def test_templates_are_sandboxed_and_their_faults_are_told() -> None:
    for source in ("{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ 1 / 0 }}"):
        with pytest.raises(TemplateError):
            ChatTemplate(source, "t", {}).render([])
    with pytest.raises(ConfigError, match="line 1"):
        ChatTemplate("{% if %}", "t", {})
    assert ChatTemplate("{% generation %}a{% endgeneration %}", "t", {}).render([]) == "a"


def test_a_folder_without_a_tokenizer_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        PromptReader(Model(name="m", tokenizer=str(tmp_path)))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError):
        PromptReader(Model(name="m", tokenizer=str(tmp_path)))
