"""The band mask: which KV tiles a block of query rows visits, which of them are whole, and what one row sees.

Row `q_idx` of a sequence sees the keys [q_idx + shift - left, q_idx + shift + right] that exist, where
shift = seqlen_k - seqlen_q aligns the last row with the last key. "full" has neither bound, "causal" has
right = 0 and no left. Every role of a kernel takes its loop bounds from here, and so agrees on them; the
oracle's `reference.tile_walks` is the same arithmetic.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float32, const_expr

EDGES = ("left", "right")  # of the band; the sequence's end counts as its right one


class TileRange(NamedTuple):
    """The KV tiles [begin, end); `end <= begin` means none."""

    begin: Any
    end: Any


def first_early(n_block, whole_end):
    """What to visit in the place of tile `n_block`, counted down from the last one, so that the first tile comes before
    the others of [0, whole_end): 0, whole_end - 1, .., 1. It holds the attention sinks (`problem.TileGeometry`)."""
    early = cutlass.select_(n_block == whole_end - 1, 0, n_block + 1)
    return cutlass.select_(n_block < whole_end, early, n_block)


class KeyRange(NamedTuple):
    """The keys [begin, end), or columns of a tile; a bound that is None hides nothing."""

    begin: Any
    end: Any

    def applied(self, score, column):
        """The score of a key, or -inf if the key is not in the range."""
        if const_expr(self.end is not None):
            score = cutlass.select_(column >= self.end, -Float32.inf, score)
        if const_expr(self.begin is not None):
            score = cutlass.select_(column < self.begin, -Float32.inf, score)
        return score

    def counted_from(self, first_key) -> "KeyRange":
        return KeyRange(*(None if bound is None else bound - first_key for bound in self))


@dataclass(frozen=True)
class Band:
    """The mask of one sequence.

    kind         "full", "causal" or "band", as in `Problem.mask`
    tile_n       keys per KV tile
    left, right  keys seen to the left and right of the diagonal, both >= 0; only for "band"
    """

    kind: cutlass.Constexpr[str]
    tile_n: cutlass.Constexpr[int]
    seqlen_q: Any
    seqlen_k: Any
    left: Any = None
    right: Any = None

    @property
    def has_left(self) -> bool:
        return self.kind == "band"

    @property
    def has_right(self) -> bool:
        return self.kind != "full"

    def keys(self, q_idx) -> KeyRange:
        """The keys that row `q_idx` sees; empty where end <= begin."""
        begin, end = 0, self.seqlen_k
        diagonal = q_idx + (self.seqlen_k - self.seqlen_q)
        if const_expr(self.has_left):
            begin = cutlass.max(diagonal - self.left, 0)
        if const_expr(self.kind == "causal"):
            end = cutlass.min(diagonal + 1, end)
        elif const_expr(self.has_right):
            end = cutlass.min(diagonal + self.right + 1, end)
        return KeyRange(begin, end)

    def visited(self, first_row, rows: int) -> TileRange:
        """The tiles in which any of the `rows` rows from `first_row` on that exist may see a key."""
        last_row = cutlass.min(first_row + rows, self.seqlen_q) - 1
        begin, end = self.keys(first_row).begin, self.keys(last_row).end
        end_tile = (cutlass.max(end, 0) + (self.tile_n - 1)) // self.tile_n
        # A row that exists has `begin` < seqlen_k, and neighbouring rows' bands touch: `end` <= `begin` only at 0.
        begin_tile = begin // self.tile_n if const_expr(self.has_left) else 0
        return TileRange(begin_tile, end_tile)

    def whole(self, first_row, rows: int) -> TileRange:
        """The tiles in which each of these rows sees every key: they need no masking."""
        begin, end = self.keys(first_row + (rows - 1)).begin, self.keys(first_row).end
        begin_tile = (begin + (self.tile_n - 1)) // self.tile_n if const_expr(self.has_left) else 0
        return TileRange(begin_tile, cutlass.max(end, 0) // self.tile_n)

    def columns(self, q_idx, first_key, edges=EDGES) -> KeyRange:
        """The keys that row `q_idx` sees, counted from `first_key`; None for a bound that is not among the `edges`."""
        seen = self.keys(q_idx)
        begin = seen.begin if const_expr(self.has_left and "left" in edges) else None
        return KeyRange(begin, seen.end if const_expr("right" in edges) else None).counted_from(first_key)

    def hide(self, scores: cute.Tensor, columns, q_idx, first_column, edges=EDGES) -> None:
        """Set to -inf, in one row's `scores`, what row `q_idx` does not see.

        scores        a register tensor; element i is the score of key first_column + columns[i]
        columns       integers known while tracing, so that a comparison has an immediate operand
        first_column  key index of the thread's column 0
        edges         those of the band that may lie in this tile
        """
        seen = self.columns(q_idx, first_column, edges)
        for i, column in enumerate(columns):
            scores[i] = seen.applied(scores[i], column)
