#!/bin/sh
# Generates clients/facelane/v1 from protos/, and lints the protos when buf is at hand.
# grpcio-tools 1.76 on purpose: its code loads on protobuf 6.31 to 7.x.
# usage: protos/generate.sh [VENV] [OUT]
set -eu
cd "$(dirname "$0")/.."
venv=${1:-.venv-protos}
out=${2:-clients}
if [ ! -x "$venv/bin/python" ]; then
    python3 -m venv "$venv"
    "$venv/bin/pip" install -q "grpcio-tools==1.76.0" "mypy-protobuf==5.1.0" "googleapis-common-protos"
fi
googleapis=$("$venv/bin/python" -c 'import os, google.rpc as p; print(os.path.dirname(os.path.dirname(list(p.__path__)[0])))')
PATH="$venv/bin:$PATH" "$venv/bin/python" -m grpc_tools.protoc -I protos -I "$googleapis" \
    --python_out="$out" --grpc_python_out="$out" --mypy_out="$out" --mypy_grpc_out="$out" \
    protos/facelane/v1/*.proto
# What the code was made of: a test compares it with the protos as they are.
(cd protos && cat facelane/v1/*.proto | sha256sum | cut -d' ' -f1) >"$out/facelane/v1/PROTO_SHA256"
if command -v buf >/dev/null 2>&1; then
    image=$(mktemp --suffix=.binpb)
    "$venv/bin/python" -m grpc_tools.protoc -I protos -I "$googleapis" --include_imports \
        --include_source_info --descriptor_set_out="$image" protos/facelane/v1/*.proto
    buf lint "$image" --config protos/buf.yaml --path facelane/v1 || { rm -f "$image"; exit 1; }
    rm -f "$image"
fi
