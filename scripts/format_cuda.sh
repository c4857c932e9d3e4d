#!/bin/bash
# Formats the kernels and what compiles them for the host as .clang-format says; --check changes nothing and fails where it would.
set -eu
cd "$(dirname "$0")/.."
tool=${VENV:-.venv}/bin/clang-format
files=(cuda/*.cu cuda/*.cuh cuda/*.h cuda/*.cpp)
if [ "${1:-}" = --check ]; then
  exec "$tool" --dry-run --Werror "${files[@]}"
fi
exec "$tool" -i "${files[@]}"
