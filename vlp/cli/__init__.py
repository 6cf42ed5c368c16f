"""The command line: `vlp COMMAND ...`. The only part of `vlp` that puts everything together, tasks included.

A command's own options are read by argparse; every other `--a.b.c VALUE` belongs to its config tree (`vlp.flags`).
What a command needs is imported when it is chosen, so that help and mistakes come at once.
"""

from vlp.cli.dispatch import main

__all__ = ["main"]
