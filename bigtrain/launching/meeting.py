"""``python -m bigtrain.launching.meeting``: where the ranks of a Slurm job meet, as ``ADDRESS PORT``.

The batch script runs it, on the job's first node, where rank 0 will be: so the port is one that is free there, in this
job and in the next start of it. Slurm itself names the nodes, whose names may be odd, and knows their addresses.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys

from bigtrain.config.errors import UserError
from bigtrain.launching.environment import free_port


def first_node(node_list: str) -> str:
    """The first of a list such as ``rack[1-2]n[01-16],gpu-a``. Raises UserError where Slurm cannot read it."""
    first = scontrol("show", "hostnames", node_list).split("\n", 1)[0]
    if not first:  # it ends well all the same
        raise UserError(f"SLURM_JOB_NODELIST={node_list}: scontrol show hostnames cannot read it.")
    return first


def address_of(node: str) -> str:
    """`node` where that is a host's name too, else the address that Slurm has for it: sites may name nodes as they
    like."""
    try:
        socket.getaddrinfo(node, None)
    except OSError:
        return fields_of(scontrol("--oneliner", "show", "node", node)).get("NodeAddr", node)
    return node


def fields_of(line: str) -> dict[str, str]:
    """``NAME=VALUE NAME=VALUE ...`` as ``scontrol --oneliner show`` prints it."""
    pairs = (field.partition("=") for field in line.split())
    return {name: value for name, _, value in pairs}


def scontrol(*arguments: str) -> str:
    command = ["scontrol", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or getattr(error, "stdout", None) or error
        raise UserError(f"{' '.join(command)}: {str(said).strip()}") from error
    return done.stdout.strip()


def main() -> int:
    try:
        node_list = os.environ.get("SLURM_JOB_NODELIST")
        if not node_list:
            raise UserError("SLURM_JOB_NODELIST is not set: this runs in the batch script of a Slurm job.")
        print(address_of(first_node(node_list)), free_port())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
