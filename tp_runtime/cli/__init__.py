"""The `tp-runtime` program."""
