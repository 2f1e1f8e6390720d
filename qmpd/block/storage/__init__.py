"""Where bytes come to rest: image files, host devices, and nowhere. Each is a protocol driver (no children)."""
