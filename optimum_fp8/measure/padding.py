"""Which positions of tensors are padding, as far as masks and shapes tell."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import count

import torch

_serial = count()


class Padding:
    """Masks of one forward pass, and what of a tensor they leave.

    Args:
        masks: `[batch, length]`, 0 or False at positions of padding.
        active: whether more masks may be noted.
        exact: whether they are of all that there is; else keys and values may go on after the padding of a prompt.
    """

    def __init__(self, masks: Iterable[torch.Tensor] = (), active: bool = False, exact: bool = False):
        self.active, self.exact = active, exact
        self._valid: dict[tuple[int, int], torch.Tensor] = {}  # by shape
        self._noted: dict[int, torch.Tensor] = {}  # by id, which is theirs as long as they are here
        self._number = next(_serial)
        given = list(masks)
        for mask in given:
            self._add(mask.bool())
        self._given = frozenset((mask.shape[0], mask.shape[1]) for mask in given)

    @property
    def state(self) -> tuple[int, int]:
        """Equal as long as the same is left of a tensor."""
        return self._number, len(self._noted)

    def note(self, mask: torch.Tensor) -> None:
        """Add a mask that modules give to each other, for lengths that no mask was given for.

        Args:
            mask: `[batch, length]`, 0 or False at positions of padding, or that of an attention,
                `[batch, heads or 1, queries, keys]`, boolean (True: attend) or added to the scores: a query that
                attends to nothing, and a key that nothing attends to, is padding.
        """
        if id(mask) in self._noted:
            return
        self._noted[id(mask)] = mask
        if mask.ndim == 2 and not mask.is_floating_point():
            self._add_unless_given(mask.bool())
        elif mask.ndim == 4:
            lowest = torch.finfo(mask.dtype).min if mask.is_floating_point() else 0
            attended = (mask if mask.dtype == torch.bool else mask > lowest / 2).any(dim=1)
            queries, keys = attended.any(dim=2), attended.any(dim=1)
            if not mask.is_floating_point() and not _attends_to_itself(attended, queries):
                return  # True may as well say what is masked
            if queries.shape[1] > 1:  # one query is a token that was generated
                self._add_unless_given(queries)
            self._add_unless_given(keys)

    def tokens_of(self, x: torch.Tensor, *, keys: bool = False) -> torch.Tensor:
        """What of `[batch, length, …]` (of `keys`, or values) is not padding: `[tokens, …]`, or `x` if no mask fits."""
        valid = self._valid.get((x.shape[0], x.shape[1]))
        if valid is None and keys and not self.exact:
            shorter = [mask for mask in self._valid.values() if len(mask) == len(x) and mask.shape[1] < x.shape[1]]
            for mask in shorter[:1]:
                valid = torch.cat([mask, mask.new_ones(len(x), x.shape[1] - mask.shape[1])], dim=1)
        return x if valid is None else x[valid.to(x.device)]

    def rows_of(self, x: torch.Tensor, *, heads: bool = False) -> torch.Tensor:
        """What of a tensor of any shape is not padding: `[tokens, …]`, or `x` where its shape tells of no positions.

        Args:
            x: `[batch, length, …]`, `[length, batch, …]`, `[batch · length, …]`, `[batch, heads, length, size]`.
            heads: it may also be `[batch · heads, length, size]`.
        """
        if x.ndim >= 3 and tuple(x.shape[:2]) in self._valid:
            return self.tokens_of(x)
        for (rows, length), valid in self._valid.items():
            valid = valid.to(x.device)
            if x.ndim == 2 and x.shape[0] == valid.numel():
                return x[valid.flatten()]
            if x.ndim >= 3 and x.shape[:2] == (length, rows):
                return x[valid.mT]
            if x.ndim == 4 and (x.shape[0], x.shape[2]) == (rows, length):
                return x.transpose(1, 2)[valid]
            if heads and x.ndim == 3 and x.shape[0] % rows == 0 and x.shape[1] == length:
                return x[valid.repeat_interleave(x.shape[0] // rows, dim=0)]
        return x

    def _add_unless_given(self, valid: torch.Tensor) -> None:
        """Add what modules say of lengths that no mask was given for; a mask that leaves nothing says what is padding,
        in the way of torch's `key_padding_mask`: that there is none."""
        if tuple(valid.shape) not in self._given and bool(valid.any()):
            self._add(valid)

    def _add(self, valid: torch.Tensor) -> None:
        if not bool(valid.all()):
            shape = (valid.shape[0], valid.shape[1])
            self._valid[shape] = valid & self._valid[shape] if shape in self._valid else valid


def _attends_to_itself(attended: torch.Tensor, queries: torch.Tensor) -> bool:
    """Whether each of the queries that attend to anything attends to its own position."""
    if attended.shape[1] != attended.shape[2]:
        return False
    return bool((attended.diagonal(dim1=1, dim2=2) == queries).all())
