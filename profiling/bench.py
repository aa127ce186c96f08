"""Attention timed beside its peers: python -m profiling.bench prefill [--case NAMES] [--peers cudnn,flash,fa4,..]
[--sparsity 0,0.5,0.75,0.9] [--out DIR], or python -m profiling.bench decode [--peers copy,flash,fa4,flashinfer] ..

Protocol
* Every provider gets the same tensors. Without --sparsity they are standard normal and every tile is computed. With
  it, queries and keys have sinks, rotary locality and far needles (cute_sparse/workloads.py), and for each share a
  threshold is searched, lambda at most 1, with which our kernel skips it; the share achieved is reported, and peers
  run dense (FlexAttention also with a block mask of the kept tiles). Never zeros: they run faster.
* Before a provider is timed its result is compared, in sampled rows of sampled heads, with attention in float32 over
  the same tiles; its relative L2 error must be at most ERROR_FACTOR times that of PyTorch rounding weights and result
  to the dtype. A provider that fails is not timed; one whose result is wrong after it was timed has no time. What a
  call does not write is NaN, and not what an earlier one left there.
* Warm-up, then rounds in which each provider runs once, another one first each time, L2 flushed before each run,
  by reading. Times are CUDA events around one call; the 20th, 50th and 80th percentile of a row are over the rounds.
* Clocks, power and temperature are read while the first provider, ours if it passed, runs back to back, and written
  as rows; nothing sets them.
* TFLOP/s count 2 * (head_dim + head_dim_v) operations for each query and visible key, a causal mask as half of all.
  With tiles skipped, too: it is the work asked for, not the work done. Of decode, TB/s count the bytes of K and V of
  all sequences once (profiling/decode.py), and "copy" is the roof: a device-to-device copy of half as many bytes.
* Rows (profiling/rows.py) are appended to DIR/prefill.jsonl or DIR/decode.jsonl as they come, DIR by default
  profiling/results/<gpu>.

Exit status: 0; 1 if a case or a provider failed (the others ran); 2 for a request that cannot be run.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import itertools
import math
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

import cute_sparse
from cute_sparse.compiled import compiler_version
from cute_sparse.reference import KEPT
from cute_sparse.targets import ARCH_OF_CAPABILITY
from cute_sparse.workloads import structured_qkv
from profiling import decode, rows, timing
from profiling.peers import PEERS, Call, KeptTiles, Missing, Shape, forget_compiled, in_flex_blocks

ROOT = Path(__file__).resolve().parent.parent
OURS = "cute_sparse"
DTYPE = torch.bfloat16

GROUPED, DIT = dict(batch=2, heads_q=64, heads_kv=8), dict(batch=1, heads_q=40, heads_kv=40)


def _tables() -> dict[str, Shape]:
    """The shapes that other people publish for H200 in BF16. Theirs of "17k" and "75k" are rounded: ours are 17 * 1024
    and 75 * 1024. Of the window only head dim 64 and 128 keys are published; batch, heads and length are ours."""
    found = {}
    for seqlen in (2048, 4096, 8192, 16384, 32768):
        for causal in (True, False):
            name = f"d128-{seqlen // 1024}k-{'causal' if causal else 'full'}"
            found[name] = Shape(**GROUPED, seqlen=seqlen, head_dim=128, head_dim_v=128, causal=causal)
    for causal in (True, False):
        name = f"d192-128-8k-{'causal' if causal else 'full'}"
        found[name] = Shape(2, 8192, 128, 128, 192, 128, causal)
    found["d256-16k-causal"] = Shape(1, 16384, 32, 2, 256, 256, True)
    for seqlen in (17 * 1024, 75 * 1024):
        found[f"dit-{seqlen // 1024}k-full"] = Shape(**DIT, seqlen=seqlen, head_dim=128, head_dim_v=128, causal=False)
    found["d64-8k-window128"] = Shape(**GROUPED, seqlen=8192, head_dim=64, head_dim_v=64, causal=True, window_left=127)
    return found


TABLES = _tables()
LONG = {"d128-64k-causal": Shape(1, 65536, 32, 8, 128, 128, True)}
SMALL = {
    f"small-d{d}": Shape(1, 2048, 4, 1, d, dv, True) for d, dv in ((64, 64), (128, 128), (192, 128), (256, 256))
}  # for profilers and checkers of memory, not to be timed
CASES = TABLES | LONG | SMALL

# ---- The work, and whether a result is right -----------------------------------------------------------------------


def flops(shape: Shape) -> int:
    pairs = shape.seqlen**2
    if shape.window_left is not None:
        inside = min(shape.window_left + 1, shape.seqlen)
        pairs = inside * (inside + 1) // 2 + (shape.seqlen - inside) * inside
    elif shape.causal:
        pairs //= 2
    return 2 * (shape.head_dim + shape.head_dim_v) * shape.batch * shape.heads_q * pairs


ERROR_FACTOR = 2.0
SAMPLE_ROWS, SAMPLE_HEADS = 128, 8


def sampled_error(
    shape: Shape, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, kept: KeptTiles | None
) -> tuple[float, float]:
    """Relative L2 error of `out` over sampled rows against float32, and that of PyTorch rounding to out's dtype.

    First, middle and last SAMPLE_ROWS rows, of the first and the last sequence, of SAMPLE_HEADS query heads spread over
    all.
    """
    batches = sorted({0, shape.batch - 1})
    heads = sorted({round(i * (shape.heads_q - 1) / (SAMPLE_HEADS - 1)) for i in range(SAMPLE_HEADS)})
    last = max(0, shape.seqlen - SAMPLE_ROWS)
    wrong = rounded_wrong = size = 0.0
    for batch, head in itertools.product(batches, heads):
        kv_head = head * shape.heads_kv // shape.heads_q
        keys, values = k[batch, :, kv_head].float(), v[batch, :, kv_head].float()
        for first in sorted({0, last // 2, last}):
            q_idx = torch.arange(first, min(first + SAMPLE_ROWS, shape.seqlen), device=q.device)
            scores = q[batch, q_idx, head].float() @ keys.T / math.sqrt(shape.head_dim)
            scores.masked_fill_(~_visible(shape, q_idx, kept, batch, head), -math.inf)
            weights = torch.exp(scores - scores.amax(-1, keepdim=True))
            total = weights.sum(-1, keepdim=True)
            exact = weights @ values / total
            rounded = (weights.to(out.dtype).float() @ values / total).to(out.dtype).float()
            wrong += (out[batch, q_idx, head].float() - exact).square().sum().item()
            rounded_wrong += (rounded - exact).square().sum().item()
            size += exact.square().sum().item()
    return math.sqrt(wrong / size), math.sqrt(rounded_wrong / size)


def _visible(shape: Shape, q_idx: torch.Tensor, kept: KeptTiles | None, batch: int, head: int) -> torch.Tensor:
    kv_idx = torch.arange(shape.seqlen, device=q_idx.device)
    visible = torch.ones(len(q_idx), shape.seqlen, dtype=torch.bool, device=q_idx.device)
    if shape.causal:
        visible &= kv_idx <= q_idx[:, None]
    if shape.window_left is not None:
        visible &= kv_idx >= q_idx[:, None] - shape.window_left
    if kept is not None:
        visible &= kept.keep[batch, head][q_idx // kept.rows][:, kv_idx // kept.keys]
    return visible


class Wrong(RuntimeError):
    """A provider's result is not attention; or it is not finite."""


