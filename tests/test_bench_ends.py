"""How `trt-wan bench` ends where the machine is in the way: a folder or disk that cannot be written to, processes
that are killed, and settings that are not for this machine.
"""

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from trt_wan.cli.main import cli

TINY = "--model tiny --size 64x48 --window 13 --executor onnxruntime"


def bench(arguments: str) -> Result:
    return CliRunner().invoke(cli, ["bench", *arguments.split()])


@pytest.mark.parametrize(
    "command", ["", "--repeat 2", "--gpus 1,2", "window", "sweep", "quality", "vae --weights ."]
)
def test_a_folder_that_cannot_be_written_to_is_refused_before_the_work(command: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "out"
    refused = bench(f"{command} {TINY} --out {out}")
    assert refused.exit_code == 1 and refused.stdout == ""
    cure = "Check the disk, or write to another one."
    assert refused.stderr == f"Error: {out}/bench cannot be written (Not a directory).\n{cure}\n"
