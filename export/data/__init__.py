"""The data files of the host side: the built-in questions and texts."""
