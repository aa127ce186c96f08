#!/bin/sh
# Nsight Compute on one benchmark case: profiling/ncu.sh CASE [OUT [bench arguments...]]
#
# Runs the case once to fill the compile cache, then again under ncu, which records only the call between
# cudaProfilerStart and cudaProfilerStop; clocks are left alone, so times vary with them. Writes OUT/ncu-CASE.ncu-rep,
# to be opened in ncu-ui, and OUT/ncu-CASE.txt. PYTHON names the interpreter.
. "$(dirname "$0")/case.sh"
command -v ncu >/dev/null || { echo "ncu.sh: ncu is not on the PATH: install Nsight Compute" >&2; exit 2; }
"$@"
ncu --profile-from-start off --clock-control none --set full --force-overwrite --export "$out/ncu-$case_name" "$@"
ncu --import "$out/ncu-$case_name.ncu-rep" --page details >"$out/ncu-$case_name.txt"