def checked_error(expected: tuple[int, ...], out: torch.Tensor, errors: Callable[[], tuple[float, float]]) -> float:
    """The error, of `errors`: (error, that of rounding). Raises Wrong where it is above what rounding explains."""
    if out.shape != expected:
        raise Wrong(f"the result has shape {tuple(out.shape)}, not {expected}")
    if not out.isfinite().all():
        raise Wrong("the result is not finite")
    error, rounded = errors()
    if not error <= ERROR_FACTOR * rounded:
        raise Wrong(f"relative error {error:.2e}, where rounding alone makes {rounded:.2e}")
    return error


# ---- Thresholds ----------------------------------------------------------------------------------------------------

LAMBDA_MIN = 1e-30  # skips only what no row of a group sees
SPARSITY_TOLERANCE = 0.01
SEARCH_RESOLUTION = 0.01  # of ln(lambda)


class Unreachable(ValueError):
    """No threshold up to 1 skips the share of tiles that was wished."""


def search_threshold(sparsity: Callable[[float], float], target: float) -> tuple[float, float]:
    """(lambda in (0, 1], the sparsity it gives), within SPARSITY_TOLERANCE of the target; target 0 is LAMBDA_MIN.

    `sparsity` rises with lambda; bisection on its logarithm. Raises Unreachable.
    """
    low, high = math.log(LAMBDA_MIN), 0.0
    least = sparsity(LAMBDA_MIN)
    if target == 0 or abs(least - target) <= SPARSITY_TOLERANCE:
        return LAMBDA_MIN, least
    most = sparsity(1.0)
    if not least < target <= most + SPARSITY_TOLERANCE:
        raise Unreachable(f"a sparsity of {target} is out of reach: lambda up to 1 gives {least:.3f} to {most:.3f}")
    best = (1.0, most)
    while high - low > SEARCH_RESOLUTION and abs(best[1] - target) > SPARSITY_TOLERANCE / 4:
        middle = (low + high) / 2
        found = sparsity(math.exp(middle))
        if abs(found - target) < abs(best[1] - target):
            best = (math.exp(middle), found)
        low, high = (middle, high) if found < target else (low, middle)
    if abs(best[1] - target) > SPARSITY_TOLERANCE:
        raise Unreachable(f"no threshold gives a sparsity of {target}; the nearest, {best[0]:.3g}, gives {best[1]:.3f}")
    return best


