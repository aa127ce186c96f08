"""Rows of measurements as tables and plots: python -m profiling.report [FOLDER...]

Reads prefill.jsonl, decode.jsonl and host.jsonl of each folder (default: every one in profiling/results), as far as
they are there, writes README.md beside them with the tables and, where matplotlib is installed, plots as PNG and SVG:
prefill's rate against length, decode's bandwidth against bytes, speed-up against sparsity, roofline. All of it also
goes into this project's README.md, between the lines MARK_BEGIN and MARK_END where it has them. Of measurements of the
same thing the latest counts.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from profiling import decode, rows
from profiling.bench import CASES, OURS, flops
from profiling.peers import PEERS, Shape
from profiling.rows import Row

README = Path(__file__).resolve().parent.parent / "README.md"
MARK_BEGIN, MARK_END = "<!-- measured: begin -->", "<!-- measured: end -->"
CEILING = 2.0  # Q K^T always runs, and K is always read: half of the work cannot be skipped
OPS = {"prefill": CASES, "decode": decode.CASES, "host": {}}  # each in a file of its own; the cases in their order
PEERS_OF = {"prefill": tuple(PEERS), "decode": tuple(decode.PEERS), "host": ()}
# Copy (read + write) in TB/s and BF16 matrix product (8192^3, random data) in TFLOP/s, as measured with PyTorch.
ROOFS = {"NVIDIA H200": (4.3, 790.0)}



class Measured:
    """The latest row of each (case, mode, provider, metric) of one operation on one GPU."""

    def __init__(self, all_rows: Iterable[Row], op: str = "prefill") -> None:
        self.op, self.known_cases, self.peers = op, OPS[op], PEERS_OF[op]
        self.latest: dict[tuple[str, str, str, str], Row] = {}
        self.times: dict[tuple[str, str, str], dict[str, float]] = {}  # ms by the run, the earliest first
        for row in sorted(all_rows, key=lambda row: row.time):
            self.latest[row.case, row.mode, row.provider, row.metric] = row
            if row.metric == "time":
                self.times.setdefault((row.case, row.mode, row.provider), {})[row.time] = row.p50
        if not self.latest:
            raise ValueError("there are no rows to report")
        ops = sorted({row.op for row in self.latest.values()})
        if ops != [op]:
            raise ValueError(f"rows of {', '.join(ops)} where those of {op} are expected")
        gpus = sorted({row.gpu for row in self.latest.values()})
        if len(gpus) > 1:
            raise ValueError(f"rows of several GPUs in one folder: {', '.join(gpus)}")
        self.gpu = gpus[0]

    def value(self, case: str, mode: str, provider: str, metric: str) -> float | None:
        row = self.latest.get((case, mode, provider, metric))
        return None if row is None else row.p50

    def speed_up(self, case: str, over: tuple[str, str], of: tuple[str, str]) -> float | None:
        """How many times as fast `of` is as `over`, each (mode, provider), in the latest run that timed both."""
        slow, fast = (self.times.get((case, *which), {}) for which in (over, of))
        runs = [run for run in fast if run in slow]
        return slow[runs[-1]] / fast[runs[-1]] if runs else None

    def providers(self, mode: str) -> list[str]:
        present = {provider for _, row_mode, provider, metric in self.latest if row_mode == mode and metric == "time"}
        return [name for name in (OURS, *self.peers) if name in present]

    def cases(self, mode: str) -> list[str]:
        """In the order of the benchmark; cases it no longer has, last."""
        present = {case for case, row_mode, _, metric in self.latest if row_mode == mode and metric == "time"}
        return [name for name in self.known_cases if name in present] + sorted(present - set(self.known_cases))

    def sparse_modes(self, case: str) -> list[str]:
        modes = {m for c, m, p, metric in self.latest if c == case and m.startswith("sparsity ") and p == OURS}
        return sorted(modes, key=lambda mode: float(mode.split()[1]))

    def sources(self) -> str:
        """With what and when, in a sentence."""
        timed = [row for row in self.latest.values() if row.metric in ("time", "host_time")]
        parts = []
        for name, label in (("driver", "driver"), ("torch", "PyTorch"), ("cutlass_dsl", "CuTe-DSL"),
                            ("commit", "commit")):  # fmt: skip
            values = sorted({getattr(row, name) for row in timed})
            parts.append(f"{label} {', '.join(values)}")
        days = sorted({row.time[:10] for row in timed})
        if days:
            parts.append(days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}")
        return "; ".join(parts)


# ---- Tables --------------------------------------------------------------------------------------------------------


def table(head: list[str], lines: list[list[str]]) -> str:
    ruler = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ruler, *lines])


def number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def dense_table(measured: Measured) -> str:
    """TFLOP/s, or TB/s of decode: the best of a line in bold (a copy is a roof, no rival), how many times as fast ours
    is as the fastest peer of one run, or as the copy, and clock and power."""
    metric, form = ("bandwidth", ".2f") if measured.op == "decode" else ("rate", ".0f")
    names = measured.providers("dense")
    lines = []
    for case in measured.cases("dense"):
        rates = {name: measured.value(case, "dense", name, metric) for name in names}
        best = max((rate for name, rate in rates.items() if rate is not None and name != decode.COPY), default=None)
        cells = [f"**{rate:{form}}**" if rate is not None and rate == best and name != decode.COPY else
                 number(rate, form) for name, rate in rates.items()]  # fmt: skip
        other = decode.COPY if measured.op == "decode" else fastest_peer(measured, case, "dense")
        ratio = number(measured.speed_up(case, ("dense", other), ("dense", OURS)), ".2f")
        state = [number(measured.value(case, "dense", "gpu", name), ".0f") for name in ("sm_clock", "power")]
        time = number(measured.value(case, "dense", OURS, "time"), ".3f")
        lines.append([case, *cells, ratio, time, *state])
    compared = "of the copy" if measured.op == "decode" else "of the best peer"
    return table([rows.UNITS[metric], *names, compared, f"{OURS}, ms", "SM clock, MHz", "power, W"], lines)


STRUCTURED = "structured, dense"
FLEX = "flex"  # the peer that is also timed on the tiles that our kernel keeps


def sparsity_table(measured: Measured, case: str) -> str:
    """Times and speed-ups, each in one run: over our own dense kernel, over the fastest dense peer, and over
    FlexAttention with a block mask of the same tiles."""
    peer = fastest_peer(measured, case)
    modes = measured.sparse_modes(case)
    flex = any(measured.value(case, mode, FLEX, "time") for mode in modes)
    head = ["wished", "skipped", "lambda", "ms", "of our dense", f"of {peer}" if peer else "of a peer"]
    head += ["of flex, same tiles"] * flex + ["error, same tiles", "error, all tiles"]
    lines = []
    for mode in (STRUCTURED, *modes):
        def read(metric: str, mode: str = mode) -> float | None:
            return measured.value(case, mode, OURS, metric)

        ours = (mode, OURS)
        others = [(STRUCTURED, OURS), (STRUCTURED, peer), *[(mode, FLEX)] * flex]
        lines.append([
            "dense" if mode == STRUCTURED else mode.split()[1],
            "0%" if mode == STRUCTURED else number(read("sparsity"), ".1%"),
            number(read("threshold"), ".2g"), number(read("time"), ".3f"),
            *(number(measured.speed_up(case, other, ours), ".2f") for other in others),
            number(read("error"), ".1e"), number(read("error" if mode == STRUCTURED else "error_dense"), ".1e"),
        ])  # fmt: skip
    return table(head, lines)


def fastest_peer(measured: Measured, case: str, mode: str = STRUCTURED) -> str | None:
    """That computes every tile; a copy computes none."""
    speeds = {name: measured.speed_up(case, (mode, OURS), (mode, name)) for name in measured.peers
              if name != decode.COPY}  # fmt: skip
    return max((name for name, speed in speeds.items() if speed is not None), key=speeds.get, default=None)


def host_table(measured: Measured) -> str:
    """What a call costs the host, by mode; of a warm call the median and, in brackets, the 80th percentile."""
    lines = []
    for case, mode in dict.fromkeys((case, mode) for case, mode, _, _ in measured.latest):
        def read(metric: str, case: str = case, mode: str = mode) -> float | None:
            return measured.value(case, mode, OURS, metric)

        warm = measured.latest.get((case, mode, OURS, "host_time"))
        first = read("first_call")
        lines.append([
            f"{case}, {mode}", number(read("import"), ".2f"), number(first and first * 1e3, ".0f"),
            f"{warm.p50:.1f} ({warm.p80:.1f})" if warm else "",
        ])  # fmt: skip
    return table(["case", "imports, s", "first call, ms", "warm call, us"], lines)


def tables(measured: Measured) -> str:
    protocol = "profiling/host.py" if measured.op == "host" else "profiling/bench.py"
    parts = [f"### {measured.gpu}, {measured.op}", f"{measured.sources()}. Medians; protocol in `{protocol}`."]
    if measured.op == "host":
        parts.append(host_table(measured))
    if measured.cases("dense"):
        parts += ["Dense, random input, BF16:", dense_table(measured)]
    for case in measured.cases(STRUCTURED):
        parts += [f"Skipping, structured input, `{case}`:", sparsity_table(measured, case)]
    return "\n\n".join(parts) + "\n"


def between_marks(text: str, content: str) -> str:
    """The text with what stands between the marks replaced. Raises ValueError where they are not there, in order."""
    begin, end = text.find(MARK_BEGIN), text.find(MARK_END)
    if begin < 0 or end < begin:
        raise ValueError(f"no line {MARK_BEGIN} with a line {MARK_END} below it")
    return f"{text[: begin + len(MARK_BEGIN)]}\n{content}{text[end:]}"


# ---- Plots ---------------------------------------------------------------------------------------------------------


def least_bytes(shape: Shape) -> int:
    """Q, K, V read once and the output written once, 16 bits each."""
    q_and_out = shape.heads_q * (shape.head_dim + shape.head_dim_v)
    k_and_v = shape.heads_kv * (shape.head_dim + shape.head_dim_v)
    return 2 * shape.batch * shape.seqlen * (q_and_out + k_and_v)


def plots(measured: Measured, folder: Path) -> list[Path]:
    """The files written; the same for the same rows. Raises ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(exist_ok=True)
    written = []
    settings = {"svg.hashsalt": "cute_sparse", "axes.grid": True, "grid.alpha": 0.3, "legend.fontsize": "small"}
    with matplotlib.rc_context(settings):
        for name, draw in DRAWINGS[measured.op].items():
            figure = pyplot.figure(figsize=(9, 4.5), layout="constrained")
            if draw(measured, figure):
                for ending, metadata in (("png", {}), ("svg", {"Date": None})):
                    written.append(folder / f"{name}.{ending}")
                    figure.savefig(written[-1], dpi=150, metadata=metadata)
            pyplot.close(figure)
    return written


