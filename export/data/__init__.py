"""The data files of the host side: the built-in questions and texts.

This room knows nothing of what they are used for.
"""