def skipped_share(stats: cute_sparse.Stats) -> float:
    kept, visited = stats.tile_counts.sum((1, 2)).tolist()
    return 1 - kept / visited if visited else 0.0


# ---- Running a case ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Provider:
    """name and mode as in a row; extra: further rows (metric -> value), known without timing."""

    name: str
    mode: str
    call: Call
    kept: KeptTiles | None = None
    extra: tuple[tuple[str, float], ...] = ()

    @property
    def label(self) -> str:
        return f"{self.name}, {self.mode}"


def random_qkv(shape: Shape, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    heads_dims = ((shape.heads_q, shape.head_dim), (shape.heads_kv, shape.head_dim), (shape.heads_kv, shape.head_dim_v))
    return tuple(
        torch.randn(shape.batch, shape.seqlen, *size, generator=generator, device=device, dtype=DTYPE)
        for size in heads_dims
    )


def ours(shape: Shape, q, k, v) -> Call:
    window = (None, None) if shape.window_left is None else (shape.window_left, None)
    return lambda **more: cute_sparse.attention(q, k, v, causal=shape.causal, window_size=window, **more)


class Bench:
    """What all cases of one run share. `failures` and `missing` are lines for the user."""

    op = "prefill"

    def __init__(
        self, writer: rows.Writer, origin: rows.Origin, timer: timing.Timer, device: str, peers: Iterable[str]
    ) -> None:
        self.writer, self.origin, self.timer, self.device, self.peers = writer, origin, timer, device, tuple(peers)
        self.failures: list[str] = []
        self.missing: list[str] = []

    def run(self, name: str, shape: Shape, sparsities: tuple[float, ...] | None, tick: Call = lambda: None) -> None:
        """Measures a case and writes its rows. What fails is noted, and the rest goes on."""
        try:
            providers, qkv = self._providers(name, shape, sparsities)
            providers = [provider for provider in providers if self._check(name, shape, qkv, provider)]
            if providers:
                self._measure(name, shape, qkv, providers, tick)
        except Exception as error:
            self._failed(name, error)

    def _failed(self, what: str, error: Exception) -> None:
        traceback.print_exception(error)
        self.failures.append(f"{what}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")

    def _inputs(self, shape: Shape, structured: bool) -> tuple[torch.Tensor, ...]:
        if not structured:
            return random_qkv(shape, self.device)
        return structured_qkv(
            shape.batch, shape.seqlen, shape.heads_q, shape.heads_kv, shape.head_dim,
            head_dim_v=shape.head_dim_v, dtype=DTYPE, device=self.device,
        )  # fmt: skip

    def _ours(self, shape: Shape, qkv) -> Call:
        return ours(shape, *qkv)

    def _providers(self, name: str, shape: Shape, sparsities: tuple[float, ...] | None):
        qkv = self._inputs(shape, structured=sparsities is not None)
        attention = self._ours(shape, qkv)
        dense = "dense" if sparsities is None else "structured, dense"
        providers = [Provider(OURS, dense, attention)]
        providers += self._peer(name, shape, qkv, dense, None, self.peers)
        for target in sparsities or ():
            try:
                providers += self._sparse(name, shape, qkv, attention, target)
            except Exception as error:
                self._failed(f"{name}, sparsity {target:g}", error)
        return providers, qkv

    kept_tiles = KeptTiles  # keep (a bool map of tiles), rows and keys of a tile

    def _skipping(self, attention: Call, target: float) -> Provider:
        """Ours with a threshold that skips this share of the tiles."""

        def sparsity(threshold: float) -> float:
            return skipped_share(attention(threshold=threshold, return_stats=True).stats)

        threshold, achieved = search_threshold(sparsity, target)
        stats = attention(threshold=threshold, return_stats=True).stats
        kept = self.kept_tiles(stats.skip_map == KEPT, stats.geometry.tile_rows, stats.geometry.tile_n)
        extra = (("sparsity", achieved), ("threshold", threshold))
        return Provider(OURS, f"sparsity {target:g}", lambda: attention(threshold=threshold), kept, extra)

    def _sparse(self, name: str, shape: Shape, qkv, attention: Call, target: float) -> list[Provider]:
        mine = self._skipping(attention, target)
        if "flex" not in self.peers:
            return [mine]
        try:
            blocks = in_flex_blocks(mine.kept, shape.seqlen)
        except Missing as reason:
            self.missing.append(f"{name}, {mine.mode}: flex: {reason}")
            return [mine]
        return [mine, *self._peer(name, shape, qkv, mine.mode, blocks, ["flex"])]

    def _peer(self, name, shape, qkv, mode, kept, names) -> list[Provider]:
        found = []
        for peer in names:
            try:
                found.append(Provider(peer, mode, self._peer_s_call(peer, shape, qkv, kept), kept))
            except Missing as reason:
                self.missing.append(f"{name}, {mode}: {peer}: {reason}")
        return found

    def _peer_s_call(self, peer: str, shape: Shape, qkv, kept: KeptTiles | None) -> Call:
        return PEERS[peer](shape, *qkv, kept)

    def _sampled_error(self, shape: Shape, qkv, out: torch.Tensor, kept) -> tuple[float, float]:
        return sampled_error(shape, *qkv, out, kept)

    def _out_shape(self, shape: Shape) -> tuple[int, ...]:
        return (shape.batch, shape.seqlen, shape.heads_q, shape.head_dim_v)

    def _check(self, name: str, shape: Shape, qkv, provider: Provider) -> bool:
        """Whether the provider's result is right; its errors become rows. A copy has nothing to check."""
        if provider.name == decode.COPY:
            return True
        try:
            with timing.phase(f"check {provider.label}"):
                out, error = self._checked(shape, qkv, provider)
                self._write(name, provider, "error", timing.once(error))
                if provider.kept is not None:
                    error_dense, _ = self._sampled_error(shape, qkv, out, None)
                    self._write(name, provider, "error_dense", timing.once(error_dense))
        except Missing as reason:
            self.missing.append(f"{name}, {provider.mode}: {provider.name}: {reason}")
            return False
        except Exception as error:
            self._failed(f"{name}, {provider.label}", error)
            return False
        for metric, value in provider.extra:
            self._write(name, provider, metric, timing.once(value))
        return True

    def _checked(self, shape: Shape, qkv, provider: Provider) -> tuple[torch.Tensor, float]:
        """A call's result and its error. Raises Wrong."""
        # The memory that the call is given next: an earlier result there would pass for what it leaves out.
        torch.full(self._out_shape(shape), math.nan, dtype=DTYPE, device=self.device)
        out = provider.call()
        return out, checked_error(
            self._out_shape(shape), out, lambda: self._sampled_error(shape, qkv, out, provider.kept)
        )

    def _still_right(self, name: str, shape: Shape, qkv, provider: Provider) -> bool:
        """Whether the result is right behind many runs, too: one may leave something that spoils the next."""
        if provider.name == decode.COPY:
            return True
        try:
            self._checked(shape, qkv, provider)
            return True
        except Exception as error:
            self._failed(f"{name}, {provider.label}, after timing", error)
            return False

    def _measure(self, name: str, shape: Shape, qkv, providers: list[Provider], tick: Call) -> None:
        if timing.profiled():
            for provider in providers:
                with timing.captured(f"{name}, {provider.label}"):
                    provider.call()
            return
        calls = {provider.label: provider.call for provider in providers}
        with timing.phase(f"time {name}"):
            times = timing.interleaved(calls, self.timer, tick)
        for provider in providers:
            if not self._still_right(name, shape, qkv, provider):
                continue
            found = timing.quantiles(times[provider.label])
            self._write(name, provider, "time", found)
            self._write(name, provider, *self._rate(shape, found))
        first = providers[0]
        with timing.phase(f"state {name}"):
            state = timing.state_under_load(first.call, timing.quantiles(times[first.label]).p50)
        gpu = Provider("gpu", first.mode, first.call)
        for metric, value in state.items():
            self._write(name, gpu, metric, timing.once(value))

    def _rate(self, shape: Shape, times: timing.Quantiles) -> tuple[str, timing.Quantiles]:
        """The metric of the work per time, and its quantiles from those of the time in ms."""
        return "rate", timing.Quantiles(*(flops(shape) / (ms * 1e9) for ms in reversed(times)))

    def _write(self, case: str, provider: Provider, metric: str, found: timing.Quantiles) -> None:
        self.writer.write(rows.row(self.origin, self.op, provider.name, case, provider.mode, metric, found))


class DecodeBench(Bench):
    """The same for decode: shapes are `decode.DecodeShape`, inputs `decode.DecodeInputs`."""

    op = "decode"
    kept_tiles = decode.KeptDecodeTiles

    def _inputs(self, shape: decode.DecodeShape, structured: bool) -> decode.DecodeInputs:
        make = decode.structured_inputs if structured else decode.random_inputs
        return make(shape, DTYPE, self.device)

    def _ours(self, shape: decode.DecodeShape, inputs: decode.DecodeInputs) -> Call:
        return decode.ours(inputs)

    def _sparse(self, name, shape, inputs, attention: Call, target: float) -> list[Provider]:
        return [self._skipping(attention, target)]

    def _peer_s_call(self, peer: str, shape: decode.DecodeShape, inputs: decode.DecodeInputs, kept) -> Call:
        return decode.PEERS[peer](shape, inputs)

    def _sampled_error(self, shape, inputs, out: torch.Tensor, kept) -> tuple[float, float]:
        return decode.sampled_error(shape, inputs, out, kept)

    def _out_shape(self, shape: decode.DecodeShape) -> tuple[int, ...]:
        return (shape.batch, shape.seqlen_q, shape.heads_q, shape.head_dim_v)

    def _rate(self, shape: decode.DecodeShape, times: timing.Quantiles) -> tuple[str, timing.Quantiles]:
        return "bandwidth", timing.Quantiles(*(shape.kv_bytes / (ms * 1e9) for ms in reversed(times)))


BENCHES = {"prefill": Bench, "decode": DecodeBench}


# ---- Where and what ------------------------------------------------------------------------------------------------

COMMIT_VARIABLE = "CUTE_SPARSE_COMMIT"


def find_commit() -> str:
    """The commit, with a "+" where the sources differ from it; without git a digest of the sources."""
    given = os.environ.get(COMMIT_VARIABLE)
    if given:
        return given
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        changed = _git("status", "--porcelain", "--", "cute_sparse", "kernels")
        return head + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return f"sources-{source_digest()[:12]}"


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True, timeout=20)
    return done.stdout.strip()


