import pytest
import torch

from fuseformer._version import __version__
from fuseformer.cli import main


def test_info_names_versions_and_why_a_backend_cannot_run(capsys):
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert f"fuseformer {__version__}" in text
    assert torch.__version__.split("+")[0] in text
    assert "reference    can run" in text
    assert "triton       no: Triton kernels do not run on cpu tensors" in text


@pytest.mark.parametrize("arguments", [[], ["sing"], ["info", "--loud"]])
def test_bad_command_lines_exit_with_2_and_usage(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage: fuseformer" in capsys.readouterr().err
