"""What `bench versions` compiles, and that it fails where it must."""

import subprocess
import sys

import pytest
import torch
import triton

from bench import versions
from bench.launches import launches
from fuseformer.ops.registration import autocasts


@pytest.mark.parametrize("capability", versions.CAPABILITIES)
def test_every_kernel_is_covered_with_each_of_its_options(capability):
    chosen, everything = versions.covering(capability), launches(capability)
    assert {x.kernel for x in chosen.values()} == {x.kernel for x in everything.values()}
    for launch in everything.values():
        assert all(
            any(feature in versions.features(x) for x in chosen.values())
            for feature in versions.features(launch)
        )
    assert len(chosen) < len(everything) / 3


def test_a_launch_that_does_not_compile_is_counted_and_named(monkeypatch, capsys):
    name, launch = next(iter(launches(80).items()))
    monkeypatch.setattr(versions, "covering", lambda capability: {name: launch})

    def refuse(*_args, **_options):
        raise TypeError("cannot convert None to tensor")

    monkeypatch.setattr(versions.triton, "compile", refuse)
    assert versions.compile_all() == len(versions.CAPABILITIES)
    assert f"FAULT {name} on sm_90: TypeError" in capsys.readouterr().err


def test_a_version_that_cannot_be_had_and_one_that_fails_end_with_status_1(monkeypatch, capsys):
    def missing(version):
        raise subprocess.CalledProcessError(1, "pip")

    monkeypatch.setattr(versions, "installed", missing)
    assert versions.main(["--triton", "0.0.1"]) == 1
    assert "triton 0.0.1: cannot be had here" in capsys.readouterr().out
    monkeypatch.setattr(versions.sys, "executable", "/bin/false")
    assert versions.main(["--triton", triton.__version__]) == 1
    assert "does not compile every kernel" in capsys.readouterr().out
    assert sys.executable == "/bin/false"


def test_autocast_is_asked_for_in_a_way_that_torch_2_11_traces(monkeypatch):
    def untraceable(kind):
        raise AssertionError(kind)

    monkeypatch.setattr(torch.amp, "is_autocast_available", untraceable)
    assert not autocasts(torch.empty(1))
    assert not autocasts(torch.empty(1, device="meta"))
    with torch.autocast("cpu"):
        assert autocasts(torch.empty(1))
        assert not autocasts(torch.empty(1, device="meta"))