def source_digest() -> str:
    """SHA-256 of everything that the kernels' results depend on."""
    digest = hashlib.sha256()
    for folder in ("cute_sparse", "kernels"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".cpp", ".h"):
                digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def find_origin(gpu: str) -> rows.Origin:
    driver = timing.smi("driver_version")
    return rows.Origin(
        gpu=gpu,
        driver=driver[0] if driver else "unknown",
        torch=torch.__version__,
        cutlass_dsl=_dsl_version(),
        commit=find_commit(),
        time=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    )


def _dsl_version() -> str:
    try:
        return compiler_version()
    except ImportError:
        return "missing"


def gpu_name() -> str:
    """Of the GPU that will be measured. Raises RuntimeError where there is none that a kernel runs on."""
    if not torch.cuda.is_available():
        raise RuntimeError("this measures on a GPU, and there is no CUDA device here")
    capability = torch.cuda.get_device_capability()
    if capability not in ARCH_OF_CAPABILITY:
        supported = ", ".join(f"{major}.{minor}" for major, minor in ARCH_OF_CAPABILITY)
        raise RuntimeError(
            f"{torch.cuda.get_device_name()} has compute capability {capability[0]}.{capability[1]}; "
            f"there are kernels for {supported}"
        )
    return torch.cuda.get_device_name()


