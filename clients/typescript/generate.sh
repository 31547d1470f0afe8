#!/bin/sh
# Generates src/gen from ../../protos with protoc-gen-es, as protos/generate.sh does for Python.
# usage: clients/typescript/generate.sh [VENV] [OUT]; VENV as protos/generate.sh makes it.
set -eu
cd "$(dirname "$0")"
venv=${1:-../../.venv-protos}
out=${2:-src/gen}
mkdir -p "$out"
googleapis=$("$venv/bin/python" -c 'import os, google.rpc as p; print(os.path.dirname(os.path.dirname(list(p.__path__)[0])))')
"$venv/bin/python" -m grpc_tools.protoc -I ../../protos -I "$googleapis" \
    --plugin=protoc-gen-es=node_modules/.bin/protoc-gen-es \
    --es_out="$out" --es_opt=target=ts,import_extension=js \
    ../../protos/facelane/v1/*.proto google/rpc/status.proto google/rpc/error_details.proto
# What the code was made of: a test compares it with the protos as they are.
(cd ../../protos && cat facelane/v1/*.proto | sha256sum | cut -d' ' -f1) >"$out/PROTO_SHA256"
