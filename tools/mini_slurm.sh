#!/usr/bin/env bash
# A real Slurm on this machine: munge, slurmctld and one slurmd per node, in a directory of its own.
#   tools/mini_slurm.sh start [NODES]    starts them (default 4 nodes) and prints the line to source
#   tools/mini_slurm.sh status           what runs
#   tools/mini_slurm.sh stop             ends them and removes the directory
# MINI_SLURM_DIR chooses the directory (default /tmp/mini_slurm), MINI_SLURM_NUMBER (default 0, at most 17) the ports and
# the first job's number: clusters of different directories and numbers run side by side. Needs root, and Debian's
# packages slurmctld slurmd slurm-client munge.
set -euo pipefail
dir=${MINI_SLURM_DIR:-/tmp/mini_slurm}
number=${MINI_SLURM_NUMBER:-0}
port=$((16817 + 10 * number))         # of the controller; the nodes' are from first_port on
first_port=$((17001 + 10 * number))
export SLURM_CONF=$dir/slurm.conf

need() {
    local missing=()
    for program in munged slurmctld slurmd srun; do
        command -v "$program" > /dev/null || missing+=("$program")
    done
    if [ ${#missing[@]} -gt 0 ]; then
        echo "missing: ${missing[*]}. Install them: apt-get install slurmctld slurmd slurm-client munge" >&2
        exit 1
    fi
    if [ "$(id -u)" != 0 ]; then
        echo "the daemons run as root here, you are $(id -un). Use root, for example inside a container." >&2
        exit 1
    fi
}

ours() { grep -qs "^ClusterName=mini$" "$SLURM_CONF"; }

write_config() {
    local nodes=$1 cpus memory_mib
    if [ "$nodes" -gt 10 ] && [ "$number" -gt 0 ]; then
        echo "a numbered cluster has room for 10 nodes, not $nodes" >&2
        exit 1
    fi
    cpus=$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc) # the cores, not the threads that who starts this has
    memory_mib=$(($(awk '/MemTotal/ {print $2}' /proc/meminfo) / 1024 * 8 / 10))
    if [ -e "$SLURM_CONF" ] && ! ours; then
        echo "$SLURM_CONF is of another Slurm. Set MINI_SLURM_DIR to a directory of its own." >&2
        exit 1
    fi
    mkdir -p "$dir/state" "$dir/log"
    cat > "$SLURM_CONF" << CONF
ClusterName=mini
SlurmctldHost=$(hostname)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=cred_expire=5
SchedulerParameters=sched_interval=5,sched_min_interval=1000000
SlurmctldPort=$port
FirstJobId=$((1 + 10000 * number))
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/%n
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/%n.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
JobRequeue=1
KillWait=5
SlurmdTimeout=10
NodeName=n[1-$nodes] NodeHostname=$(hostname) NodeAddr=127.0.0.1 Port=$first_port-$((first_port + nodes - 1)) CPUs=$cpus RealMemory=$memory_mib
PartitionName=debug Nodes=n[1-$nodes] Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:4
CONF
}

start() {
    local nodes=${1:-4} node
    need
    if [ -f "$SLURM_CONF" ] && scontrol ping 2> /dev/null | grep -q UP; then
        echo "already running in $dir" >&2
    else
        write_config "$nodes"
        start_munge
        slurmctld -f "$SLURM_CONF"
        for node in $(seq "$nodes"); do slurmd -f "$SLURM_CONF" -N "n$node"; done
        wait_until_idle "$nodes"
    fi
    echo "export SLURM_CONF=$SLURM_CONF"
}

start_munge() { # one for all clusters; two may start at once
    mkdir -p /run/munge /var/log/munge && chown munge /run/munge /var/log/munge
    (
        flock 9
        [ -f /etc/munge/munge.key ] || mungekey --create
        pgrep -x munged > /dev/null || runuser -u munge -- munged 9>&-
    ) 9> /run/munge/mini_slurm.lock
}

wait_until_idle() {
    for _ in $(seq 60); do
        [ "$(sinfo --noheader --Node --format=%T | grep -c idle || true)" = "$1" ] && return
        sleep 0.5
    done
    echo "the nodes are not idle after 30 s:" >&2
    sinfo >&2
    tail -n 5 "$dir"/log/*.log >&2
    exit 1
}

wait_for_end() { # and no longer than 5 s
    for _ in $(seq 50); do
        kill -0 "$1" 2> /dev/null || return 0
        sleep 0.1
    done
    kill -9 "$1" 2> /dev/null || true
}

stop() {
    local processes process
    if ours; then
        scancel --state=RUNNING 2> /dev/null || true
        processes=$(cat "$dir"/*.pid 2> /dev/null) || true # now: who is asked to end removes its file, and may take long
        for process in $processes; do kill "$process" 2> /dev/null || true; done
        for process in $processes; do wait_for_end "$process"; done
        rm -rf "$dir"
    fi
}

case ${1:-} in
    start) start "${2:-4}" ;;
    status) sinfo && squeue ;;
    stop) stop ;;
    *) sed -n '2,8s/^# \{0,1\}//p' "$0" && exit 2 ;;
esac
