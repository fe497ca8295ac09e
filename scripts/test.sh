#!/usr/bin/env bash
# Set-up and every test that this machine can run; arguments go to pytest.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh" test,bench
exec python -m pytest "$@"
