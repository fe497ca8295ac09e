#!/usr/bin/env bash
# The main job on the embedded base model and preference pairs: set-up, training, and what it changed.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh" tracking
exec python scripts/demo.py "$@"
