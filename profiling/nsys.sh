#!/bin/sh
# Nsight Systems on one benchmark case: profiling/nsys.sh CASE [OUT [bench arguments...]]
#
# Runs the case once to fill the compile cache, then again under nsys; the timeline has the NVTX ranges of the
# benchmark's phases (domain cute_sparse). Writes OUT/nsys-CASE.nsys-rep, to be opened in nsys-ui. PYTHON names the
# interpreter.
. "$(dirname "$0")/case.sh"
command -v nsys >/dev/null || { echo "nsys.sh: nsys is not on the PATH: install Nsight Systems" >&2; exit 2; }
"$@"
nsys profile --trace cuda,nvtx --sample none --cpuctxsw none --force-overwrite true --output "$out/nsys-$case_name" "$@"
nsys stats --report nvtx_sum,cuda_gpu_kern_sum "$out/nsys-$case_name.nsys-rep"
