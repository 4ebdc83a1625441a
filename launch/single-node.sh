#!/usr/bin/env bash
# All GPUs of one machine in one process, with TensorFlow's MirroredStrategy: no MPI, no Horovod. On a machine
# without GPUs, two logical devices on its CPU, which shows that a script works but not how fast.
#
#   launch/single-node.sh                                         # the digits
#   CUDA_VISIBLE_DEVICES=0,1 launch/single-node.sh python train.py
set -euo pipefail

CPU_DEVICES=${CPU_DEVICES:-2} # without GPUs

[[ $# -gt 0 ]] || set -- distfit train configs/digits.yaml
export DISTFIT_STRATEGY=mirrored
compgen -G '/dev/nvidia[0-9]*' >/dev/null || export DISTFIT_DEVICES=$CPU_DEVICES

exec "$@"
