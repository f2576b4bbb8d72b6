"""placeholder"""


def write(found):
    pass
