#!/usr/bin/env bash
# Makes .venv, installs what the tests need, and runs all checks. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
bash tools/make_venv.sh test
source .venv/bin/activate

# Slurm's daemons, for the tests that start a real one; where they may be installed.
if ! command -v slurmctld > /dev/null && [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null; then
    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
        slurmctld slurmd slurm-client munge > /dev/null || echo "Slurm could not be installed" >&2
fi

ruff check .
ruff format --check .
mypy
python -m pytest "$@"
