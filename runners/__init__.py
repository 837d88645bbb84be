"""What happens inside a job's process: finetune, infer, download, probe.

The only package that imports torch, transformers and peft. It imports specs and store/folder.py,
and knows no database, no queue, no network and no secrets. docs/runner-protocol.md is its contract.
"""
