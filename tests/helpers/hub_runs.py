"""Commands against the stand-in for the Hub."""

import subprocess
import sys
from types import SimpleNamespace


def run(server, home, *command, token=None, **more):
    """A process that knows of no package but those installed, and no Hub but the stand-in; its standard output."""
    environment = server.environment(home, token=token, OMP_NUM_THREADS="1", **more)
    done = subprocess.run(
        [sys.executable, *map(str, command)], env=environment, cwd=home, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return SimpleNamespace(out=done.stdout, err=done.stderr)
