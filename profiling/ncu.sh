#!/bin/sh
# Nsight Compute on one benchmark case: profiling/ncu.sh CASE [OUT [bench arguments...]]
#
# Runs the case once to fill the compile cache, then again under ncu, which records only the call between
# cudaProfilerStart and cudaProfilerStop; clocks are left alone, so times vary with them. Writes OUT/ncu-CASE.ncu-rep,
# to be opened in ncu-ui, and OUT/ncu-CASE.txt. PYTHON names the interpreter.
set -eu
case_name=${1:?usage: profiling/ncu.sh CASE [OUT [bench arguments...]]}
out=${2:-.}
shift $(($# < 2 ? $# : 2))
python=${PYTHON:-python3}
op=$("$python" -c 'import sys; from profiling import decode; print("decode" if sys.argv[1] in decode.CASES else "prefill")' \
    "$case_name")
command -v ncu >/dev/null || { echo "ncu.sh: ncu is not on the PATH: install Nsight Compute" >&2; exit 2; }
mkdir -p "$out"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export CUTE_SPARSE_PROFILED=1
"$python" -m profiling.bench "$op" --case "$case_name" --peers "" --out "$scratch" "$@"
ncu --profile-from-start off --clock-control none --set full --force-overwrite --export "$out/ncu-$case_name" \
    "$python" -m profiling.bench "$op" --case "$case_name" --peers "" --out "$scratch" "$@"
ncu --import "$out/ncu-$case_name.ncu-rep" --page details >"$out/ncu-$case_name.txt"
