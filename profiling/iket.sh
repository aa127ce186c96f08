#!/bin/sh
# In-kernel event tracing of one benchmark case: profiling/iket.sh CASE [OUT [bench arguments...]]
#
# The DSL's own tracer, run-iket, records for every warp of the launch's first cluster when it entered and left the
# kernels' spans (cute_sparse/device/events.py), and writes a Perfetto trace under OUT/iket-CASE, to be opened at
# ui.perfetto.dev. The kernels are compiled for it anew: traced ones have a cache entry of their own. PYTHON names the
# interpreter.
. "$(dirname "$0")/case.sh"
run_iket() { "$python" -c 'from iket.cli.main import entrypoint; entrypoint()' "$@"; }
run_iket --clobber --output-dir "$out/iket-$case_name" profile --postprocess perfetto --enabled-cluster 0,0,0 -- "$@"
