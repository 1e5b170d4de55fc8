"""A user of whom the system knows neither a name nor a home, as in containers."""

import os
import subprocess
import sys
from pathlib import Path

# Run as another user, the interpreter itself might be out of reach.
CODE = """
import pwd, sys

def unknown(user):
    raise KeyError(f"getpwuid(): uid not found: {user}")

pwd.getpwuid = unknown
sys.argv = ["atmossl", *sys.argv[1:]]
from atmossl.cli import main
import getpass, cartopy, matplotlib, torch._inductor.runtime.cache_dir_utils as inductor
inductor.default_cache_dir(), getpass.getuser()
sys.exit(main())
"""


def test_a_user_without_name_and_home_needs_a_cache_alone(tmp_path: Path) -> None:
    environment = {
        "PATH": os.environ["PATH"], "ATMOSSL_CACHE": str(tmp_path), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [
        "data",
        "stats",
        "experiment=quickstart",
        "stream.atmosphere.variables=[temperature]",
    ]
    done = subprocess.run(
        [sys.executable, "-c", CODE, *command], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    assert [path.suffix for path in tmp_path.glob("statistics-*")] == [".json"]
