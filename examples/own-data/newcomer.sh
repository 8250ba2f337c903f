#!/usr/bin/env bash
# From a CSV file to a model that plain transformers loads. Run from the project's root:
#   bash examples/own-data/newcomer.sh [FOLDER]
# FOLDER takes all that is made; it is runs/ if none is given.
set -euo pipefail
command -v orpo-ray > /dev/null || { echo "no orpo-ray yet: . .venv/bin/activate" >&2; exit 1; }
runs=${1:-runs}
config=examples/own-data/orpo.yaml
question="What sound does a bee make?"
load="import orpo_ray; print(orpo_ray.load('$runs/own-data')[0].num_parameters())"

PS4=$'\n$ '
set -x # from here each command is printed before it runs
orpo-ray prepare "$config" storage="$runs" --show 2
orpo-ray train "$config" storage="$runs"
orpo-ray chat "$runs/own-data" --once "$question"
orpo-ray export "$runs/own-data" --to "$runs/own-data-model"
python examples/own-data/load.py "$runs/own-data-model" "$question"
python -c "$load"
