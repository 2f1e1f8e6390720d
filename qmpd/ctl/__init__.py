"""qmpctl, the command line for people, and the small client library under it.

``client`` is a QMP client for trio; the other modules are the program: ``cli`` the arguments, ``commands`` what each
subcommand does, ``commit`` and ``follow`` the life of a job as seen from outside, ``meter`` and ``display`` its progress,
``chain`` and ``text`` the output. The room knows ``wire`` alone: a client sees what is on the socket, nothing else, and
so works with qemu-storage-daemon too. One trio thread; the only worker thread waits for an answer at the keyboard.
"""
