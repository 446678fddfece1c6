"""What `nightly check` says, whatever a source holds."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from flows import cli


def test_the_command_says_one_sentence_and_keeps_stdout_for_its_own(tmp_path: Path) -> None:
    (tmp_path / "load.py").write_text(
        "import numpy as np\n\n\ndef rows():\n    print('reading')\n"
        "    return np.random.default_rng(0).normal(size=(40, 3)), ['a', None, 'b', 'a'] * 10\n"
    )
    (tmp_path / "gaps.yaml").write_text(f"name: gaps\ndata:\n  source: {tmp_path}/load.py:rows\nmodel: mlp\n")
    finished = subprocess.run(
        [sys.executable, "-c", "from flows.cli import main; main()", "check", "gaps", "--json"],
        env=os.environ | {"NIGHTLY_JOBS": str(tmp_path), "NIGHTLY_HOME": str(tmp_path / "home")},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    printed, sentence = finished.stderr.splitlines()
    assert (finished.returncode, finished.stdout, printed) == (1, "", "reading")
    assert sentence.startswith(
        f"nightly: {tmp_path}/load.py:rows: the target must have a value in every row, found none"
    )


def test_an_error_that_nobody_expected_is_one_sentence_and_a_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def fails() -> None:
        raise ValueError("one\ntwo")

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(cli, "app", fails)
    with pytest.raises(SystemExit, match="1"):
        cli.main()
    (path,) = tmp_path.iterdir()
    assert capsys.readouterr().err == (
        "nightly: this is a fault of Nightly Tuner's own, found ValueError: one; report it with the traceback in "
        f"{path}\n"
    )
    assert path.read_text().startswith("Traceback (most recent call last)")
