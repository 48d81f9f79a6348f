"""Recipes: fields, files, flags, and what they refuse."""

import argparse
import os
from dataclasses import asdict, fields

import pytest

from fuseformer.tuning.recipe import (
    PATHS,
    Recipe,
    add_flags,
    differences,
    flags_given,
    merged,
    read_recipe,
)


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_a_written_recipe_reads_back_equal(tmp_path):
    recipe = Recipe(
        corpus=("a b.txt", 'quo"te.txt', "ü🙂\x7f\t\\.txt"),
        learning_rate=3e-5,
        tasks=("translation",),
    )
    recipe = recipe.with_absolute_paths()
    path = write(tmp_path / "recipe.toml", recipe.to_toml())
    assert read_recipe(path)[0] == recipe


def test_a_file_sets_what_it_names(tmp_path):
    recipe, given = read_recipe(
        write(tmp_path / "r.toml", '\ufeffsteps = 7\r\ncorpus = ["x.txt", "/y.txt"]\n')
    )
    files = (str(tmp_path / "x.txt"), "/y.txt")  # a relative name counts from the file's folder
    assert (recipe.steps, recipe.corpus, recipe.width) == (7, files, Recipe().width)
    assert set(given) == {"steps", "corpus"}
    assert differences(recipe, Recipe()) == ["corpus", "steps"]


def test_every_field_has_a_flag_that_sets_it():
    parser = argparse.ArgumentParser()
    add_flags(parser, Recipe())
    assert flags_given(parser.parse_args([])) == {}
    values = {
        "objective": "masked",
        "language": "de",
        "dtype": "bfloat16",
        "weighting": "record",
        "truncation": "input",
        "activation": "gelu",
        "device": "cpu",
        "tasks": ["writing"],
        "repeat": ["writing=3"],
        "dropout": 0.25,
        "held_out_share": 0.25,
        "beta1": 0.5,
        "beta2": 0.5,
        "final_rate": 0.5,
        "masked_share": 0.5,
    }
    for spec in fields(Recipe):
        default = getattr(Recipe(), spec.name)
        value = values.get(spec.name, ["x"] if isinstance(default, tuple) else default * 2)
        if spec.name in ("warmup_steps", "seed"):
            value = 5
        words = [str(v) for v in value] if isinstance(value, list) else [str(value)]
        flag = "--" + spec.name.replace("_", "-")
        given = flags_given(parser.parse_args([flag, *words]))
        if spec.name in PATHS:
            value = (os.path.abspath("x"),)
        assert given == {spec.name: value}
        if isinstance(default, tuple):
            twice = flags_given(parser.parse_args([flag, *words, flag, *words]))
            assert twice == {spec.name: 2 * value}
        changed = merged(Recipe(), given, "flags")
        assert differences(changed, Recipe()) == [spec.name]
    assert "learning rate at the end" in parser.format_help()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepz = 3", "unknown field 'stepz'"),
        ("[model]\nwidth = 3", "unknown field 'model'"),
        ("steps = 0", "steps: got 0, expected a whole number from 1 up"),
        ("steps = 2.5", "steps: got 2.5, expected a whole number"),
        ("steps = true", "steps: got True, expected a whole number"),
        ('steps = "many"', "steps: got 'many', expected a whole number"),
        ("corpus = 'x.txt'", "corpus: got 'x.txt', expected a list of strings"),
        ("objective = 'mystical'", "objective: got 'mystical', expected one of causal"),
        ("tasks = ['singing']", "tasks: got 'singing', expected one of question_answering"),
        ("tasks = []", "tasks: got none"),
        ("repeat = ['classification']", "repeat: got 'classification', expected TASK=TIMES"),
        ("repeat = ['writing=0']", "repeat: got 'writing=0', expected TASK=TIMES"),
        ("dropout = 1.0", "dropout: got 1.0"),
        ("width = 30", "width: got 30, expected a multiple"),
        ("learning_rate = 0.0", "learning_rate: got 0.0"),
        ("learning_rate = nan", "learning_rate: got nan"),
        ("beta2 = 1", "beta2: got 1, expected a number below 1"),
        ("clip_norm = -1", "clip_norm: got -1"),
        ("masked_share = 0", "masked_share: got 0"),
        ("held_out_share = 1", "held_out_share: got 1"),
        (f"seed = {2**63 - 1}0", "seed: got"),
        ("repeat = ['writing=1', 'writing=2']", "repeat: got 'writing' twice"),
        ("repeat = ['classification=²']", "repeat: got 'classification=²'"),
        ("steps =", "not TOML"),
    ],
)
def test_bad_recipes_name_file_field_and_value(text, message, tmp_path):
    path = write(tmp_path / "bad.toml", text)
    with pytest.raises(ValueError, match=r"bad\.toml: ") as error:
        read_recipe(path)
    assert message in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"none\.toml: cannot be read \(No such file"):
        read_recipe(tmp_path / "none.toml")


def test_the_model_gets_the_recipes_sizes():
    config = asdict(Recipe(width=64, layers=2).model_config(vocab_size=999))
    assert (config["vocab_size"], config["width"], config["layers"]) == (999, 64, 2)
