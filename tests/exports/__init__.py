"""Users of NBD exports: real programs, crowds, liars and sleepers. All of it an outsider's view of a real process."""
