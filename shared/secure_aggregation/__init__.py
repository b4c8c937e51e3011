"""Sums of clients' updates of which the server sees nothing but the sum. No torch, no sockets, no files.

    terms           what all clients of a sum agree on beforehand
    fixed_point     float32 values as integers modulo 2^32 or 2^64, and back
    client, server  SecAgg and SecAgg+: one class a side, one method a phase; clients may drop out
    ring            two shared secrets a client, one message a round; for groups that hardly change
    group_key       a key among the clients that keeps even the sum from the server
    messages        what travels, typed and bounded

What is promised against whom: docs/adr/0012-secure-aggregation.md.
"""
