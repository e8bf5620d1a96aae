#!/usr/bin/env bash
# A real Slurm cluster of N nodes on this one host, to try and test batch scripts with.
#
#   scripts/slurm_lab.sh start N      prints the line that points sbatch, squeue, … at it
#   scripts/slurm_lab.sh stop         cancels its jobs, ends its daemons, removes its folder
#
# Needs root and Debian's slurm-wlm and munge; uses neither systemd nor cgroups nor accounting, and listens on the
# loopback alone. Its files are in $SLURM_LAB (${TMPDIR:-/tmp}/slurm_lab); labs in different folders run side by side.
# Each node claims two cores, whatever the host has. A job in partition `high` preempts those in `low`, the default.
set -euo pipefail
lab=$(realpath -m "${SLURM_LAB:-${TMPDIR:-/tmp}/slurm_lab}")
export SLURM_CONF=$lab/slurm.conf
marker=.slurm_lab # in a folder that `start` has made, and that `stop` may therefore remove

die() {
    echo "slurm_lab: $*" >&2
    exit 1
}

check_host() {
    local missing=()
    for program in munged slurmctld slurmd sbatch; do
        command -v "$program" >/dev/null || missing+=("$program")
    done
    ((${#missing[@]} == 0)) ||
        die "not installed: ${missing[*]}; on Debian: apt-get install --no-install-recommends slurm-wlm munge"
    [ "$(id -u)" = 0 ] || die "must be root: Slurm's daemons start jobs in the name of whoever submits them"
}

# The first of N + 1 ports in a row that nobody listens on, below 20000, where those of the jobs' ranks begin
# (rltrain/runtime/dist.py). Labs that start at the same time begin their search apart.
free_ports() {
    local base port
    for attempt in {0..99}; do
        base=$((10000 + ($$ + attempt) % 100 * 100))
        for ((port = base; port <= base + $1; port++)); do
            ! (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null || continue 2
        done
        echo "$base"
        return
    done
    die "no free ports between 10000 and 20000"
}

write_config() {
    local nodes=$1 port=$2 host
    host=$(hostname -s)
    cat >"$SLURM_CONF" <<CONF
ClusterName=lab
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# A requeued job may start again only when its old credential has expired: 120 s if not set.
AuthInfo=socket=$lab/munge.socket,cred_expire=5
StateSaveLocation=$lab/state
SlurmdSpoolDir=$lab/spool.%n
SlurmctldPidFile=$lab/slurmctld.pid
SlurmdPidFile=$lab/slurmd.%n.pid
SlurmctldLogFile=$lab/log/slurmctld
SlurmdLogFile=$lab/log/slurmd.%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
# Nodes have the cores that are written here, not those of the host.
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=0,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=30
ReturnToService=2
CONF
    for ((i = 1; i <= nodes; i++)); do
        echo "NodeName=n$i NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + i)) CPUs=2 RealMemory=4000"
    done >>"$SLURM_CONF"
    cat >>"$SLURM_CONF" <<CONF
PartitionName=low Nodes=n[1-$nodes] Default=YES MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
PartitionName=high Nodes=n[1-$nodes] MaxTime=INFINITE PriorityTier=2 PreemptMode=OFF
CONF
}

start_munge() {
    (umask 077 && head -c 1024 /dev/urandom >"$lab/munge.key")
    munged --force --key-file="$lab/munge.key" --socket="$lab/munge.socket" --pid-file="$lab/munged.pid" \
        --log-file="$lab/log/munged" --seed-file="$lab/munge.seed"
}

wait_for_nodes() {
    for _ in {1..150}; do
        [ "$(sinfo -h -p low -t idle -o %D 2>/dev/null || true)" = "$1" ] && return
        sleep 0.2
    done
    die "not all of $1 nodes came up within 30 s"
}

start() {
    local nodes=$1 port
    [[ $nodes =~ ^[1-9][0-9]?$ ]] || die "start $nodes: say how many nodes, 1 to 99"
    check_host
    mkdir "$lab" 2>/dev/null ||
        die "$lab: exists or cannot be made; 'stop' ends a lab that is there, SLURM_LAB names another folder"
    trap '(($? == 0)) || { tail -n 5 "$lab"/log/* >&2 || true; stop; }' EXIT
    touch "$lab/$marker"
    mkdir "$lab/log" "$lab/state"
    port=$(free_ports "$nodes")
    write_config "$nodes" "$port"
    start_munge
    slurmctld -f "$SLURM_CONF"
    for ((i = 1; i <= nodes; i++)); do
        mkdir "$lab/spool.n$i"
        slurmd -f "$SLURM_CONF" -N "n$i"
    done
    wait_for_nodes "$nodes"
    echo "export SLURM_CONF=$SLURM_CONF"
}

cancel_jobs() {
    squeue -h -o %A 2>/dev/null | sort -u | xargs -r scancel 2>/dev/null || return 0
    for _ in {1..200}; do
        [ -n "$(squeue -h 2>/dev/null || true)" ] || return 0
        sleep 0.2
    done
}

# A pid is ours only as long as its command line names this lab: numbers are used again, and a zombie has none.
is_ours() {
    grep -qsF "$lab/" "/proc/$1/cmdline"
}

end_daemon() {
    local pid
    pid=$(cat "$1" 2>/dev/null) && is_ours "$pid" || return 0
    kill "$pid"
    for _ in {1..200}; do
        is_ours "$pid" || return 0
        sleep 0.1
    done
    kill -KILL "$pid"
}

stop() {
    [ -O "$lab/$marker" ] || die "no lab in $lab"
    cancel_jobs
    for pid_file in "$lab"/slurmd.*.pid "$lab/slurmctld.pid" "$lab/munged.pid"; do
        end_daemon "$pid_file"
    done
    rm -rf "$lab"
}

case ${1:-} in
start) start "${2:-}" ;;
stop) stop ;;
*) die "usage: $0 start N | stop" ;;
esac
