#!/usr/bin/env bash
# Ranks on one machine or several with Horovod's own launcher. With Gloo where there is no MPI, or its mpirun does not
# work; with MPI where mpirun.sh would do as well, and each line of output should say which rank it is from.
#
#   launch/horovodrun.sh                                          # the digits, two ranks on this machine, Gloo
#   CONTROLLER=mpi launch/horovodrun.sh                           # Open MPI 4.1, MPICH or Intel MPI
#   RANKS=8 HOSTS=h1:4,h2:4 INTERFACE=eth0 launch/horovodrun.sh python train.py
#
# `distfit launch --gloo` does the same, and counts threads by itself.
set -euo pipefail

RANKS=${RANKS:-2}
HOSTS=${HOSTS:-localhost:$RANKS} # machine:ranks, separated by commas
CONTROLLER=${CONTROLLER:-gloo}   # gloo or mpi
INTERFACE=${INTERFACE:-}         # the network interface that ranks talk over; empty: horovodrun finds one
THREADS=${THREADS:-1}            # of each rank: cores of a machine divided by its ranks
PASS=${PASS:-PATH LD_LIBRARY_PATH PYTHONPATH TF_CPP_MIN_LOG_LEVEL} # variables that ranks get, if set

[[ $# -gt 0 ]] || set -- distfit train configs/digits.yaml

# horovodrun writes the values of its whole environment on the ranks' command lines, for every user to read.
environment=(OMP_NUM_THREADS="$THREADS" TF_NUM_INTRAOP_THREADS="$THREADS" DISTFIT_CTRL_C=SIGUSR2)
for name in $PASS HOME USER SSH_AUTH_SOCK; do
  [[ -z ${!name+set} ]] || environment+=("$name=${!name}")
done

options=(-np "$RANKS" -H "$HOSTS" "--$CONTROLLER")
[[ -z $INTERFACE ]] || options+=(--network-interfaces "$INTERFACE")
if [[ $CONTROLLER = mpi && $(mpirun --version) = *'Open MPI'* ]]; then
  prefix=$(dirname "$(dirname "$(command -v mpirun)")") # where mpirun's daemon lies on the other machines
  options+=("--mpi-args=--mca mpi_yield_when_idle 1 --prefix $prefix")
fi

# horovodrun itself, but ssh checks host keys as it is configured, which plain `horovodrun` switches off; and it passes
# on SIGUSR1 and SIGUSR2, so that ranks can save and leave, with code 75 or 130, where SIGTERM and Ctrl-C kill them.
set -m # a process group of its own, where Ctrl-C does not reach it
env -i "${environment[@]}" python -m distfit.launchers.horovodrun_program "${options[@]}" "$@" &
trap 'kill -USR1 $!' TERM USR1
trap 'kill -USR2 $!' INT
code=0
wait $! || code=$?
while kill -0 $! 2>/dev/null; do code=0; wait $! || code=$?; done # a signal had ended the wait
exit "$code"
