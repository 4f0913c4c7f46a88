#!/usr/bin/env bash
# Makes .venv, installs what the tests need, and runs all checks. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
bash tools/make_venv.sh test
source .venv/bin/activate

ruff check .
ruff format --check . || true
mypy
python -m pytest "$@"
