"""The named corner cases of decode, with caches in which everything that must not be read is poison.

Tokens behind a sequence's length or before its window are NaN, and page-table entries that are not used are no pages.
Distinct kinds of problem are few, because each is compiled: sizes, lengths, splits and groups are not part of a kind.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from tests.cases import Case, _threshold, _tokens, sinks

NEEDLE_KEYS = 300  # every so many keys before a sequence's last one, a key is as like the last queries as that one
GARBAGE_PAGES = (2**31 - 1, -1, -(2**31), 10**6)


@dataclass(frozen=True)
class DecodeCase:
    """One call. `lengths` holds the keys of each sequence.

    capacity    of contiguous caches: None: the longest length
    page_size   None: contiguous. Pages are shuffled; those of `shared` leading tokens belong to all sequences
    threshold, mixed, spread  as in `tests.cases.Case`
    """

    lengths: tuple[int, ...] = (300,)
    seqlen_q: int = 1
    heads_q: int = 4
    heads_kv: int = 1
    head_dim: int = 128
    head_dim_v: int = 128
    dtype: torch.dtype = torch.bfloat16
    capacity: int | None = None
    page_size: int | None = None
    shared: int = 0
    causal: bool = True
    window: tuple[int | None, int | None] = (None, None)
    softcap: float = 0.0
    softmax_scale: float | None = None
    sink: bool = False
    threshold: float | str | None = None
    num_splits: int | None = None
    share_max: bool = False
    mixed: bool = False
    spread: float = 1.0

    @property
    def batch(self) -> int:
        return len(self.lengths)

    @property
    def scale(self) -> float:
        return self.softmax_scale or 1.0 / math.sqrt(self.head_dim)

    @property
    def group(self) -> int:
        return self.heads_q // self.heads_kv

    def first_key(self, length: int) -> int:
        """The first key that any query of such a sequence sees."""
        left = self.window[0]
        return 0 if left is None else max(length - self.seqlen_q - left, 0)


PAGED = DecodeCase(page_size=64, lengths=(0, 1, 63, 64, 65, 300), heads_q=8, heads_kv=2)
SKIPPING = DecodeCase(page_size=64, lengths=(700,), threshold=0.03, spread=2.0)
SMALL_PAGES = DecodeCase(page_size=16, lengths=(700, 15, 16, 17), threshold=0.03, spread=2.0)
CONTIGUOUS = DecodeCase(lengths=(400, 129), capacity=450, head_dim=64, head_dim_v=64)

CASES = {
    # paged, dense: lengths around a page, groups, queries, splits
    "paged": PAGED,
    "one long among short ones": replace(PAGED, lengths=(3, 900, 5, 1, 64), heads_q=2, heads_kv=1),
    "one split": replace(PAGED, num_splits=1),
    "three splits": replace(PAGED, num_splits=3),
    "more splits than tiles": replace(PAGED, num_splits=40),
    "three levels of groups of splits": replace(PAGED, lengths=(4500,), heads_q=16, heads_kv=1, num_splits=71),
    "pages shared by sequences": replace(PAGED, lengths=(200, 300, 130, 128), shared=128),
    "two queries": replace(PAGED, seqlen_q=2),
    "queries that see no key": replace(PAGED, seqlen_q=4, lengths=(0, 1, 2, 3, 4, 65)),
    "no key at all": replace(PAGED, lengths=(0, 0)),
    "no key at all, three splits": replace(PAGED, lengths=(0, 0), num_splits=3),
    "a head for each query head": replace(PAGED, heads_q=3, heads_kv=3, lengths=(130, 64)),
    "one row": replace(PAGED, heads_q=1, heads_kv=1, lengths=(257,)),
    "rows of more than one block": replace(PAGED, heads_q=16, heads_kv=1, seqlen_q=9, lengths=(200, 70)),  # 144
    "exactly one block of rows": replace(PAGED, heads_q=16, heads_kv=1, seqlen_q=4, lengths=(200, 3)),
    "sixteen queries of sixteen heads": replace(PAGED, heads_q=16, heads_kv=1, seqlen_q=16, lengths=(150, 9)),
    "many sequences": replace(PAGED, lengths=tuple(range(0, 70, 2)), heads_q=2, heads_kv=1),
    # paged, skipping
    "skip": SKIPPING,
    "skip, one split": replace(SKIPPING, num_splits=1, mixed=True),
    "skip, two splits": replace(SKIPPING, num_splits=2, lengths=(1000,), mixed=True),
    "skip, more splits than tiles": replace(SKIPPING, num_splits=40),
    "skip, ragged": replace(SKIPPING, lengths=(0, 700, 1, 450, 64), heads_q=8, heads_kv=2, num_splits=2, mixed=True),
    "skip, four queries": replace(SKIPPING, seqlen_q=4),
    "skip, several blocks of rows": replace(SKIPPING, heads_q=16, seqlen_q=9, mixed=True),
    "skip, lambda 1": replace(SKIPPING, threshold=1.0, num_splits=1),
    "skip, lambda so small that nothing is": replace(SKIPPING, threshold=1e-30),
    "skip, lambda per sequence": replace(SKIPPING, lengths=(600, 500), heads_q=4, threshold="batch"),
    "skip, lambda per head": replace(
        SKIPPING, lengths=(600, 500), heads_q=4, heads_kv=2, threshold="heads", num_splits=1
    ),
    "skip, lambda per sequence and head": replace(
        SKIPPING, lengths=(600, 500), heads_q=4, heads_kv=2, threshold="batch x heads", num_splits=1
    ),
    # other pages
    "skip, pages of 16": SMALL_PAGES,
    "skip, pages of 16, shared": replace(SMALL_PAGES, lengths=(500, 300), shared=48, seqlen_q=2),
    "pages of 256, window": DecodeCase(page_size=256, lengths=(700, 256, 257, 3), window=(200, 0), seqlen_q=3),
    "pages of 128, skip, softcap": DecodeCase(
        page_size=128, lengths=(700, 128, 129), threshold=0.01, softcap=30.0, num_splits=2
    ),
    "pages of 32, window to both sides": DecodeCase(
        page_size=32, lengths=(200, 31, 33, 2), causal=False, window=(90, 2), seqlen_q=4
    ),
    # contiguous
    "contiguous": CONTIGUOUS,
    "contiguous, four queries, three splits": replace(CONTIGUOUS, seqlen_q=4, num_splits=3),
    "contiguous, to the capacity": replace(CONTIGUOUS, lengths=(450, 0, 449)),
    "contiguous, skip": DecodeCase(
        lengths=(700, 512), threshold=0.03, spread=2.0, mixed=True, dtype=torch.float16, num_splits=1
    ),
    "contiguous, skip, window": DecodeCase(lengths=(700, 100, 0), threshold=0.01, window=(450, 2), seqlen_q=2),
    "contiguous, head dim 192 and 128": DecodeCase(
        lengths=(300, 65), head_dim=192, head_dim_v=128, threshold=0.01, page_size=None
    ),
    "contiguous, head dim 256": DecodeCase(lengths=(300, 64), head_dim=256, head_dim_v=256, threshold=0.01),
    "contiguous, head dim 72": DecodeCase(lengths=(200, 64), head_dim=72, head_dim_v=72, causal=False),
    # sinks: of a kind of their own, in one split and several, with rows that see no key
    "sink, skip": replace(SKIPPING, sink=True, lengths=(700, 0, 40), heads_q=8, heads_kv=2, seqlen_q=2),
    "sink, skip, three splits": replace(SKIPPING, sink=True, num_splits=3, heads_q=16, seqlen_q=9, lengths=(400, 0)),
    # maxima shared
    "shared maxima": replace(SKIPPING, share_max=True, lengths=(700, 64)),
    "shared maxima, many splits": replace(SKIPPING, share_max=True, num_splits=5, heads_q=8, heads_kv=2),
    "shared maxima, several blocks of rows": replace(
        SKIPPING, share_max=True, num_splits=3, heads_q=16, seqlen_q=9, lengths=(400, 70)
    ),
}  # fmt: skip


@dataclass(frozen=True)
class DecodeInputs:
    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    seqused_k: torch.Tensor
    page_table: torch.Tensor | None
    threshold: float | torch.Tensor | None
    learnable_sink: torch.Tensor | None


def make_decode_inputs(case: DecodeCase, seed: int = 0, device: str | torch.device = "cpu") -> DecodeInputs:
    generator = torch.Generator().manual_seed(seed)
    form = Case(
        lengths_q=(case.seqlen_q,) * case.batch, lengths_k=case.lengths, heads_q=case.heads_q, head_dim=case.head_dim,
        softmax_scale=case.softmax_scale, threshold=case.threshold,
    )  # fmt: skip
    q = torch.zeros(case.batch, case.seqlen_q, case.heads_q, case.head_dim)
    for index, length in enumerate(case.lengths):
        positions = torch.arange(case.seqlen_q) + (length - case.seqlen_q)
        q[index] = _tokens(positions, case.heads_q, form, generator, case.spread)
    longest = max(case.lengths)
    common_k = _tokens(torch.arange(longest), case.heads_kv, form, generator, 1.0)
    common_v = torch.randn(longest, case.heads_kv, case.head_dim_v, generator=generator)
    tokens = []  # of each sequence: k, v; the first `shared` of all are the same
    for length in case.lengths:
        k = _tokens(torch.arange(length), case.heads_kv, form, generator, 1.0)
        v = torch.randn(length, case.heads_kv, case.head_dim_v, generator=generator)
        for needle in range(length - 1 - NEEDLE_KEYS, -1, -NEEDLE_KEYS):
            k[needle] = k[length - 1]
        k[: case.shared], v[: case.shared] = common_k[: case.shared][:length], common_v[: case.shared][:length]
        first_key = case.first_key(length)
        k[:first_key], v[:first_key] = math.nan, math.nan
        tokens.append((k, v))
    k_cache, v_cache, page_table = (_paged if case.page_size else _contiguous)(case, tokens, generator)
    return DecodeInputs(
        q.to(case.dtype).to(device), k_cache.to(case.dtype).to(device), v_cache.to(case.dtype).to(device),
        torch.tensor(case.lengths, dtype=torch.int32, device=device),
        None if page_table is None else page_table.to(device), _threshold(form, generator, device),
        sinks(case, device),
    )  # fmt: skip


def _contiguous(case: DecodeCase, tokens: list, generator: torch.Generator):
    capacity = max(case.lengths) if case.capacity is None else case.capacity
    caches = [
        torch.full((case.batch, capacity, case.heads_kv, head_dim), math.nan)
        for head_dim in (case.head_dim, case.head_dim_v)
    ]
    for index, parts in enumerate(tokens):
        for cache, part in zip(caches, parts, strict=True):
            cache[index, : len(part)] = part
    return *caches, None


def _paged(case: DecodeCase, tokens: list, generator: torch.Generator):
    """Pages in random order, some of which belong to nobody; one more column than the longest sequence needs."""
    size = case.page_size
    columns = -(-max(case.lengths) // size) + 1
    shared_pages = case.shared // size
    numbers = torch.randperm(case.batch * columns + 3, generator=generator).tolist()
    common = [numbers.pop() for _ in range(shared_pages)]
    garbage = torch.tensor(GARBAGE_PAGES)[torch.randint(len(GARBAGE_PAGES), (case.batch, columns), generator=generator)]
    table = garbage.to(torch.int32)
    caches = [
        torch.full((case.batch * columns + 3, size, case.heads_kv, head_dim), math.nan)
        for head_dim in (case.head_dim, case.head_dim_v)
    ]
    for index, (length, parts) in enumerate(zip(case.lengths, tokens, strict=True)):
        for page in range(case.first_key(length) // size, -(-length // size)):
            number = common[page] if page < shared_pages and length >= case.shared else numbers.pop()
            table[index, page] = number
            for cache, part in zip(caches, parts, strict=True):
                piece = part[page * size : (page + 1) * size]
                cache[number, : len(piece)] = piece
    return *caches, table
