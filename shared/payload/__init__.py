"""What client and server say to each other inside the seal: messages, and tensors as raw frames."""
