"""qmpctl, the command line for people, and the small client library under it.

``client`` is a QMP client for trio. The rest is the program: ``cli`` the arguments, ``commands`` the short subcommands,
``commit`` and ``watch`` the long ones, ``follow`` the life of a job as seen from outside, ``meter`` and ``display`` its
progress, ``chain`` and ``text`` the output. The room knows ``wire`` alone: a client sees what is on the socket, nothing
else, and so works with qemu-storage-daemon too. One trio thread; the only worker waits for an answer at the keyboard.
"""
