"""The `tuneyard` command. Knows specs and client; loads everything else by name when asked to."""
