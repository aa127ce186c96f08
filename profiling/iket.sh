#!/bin/sh
# In-kernel event tracing of one benchmark case: profiling/iket.sh CASE [OUT [bench arguments...]]
#
# The DSL's own tracer, run-iket, records for every warp of the launch's first cluster when it entered and left the
# kernels' spans (cute_sparse/device/events.py), and writes a Perfetto trace under OUT/iket-CASE, to be opened at
# ui.perfetto.dev. The kernels are compiled for it anew: traced ones have a cache entry of their own. PYTHON names the
# interpreter.
set -eu
case_name=${1:?usage: profiling/iket.sh CASE [OUT [bench arguments...]]}
out=${2:-.}
shift $(($# < 2 ? $# : 2))
python=${PYTHON:-python3}
op=$("$python" -c 'import sys; from profiling import decode; print("decode" if sys.argv[1] in decode.CASES else "prefill")' \
    "$case_name")
run_iket() { "$python" -c 'from iket.cli.main import entrypoint; entrypoint()' "$@"; }
mkdir -p "$out"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export CUTE_SPARSE_PROFILED=1
run_iket --clobber --output-dir "$out/iket-$case_name" profile --postprocess perfetto --enabled-cluster 0,0,0 -- \
    "$python" -m profiling.bench "$op" --case "$case_name" --peers "" --out "$scratch" "$@"
