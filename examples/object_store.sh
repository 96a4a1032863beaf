#!/usr/bin/env bash
# Runs an experiment with all files in an object store: prepares the corpus, trains, stops and
# continues the run, evaluates and exports the model, evaluates the exported model and prints a
# sample. Usage:
#
#     examples/object_store.sh gs://BUCKET/FOLDER 'TEXTS/*.txt' [--config.GROUP.FIELD=VALUE ...]
set -euo pipefail
folder=$1 texts=$2
shift 2
python=${PYTHON:-python}
log=$(mktemp)

"$python" -m aoe_jax.prepare --input="$texts" --tokenizer=bpe:512 --validation=0.1 \
  --test=0.1 --output="$folder/corpus"
train=("$python" train.py --config=configs/tiny.py --workdir="$folder/run"
  --config.data.name=prepared --config.data.path="$folder/corpus"
  --config.model.vocab_size=512 "$@")
"${train[@]}" 2> "$log" &
until grep -q "| loss" "$log" || ! kill -0 $!; do sleep 0.1; done
kill -TERM $!
wait $!
cat "$log"
"${train[@]}"
"$python" eval.py --workdir="$folder/run" --split=validation
"$python" -m aoe_jax.export --workdir="$folder/run" --output="$folder/model"
"$python" eval.py --workdir="$folder/model" --split=validation --data="prepared@$folder/corpus"
"$python" -m aoe_jax.generate --workdir="$folder/model" --prompt="the state" --max_tokens=16
