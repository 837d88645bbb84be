"""What is refused before a GPU is spent: data sets, model folders' headers, combinations.

Knows specs and store; no torch, no database. Files of users are read by a child process with
limits (``check_file``), never by the API itself.
"""
