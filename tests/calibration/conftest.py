"""A tokenizer of five words, and the batches that a dataset gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from optimum_fp8 import FP8Config
from optimum_fp8.calibration import ModelFacts, check_dataset


def _tokenizer(**special: str) -> PreTrainedTokenizerFast:
    words = {word: number for number, word in enumerate(["<pad>", "<unk>", "a", "b", "c"])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **special)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return _tokenizer(pad_token="<pad>")


@pytest.fixture(scope="session")
def tokenizer_without_padding() -> PreTrainedTokenizerFast:
    return _tokenizer()


TEMPLATE = """{% if tools %}[{{ tools[0].function.name }}]{% endif %}{% for message in messages %}\
{% if message.role not in ("system", "user", "assistant", "tool") %}{{ raise_exception("no role " + message.role) }}\
{% endif %}<{{ message.role }}> {{ message.content }} </s> {% endfor %}"""


@pytest.fixture(scope="session")
def chat_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with a chat template, which says each role as a token of its own, and with an EOS."""
    tokenizer = _tokenizer(pad_token="<pad>", eos_token="</s>")
    tokenizer.add_tokens(["<system>", "<user>", "<assistant>", "<tool>", "[look]", "x", "y", "z", "You"])
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="session")
def load() -> Callable[..., list[Any]]:
    """`load(dataset, model=ModelFacts(), **keys)`: its batches for a model, under a config with these keys."""

    def load(dataset: Any, model: ModelFacts | None = None, **keys: Any) -> list[Any]:
        config = FP8Config(dataset=dataset, **keys)
        return list(check_dataset(config.dataset).batches(config.dataset, config, model or ModelFacts()))

    return load


@pytest.fixture(scope="session")
def ids() -> Callable[[Any], list[Any]]:
    return lambda batch: batch["input_ids"].tolist()


@pytest.fixture
def no_network(monkeypatch):
    """Whoever asks the network fails."""

    def refuse(*args, **kwargs):
        raise AssertionError("the network is asked")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)
