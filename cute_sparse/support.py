"""The support matrix as the README shows it: `python -m cute_sparse.support` prints it from what kernels declare."""

from __future__ import annotations

from cute_sparse.dispatch import OPERANDS, support_matrix

# Kinds of kernel, and what their tables are called.
TITLES = {"prefill": "forward", "decode": "decode"}
assert set(TITLES) == set(OPERANDS)
# Feature kinds in the order of rows, what they are called, and which kinds of kernel have them.
ROWS = {
    "dtype": ("element types", "prefill decode"),
    "head_dim": ("head dims", "prefill decode"),
    "mask": ("masks", "prefill decode"),
    "varlen": ("packed sequences of different lengths", "prefill"),
    "page_size": ("tokens per page of paged caches", "decode"),
    "softcap": ("softcap", "prefill decode"),
    "sink": ("learnable sinks", "prefill decode"),
    "sparsity": ("tile skipping", "prefill decode"),
    "share_max": ("splits tell each other their maxima", "decode"),
    "lse": ("log-sum-exp", "prefill decode"),
    "stats": ("tile counts and skip map", "prefill decode"),
}
BEGIN, END = "<!-- support matrix: python -m cute_sparse.support -->", "<!-- end of the support matrix -->"


def markdown() -> str:
    """For each kind of kernel a table of what that of each architecture supports."""
    return "\n\n".join(_table(kind) for kind in TITLES)


def _table(kind: str) -> str:
    matrix = support_matrix(kind)
    lines = [f"| {TITLES[kind]} | " + " | ".join(matrix) + " |", "|---" * (len(matrix) + 1) + "|"]
    rows = {feature: title for feature, (title, kinds) in ROWS.items() if kind in kinds.split()}
    for supports in matrix.values():
        unknown = {name.partition(":")[0] for name in supports} - set(rows)
        assert not unknown, f"{unknown} have no row"
    for feature, title in rows.items():
        cells = (_cell(feature, supports) for supports in matrix.values())
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(kind: str, supports: frozenset[str]) -> str:
    if kind in supports:
        return "yes"
    values = [name.partition(":")[2] for name in supports if name.startswith(f"{kind}:")]
    if not values:
        return "no"
    if kind == "head_dim":
        return _head_dims(values)
    return ", ".join(sorted(values, key=lambda value: (int(value) if value.isdigit() else 0, value)))


def _head_dims(values: list[str]) -> str:
    """Runs of equal steps shortened: "8 to 256 in steps of 8, 192/128"."""
    plain = sorted(int(value) for value in values if "/" not in value)
    pairs = sorted(value for value in values if "/" in value)
    steps = {after - before for before, after in zip(plain, plain[1:], strict=False)}
    if len(plain) > 2 and len(steps) == 1:
        return ", ".join([f"{plain[0]} to {plain[-1]} in steps of {steps.pop()}", *pairs])
    return ", ".join([*map(str, plain), *pairs])


if __name__ == "__main__":
    print(markdown())