def progress(jobs: list, shown: bool) -> tuple[Iterable, Callable[[str], None]]:
    """The jobs behind tqdm's bar where it is installed, and what sets the bar's text."""
    try:
        from tqdm import tqdm
    except ImportError:
        return jobs, lambda text: print(text, file=sys.stderr, flush=True)
    bar = tqdm(jobs, disable=not shown, unit="case", file=sys.stderr)
    return bar, lambda text: bar.set_postfix_str(text)


# ---- The command ---------------------------------------------------------------------------------------------------


PEERS_OF = {"prefill": tuple(PEERS), "decode": tuple(decode.PEERS)}
CASES_OF = {"prefill": CASES, "decode": decode.CASES}
TABLES_OF = {"prefill": TABLES, "decode": decode.TABLES}
LONG_OF = {"prefill": LONG, "decode": decode.LONG}


def list_of_names(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.split(",") if name)


def list_of_sparsities(text: str) -> tuple[float, ...]:
    try:
        values = tuple(float(value) for value in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers like 0,0.5,0.75") from None
    if not all(0 <= value < 1 for value in values):
        raise argparse.ArgumentTypeError(f"{text!r}: a sparsity lies in [0, 1)")
    return values


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m profiling.bench", description=__doc__.split("\n\n")[0])
    parser.add_argument("op", choices=tuple(BENCHES))
    parser.add_argument("--case", type=list_of_names,
                        help="cases by name; default: the tables, or with --sparsity the long ones")  # fmt: skip
    known = "; ".join(f"{op}: {','.join(names)}" for op, names in PEERS_OF.items())
    parser.add_argument("--peers", type=list_of_names, help=f"'' for none; default: all ({known})")
    parser.add_argument("--sparsity", type=list_of_sparsities, help="shares of tiles to skip, on structured input")
    parser.add_argument("--out", type=Path, help="folder of the rows; default: profiling/results/<gpu>")
    options = parser.parse_args(arguments)
    peers, cases = PEERS_OF[options.op], CASES_OF[options.op]
    options.peers = peers if options.peers is None else options.peers
    unknown = [name for name in options.peers if name not in peers]
    if unknown:
        parser.error(f"unknown peer {', '.join(unknown)}; there are {', '.join(peers)}")
    unknown = [name for name in options.case or () if name not in cases]
    if unknown or options.case == ():
        parser.error(f"unknown case {', '.join(unknown)!r}; there are {', '.join(cases)}")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.case is not None:
        cases = {name: CASES_OF[options.op][name] for name in options.case}
    else:
        cases = (LONG_OF if options.sparsity is not None else TABLES_OF)[options.op]
    try:
        gpu = gpu_name()
        folder = options.out or rows.RESULTS / rows.folder_name(gpu)
        writer = rows.Writer(folder / f"{options.op}.jsonl")
    except (RuntimeError, OSError, rows.BadRow) as error:
        print(f"bench.py: {error}", file=sys.stderr)
        return 2
    torch.backends.cuda.matmul.allow_tf32 = False  # the check is against float32
    bench = BENCHES[options.op](writer, find_origin(gpu), timing.EventTimer(), "cuda", options.peers)
    jobs, show = progress(list(cases.items()), shown=sys.stderr.isatty())
    for name, shape in jobs:
        show(name)
        bench.run(name, shape, options.sparsity)
        forget_compiled()
        torch.cuda.empty_cache()
    for line in bench.missing:
        print(f"missing: {line}")
    for line in bench.failures:
        print(f"FAILED: {line}")
    print(f"rows: {writer.path}")
    return 1 if bench.failures else 0


if __name__ == "__main__":
    sys.exit(main())
