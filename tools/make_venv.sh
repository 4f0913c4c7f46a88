#!/usr/bin/env bash
# Makes .venv beside the project's files and installs the project, with extras if given: make_venv.sh [EXTRAS]
# A second call changes nothing unless the project's requirements have changed.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "Python 3.11 or newer is needed, $("$python" --version) was found. Set PYTHON to another one." >&2
    exit 1
}
command -v c++ > /dev/null || command -v g++ > /dev/null || {
    echo "A C++ compiler is needed (the passes over cells and DeepSpeed's ops are built with one). Install g++." >&2
    exit 1
}

extras=${1:-}
wanted="$(cat pyproject.toml tools/constraints.txt | cksum)"
for stamp in ".venv/installed-$extras" .venv/installed-test; do # the tests' extras include all others
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
        exit 0
    fi
done

install() { # Python compiles what is imported, when it is: of all that lies there a small part
    .venv/bin/python -m pip --disable-pip-version-check install --quiet --no-compile --constraint tools/constraints.txt "$@"
}
echo "installing into .venv (a few minutes the first time)"
"$python" -m venv .venv
install torch # first and by itself, so that what builds against it finds the pinned version
install --editable ".${extras:+[$extras]}"
if [ "$extras" = test ]; then # not in pyproject.toml, as it asks for one torch; without it its tests are skipped
    install --no-deps torch-harmonics==0.9.3 || echo "torch-harmonics cannot be had here" >&2
fi
echo "$wanted" > ".venv/installed-$extras"
