"""Exports of nodes: the transmission loop for worker threads, and the gate that graph changes drain."""
