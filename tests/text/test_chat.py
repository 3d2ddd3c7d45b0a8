"""Conversations: what may be said how, and how they end."""

import pytest

import specjax
from specjax.errors import ConfigError
from specjax.text import chat, tokenizer
from tests import paths

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if m.tool_calls %}CALL{% endif %}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
USER = {"role": "user", "content": "Hi"}


@pytest.fixture(scope="module")
def tok():
    return tokenizer.load(paths.fixture("tiny-fp16"), chat_template=TEMPLATE)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("Hi", "Hi"),
        ([{"type": "text", "text": "Hi"}], "Hi"),
        ([{"type": "input_text", "text": "Hi"}, {"type": "text", "text": "you"}], "Hi\nyou"),
        (["Hi"], "Hi"),
        ([], ""),
        ("", ""),
    ],
)
def test_content_in_parts_is_text(tok, content, text):
    messages = [{"role": "user", "content": content}]
    assert tok.render_chat(messages) == f"<user>{text}</><assistant>"
    assert messages == [{"role": "user", "content": content}], "the caller's messages stay"


def test_calls_of_tools_need_no_content(tok):
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    assert "CALL" in tok.render_chat([USER, call])


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages is empty"),
        ("Hi", "messages: expected a list of objects .* found str"),
        (USER, "messages: expected a list .* found dict"),
        (["Hi"], r"messages\[0\]: expected an object .* found str"),
        ([USER, {"content": "x"}], r"messages\[1\]: role=None"),
        ([{"role": "", "content": "x"}], r"messages\[0\]: role=''"),
        ([{"role": 3, "content": "x"}], r"messages\[0\]: role=3"),
        ([{"role": "user"}], r"messages\[0\]: content is missing"),
        ([{"role": "user", "content": None}], r"messages\[0\]: content is null"),
        ([{"role": "user", "content": 5}], r"messages\[0\]\.content: .* found int"),
        ([{"role": "user", "content": {"type": "text"}}], r"content: .* found dict"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}],
            r"messages\[0\]\.content\[0\]: type='image_url' is not supported \(supported: text",
        ),
        ([{"role": "user", "content": [{"text": "x"}]}], r"content\[0\]: type=None"),
        ([{"role": "user", "content": [{"type": "text"}]}], r"content\[0\]: text=None"),
        ([{"role": "user", "content": [3]}], r"content\[0\]: expected a part .* found int"),
        ([{"role": "user", "content": "\ud800"}], "not Unicode: half a surrogate pair"),
    ],
)
def test_malformed_messages_are_refused_by_place(tok, messages, message):
    with pytest.raises(ConfigError, match=message):
        tok.apply_chat_template(messages)


def test_how_a_conversation_ends(tok):
    answer = {"role": "assistant", "content": "Well, "}
    assert tok.render_chat([USER]) == "<user>Hi</><assistant>"
    assert tok.render_chat([USER], add_generation_prompt=False) == "<user>Hi</>"
    continued = tok.render_chat([USER, answer], continue_final_message=True)
    assert continued == "<user>Hi</><assistant>Well, "
    parts = [USER, {**answer, "content": [{"type": "text", "text": "Well, "}]}]
    assert tok.render_chat(parts, continue_final_message=True) == continued
    with pytest.raises(ConfigError, match="exclude each other"):
        tok.render_chat([USER], add_generation_prompt=True, continue_final_message=True)
    assert chat.generation_prompt(None, False) and not chat.generation_prompt(None, True)


def test_options_say_how_a_conversation_ends():
    model = specjax.load(paths.fixture("tiny-fp16"), chat_template=TEMPLATE)
    row = {"messages": [USER, {"role": "assistant", "content": "We"}]}
    encode = model.tokenizer.encode
    ends = {
        "<user>Hi</><assistant>We</><assistant>": {},
        "<user>Hi</><assistant>We</>": {"add_generation_prompt": False},
        "<user>Hi</><assistant>We": {"continue_final_message": True},
    }
    for text, options in ends.items():
        assert model.encode(row, **options) == encode(text, add_special_tokens=False)
        [result] = model.generate(row, max_new_tokens=1, **options)
        assert result.input_ids == encode(text, add_special_tokens=False)
    for wrong in ({"add_generation_prompt": 1}, {"continue_final_message": None}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            model.generate(row, **wrong)


def test_a_template_that_fails_in_any_way_is_one_line():
    for template in ("{{ 1 // 0 }}", "{{ raise_exception('no\nroles') }}", "{% for %}"):
        failing = tokenizer.load(paths.fixture("tiny-fp16"), chat_template=template)
        with pytest.raises(ConfigError, match=r"^the chat template of .* failed: .+$"):
            failing.render_chat([USER])


TRIMS = TEMPLATE.replace("m.content", "m.content | trim").replace("role }}>", "role }}>\n")


@pytest.mark.parametrize(
    ("template", "content", "text"),
    [
        (TRIMS, "Sure", "<user>\nHi</><assistant>\nSure"),
        (TRIMS, " Sure ", "<user>\nHi</><assistant>\nSure"),
        (TRIMS, "", "<user>\nHi</><assistant>\n"),
        (TRIMS, "  ", "<user>\nHi</><assistant>\n"),
        (TRIMS, "/", "<user>\nHi</><assistant>\n/"),
        (TEMPLATE, " Sure ", "<user>Hi</><assistant> Sure "),
        (TEMPLATE, "", "<user>Hi</><assistant>"),
        (
            "{{ messages[-1].content }}|" + TEMPLATE,
            "Sure ",
            "Sure |<user>Hi</><assistant>Sure ",
        ),
        (
            "{{ messages[-1].content | trim }}|" + TRIMS,
            "a ",
            "a|<user>\nHi</><assistant>\na",
        ),
    ],
)
def test_a_message_is_continued_where_its_text_ends(template, content, text):
    tok = tokenizer.load(paths.fixture("tiny-fp16"), chat_template=template)
    messages = [USER, {"role": "assistant", "content": content}]
    assert tok.render_chat(messages, continue_final_message=True) == text
    assert messages[-1]["content"] == content


@pytest.mark.parametrize("change", [" | upper", ".replace('u', '')", " | length"])
def test_a_message_that_a_template_changes_is_not_continued(change):
    template = TEMPLATE.replace("m.content", "m.content" + change)
    tok = tokenizer.load(paths.fixture("tiny-fp16"), chat_template=template)
    message = {"role": "user", "content": "Sure"}
    with pytest.raises(ConfigError, match="continue_final_message: the chat template leaves out"):
        tok.render_chat([message], continue_final_message=True)
    calls = {"role": "assistant", "tool_calls": [{}]}
    with pytest.raises(ConfigError, match=r"messages\[0\] has no content to continue"):
        tok.render_chat([calls], continue_final_message=True)
