"""What a job is, without an event loop.

``table`` holds the life cycle as data, ``job`` the base class with its phases, ``cell`` the control cell that a
worker thread and the control thread share, ``ratelimit`` the arithmetic of speed limits, ``plan`` what a commit will
touch, and ``commit`` the intermediate commit itself.

Threads: a job's body runs on a worker, everything else on the control thread. May import ``graph`` and ``block``;
knows no socket, no event loop and no command. ``control.manager`` gives jobs their life.
"""
