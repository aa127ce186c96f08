"""Online softmax in the base-2 domain, for one thread's share of some rows.

With c = scale_log2, raw scores s, and a reference r per row,

    p = 2^(s c - r c),   row_sum += sum(p),   O += p V;      where r moves to r':  row_sum, O *= 2^(r c - r' c)

FlashAttention moves r with every new maximum. Here r stays while the row's maximum exceeds it by at most
RESCALE_LOG2 exponents (p is then at most 2^RESCALE_LOG2), so that O is seldom touched; whether r moves is decided
once per warp. The skip test needs the true maximum, which a sparse kernel keeps beside r.

Nothing is reduced across the threads of a row until it must be: a row's maximum exceeds a bound if and only if
some thread's part does, and votes are cheaper than shuffles.
"""

from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, const_expr

from cute_sparse.device.bundles import LN_2, LOG2_E

RESCALE_LOG2 = 8.0  # FlashAttention-4's choice for 16-bit P: scaling by 2^8 costs neither bf16 nor fp16 any precision

# Stands for -inf where a row has seen no key: -inf - (-inf) would be NaN, FLOOR - FLOOR is 0.
# Scores below it do not occur: fp16 bounds them to 2^40, and in bf16 it takes |q||k| > 1e30.
FLOOR = -1.0e30


def normaliser(reference, row_sum, sink=None):
    """(what O is to be multiplied with, natural-log LSE) of a row; 0 and -inf if it has seen no key.

    reference  of p, in base-2 units; any number if the row has seen no key
    sink       a logit that is one more term of the sum, and alone the LSE of a row without keys; None: there is none
    """
    no_key = row_sum == 0.0
    if const_expr(sink is None):
        inverse = cutlass.select_(no_key, Float32(0.0), cute.arch.rcp_approx(row_sum))
        return inverse, (cute.math.log2(row_sum, fastmath=True) + reference) * LN_2
    sink_log2 = sink * LOG2_E
    common = cute.arch.fmax(reference, sink_log2, nan=True)  # no exponential below overflows
    scale = cute.math.exp2(reference - common, fastmath=True)
    total = row_sum * scale + cute.math.exp2(sink_log2 - common, fastmath=True)
    inverse = cutlass.select_(no_key, Float32(0.0), scale * cute.arch.rcp_approx(total))
    return inverse, cutlass.select_(no_key, sink, (cute.math.log2(total, fastmath=True) + common) * LN_2)


