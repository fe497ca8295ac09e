# Sourced by the other scripts: makes .venv beside pyproject.toml with qorpo and the tested versions, and uses it.
# The first argument names extras ("test,bench"); what is installed already is left as it is. Needs python3 (3.10 or newer).
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ ! -x .venv/bin/python ]; then
    echo "making .venv with $(python3 --version)" >&2
    python3 -m venv .venv
fi
extras="${1:-}"
wanted="$(cat pyproject.toml scripts/constraints.txt | cksum) ${extras}"
if [ "$(cat ".venv/.installed-${extras:-plain}" 2>/dev/null)" != "$wanted" ]; then
    echo "installing qorpo${extras:+ with $extras} at the versions of scripts/constraints.txt" >&2
    # torch by itself first: asked for by name and version, pip takes the build that suits this machine's index.
    .venv/bin/python -m pip install --quiet --disable-pip-version-check "$(grep '^torch==' scripts/constraints.txt)"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -c scripts/constraints.txt -e ".${extras:+[$extras]}"
    echo "$wanted" > ".venv/.installed-${extras:-plain}"
fi
. .venv/bin/activate
