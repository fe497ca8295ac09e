#!/usr/bin/env bash
# What qorpo does on a CUDA GPU: its GPU tests, its losses against the CPU's, steps of an 8B shape (one pair of 2 × 2,048
# tokens on a card of 10 GiB, rows of 8,192 tokens), its output head against plain PyTorch and Liger, and training beside
# TRL where that can be imported. Under ten minutes, no network; a JSON line a result.
#
#   bash scripts/bench/gpu_check.sh [--wheels DIR] [--cap-gib 24] [--output FILE]
#
# Needs python3 (or $PYTHON) with torch for CUDA, transformers, peft and accelerate. What else is missing comes from the
# wheels in DIR, into a temporary folder. Exits with 2 where there is no CUDA device, 1 where a check failed.
set -uo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python=${PYTHON:-python3}

wheels= output=() cap=(--cap-gib 24)
while (($#)); do
    case $1 in
        --wheels) wheels=${2:?--wheels needs a folder}; shift 2 ;;
        --cap-gib) cap=("$1" "${2:?$1 needs a value}"); shift 2 ;;
        --output) output=("$1" "${2:?$1 needs a value}"); shift 2 ;;
        *) echo "usage: bash scripts/bench/gpu_check.sh [--wheels DIR] [--cap-gib 24] [--output FILE]" >&2; exit 64 ;;
    esac
done

if ! "$python" -c 'import torch; raise SystemExit(not torch.cuda.is_available())'; then
    echo "gpu_check: $python sees no CUDA device through torch; nothing was measured" >&2
    exit 2
fi

site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
export PYTHONPATH="$root:$site${PYTHONPATH:+:$PYTHONPATH}"

if [[ -n $wheels ]]; then
    # Packages that only fit each other's exact version are replaced together. pip takes one wheel of a package, that of
    # this Python, so the best is picked here and all are installed by one call.
    missing=$("$python" - "$wheels" <<'PYTHON'
import importlib.metadata, sys
from pathlib import Path

from pip._vendor.packaging.tags import sys_tags
from pip._vendor.packaging.utils import InvalidWheelFilename, parse_wheel_filename

TOGETHER = [{"pydantic", "pydantic-core"}]

def is_installed(name):
    try:
        return bool(importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return False

ranks = {tag: rank for rank, tag in enumerate(sys_tags())}
best = {}
for path in sorted(Path(sys.argv[1]).glob("*.whl")):
    try:
        name, version, build, tags = parse_wheel_filename(path.name)
    except InvalidWheelFilename as error:
        print(f"gpu_check: {error}; left out", file=sys.stderr)
        continue
    fitting = [ranks[tag] for tag in tags if tag in ranks]
    if not fitting:
        print(f"gpu_check: {path} is not for this Python and system; left out", file=sys.stderr)
        continue
    best[name] = max(best.get(name, ()), (version, -min(fitting), str(path)))
missing = {name for name in best if not is_installed(name)}
for group in TOGETHER:
    if group & missing:
        missing |= group & best.keys()
for name in sorted(missing):
    print(best[name][-1])
PYTHON
    ) || exit 1
    if [[ -n $missing ]]; then
        mapfile -t missing <<<"$missing"
        "$python" -m pip install --quiet --no-index --no-deps --disable-pip-version-check --target "$site" \
            "${missing[@]}" || echo "gpu_check: wheels of $wheels could not be installed" >&2
    fi
fi

failed=0
# Each in a process of its own, so that none fails for the memory or the crash of another.
run() {
    local seconds=$1 script=$2; shift 2
    timeout "$seconds" "$python" "$root/scripts/bench/$script.py" "$@" --device cuda ${output[@]+"${output[@]}"} ||
        { echo "gpu_check: $script $* failed" >&2; failed=1; }
}
run 140 gpu_check --part tests
run 45 gpu_check --part losses
run 55 step --shape llama-3-8b --mix pair-2x2048 --cap-gib 10
run 55 step --shape llama-3-8b --mix packed-8192 "${cap[@]}"
# Liger's loss as it is, not compiled: that alone takes longer than all other sides.
run 80 head --tokens 4096 --hidden 4096 --vocab 128256 --dtype bfloat16 --chunk-tokens 1024 \
    --sides plain,liger-eager,qorpo,products
if "$python" -c 'import datasets, trl' 2>/dev/null; then
    trl=(--trl-checkpointing on --trl-liger on)
    run 60 train_vs_peers --shape llama-3-8b --mix pair-2x2048 "${cap[@]}" --steps 3 --sides trl --trl-batches 1 "${trl[@]}"
    run 155 train_vs_peers --shape llama-3-8b --mix ultrafeedback "${cap[@]}" --steps 3 --sides qorpo,trl \
        --trl-batches 1,2 "${trl[@]}"
else
    echo "gpu_check: TRL can't be imported; nothing was compared with it" >&2
fi
exit "$failed"
