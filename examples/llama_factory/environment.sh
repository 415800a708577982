#!/bin/sh
# A virtual environment (1.5 GB) in which LLaMA-Factory 0.9.5 fine-tunes on text:
#     sh examples/llama_factory/environment.sh .venv-llama-factory
# PYTHON chooses the interpreter (3.11 or newer), TORCH what pip installs as PyTorch.
set -eu
folder=${1:?usage: environment.sh FOLDER}
here=$(dirname "$0")
"${PYTHON:-python3}" -m venv "$folder"
# shellcheck disable=SC2086
"$folder/bin/pip" install ${TORCH:-torch}
"$folder/bin/pip" install -r "$here/requirements.txt"
"$folder/bin/pip" install --no-deps llamafactory==0.9.5