NAMES = {OURS: "cute_sparse", "cudnn": "cuDNN", "flash": "PyTorch's flash", "fa4": "FlashAttention-4",
         "fa4-unpacked": "FlashAttention-4, heads apart",
         FLEX: "FlexAttention", "flashinfer": "FlashInfer", decode.COPY: "copy, the roof"}  # fmt: skip
STYLES = {OURS: dict(color="C3", marker="o", linewidth=2.5, zorder=3), "cudnn": dict(color="C2", marker="s"),
          "flash": dict(color="C4", marker="v"), "fa4": dict(color="C0", marker="D"),
          "fa4-unpacked": dict(color="C9", marker="d"),
          FLEX: dict(color="C5", marker="^"), "flashinfer": dict(color="C2", marker="s"),
          decode.COPY: dict(color="grey", marker="_", linestyle=":")}  # fmt: skip


def _panels(measured: Measured, figure, titles: tuple[str, str], of_panel, x_of, metric: str) -> list:
    """Two panels of rates over x_of(case), the cases of each those that of_panel(title, case) holds; medians, with
    bars from the 20th to the 80th percentile. Cases of one x are joined in their middle. [] without a point."""
    axes = figure.subplots(1, 2, sharey=True)
    drawn: dict[str, object] = {}
    for title, one in zip(titles, axes, strict=True):
        one.set_title(title)
        ticks = set()
        for provider in measured.providers("dense"):
            points: dict[float, list[Row]] = {}
            for case in measured.cases("dense"):
                row = measured.latest.get((case, "dense", provider, metric))
                if row is not None and case in measured.known_cases and of_panel(title, case):
                    points.setdefault(x_of(case), []).append(row)
            for x, found in points.items():
                for row in found:
                    one.plot([x, x], [row.p20, row.p80], color=STYLES[provider]["color"], alpha=0.5, linewidth=4)
            if points:
                line = sorted((x, sum(row.p50 for row in found) / len(found)) for x, found in points.items())
                (drawn[provider],) = one.plot(*zip(*line, strict=True), **STYLES[provider])
                ticks |= {2 ** math.floor(math.log2(x)) for x in points}
        one.set_xscale("log", base=2)
        one.set_xticks(sorted(ticks), [_short(x) for x in sorted(ticks)], fontsize="small")
        one.minorticks_off()
    axes[0].set_ylim(bottom=0)
    columns = min(len(drawn), 4) or 1
    figure.legend(drawn.values(), [NAMES[name] for name in drawn], loc="outside lower center", ncols=columns)
    return list(axes) if drawn else []


