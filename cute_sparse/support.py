"""The support matrix as the README shows it: `python -m cute_sparse.support` prints it from what kernels declare."""

from __future__ import annotations

from cute_sparse.dispatch import support_matrix

# Feature kinds in the order of rows, and what they are called.
ROWS = {
    "dtype": "element types",
    "head_dim": "head dims",
    "mask": "masks",
    "varlen": "packed sequences of different lengths",
    "softcap": "softcap",
    "sparsity": "tile skipping",
    "lse": "log-sum-exp",
    "stats": "tile counts and skip map",
}
BEGIN, END = "<!-- support matrix: python -m cute_sparse.support -->", "<!-- end of the support matrix -->"


def markdown() -> str:
    """A table of what the forward (prefill) kernel of each architecture supports."""
    matrix = support_matrix()
    lines = ["| forward | " + " | ".join(matrix) + " |", "|---" * (len(matrix) + 1) + "|"]
    known = set(ROWS)
    for supports in matrix.values():
        unknown = {name.partition(":")[0] for name in supports} - known
        assert not unknown, f"{unknown} have no row"
    for kind, title in ROWS.items():
        cells = (_cell(kind, supports) for supports in matrix.values())
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(kind: str, supports: frozenset[str]) -> str:
    if kind in supports:
        return "yes"
    values = [name.partition(":")[2] for name in supports if name.startswith(f"{kind}:")]
    if not values:
        return "no"
    return _head_dims(values) if kind == "head_dim" else ", ".join(sorted(values))


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
