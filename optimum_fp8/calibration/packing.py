"""Packing: texts one behind the other, cut into samples of one length, so that there is nothing to pad."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch

from ..config import FP8Config

logger = logging.getLogger(__name__)


def packed(texts: Iterable[str], tokenizer: Any, limit: int, config: FP8Config, special: bool) -> Iterator[Any]:
    """Batches of full samples, of texts with the tokenizer's EOS between them where it has one.

    What is left at the end is no full sample, and only used where there is no other.

    Args:
        texts: as many as it takes are read.
        tokenizer: makes tokens of them.
        limit: tokens of a sample.
        config: how many samples, and how many of them are a batch.
        special: whether the tokenizer adds its special tokens to each text.
    """
    samples = islice(_samples(texts, tokenizer, limit, special), config.most_samples)
    while group := list(islice(samples, config.batch_size)):
        ids = torch.tensor(group)
        yield {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _samples(texts: Iterable[str], tokenizer: Any, limit: int, special: bool) -> Iterator[list[int]]:
    eos = getattr(tokenizer, "eos_token_id", None)
    tokens: list[int] = []
    last, full = eos, False
    for text in texts:
        # `verbose`: tokenizers warn of texts that are longer than a model takes, and these are cut.
        added = tokenizer(text, add_special_tokens=special, truncation=False, verbose=False)["input_ids"]
        if eos is not None and last != eos:
            tokens.append(eos)
        tokens += added
        last = added[-1] if added else last
        while len(tokens) >= limit:
            yield tokens[:limit]
            tokens, full = tokens[limit:], True
    if tokens and not full:
        logger.warning(
            "concatenate_data=True: all texts together have %d tokens, fewer than the %d of a sample: use more data",
            len(tokens),
            limit,
        )
        yield tokens