def _short(count: float) -> str:
    """2048 -> "2K"."""
    for prefix, size in (("G", 1 << 30), ("M", 1 << 20), ("K", 1 << 10)):
        if count >= size:
            return f"{count / size:.3g}{prefix}"
    return f"{count:g}"


def draw_rates(measured: Measured, figure) -> bool:
    """Head dim 128, by length."""
    def of_panel(title: str, case: str) -> bool:
        return case.startswith("d128-") and case.endswith("causal" if title == "causal" else "full")

    axes = _panels(measured, figure, ("causal", "full"), of_panel, lambda case: CASES[case].seqlen, "rate")
    for one in axes:
        one.set(xlabel="sequence length", ylabel="TFLOP/s" if one is axes[0] else None)
    figure.suptitle(f"{measured.gpu}: prefill, head dim 128, BF16, dense")
    return bool(axes)


def draw_bandwidth(measured: Measured, figure) -> bool:
    """By the bytes of K and V."""
    def of_panel(title: str, case: str) -> bool:
        return bool(decode.CASES[case].page_size) == (title == "paged caches")

    titles = ("contiguous caches", "paged caches")
    axes = _panels(measured, figure, titles, of_panel, lambda case: decode.CASES[case].kv_bytes, "bandwidth")
    for one in axes:
        one.set(xlabel="bytes of K and V", ylabel="TB/s" if one is axes[0] else None)
    figure.suptitle(f"{measured.gpu}: decode, head dim 128, BF16, dense")
    return bool(axes)


