#!/usr/bin/env bash
# Makes a small adapter for the demo's model and checks that it fits; arguments are passed on, as --rank 16.
set -euo pipefail
cd "$(dirname "$0")/.."
caprese distill --config examples/distill.yaml "$@"
caprese inspect out/example/adapters.safetensors --model serve/caprese_serve/demo/model
