#!/usr/bin/env bash
# Trains configs/1b.py on all hosts of a TPU slice: `examples/launch/tpu_vm.sh NAME ZONE gs://BUCKET`.
# The token store is gs://BUCKET/tokens, and the run is gs://BUCKET/runs/1b. The same command continues
# the run; further arguments are passed to train.py. The hosts need Python 3.11 or newer.
set -euo pipefail
name=$1 zone=$2 bucket=$3 python=${PYTHON:-python3}
shift 3
on_all() { gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$1"; }

archive=$(mktemp --suffix=.tar.gz)
git archive --format=tar.gz --output="$archive" HEAD
gcloud compute tpus tpu-vm scp "$archive" "$name:aoe_jax.tar.gz" --zone="$zone" --worker=all
on_all "mkdir -p aoe_jax && tar -xzf aoe_jax.tar.gz -C aoe_jax && \
  cd aoe_jax && $python -m pip install --quiet '.[tpu,gs]'"
on_all "cd aoe_jax && $python -m aoe_jax.supervise -- train.py --config=configs/1b.py --distributed \
  --workdir=$bucket/runs/1b --config.data.path=$bucket/tokens --config.mesh.fsdp=16 $*"
