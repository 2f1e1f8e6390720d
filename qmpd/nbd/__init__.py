"""The NBD protocol without I/O: the handshake as a table of options, packing of requests and replies."""
