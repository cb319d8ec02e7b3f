#!/bin/sh
# Installs what the tests use and pip does not have, where it is missing and this user may: Debian, Ubuntu. It never fails;
# the tests of what stays missing are skipped, and say so.
set -u

missing=""
PATH="$PATH:/usr/sbin:/sbin" command -v nginx > /dev/null || missing="$missing nginx"
for program in munged slurmctld slurmd sbatch; do  # real Slurm, for tests/integration/slurm
  PATH="$PATH:/usr/sbin:/sbin" command -v $program > /dev/null || { missing="$missing munge slurm-wlm"; break; }
done
[ -n "$missing" ] || exit 0

if ! command -v apt-get > /dev/null; then
  echo "note: no apt-get here to install$missing; its tests are skipped" >&2
  exit 0
fi
as_root=""
[ "$(id -u)" = 0 ] || as_root="sudo -n"
echo "installing$missing for the tests"
# RUNLEVEL=1: the package does not start a server of its own.
if ! { $as_root apt-get update -qq \
    && $as_root env RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing; } \
    > /dev/null; then
  echo "note: cannot install$missing (root is needed, and the package index); its tests are skipped" >&2
fi
