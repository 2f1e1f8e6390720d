"""The same random commands to qmpd and to qemu-storage-daemon: do they accept and refuse the same, and end up alike?"""