@dataclass(frozen=True)
class OnlineSoftmax:
    """The state of `rows` rows, each spread over `threads_per_row` neighbouring threads of a warp.

    minus_ref   (rows,) -r c
    row_sum     (rows,) this thread's share of the sum of p
    limit       (rows,) raw score above which r moves: r + RESCALE_LOG2 / c
    row_max     (rows,) the true running maximum, raw; None in a dense kernel
    skip_bound  (rows,) row_max + ln(lambda) in raw units: below it a tile is negligible; None in a dense kernel
    """

    scale_log2: Any
    rescale_raw: Any  # RESCALE_LOG2 / c
    rows: cutlass.Constexpr[int]
    threads_per_row: cutlass.Constexpr[int]
    minus_ref: cute.Tensor
    row_sum: cute.Tensor
    limit: cute.Tensor
    row_max: Any
    skip_bound: Any

    @staticmethod
    def create(scale_log2, rows: int, threads_per_row: int, sparse: bool) -> "OnlineSoftmax":
        minus_ref, row_sum, limit = (cute.make_rmem_tensor(rows, Float32) for _ in range(3))
        row_max, skip_bound = (cute.make_rmem_tensor(rows, Float32) if sparse else None for _ in range(2))
        rescale_raw = RESCALE_LOG2 * cute.arch.rcp_approx(scale_log2)
        return OnlineSoftmax(
            scale_log2, rescale_raw, rows, threads_per_row, minus_ref, row_sum, limit, row_max, skip_bound
        )

    def clear(self) -> None:
        """Rows that visit no tile."""
        self.minus_ref.fill(0.0)
        self.row_sum.fill(0.0)

    def begin(self, threshold_raw, in_sequence: list | None = None) -> None:
        """Rows that have seen no key: for a kernel whose first tile is as any other.

        threshold_raw, in_sequence  as in `start`; threshold_raw may be a list, one per row
        """
        for row in range(self.rows):
            self.minus_ref[row] = -(FLOOR * self.scale_log2)
            self.limit[row] = Float32(FLOOR)
            self.row_sum[row] = Float32(0.0)
            if const_expr(self.row_max is not None):
                self.row_max[row] = cutlass.select_(in_sequence[row], Float32(FLOOR), Float32.inf)
                self.skip_bound[row] = self.row_max[row] + _of_row(threshold_raw, row)

    def see(self, row: int, row_max, threshold_raw) -> None:
        """Test a row's next tile against another's maximum, too."""
        highest = cute.arch.fmax(self.row_max[row], row_max, nan=True)
        self.skip_bound[row] = highest + _of_row(threshold_raw, row)

    def seed(self, thread_max: list, threshold_raw) -> None:
        """Begin with the maxima of a tile that is visited elsewhere; before any tile that is visited here."""
        unused = cute.make_rmem_tensor(self.rows, Float32)
        self._move(self._raise_row_max(thread_max, threshold_raw), unused)

    def has_seen_key(self, row: int):
        """Whether a row's true maximum is one; only in a sparse kernel."""
        return ~(self.row_max[row] <= FLOOR)

    def thread_max(self, scores: cute.Tensor) -> list:
        """Per row, the maximum of this thread's columns of scores (rows, columns); NaN if one is NaN."""
        return [_tree_max(_row(scores, row)) for row in range(self.rows)]

    def wants(self, thread_max: list, sees_key: list | None = None):
        """Whether some row's part in this thread keeps the tile: not below its bound. NaN is not below.

        sees_key  per row, whether it sees a key of the tile, where -inf alone does not say so: a row whose bound
                  is NaN wants every tile in which it sees a key
        """
        wanted = Boolean(False)
        for row in range(self.rows):
            keeps = ~(thread_max[row] < self.skip_bound[row])
            wanted = wanted | (keeps if sees_key is None else keeps & sees_key[row])
        return wanted

    def start(self, scores: cute.Tensor, thread_max: list, threshold_raw, in_sequence: list | None = None) -> None:
        """A row's first tile: its maximum is the reference, `scores` become p.

        threshold_raw  ln(lambda) in raw units
        in_sequence    per row, whether it exists: one that does not never keeps a tile
        """
        for row in range(self.rows):
            row_max = cute.arch.fmax(self._row_max(thread_max[row]), FLOOR, nan=True)
            self.minus_ref[row] = -(row_max * self.scale_log2)
            self.limit[row] = row_max + self.rescale_raw
            if const_expr(self.row_max is not None):
                self.row_max[row] = cutlass.select_(in_sequence[row], row_max, Float32.inf)
                self.skip_bound[row] = self.row_max[row] + threshold_raw
            self.row_sum[row] = self._exponentiate(scores, row, None)

    @cute.jit
    def advance(self, scores: cute.Tensor, thread_max: list, threshold_raw):
        """A row's next tile: `scores` become p.

        Returns whether this warp moved a reference, and the (rows,) factors that O is then to be multiplied with.
        """
        moved = Boolean(False)
        factors = cute.make_rmem_tensor(self.rows, Float32)
        factors.fill(1.0)
        if const_expr(self.row_max is None):
            moved = self._any_above(self.limit, thread_max)
            if moved:
                self._move([self._row_max(value) for value in thread_max], factors)
        else:
            if self._any_above(self.row_max, thread_max):
                row_max = self._raise_row_max(thread_max, threshold_raw)
                moved = self._any_above(self.limit, thread_max)
                if moved:
                    self._move(row_max, factors)
        for row in cutlass.range_constexpr(self.rows):
            self.row_sum[row] = self._exponentiate(scores, row, self.row_sum[row])
        return moved, factors

    def finish(self, sink=None):
        """Per row, what O is to be multiplied with, and the natural-log LSE: `normaliser` of all rows."""
        inverses, lse = [], []
        for row in range(self.rows):
            row_sum = cute.arch.warp_reduction_sum(self.row_sum[row], threads_in_group=self.threads_per_row)
            of_row = normaliser(-self.minus_ref[row], row_sum, sink)
            inverses.append(of_row[0])
            lse.append(of_row[1])
        return inverses, lse

    def totals(self):
        """Per row, the reference in base-2 units, -inf for a row that has seen no key, and the sum of p."""
        references, sums = [], []
        for row in range(self.rows):
            row_sum = cute.arch.warp_reduction_sum(self.row_sum[row], threads_in_group=self.threads_per_row)
            references.append(cutlass.select_(row_sum == 0.0, -Float32.inf, -self.minus_ref[row]))
            sums.append(row_sum)
        return references, sums

    def _row_max(self, thread_max):
        """A row's maximum from its threads' parts; NaN if one is NaN."""
        offset = self.threads_per_row // 2
        while offset:
            other = cute.arch.shuffle_sync_bfly(thread_max, offset=offset)
            thread_max = cute.arch.fmax(thread_max, other, nan=True)
            offset //= 2
        return thread_max

    def _any_above(self, bounds: cute.Tensor, thread_max: list):
        """Whether in this warp some row exceeds its bound, or is NaN."""
        above = Boolean(False)
        for row in range(self.rows):
            above = above | ~(thread_max[row] <= bounds[row])
        return cute.arch.vote_any_sync(above)

    def _raise_row_max(self, thread_max: list, threshold_raw) -> list:
        """Fold a tile into the true maxima and the bounds that follow them; returns the new maxima."""
        for row in range(self.rows):
            self.row_max[row] = cute.arch.fmax(self.row_max[row], self._row_max(thread_max[row]), nan=True)
            self.skip_bound[row] = self.row_max[row] + _of_row(threshold_raw, row)
        return [self.row_max[row] for row in range(self.rows)]

    def _move(self, row_max: list, factors: cute.Tensor) -> None:
        """Refer to the given maxima where they are new ones."""
        for row in range(self.rows):
            new_ref = cute.arch.fmax(row_max[row] * self.scale_log2, -self.minus_ref[row])
            factors[row] = cute.math.exp2(-self.minus_ref[row] - new_ref, fastmath=True)
            self.row_sum[row] = self.row_sum[row] * factors[row]
            self.minus_ref[row] = -new_ref
            self.limit[row] = cute.arch.fmax(self.limit[row], row_max[row] + self.rescale_raw)

    def _exponentiate(self, scores: cute.Tensor, row: int, row_sum):
        """Turn one row of scores into p; returns row_sum + their sum."""
        values = _row(scores, row)
        for i, value in enumerate(values):
            exponent = cute.math.fma(value, self.scale_log2, self.minus_ref[row])
            values[i] = cute.math.exp2(exponent, fastmath=True)
            scores[row, i] = values[i]
        return _sum(values, row_sum)


def _of_row(threshold_raw, row: int):
    """A row's own threshold, where rows differ in it."""
    return threshold_raw[row] if isinstance(threshold_raw, list) else threshold_raw


def _row(scores: cute.Tensor, row: int) -> list:
    return [scores[row, i] for i in range(cute.size(scores, mode=[1]))]


def _tree_max(values: list):
    """The maximum of a list; NaN if one is NaN. A tree, so that few operations wait for each other."""
    while len(values) > 1:
        odd = values[-1:] if len(values) % 2 else []
        pairs = zip(values[0::2], values[1::2], strict=False)
        values = [cute.arch.fmax(a, b, nan=True) for a, b in pairs] + odd
    return values[0]


def _sum(values: list, initial):
    """The sum of a list and of `initial` (None: 0), in two chains."""
    even, odd = values[0] if initial is None else initial + values[0], values[1]
    for i in range(2, len(values), 2):
        even, odd = even + values[i], odd + values[i + 1]
    return even + odd
