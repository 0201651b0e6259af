"""Share code between tests: ranks and commands in forked processes, a tiny text data set, tiny models."""
