#!/usr/bin/env bash
# Sets up the virtual environment: deploy/prepare.sh FOLDER [EXTRA]
# The package in it is this checkout itself, or a copy of what PACKAGE names (a wheel or a source folder).
# Says everything that is missing at once, and changes nothing outside FOLDER. Safe to run again.
set -euo pipefail

venv=$1
extra=${2:-}
python=${PYTHON:-python3}
cd "$(dirname "$0")/.."

# Names in `missing` the tools of the build that are not here.
missing=()
look_for_tools() {
    for tool in gcc g++ cmake make; do
        command -v "$tool" >/dev/null || missing+=("$tool")
    done
}

complain() {
    printf 'missing: %s\n' "$@" >&2
    printf 'On Debian, Ubuntu or Raspberry Pi OS: sudo apt-get install -y %s\n' \
        'python3 python3-venv python3-dev gcc g++ cmake make' >&2
    exit 1
}

if [ ! -x "$venv/bin/python" ]; then
    if ! command -v "$python" >/dev/null; then
        missing+=("$python (3.11 or newer)")
    elif ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        missing+=("Python 3.11 or newer ($python is $("$python" -V 2>&1); another one: make PYTHON=python3.12)")
    elif ! "$python" -c 'import sys; sys.exit(sys.maxsize < 2**32)'; then
        missing+=("a 64-bit Python ($python has 32 bits)")
    elif ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
        missing+=("the venv module of $python")
    fi
    look_for_tools
    [ ${#missing[@]} -eq 0 ] || complain "${missing[@]}"
    "$python" -m venv "$venv"
fi

pip=("$venv/bin/python" -m pip --disable-pip-version-check --no-input)
pinned=$(sed -n 's/^ *"llama-cpp-python==\([^"]*\)".*/\1/p' pyproject.toml)

if ! "$venv/bin/python" -c "
import importlib.metadata as m, sys
try: sys.exit(m.version('llama-cpp-python') != '$pinned')
except m.PackageNotFoundError: sys.exit(1)"; then
    look_for_tools
    [ ${#missing[@]} -eq 0 ] || complain "${missing[@]}"
    free_mb=$(df -Pm "$venv" | awk 'NR == 2 { print $4 }')
    if [ "$free_mb" -lt 2000 ]; then
        echo "missing: 2 GB of disk for the build ($free_mb MB are free here)" >&2
        exit 1
    fi
    # A compiler of this code takes up to a gigabyte: more of them than fit would swap or be killed.
    cores=$(nproc)
    memory_mb=$(awk '/^MemAvailable/ { print int($2 / 1024) }' /proc/meminfo 2>/dev/null || echo 4000)
    jobs=$((memory_mb / 1000 < 1 ? 1 : memory_mb / 1000))
    export CMAKE_BUILD_PARALLEL_LEVEL=$((jobs < cores ? jobs : cores))
    [ "$memory_mb" -ge 1000 ] || echo "note: only $memory_mb MB of memory are free; add swap if the build is killed" >&2
    # NATIVE: the kernels for this CPU. Said aloud, because cmake leaves it out where SOURCE_DATE_EPOCH is set.
    export CMAKE_ARGS="-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF ${CMAKE_ARGS:-}"
    echo "building llama-cpp-python $pinned for this CPU (6 minutes on two cores, an hour on a Raspberry Pi 4; once)"
    "${pip[@]}" install --quiet "llama-cpp-python==$pinned"
fi

case $extra in
    *train*)
        # First and pinned, so that a CPU build that is at hand is taken and nothing replaces it later.
        torch=$(sed -n 's/.*"\(torch==[^"]*\)".*/\1/p' pyproject.toml | head -n 1)
        "${pip[@]}" install --quiet "$torch"
        ;;
esac
echo "installing edge-runtime${extra:+ with $extra}"
if [ -n "${PACKAGE:-}" ]; then
    "${pip[@]}" install --quiet "$PACKAGE${extra:+[$extra]}"
    # Once more and by force: pip leaves a wheel alone whose version it has, and an update may keep the version.
    "${pip[@]}" install --quiet --force-reinstall --no-deps "$PACKAGE"
else
    "${pip[@]}" install --quiet --editable ".${extra:+[$extra]}"
fi
