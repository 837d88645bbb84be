"""The tables (classes ``…Row``) and the transactions that change them.

A transaction is one function that takes a connection and never commits; its caller opens
``with db.begin() as tx``. Knows specs; knows no HTTP, no Celery, no files, no tensors.
"""
