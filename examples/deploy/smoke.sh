#!/usr/bin/env bash
# What the Dockerfile does, without Docker: record, prebuild, bundle, ship, run frozen without a compiler. Needs g++.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=$(python3 -c 'import sys; print(sys.executable)')
jitgen() { "$python" -m jitgen "$@"; }
cd "$work"
unset "${!JITGEN_@}"
export JITGEN_CACHE_DIR="$work/store"

echo "--- record what the service asks for"
JITGEN_RECORD="$work/recorded.toml" "$python" "$here/service.py"
jitgen cache stats

echo "--- prebuild it"
jitgen prebuild recorded.toml --out layer

echo "--- pack, check, unpack"
jitgen bundle pack layer -o kernels.tar.xz
jitgen bundle verify kernels.tar.xz
jitgen bundle unpack kernels.tar.xz -o shipped

echo "--- run frozen, with no compiler and an empty store"
mkdir bin && ln -s "$python" bin/python
PATH="$work/bin" JITGEN_MODE=frozen JITGEN_PREBUILT="$work/shipped" JITGEN_CACHE_DIR="$work/none" JITGEN_LOG=info \
  "$python" "$here/service.py" 2>&1 | tee frozen.log
[[ $(grep -c 'load .* source=layer' frozen.log) -eq 2 ]]

echo "--- without the layer a frozen service says what to add to the manifest"
if PATH="$work/bin" JITGEN_MODE=frozen JITGEN_CACHE_DIR="$work/none" "$python" "$here/service.py" 2>missing.log; then
  echo "it ran without its kernels" >&2
  exit 1
fi
grep -q '^\[\[request\]\]$' missing.log
echo "deployment works"
