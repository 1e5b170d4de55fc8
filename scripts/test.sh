#!/usr/bin/env bash
# Runs the tests in .venv, which it makes if needed, in two processes; arguments go to pytest.
#
#   bash scripts/test.sh
#   bash scripts/test.sh -m "not slow" tests/test_tokens.py
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash scripts/setup.sh dev
exec .venv/bin/python -m pytest -n 2 --dist loadfile "$@"
