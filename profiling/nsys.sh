#!/bin/sh
# Nsight Systems on one benchmark case: profiling/nsys.sh CASE [OUT [bench arguments...]]
#
# Runs the case once to fill the compile cache, then again under nsys; the timeline has the NVTX ranges of the
# benchmark's phases (domain cute_sparse). Writes OUT/nsys-CASE.nsys-rep, to be opened in nsys-ui. PYTHON names the
# interpreter.
set -eu
case_name=${1:?usage: profiling/nsys.sh CASE [OUT [bench arguments...]]}
out=${2:-.}
shift $(($# < 2 ? $# : 2))
python=${PYTHON:-python3}
op=$("$python" -c 'import sys; from profiling import decode; print("decode" if sys.argv[1] in decode.CASES else "prefill")' \
    "$case_name")
command -v nsys >/dev/null || { echo "nsys.sh: nsys is not on the PATH: install Nsight Systems" >&2; exit 2; }
mkdir -p "$out"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export CUTE_SPARSE_PROFILED=1
"$python" -m profiling.bench "$op" --case "$case_name" --peers "" --out "$scratch" "$@"
nsys profile --trace cuda,nvtx --sample none --cpuctxsw none --force-overwrite true --output "$out/nsys-$case_name" \
    "$python" -m profiling.bench "$op" --case "$case_name" --peers "" --out "$scratch" "$@"
nsys stats --report nvtx_sum,cuda_gpu_kern_sum "$out/nsys-$case_name.nsys-rep"
