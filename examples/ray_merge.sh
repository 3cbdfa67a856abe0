#!/usr/bin/env bash
# Merge an adapter on a Ray cluster, then recompute what was written.
#
#     ray start --head                      # on one machine,
#     ray start --address HOST:6379         # on every other one
#     examples/ray_merge.sh ADAPTER BASE OUT [HOST:6379]
#
# Every machine has the same loratool (pip install 'loratool[ray]') and sees BASE, ADAPTER and OUT
# under the same paths, as on NFS or Lustre.  Or OUT is s3://bucket/folder: then each worker uploads
# the shards that it makes, and what is on the Hub (hf://owner/name) is read there.  Without an address Ray takes the cluster of this
# machine, or starts one on it.  A node that goes away costs the tensors that it was at.
set -euo pipefail
adapter=${1:?ADAPTER} base=${2:?BASE} out=${3:?OUT}
cluster=(--executor ray ${4:+--ray-address "$4"})

loratool merge "$adapter" --base "$base" -o "$out" "${cluster[@]}"
[[ $out == *://* ]] ||
  loratool verify "$out" --base "$base" --adapter "$adapter" "${cluster[@]}"
