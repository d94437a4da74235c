#!/usr/bin/env bash
# Start a Slurm of one node on this machine, from Debian's packages: to try the profile "slurm" where no cluster is at hand.
#
#     workflow/slurm-node.sh          # as root; installs what is missing (Debian, Ubuntu)
#     workflow/slurm-node.sh stop
#
# No accounting database and no control groups, so it also runs in a container.
set -euo pipefail

if [ "${1:-start}" = stop ]; then
  scontrol shutdown
  exit
fi
if scontrol ping >/dev/null 2>&1 && srun -n1 true >/dev/null 2>&1; then
  echo "Slurm runs already"
  exit
fi
if ! command -v slurmctld >/dev/null || ! command -v munged >/dev/null; then
  apt-get -q update
  DEBIAN_FRONTEND=noninteractive apt-get -q install -y --no-install-recommends slurm-wlm munge
fi
if [ -e /etc/slurm/slurm.conf ] && ! grep -q '^ClusterName=wda-one-node$' /etc/slurm/slurm.conf; then
  echo "/etc/slurm/slurm.conf is there already and not from here: this machine has its own Slurm" >&2
  exit 1
fi

host=$(hostname)
memory=$(awk '/^MemTotal:/ {print int($2 / 1024 * 0.9)}' /proc/meminfo)
mkdir -p /etc/slurm /var/lib/slurm/slurmctld /var/lib/slurm/slurmd /var/log/slurm /run/munge
chown munge: /run/munge
cat >/etc/slurm/slurm.conf <<END
ClusterName=wda-one-node
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SchedulerType=sched/backfill
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
ReturnToService=2
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
StateSaveLocation=/var/lib/slurm/slurmctld
SlurmdSpoolDir=/var/lib/slurm/slurmd
SlurmctldLogFile=/var/log/slurm/slurmctld.log
SlurmdLogFile=/var/log/slurm/slurmd.log
SlurmdParameters=config_overrides
MinJobAge=3600
NodeName=$host NodeAddr=127.0.0.1 CPUs=$(nproc) RealMemory=$memory State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
END

pgrep -x munged >/dev/null || runuser -u munge -- /usr/sbin/munged
pgrep -x slurmctld >/dev/null || slurmctld
pgrep -x slurmd >/dev/null || { sleep 2; slurmd; }
for _ in $(seq 30); do
  if timeout 10 srun -n1 true 2>/dev/null; then
    sinfo
    exit
  fi
  sleep 1
done
echo "Slurm did not come up: see /var/log/slurm" >&2
exit 1
