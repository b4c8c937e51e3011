"""Handshake and sealed records between a client and a server. No torch, no sockets, no files."""
