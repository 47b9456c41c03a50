#!/usr/bin/env bash
# Generates the gRPC stubs in edge_runtime/v1 from proto/edge_runtime/v1: deploy/generate_proto.sh [--check]
# --check changes nothing: it compares what would be generated with what is there, and fails if they differ.
# The generator has its own virtual environment, because it asks for protobuf < 6. Its version is the newest
# whose output still runs with protobuf 5.29.
set -euo pipefail

version=1.71.2
venv=${PROTO_VENV:-.venv-proto}
python=${PYTHON:-python3}
cd "$(dirname "$0")/.."

check=false
case ${1:-} in
    '') ;;
    --check) check=true ;;
    *)
        echo "usage: deploy/generate_proto.sh [--check]" >&2
        exit 2
        ;;
esac

installed() {
    "$venv/bin/python" -c "
import importlib.metadata as m, sys
try: sys.exit(m.version('grpcio-tools') != '$version')
except m.PackageNotFoundError: sys.exit(1)" 2>/dev/null
}

if ! installed; then
    echo "installing grpcio-tools $version into $venv" >&2
    [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-input "grpcio-tools==$version"
fi

target=$(mktemp -d)
trap 'rm -rf "$target"' EXIT
"$venv/bin/python" -m grpc_tools.protoc --proto_path=proto \
    --python_out="$target" --pyi_out="$target" --grpc_python_out="$target" \
    proto/edge_runtime/v1/*.proto

# Compared in both directions: a file without its .proto is as wrong as one that is missing.
stale=$(diff --recursive --brief --exclude=__init__.py --exclude=__pycache__ \
    "$target/edge_runtime/v1" edge_runtime/v1 || true)
if [ -z "$stale" ]; then
    echo "edge_runtime/v1 is what proto/edge_runtime/v1 says"
    exit 0
fi
if $check; then
    printf '%s\n' "$stale" | sed "s|$target/||g" >&2
    echo "edge_runtime/v1 is not what proto/edge_runtime/v1 says; run \`make proto\` and commit the result" >&2
    exit 1
fi
find edge_runtime/v1 \( -name '*_pb2*.py' -o -name '*_pb2*.pyi' \) -delete
cp "$target"/edge_runtime/v1/* edge_runtime/v1/
echo "wrote $(find edge_runtime/v1 -name '*_pb2*.py*' | wc -l) files to edge_runtime/v1"
