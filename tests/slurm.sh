#!/usr/bin/env bash
# A Slurm of its own on this machine, without systemd and without touching another one: munge, a controller, two nodes of one CPU.
#
#   tests/slurm.sh start DIR           then: SLURM_CONF=DIR/slurm.conf srun hostname
#   tests/slurm.sh kill DIR node0      the node dies, with all that runs on it
#   tests/slurm.sh node DIR node0      it is there again
#   tests/slurm.sh stop DIR
#
# Debian: apt-get install slurmctld slurmd slurm-client munge
set -eu
PATH=$PATH:/usr/sbin
what=$1 dir=$(realpath -m "$2")
export SLURM_CONF=$dir/slurm.conf

configure() {
  mkdir -p "$dir/state"
  (umask 077; dd if=/dev/urandom of="$dir/munge.key" bs=1k count=1 status=none)
  cat > "$SLURM_CONF" <<END
ClusterName=test
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthInfo=socket=$dir/munge.socket
SlurmctldPort=26817
SlurmctldPidFile=$dir/slurmctld.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdPidFile=$dir/%n.pid
SlurmdLogFile=$dir/%n.log
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/%n
SlurmdParameters=config_overrides
SlurmdTimeout=10
KillWait=2
ReturnToService=2
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
NodeName=node[0-1] NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=[26818-26819] CPUs=1
PartitionName=all Nodes=ALL Default=YES State=UP
END
}

case $what in
  start)
    configure
    munged --force --socket="$dir/munge.socket" --key-file="$dir/munge.key" --pid-file="$dir/munged.pid" \
      --log-file="$dir/munged.log" --seed-file="$dir/munged.seed"
    slurmctld -c
    slurmd -N node0
    slurmd -N node1
    for _ in $(seq 100); do [ "$(sinfo -h -t idle -o %D 2> "$dir/sinfo.log")" = 2 ] && exit 0; sleep 0.2; done
    echo "Slurm did not start: see $dir/*.log" >&2
    exit 1 ;;
  kill)  # also what the node runs: its processes have its name in their environment
    kill -9 "$(cat "$dir/$3.pid")" || true
    grep -lsz "^SLURMD_NODENAME=$3$" /proc/[0-9]*/environ | grep -o '[0-9]\+' | xargs -r kill -9 2> /dev/null || true ;;
  node)
    slurmd -N "$3" ;;
  stop)
    for pid in "$dir"/*.pid; do kill "$(cat "$pid")" 2> /dev/null || true; done ;;
esac
