"""All that the broker may know of a message: frames, kinds, routing headers. No torch, no keys."""