def draw_sparsity(measured: Measured, figure) -> bool:
    """Every point in one run with what it is compared with."""
    axes, drawn = figure.subplots(), False
    for index, case in enumerate(measured.cases(STRUCTURED)):
        peer, color = fastest_peer(measured, case), f"C{index}"
        modes = measured.sparse_modes(case)
        curves = [("over our dense", "o-", OURS, (STRUCTURED, OURS)),
                  (f"over {NAMES.get(peer)}, dense", "D--", OURS, (STRUCTURED, peer)),
                  ("FlexAttention on these tiles, over our dense", "^:", FLEX, (STRUCTURED, OURS))]  # fmt: skip
        for label, style, provider, over in curves:
            points = [(measured.value(case, mode, OURS, "sparsity"), measured.speed_up(case, over, (mode, provider)))
                      for mode in modes]  # fmt: skip
            points = sorted(point for point in points if None not in point)
            if points:
                axes.plot(*zip(*points, strict=True), style, color=color, label=f"{case}: {label}")
                drawn = True
    shares = [share / 100 for share in range(0, 101)]
    axes.plot(shares, [1 / (1 - share / CEILING) for share in shares], "-", color="grey", lw=1,
              label="if the half that can be skipped were free")  # fmt: skip
    axes.axhline(CEILING, color="black", lw=1)
    axes.text(0, CEILING * 1.01, f"ceiling: {CEILING:g}, the other half always runs", va="bottom")
    axes.set(xlabel="share of tiles skipped", ylabel="speed-up", xlim=(-0.02, 1.02))
    axes.set_ylim(top=max(axes.get_ylim()[1], CEILING * 1.1))
    axes.set_title(f"{measured.gpu}: {measured.op}, tiles skipped, structured input")
    figure.legend(loc="outside lower center", ncols=2)
    return drawn


