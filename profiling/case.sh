# What ncu.sh, nsys.sh and iket.sh begin with: case.sh is sourced, with their arguments, CASE [OUT [bench arguments...]].
#
# Sets case_name, out, and as arguments the command that runs the case once. PYTHON names the interpreter.
set -eu
case_name=${1:?usage: $0 CASE [OUT [bench arguments...]]}
out=${2:-.}
shift $(($# < 2 ? $# : 2))
python=${PYTHON:-python3}
op=$("$python" -c 'import sys; from profiling import decode; print("decode" if sys.argv[1] in decode.CASES else "prefill")' \
    "$case_name")
mkdir -p "$out"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export CUTE_SPARSE_PROFILED=1
set -- "$python" -m profiling.bench "$op" --case "$case_name" --peers "" --out "$scratch" "$@"
