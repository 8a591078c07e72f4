"""Conversations: whatever their columns are called, the model reads what its chat template makes of them."""

from __future__ import annotations

import copy
import json

import datasets
import pytest
import torch
from tiny_models import tiny_bert, tiny_llama
from tokenizers.processors import TemplateProcessing

from optimum_fp8 import FP8Config, calibrate, prepare
from optimum_fp8.calibration import facts_of
from optimum_fp8.errors import FP8CalibrationError
from optimum_fp8.lifecycle.state import state_of

LLAMA = facts_of(tiny_llama())


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


ASKED = [turn("user", "a b"), turn("assistant", "c")]
WITH_SYSTEM = [turn("system", "You"), *ASKED]
SHAREGPT = [{"from": "human", "value": "a b"}, {"from": "gpt", "value": "c"}]


@pytest.fixture
def read(load, chat_tokenizer):
    """`read(dataset)`: the tokens of each sample as text, for a model that reads."""

    def read(dataset, **keys):
        found = load(dataset, LLAMA, **({"tokenizer": chat_tokenizer} | keys))
        return [chat_tokenizer.decode(row) for batch in found for row in batch["input_ids"]]

    return read


def expected(tokenizer, messages, **options):
    """What transformers itself makes of a conversation."""
    return tokenizer.decode(tokenizer.apply_chat_template(messages, return_dict=True, **options)["input_ids"])


@pytest.mark.core
@pytest.mark.parametrize(
    "row, messages",
    [
        ({"messages": ASKED}, ASKED),
        ({"messages": WITH_SYSTEM}, WITH_SYSTEM),
        ({"conversations": SHAREGPT}, ASKED),
        ({"conversations": SHAREGPT, "system": "You"}, WITH_SYSTEM),
        ({"conversations": ASKED}, ASKED),
        ({"anything": ASKED}, ASKED),
        ({"messages": {"role": ["user", "assistant"], "content": ["a b", "c"]}}, ASKED),
        ({"prompt": ASKED[:1], "completion": ASKED[1:]}, ASKED),
        ({"prompt": "a b", "completion": "c"}, ASKED),
        ({"instruction": "a b", "output": "c"}, ASKED),
        ({"instruction": "a", "input": "b", "output": "c"}, [turn("user", "a\n\nb"), turn("assistant", "c")]),
        ({"instruction": "a b", "input": "", "output": "c"}, ASKED),
        ({"question": "a b", "answer": "c", "id": "7"}, ASKED),
        ({"system_prompt": "You", "question": "a b", "response": "c"}, WITH_SYSTEM),
        ({"query": "a b", "response": "c"}, ASKED),
        ({"problem": "a b", "solution": "c"}, ASKED),
        ({"messages": [turn("user", [{"type": "text", "text": "a b"}]), ASKED[1]], "note": "parts"}, ASKED),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else "",
)
def test_the_columns_of_a_conversation(row, messages, read, chat_tokenizer):
    assert read([row]) == [expected(chat_tokenizer, messages)]
    if "parts" not in str(row):  # Arrow has one type for all contents
        assert read(datasets.Dataset.from_list([row, row])) == [expected(chat_tokenizer, messages)] * 2


def test_tools_go_through_the_template(read, chat_tokenizer):
    look = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
    for tools in ([look], json.dumps([look])):
        found = read([{"messages": ASKED, "tools": tools}])
        assert found == [expected(chat_tokenizer, ASKED, tools=[look])] and "[look]" in found[0]


def test_calls_of_tools_and_their_results(read):
    call = turn("assistant", None, tool_calls=[{"function": {"name": "look", "arguments": {"x": 1}}}])
    rows = datasets.Dataset.from_list(
        [{"messages": [turn("user", "a"), call, turn("tool", "b"), turn("assistant", "c")]}]
    )
    assert read(rows) == ["<user> a </s> <assistant> </s> <tool> b </s> <assistant> c </s>"]


@pytest.mark.core
def test_a_file_of_conversations_and_a_list_of_them(tmp_path, read, chat_tokenizer):
    (tmp_path / "chats.jsonl").write_text("\n".join(json.dumps({"conversations": SHAREGPT}) for _ in range(3)))
    assert read(tmp_path / "chats.jsonl") == read([ASKED] * 3) == [expected(chat_tokenizer, ASKED)] * 3


def test_text_column_picks_the_conversation(read, chat_tokenizer):
    other = [turn("user", "x"), turn("assistant", "y")]
    row = {"messages": ASKED, "other": other}
    assert read([row], text_column="other") == [expected(chat_tokenizer, other)]
    assert read([row]) == [expected(chat_tokenizer, ASKED)], "else the one with the usual name"
    assert read([{"prompt": "a", "completion": "b", "story": "c"}], text_column="story") == ["c"]
    with pytest.raises(FP8CalibrationError, match=r"several columns of messages, \['one', 'other'\]: set text_column"):
        read([{"one": ASKED, "other": other}])


def test_empty_conversations_are_left_out(read, chat_tokenizer):
    assert read([{"messages": []}, {"messages": ASKED}]) == [expected(chat_tokenizer, ASKED)]
    with pytest.raises(FP8CalibrationError, match="the dataset is empty: expected at least one sample that is"):
        read([{"messages": []}])


def test_no_special_token_is_added_to_what_the_template_has(read, chat_tokenizer):
    tokenizer = copy.deepcopy(chat_tokenizer)
    end = ("</s>", tokenizer.eos_token_id)
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[end])
    assert read(["a"], tokenizer=tokenizer) == ["a </s>"]
    assert read([ASKED], tokenizer=tokenizer) == [expected(chat_tokenizer, ASKED)]


