#!/bin/sh
# Makes the Go code of the protos in OUT/facelane/v1, as the package example.org/facelane/facelane/v1.
# Wants protoc, protoc-gen-go and protoc-gen-go-grpc in PATH, and google/rpc/status.proto in
# GOOGLEAPIS: by default that of the Python package googleapis-common-protos, which facelane needs.
# usage: examples/go/generate.sh [OUT]
set -eu
cd "$(dirname "$0")"
out=${1:-.}
google=${GOOGLEAPIS:-$("${PYTHON:-python3}" -c 'import os, google.rpc as p; print(os.path.dirname(os.path.dirname(list(p.__path__)[0])))')}
module=example.org/facelane
where="--go_opt=module=$module --go-grpc_opt=module=$module"
for name in analysis_service face; do
    package=Mfacelane/v1/$name.proto=$module/facelane/v1
    where="$where --go_opt=$package --go-grpc_opt=$package"
done
# shellcheck disable=SC2086 - words are meant
protoc -I ../../protos -I "$google" --go_out="$out" --go-grpc_out="$out" $where \
    facelane/v1/analysis_service.proto facelane/v1/face.proto
