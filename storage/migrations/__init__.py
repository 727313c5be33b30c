"""Schema revisions, oldest first in `versions`; storage.revisions runs them.

A new one is a module `vNNNN_what.py` with the next number as its revision, and with the tables' change spelled out:
a revision never imports storage.schema, which moves on without it. No downgrades: restore a backup instead.
"""
