"""placeholder"""


class settings:
    enabled = False
