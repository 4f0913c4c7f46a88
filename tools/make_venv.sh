#!/usr/bin/env bash
# Makes .venv beside the project's files and installs the project with the extras given: make_venv.sh EXTRAS
# A second call changes nothing unless the project's requirements have changed.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "Python 3.11 or newer is needed, $("$python" --version) was found. Set PYTHON to another one." >&2
    exit 1
}
command -v c++ > /dev/null || command -v g++ > /dev/null || {
    echo "A C++ compiler is needed (DeepSpeed and torch.compile use one). Install g++." >&2
    exit 1
}

stamp=.venv/installed-with
wanted="$1 $(cat pyproject.toml tools/constraints.txt | cksum)"
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
    exit 0
fi
"$python" -m venv .venv
pip="$PWD/.venv/bin/python -m pip --disable-pip-version-check"
echo "installing into .venv (a few minutes the first time)"
# torch first and by itself, so that what builds against it finds the pinned version
$pip install --quiet --constraint tools/constraints.txt torch 2> >(grep -v '^WARNING: Location' >&2)
$pip install --quiet --constraint tools/constraints.txt --editable ".[$1]" 2> >(grep -v '^WARNING: Location' >&2)
echo "$wanted" > "$stamp"
