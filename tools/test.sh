#!/usr/bin/env bash
# Makes .venv, installs what the tests need, and runs all checks, on several workers. Arguments go to pytest.
#   tools/test.sh             all tests: about 20 minutes on two cores
#   tools/test.sh --all       and all combinations of what is else tried in shares, before a release
#   tools/test.sh --quick     the daily loop: what takes less than a second and starts no processes; under 2 minutes
#   tools/test.sh -n0 -k NAME some tests, one after the other
set -euo pipefail
cd "$(dirname "$0")/.."

# Slurm's daemons, for the tests that start a real one; where they may be installed. Meanwhile pip works.
if [ "${1:-}" != --quick ] && ! command -v slurmctld > /dev/null && [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null; then
    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
        slurmctld slurmd slurm-client munge > /dev/null || echo "Slurm could not be installed" >&2 &
fi
bash tools/make_venv.sh test
source .venv/bin/activate
wait

unset PYTHONDONTWRITEBYTECODE # hundreds of processes would each compile the package, and the workers all tests
ruff check .
ruff format --check .
typed=$(mktemp)
trap 'rm -f "$typed"' EXIT
mypy > "$typed" 2>&1 & # beside the tests
mypy=$!

if [ ! -d tests/__pycache__ ]; then # what is imported is compiled once: half a minute, which all workers would take each
    python -m pytest --collect-only -qq -n0 > /dev/null || true
fi

# Two workers per core, as many tests wait, three of them for minutes; each may have 24 ranks, 4 GiB, a Slurm.
cores=$(nproc)
memory_gib=$(awk '/MemAvailable/ {print int($2 / 1048576)}' /proc/meminfo)
workers=$((2 * cores < 12 ? 2 * cores : 12))
workers=$((memory_gib / 4 < workers ? memory_gib / 4 : workers))
tests=0 types=0
python -m pytest -n "$((workers > 1 ? workers : 1))" --durations=20 "$@" || tests=$?
wait "$mypy" || types=$?
[ "$types" = 0 ] || cat "$typed"
exit $((tests ? tests : types))
