#!/usr/bin/env bash
# Set-up and every test that this machine can run; arguments go to pytest.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh" test,bench,eval
# Two at a time: each test computes in one thread (tests/conftest.py). A file's tests share what they set up.
exec python -m pytest -n 2 --dist loadfile "$@"
