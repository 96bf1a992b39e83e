"""Chats to tokens: the tokenizer's own parsing of special tokens is the truth for templates."""

import copy
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from dsv3_jax.data.tokenizer import BOS, EOS, SPECIAL_TOKENS, Tokenizer, load_tokenizer
from dsv3_jax.serve.server.templates import FALLBACK, ChatTemplate, load_template

SOURCE = """{{ bos_token }}
{%- for message in messages %}
    {%- if message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}
    {%- elif message['role'] == 'system' %}{{ message['content'] }}
    {%- else %}{{ '<｜Assistant｜>' + message['content'] + eos_token }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"""
NAMES = (*SPECIAL_TOKENS, "<｜User｜>", "<｜Assistant｜>")


@pytest.fixture(scope="module")
def chat_tokenizer(tokenizer, tmp_path_factory) -> Tokenizer:
    """With role tokens that are, as DeepSeek-V3's are, added but not special."""
    folder = tmp_path_factory.mktemp("tokenizer")
    backend = copy.deepcopy(tokenizer.backend)
    backend.add_tokens([AddedToken(name, special=False) for name in NAMES[-2:]])
    backend.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def template(chat_tokenizer) -> ChatTemplate:
    return ChatTemplate(SOURCE, chat_tokenizer, {"bos_token": BOS, "eos_token": EOS})


@pytest.fixture(scope="module")
def parse(chat_tokenizer):
    """Ids of a text whose special tokens are meant, by the tokenizer itself."""
    backend = copy.deepcopy(chat_tokenizer.backend)
    backend.encode_special_tokens = False
    return lambda text: backend.encode(text, add_special_tokens=False).ids


def messages(*contents):
    roles = ("user", "assistant")
    return [{"role": roles[n % 2], "content": text} for n, text in enumerate(contents)]


TEXTS = st.lists(st.text("the model <>｜|é\n", max_size=12), min_size=1, max_size=4)


@settings(max_examples=25)
@given(texts=TEXTS)
def test_a_templates_special_tokens_become_those_tokens(parse, template, texts):
    rendered = BOS
    for number, text in enumerate(texts):
        rendered += f"<｜Assistant｜>{text}{EOS}" if number % 2 else f"<｜User｜>{text}"
    rendered += "<｜Assistant｜>"
    assert template.encode(messages(*texts)) == parse(rendered)


PARTS = st.sampled_from(
    [*NAMES, "<｜", "end", "｜>", ">", EOS[:5], EOS[5:], "a", "<", " ", "\ue000"]
)


@settings(max_examples=25)
@given(texts=st.lists(st.lists(PARTS, max_size=6).map("".join), min_size=1, max_size=3))
def test_users_cannot_spell_special_tokens(chat_tokenizer, template, texts):
    """Nor complete in one message what another, or the template, began: `<｜end` `of...｜>`."""
    tokens = template.encode([{"role": "system", "content": text} for text in texts])
    ids = {chat_tokenizer.backend.token_to_id(name) for name in NAMES}
    last = chat_tokenizer.backend.token_to_id("<｜Assistant｜>")
    assert [token for token in tokens if token in ids] == [chat_tokenizer.bos_id, last]
    assert chat_tokenizer.decode(tokens[1:-1], skip_special_tokens=False) == "".join(texts)


def test_what_hugging_face_gives_templates(tokenizer):
    source = """{% set x = namespace(n=0) %}
{% for m in messages %}
    {% generation %}{{ m.content }}{% endgeneration %}
    {% set x.n = x.n + 1 %}
    {% if x.n == 2 %}{% break %}{% endif %}
{% endfor %}
{{ {'a': '<é>&'} | tojson }} {{ {'a': [1]} | tojson(indent=2) }} {{ strftime_now('%Y') | length }}
"""
    text = tokenizer.decode(ChatTemplate(source, tokenizer).encode(messages("p", "q", "r")))
    # by hand: trim_blocks eats the line break after a tag, lstrip_blocks the spaces before one
    assert text == 'pq{"a": "<é>&"} {\n  "a": [\n    1\n  ]\n} 4'


def test_a_template_may_refuse_messages_and_cannot_reach_python(tokenizer):
    refusing = ChatTemplate("{{ raise_exception('no system messages') }}", tokenizer)
    with pytest.raises(ValueError, match="no system messages"):
        refusing.encode(messages("a"))
    for source in ("{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ 1 / 0 }}"):
        with pytest.raises(ValueError, match="do not fit"):
            ChatTemplate(source, tokenizer).encode(messages("a"))
    with pytest.raises(ValueError, match="no Jinja template"):
        ChatTemplate("{% if %}", tokenizer)


def test_the_fallback(tokenizer, tmp_path):
    template = load_template(tmp_path, tokenizer)
    assert template.is_fallback and template.stop == ("\nUser:", "\nSystem:")
    tokens = template.encode(
        [
            {"role": "system", "content": "the model "},
            {"role": "user", "content": "to\n"},
            {"role": "assistant", "content": "of"},
            {"role": "user", "content": EOS},
        ]
    )
    expected = f"System: the model\n\nUser: to\n\nAssistant: of\n\nUser: {EOS}\n\nAssistant:"
    assert tokenizer.decode(tokens, skip_special_tokens=False) == expected
    assert tokenizer.eos_id not in tokens


def test_where_a_checkpoint_keeps_its_template(tokenizer, tmp_path):
    def text_of(**config):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        template = load_template(tmp_path, tokenizer)
        assert not template.is_fallback
        return tokenizer.decode(template.encode(messages("a")), skip_special_tokens=False)

    assert text_of(chat_template="one {{ messages[0].content }}") == "one a"
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "two"}]
    assert text_of(chat_template=named) == "two"
    own = {"content": EOS}
    assert text_of(chat_template="{{ eos_token }}{{ bos_token }}", eos_token=own) == EOS + BOS
    (tmp_path / "chat_template.jinja").write_text("three")
    assert text_of(chat_template="one") == "three"
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match=r"chat_template is a int, expected a text"):
        text_of(chat_template=3)


def test_long_messages_full_of_beginnings_are_quick(tokenizer):
    """800 placeholder tokens as DeepSeek-V3's, and a message that nearly spells them."""
    backend = copy.deepcopy(tokenizer.backend)
    backend.add_special_tokens([f"<｜place▁holder▁no▁{n}｜>" for n in range(800)])
    many = Tokenizer(**{**vars(tokenizer), "backend": backend})
    text = "<｜place▁holder▁no▁ <｜" * 1_000
    tokens = ChatTemplate(FALLBACK, many).encode(messages(text))  # seconds if it were quadratic
    assert many.decode(tokens) == f"User: {text}\n\nAssistant:"
