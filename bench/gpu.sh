#!/usr/bin/env bash
# The whole GPU programme in one command, within 8 minutes: versions, GPU tests, sanitizers, tiles, benchmark.
# Each part has a time of its own and leaves what it has when that is over; a part that fails stops no other.
# Logs and results go to ${OUT:-bench/results}, as one archive if PACK is set. The package need not be installed; the
# tests need what the extra "test" lists, all else torch, triton and rich (matplotlib for charts).
set -u

cd "$(dirname "$0")/.." || exit 1
out=${OUT:-bench/results}
python=${PYTHON:-python3}
mkdir -p "$out"
out=$(cd "$out" && pwd)
started=$(mktemp)
export PYTHONPATH="src:kernels:.${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
failed=""

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "no CUDA device that torch can use"
  exit 1
fi

# part NAME SECONDS COMMAND...: run it, at most so long; its output goes to the screen and to NAME.log.
part() {
  local name=$1 limit=$2 begun=$SECONDS status
  shift 2
  echo "== $name (at most $limit s): $*"
  timeout --kill-after=5 "$limit" "$@" 2>&1 | tee "$out/$name.log"
  status=${PIPESTATUS[0]}
  echo "== $name: status $status after $((SECONDS - begun)) s" | tee -a "$out/$name.log"
  [ "$status" -eq 0 ] || failed="$failed $name"
}

sanitizer() {
  if command -v compute-sanitizer >/dev/null; then
    # Caching allocation would hide a write beyond a tensor within the same block.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 part "$1" "$2" compute-sanitizer --tool "$1" --error-exitcode 99 \
      "$python" -m tickwork_kernels.check --device cuda --quick
  else
    echo "== $1: skipped, compute-sanitizer is not installed" | tee "$out/$1.log"
  fi
}

versions='
import platform, torch
from bench.record import circumstances
print(platform.platform(), circumstances()["versions"], circumstances()["machine"])
print("compute capability", torch.cuda.get_device_capability(), "L2", torch.cuda.get_device_properties(0).L2_cache_size)
'

part versions 25 "$python" -c "$versions"
part tests 95 "$python" -m pytest -m gpu -q --durations=5
sanitizer memcheck 45
sanitizer racecheck 45
part tune 65 "$python" -m bench kernels --tune --seconds 50 --out "$out"
part kernels 185 "$python" -m bench kernels --preset gpu --seconds 155 --out "$out"

if [ -n "${PACK:-}" ]; then
  (cd "$out" && find . -maxdepth 1 -type f -newer "$started" -print0 | tar --null -czf gpu.tar.gz --remove-files -T -)
fi
rm -f "$started"
echo "== $SECONDS s in all; failed:${failed:- nothing}"
[ -z "$failed" ]