def draw_roofline(measured: Measured, figure) -> bool:
    axes, drawn = figure.subplots(), False
    for provider in measured.providers("dense"):
        points = []
        for case in measured.cases("dense"):
            rate = measured.value(case, "dense", provider, "rate")
            if rate is not None and case in CASES:
                points.append((flops(CASES[case]) / least_bytes(CASES[case]), rate))
        if points:
            style = STYLES[provider] | {"linestyle": "none", "alpha": 0.8}
            axes.plot(*zip(*points, strict=True), label=NAMES[provider], **style)
            drawn = True
    if measured.gpu in ROOFS:
        terabytes, teraflops = ROOFS[measured.gpu]
        ridge = teraflops / terabytes
        axes.plot([ridge / 8, ridge, 1e5], [teraflops / 8, teraflops, teraflops], color="black", lw=1)
        axes.text(ridge / 4, teraflops / 4, f" copy, {terabytes} TB/s", va="top")
        axes.text(1e5, teraflops * 1.02, f"BF16 matrix product, {teraflops:g} TFLOP/s", va="bottom", ha="right")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(_plain_ticks())
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.set(xlabel="FLOP per byte of Q, K, V and output", ylabel="TFLOP/s")
    axes.set_title(f"{measured.gpu}: prefill, BF16, dense: all cases of the table")
    axes.legend(loc="lower right")
    return drawn


def _plain_ticks():
    from matplotlib.ticker import LogLocator

    return LogLocator(subs=(1, 2, 5))


DRAWINGS = {
    "prefill": {"rate": draw_rates, "sparsity": draw_sparsity, "roofline": draw_roofline},
    "decode": {"decode-bandwidth": draw_bandwidth, "decode-sparsity": draw_sparsity},
    "host": {},
}


# ---- The command ---------------------------------------------------------------------------------------------------


def report(folder: Path) -> str:
    """Writes a folder's README.md and plots; returns its content for this project's README.md.

    Raises FileNotFoundError where the folder has no rows.
    """
    files = {op: folder / f"{op}.jsonl" for op in OPS}
    present = [op for op, path in files.items() if path.exists() and path.stat().st_size]
    if not present:
        raise FileNotFoundError(f"{folder} has no rows in any of {', '.join(path.name for path in files.values())}")
    measured = [Measured(rows.read(files[op]), op) for op in present]
    content = "\n".join(tables(one) for one in measured)
    pictures: list[Path] = []
    try:
        pictures = [picture for one in measured for picture in plots(one, folder / "plots")]
    except ImportError:
        print("no plots: pip install matplotlib", file=sys.stderr)
    (folder / "README.md").write_text(content + _shown(pictures, folder))
    return content + _shown(pictures, README.parent)


def _shown(pictures: list[Path], reader: Path) -> str:
    """Lines of Markdown that show them to who reads a file in the folder `reader`."""
    paths = [path for path in pictures if path.suffix == ".svg"]
    return "".join(f"\n![{path.stem}]({Path(os.path.relpath(path, reader)).as_posix()})\n" for path in paths)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m profiling.report", description=__doc__.split("\n\n")[0])
    parser.add_argument("folders", nargs="*", type=Path, help="with rows; default: profiling/results/*")
    options = parser.parse_args(arguments)
    folders = options.folders or sorted({path.parent for path in rows.RESULTS.glob("*/*.jsonl")})
    if not folders:
        print(f"report.py: no rows in {rows.RESULTS}: measure with make gpu-check", file=sys.stderr)
        return 2
    try:
        content = "\n".join(report(folder) for folder in folders)
        print(content)
        if not options.folders and MARK_BEGIN in README.read_text():
            README.write_text(between_marks(README.read_text(), content))
    except (OSError, ValueError) as error:
        print(f"report.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
