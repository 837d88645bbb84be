"""What a job is, as data: specs, states, events, errors, messages, exit codes, ids, settings.

The ground floor: it imports nothing else of ours and knows no database, queue or tensor.
"""
