"""What is wrong with a kernel, and what this emulator does not know."""


class Fault(Exception):
    """The program does what a GPU forbids, or what it leaves undefined."""


class Unsupported(Exception):
    """An instruction, modifier or host operation that has no entry here."""
