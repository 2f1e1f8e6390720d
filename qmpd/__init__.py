"""qmpd: a QMP-compatible daemon that looks after the disk images of virtual machines."""

__version__ = "0.1.0"

#: The QMP level spoken, reported as ``version.qemu`` (major, minor, micro).
QMP_LEVEL = (10, 0, 2)