@pytest.mark.core
@pytest.mark.parametrize("row", [{"messages": ASKED}, {"prompt": "a", "completion": "b"}], ids=lambda row: list(row)[0])
def test_a_tokenizer_without_a_template(row, read, tokenizer):
    column = next(iter(row))
    message = f"column '{column}' holds conversations, and .* has no chat template: pass a tokenizer that has one"
    with pytest.raises(FP8CalibrationError, match=message):
        read([row], tokenizer=tokenizer)


@pytest.mark.parametrize(
    "messages, message",
    [
        ([turn("user", "a"), "b"], "sample 1, column 'messages', message 1 is 'b': expected a dict with 'role'"),
        ([{"content": "b"}], r"sample 1, column 'messages', message 0 does not say whose it is, only \['content'\]"),
        ([{"role": "user"}], r"sample 1, column 'messages', message 0 says nothing, it has only \['role'\]"),
        ([turn("user", 3)], "sample 1, column 'messages', message 0 is 3: expected a string, or a list of parts"),
        ([turn("king", "a")], r"sample 1, column 'messages': the chat template cannot take .*no role king.*\['king'\]"),
        ("a", "sample 1, column 'messages' is 'a', not a list of messages"),
        (None, "sample 1, column 'messages' is None, not a list of messages"),
    ],
)
def test_rows_that_are_no_conversation(messages, message, read):
    with pytest.raises(FP8CalibrationError, match=message):
        read([{"messages": ASKED}, {"messages": messages}])


def test_columns_beside_a_conversation_are_said(read, caplog):
    read([{"messages": ASKED, "system": "You", "score": 3}])
    assert "columns of the dataset that are not the conversation are left out: score" in caplog.text


def test_a_template_that_takes_parts_only_is_given_parts(read, chat_tokenizer):
    """As those of many models that see: a text by itself would be left out without a word."""
    tokenizer = copy.deepcopy(chat_tokenizer)
    tokenizer.chat_template = (
        "{% for message in messages %}<{{ message.role }}> {% for part in message.content "
        "if part.type == 'text' %}{{ part.text }} {% endfor %}{% endfor %}"
    )
    assert read([ASKED], tokenizer=tokenizer) == ["<user> a b <assistant> c"]


@pytest.mark.core
def test_ranges_are_those_of_what_the_template_renders(chat_tokenizer):
    def measured(dataset):
        config = FP8Config(dataset=dataset, tokenizer=chat_tokenizer, batch_size=2)
        tensors = state_of(calibrate(prepare(tiny_llama(), config))).measurements.tensors
        return {key: observer.range().tolist() for key, observer in tensors.items()}

    chats = [ASKED, [turn("user", "x y z"), turn("assistant", "a")]]
    texts = [chat_tokenizer.apply_chat_template(messages, tokenize=False) for messages in chats]
    torch.manual_seed(0)
    found = measured(chats)
    torch.manual_seed(0)
    assert found == measured(texts)


def test_what_is_no_conversation_is_no_pair(load, chat_tokenizer):
    with pytest.raises(FP8CalibrationError, match=r"columns \['a', 'b'\]: expected text in 'text': set text_"):
        load([{"a": "x", "b": "y"}], facts_of(tiny_bert()), tokenizer=chat_tokenizer)
