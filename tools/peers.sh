#!/usr/bin/env bash
# The programs that the tests compare qmpd with. Root gets the missing ones installed, others are told how.
# `peers.sh long` adds what only the long tests need: an emulator, a kernel and a shell for a guest, and fio.
# Never fails by itself: a test that misses its program skips with a reason, or fails where CI is set.
set -euo pipefail

packages=()
need() { # need PACKAGE COMMAND...: the package is missing unless the command succeeds
  local package=$1
  shift
  "$@" >/dev/null 2>&1 || packages+=("$package")
}
need qemu-utils sh -c 'command -v qemu-img && command -v qemu-io && command -v qemu-nbd'
need libnbd-bin sh -c 'command -v nbdinfo && command -v nbdcopy'
need python3-libnbd sh -c '/usr/bin/python3 -c "import nbd"'
need socat sh -c 'command -v socat'
need openssl sh -c 'command -v openssl'
need xfsprogs sh -c 'command -v mkfs.xfs'
if [ "${1:-}" = long ]; then
  need fio sh -c 'command -v fio'
  need busybox-static sh -c 'command -v busybox'
  need linux-image-cloud-amd64 sh -c 'ls /boot/vmlinuz-*-cloud-amd64'
  need qemu-system-x86 sh -c 'command -v qemu-system-x86_64'
fi
[ ${#packages[@]} -gt 0 ] || exit 0

if [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null; then
  echo "Installing ${packages[*]}"
  export DEBIAN_FRONTEND=noninteractive
  install=(apt-get install -qq -y --no-install-recommends)
  # Where one program of QEMU is from the backports, the others must be too.
  backports=(-t "$(. /etc/os-release && echo "${VERSION_CODENAME:-stable}")-backports")
  all() { "${install[@]}" "${packages[@]}" || "${install[@]}" "${backports[@]}" "${packages[@]}"; }
  { all || { apt-get update -qq && all; }; } </dev/null >/dev/null 2>&1 && exit 0
  echo "apt-get could not install them."
fi
echo "For all of the tests, type: sudo apt-get install ${packages[*]}"
