#!/usr/bin/env bash
# Ranks on one machine or several with Open MPI's mpirun, 4.1 or 5. For machines that you reach by ssh without a
# password, and that have no batch scheduler. The same environment and data lie under the same paths on all of them.
#
#   launch/mpirun.sh                                              # the digits, two ranks on this machine
#   HOSTS=h1:4,h2:4 INTERFACE=eth0 launch/mpirun.sh python train.py
#
# As root (in a container) Open MPI wants OMPI_ALLOW_RUN_AS_ROOT=1 and OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1.
# `distfit launch` does the same, and counts threads by itself.
set -euo pipefail

HOSTS=${HOSTS:-localhost:2} # machine:ranks, separated by commas
INTERFACE=${INTERFACE:-}    # the network interface that ranks talk over; empty: Open MPI tries all
THREADS=${THREADS:-1}       # of each rank: cores of a machine divided by its ranks
PASS=${PASS:-PATH LD_LIBRARY_PATH PYTHONPATH TF_CPP_MIN_LOG_LEVEL} # variables that ranks get, if set

[[ $# -gt 0 ]] || set -- distfit train configs/digits.yaml
export OMP_NUM_THREADS=$THREADS TF_NUM_INTRAOP_THREADS=$THREADS DISTFIT_CTRL_C=SIGUSR2

# TensorFlow has threads of its own, so none is bound to a core. Ranks that wait for a message poll; where there is
# no idle core for that, they have to yield to those that compute.
options=(-H "$HOSTS" --map-by slot --bind-to none --mca mpi_yield_when_idle 1)
if [[ -n $INTERFACE ]]; then
  export NCCL_SOCKET_IFNAME=$INTERFACE
  options+=(--mca btl_tcp_if_include "$INTERFACE" -x NCCL_SOCKET_IFNAME)
fi
for name in $PASS OMP_NUM_THREADS TF_NUM_INTRAOP_THREADS DISTFIT_CTRL_C; do
  [[ -z ${!name+set} ]] || options+=(-x "$name")
done

# By its full path: so mpirun finds its own daemon on the other machines. After SIGTERM or Ctrl-C it would give ranks
# a second; SIGUSR1 and SIGUSR2 it passes on, so that they can save and leave, with code 75 or 130.
set -m # a process group of its own, where Ctrl-C does not reach it
"$(command -v mpirun)" "${options[@]}" "$@" &
trap 'kill -USR1 $!' TERM USR1
trap 'kill -USR2 $!' INT
code=0
wait $! || code=$?
while kill -0 $! 2>/dev/null; do code=0; wait $! || code=$?; done # a signal had ended the wait
exit "$code"
