"""A virtual machine whose only program writes files, and checks all of them, over and over.

The kernel is Debian's, the rest is busybox; the initial RAM disk is made here. The machine and the test talk over the
serial line: the guest says what it has done, and any line makes it unmount its disk and switch off.
"""

from __future__ import annotations

import contextlib
import gzip
import select
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.tools import need

#: Seconds for the slowest thing, booting by software emulation on a busy machine.
PATIENCE = 300.0

#: In the order in which they need each other.
_MODULES = (
    "drivers/virtio/virtio_ring.ko",
    "drivers/virtio/virtio.ko",
    "drivers/virtio/virtio_pci_legacy_dev.ko",
    "drivers/virtio/virtio_pci_modern_dev.ko",
    "drivers/virtio/virtio_pci.ko",
    "drivers/block/virtio_blk.ko",
)

# Every round writes one of eight files anew and reads all of them back from the disk, not from the page cache.
_INIT = """#!/bin/busybox sh
/bin/busybox --install -s /bin
mkdir -p /proc /sys /dev /disk /sums
mount -t proc proc /proc; mount -t sysfs sysfs /sys; mount -t devtmpfs devtmpfs /dev
for module in {modules}; do insmod /modules/$module || echo "GUEST broken insmod $module"; done
mke2fs -F /dev/vda >/dev/null && mount -t ext4 /dev/vda /disk || echo "GUEST broken mount"
echo "GUEST mounted"
( read line; touch /stop ) </dev/ttyS0 &
round=0
while [ ! -e /stop ]; do
  name=$((round % 8))
  rm -f /disk/$name /sums/$name
  seq $round $((round + 60000 + round % 5 * 10000)) | tee /disk/$name | md5sum | sed "s|-|/disk/$name|" >/sums/$name
  sync
  echo 3 >/proc/sys/vm/drop_caches
  cat /sums/* | md5sum -c -s && echo "GUEST round $round" || echo "GUEST broken sums in round $round"
  dmesg | grep -E "I/O error|EXT4-fs error|EXT4-fs warning" && echo "GUEST broken disk"
  round=$((round + 1))
done
umount /disk && echo "GUEST finished" || echo "GUEST broken umount"
poweroff -f
"""


def kernel() -> tuple[Path, Path]:
    """The newest of Debian's kernels for clouds and its modules; else the test is skipped, or fails where CI is set."""
    need("qemu-system-x86_64", "busybox")
    images = sorted(Path("/boot").glob("vmlinuz-*-cloud-amd64"))
    if not images:
        need("linux-image-cloud-amd64")
    return images[-1], Path("/lib/modules") / images[-1].name.removeprefix("vmlinuz-") / "kernel"


def ram_disk(modules: Path) -> bytes:
    """The initial RAM disk: busybox, the modules for a virtio disk, the program."""
    names = [Path(module).name for module in _MODULES]
    shell = subprocess.run(["sh", "-c", "command -v busybox"], capture_output=True, text=True, check=True)
    files = {
        "init": _INIT.format(modules=" ".join(names)).encode(),
        "bin/busybox": Path(shell.stdout.strip()).read_bytes(),
    }
    files |= {f"modules/{Path(module).name}": (modules / module).read_bytes() for module in _MODULES}
    archive = b"".join(_member(directory, 0o040755, b"") for directory in ("bin", "modules"))
    archive += b"".join(_member(name, 0o100755, data) for name, data in files.items())
    return gzip.compress(archive + _member("TRAILER!!!", 0, b""), 1)


def _member(name: str, mode: int, data: bytes) -> bytes:
    """One file of a cpio archive in the "newc" format."""
    numbers = [0, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0]
    header = b"070701" + b"".join(b"%08x" % number for number in numbers) + name.encode() + b"\0"
    return header + bytes(-len(header) % 4) + data + bytes(-len(data) % 4)


@dataclass
class Guest:
    """A running machine."""

    process: subprocess.Popen[bytes]
    rounds: int = -1  # the last round that is known to have ended well
    said: list[str] = field(default_factory=list)
    _rest: bytes = b""

    def more_rounds(self, count: int) -> None:
        """Until the guest has done so many whole rounds from now on."""
        self._until(f"GUEST round {self.rounds + 1 + count}")

    def finish(self) -> None:
        """Let the guest unmount its disk and switch off."""
        assert self.process.stdin is not None
        self.process.stdin.write(b"\n")
        self.process.stdin.flush()
        self._until("GUEST finished")
        assert self.process.wait(PATIENCE) == 0

    def _until(self, wanted: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while True:
            line = self._line(deadline)
            self.said.append(line)
            assert "GUEST broken" not in line, "\n".join(self.said[-30:])
            if line.startswith("GUEST round "):
                self.rounds = int(line.split()[2])
            if line == wanted:
                return

    def _line(self, deadline: float) -> str:
        assert self.process.stdout is not None
        while b"\n" not in self._rest:
            ready, _, _ = select.select([self.process.stdout], [], [], max(deadline - time.monotonic(), 0))
            data = self.process.stdout.read1(65536) if ready else b""  # type: ignore[attr-defined]
            assert data, "the guest fell silent:\n" + "\n".join(self.said[-30:]) + self._rest.decode(errors="replace")
            self._rest += data
        line, self._rest = self._rest.split(b"\n", 1)
        return line.decode(errors="replace").rstrip("\r")


@contextlib.contextmanager
def boot(directory: Path, disk: str) -> Iterator[Guest]:
    """A machine with the disk of that URL, running until the block is left."""
    image, modules = kernel()
    (directory / "initrd").write_bytes(ram_disk(modules))
    machine = ["-machine", "pc,accel=tcg", "-cpu", "max", "-m", "192", "-nodefaults", "-no-reboot", "-display", "none"]
    start = ["-kernel", image, "-initrd", directory / "initrd", "-append", "console=ttyS0 quiet panic=-1"]
    drive = ["-drive", f"if=none,id=disk,format=raw,file={disk}", "-device", "virtio-blk-pci,drive=disk"]
    argv = ["qemu-system-x86_64", *machine, *start, *drive, "-serial", "stdio"]
    process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        yield Guest(process)
    finally:
        process.kill()
        process.communicate()
