"""The control plane, on trio: sockets, the command registry, events, job lifetimes, and the only bridge to threads.

Everything here runs on the control thread; what blocks goes through :mod:`qmpd.control.bridge`. May use all rooms
below, and knows no command: those register themselves (:mod:`qmpd.commands`).
"""
