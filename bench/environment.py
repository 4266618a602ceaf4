"""What a record says of its place, by the name that this room uses; the code is `adrec.environment`."""

from adrec.environment import (
    Accelerator,
    Environment,
    Frozen,
    Machine,
    Revision,
    printable_command,
    read_environment,
)

__all__ = ["Accelerator", "Environment", "Frozen", "Machine", "Revision", "printable_command", "read_environment"]
