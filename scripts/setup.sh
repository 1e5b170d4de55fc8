#!/usr/bin/env bash
# Makes .venv and installs atmossl into it, editable; does nothing if that is already done.
#
#   bash scripts/setup.sh               what training, prediction and reports need
#   bash scripts/setup.sh [EXTRAS]      EXTRAS: comma-separated extras of pyproject.toml, e.g. dev;
#                                       '' for prediction alone
#   ATMOSSL_PYTHON=python3.12 bash scripts/setup.sh     the Python that makes .venv, by default python3
#
# The plain install of torch uses a GPU where there is one. Where pip knows an index with CPU builds
# (2.13.0+cpu, a tenth of the size; see PIP_EXTRA_INDEX_URL), it prefers those by itself.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usual=train,report
extras="${1-$usual}"
python="${ATMOSSL_PYTHON:-python3}"

fail() {
    echo "setup: $1" >&2
    exit 2
}

recent_enough() { # PYTHON
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

if [[ ! -e .venv ]] && ! recent_enough "$python"; then
    found="$(command -v "$python" >/dev/null && "$python" -V 2>&1 || echo "not there")"
    fail "Python 3.11 or newer needed, but '$python' is $found; name another with ATMOSSL_PYTHON=python3.12"
fi
if [[ ! -x .venv/bin/pip ]]; then
    echo "setup: making .venv"
    "$python" -m venv .venv || fail "cannot make .venv; if a part of Python is missing (Debian: python3-venv), install it, then remove .venv and try again"
fi
recent_enough .venv/bin/python || fail ".venv holds no working Python 3.11 or newer; remove it and try again"

# A stamp per set of extras says what was installed last: from where, with which requirements.
wanted="$({ pwd; .venv/bin/python -V; cat pyproject.toml constraints.txt; } | cksum)"
stamp=".venv/.atmossl-installed${extras:+-$extras}"
up_to_date() { # STAMP
    [[ -f $1 && $(<"$1") == "$wanted" ]]
}
if up_to_date "$stamp"; then
    exit 0
elif [[ -z $extras || $extras == "$usual" ]] && up_to_date .venv/.atmossl-installed-dev; then
    exit 0 # dev holds what users usually need, too
fi

echo "setup: installing atmossl${extras:+[$extras]} (a few minutes the first time)"
.venv/bin/python -m pip install --quiet --disable-pip-version-check \
    -c constraints.txt -e ".${extras:+[$extras]}" || fail "pip could not install atmossl, see above"
echo "$wanted" >"$stamp"
