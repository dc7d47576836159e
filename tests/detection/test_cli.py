"""The command line: what words become, and how errors read."""

import json
import re
import subprocess
import sys

import pytest

from fastcov_detection import cli
from fastcov_detection.config import SearchConfig, TrainConfig, preset, save_config


@pytest.fixture
def searched(monkeypatch):
    """Catches the configuration of a search instead of running it."""
    caught = {}

    def catch(config, out, results, quiet, engine=None):
        caught.update(config=config, out=out)

    monkeypatch.setattr(cli, "_run_search", catch)
    return caught


def test_search_options_become_a_configuration(searched):
    words = ["search", "--data", "mini", "--model", "maskrcnn_resnet50_fpn", "--rounds", "2"]
    words += ["--rules", "share,dof", "--seeds", "4", "--arms", "searched,uniform"]
    words += ["--max-params", "1800000", "--jobs", "3", "--vary", "backbone,fpn"]
    words += ["--set", "steps=300", "--set", "model.norm=group", "--out", "x"]
    assert cli.main(words) == 0
    config = searched["config"]
    assert isinstance(config, SearchConfig)
    assert config.train.model.name == "maskrcnn_resnet50_fpn"
    assert config.train.model.norm == "group"
    assert config.train.model.width_multiplier == preset("mini").model.width_multiplier
    assert config.train.steps == 300
    assert (config.rounds, config.seeds, config.jobs) == (2, 4, 3)
    assert config.rule == "share"
    assert config.arms == ("searched", "uniform", "searched-dof")
    assert config.max_params == 1_800_000
    assert config.vary == ("backbone", "fpn")


def test_demo_is_the_mini_search_of_three_arms(searched):
    assert cli.main(["demo"]) == 0
    config = searched["config"]
    assert searched["out"] == "runs/demo"
    assert config.train == preset("mini")
    assert config.train.track != "none"
    assert config.train.model.name == "fasterrcnn_resnet50_fpn"
    assert config.arms == ("baseline", "searched", "uniform")
    assert (config.seeds, config.jobs) == (1, 2)


def test_folders_have_defaults(searched):
    assert cli.main(["search"]) == 0
    assert searched["out"] == "runs/search"


@pytest.fixture
def parse(monkeypatch):
    """Settings that the train command would run with."""
    caught = {}

    def train(settings: TrainConfig, out: str = "runs/train", seed: int = 0) -> None:
        caught.update(settings=settings, out=out)

    monkeypatch.setitem(cli.COMMANDS, "train", train)

    def words_to_settings(*words):
        assert cli.main(["train", "--out", "x", *words]) == 0
        return caught["settings"]

    return words_to_settings


def test_settings_come_from_preset_file_and_options_in_this_order(tmp_path, parse):
    assert parse() == preset("mini")
    assert parse("--data", "/data/coco").batch_size == preset("coco").batch_size
    assert parse("--data", "/data/coco").data.name == "/data/coco"
    assert parse("--data", "/data/small", "--preset", "small").steps == preset("small").steps
    save_config(TrainConfig(steps=77, lr=0.5), tmp_path / "own.json")
    config = parse("--config", str(tmp_path / "own.json"), "--init", "imagenet", "--set", "lr=0.25")
    assert (config.steps, config.lr, config.model.init) == (77, 0.25, "imagenet")
    both = parse("--model", "maskrcnn_resnet18_fpn", "--set", "model.name=fasterrcnn_resnet18_fpn")
    assert both.model.name == "fasterrcnn_resnet18_fpn"
    (tmp_path / "own.yaml").write_text("lr: 1e-3\nmodel:\n  norm: group\n")
    written = parse("--config", str(tmp_path / "own.yaml"))
    assert (written.lr, written.model.norm, written.steps) == (1e-3, "group", TrainConfig().steps)


def test_every_setting_is_an_option_by_its_dotted_name(parse):
    config = parse("--model.norm", "group", "--steps=7", "--model.anchor-sizes", "8,16,32,64,128")
    assert (config.model.norm, config.steps) == ("group", 7)
    assert config.model.anchor_sizes == (8.0, 16.0, 32.0, 64.0, 128.0)
    assert parse("--nesterov", "--clip-norm", "none").nesterov is True
    assert parse("--clip-norm", "none").clip_norm is None
    assert parse("--nesterov", "false").nesterov is False
    words = ["--data.mini.train", "40", "--data.scale-jitter", "[0.5, 2]", "--clip-norm", "5"]
    config = parse(*words, "--model.zero-init-last-norm", "false")
    assert (config.data.mini.train, config.data.scale_jitter, config.clip_norm) == (40, (0.5, 2), 5)
    assert config.model.zero_init_last_norm is False


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_option_has_help(name, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "2000")  # one option a line
    with pytest.raises(SystemExit):
        cli.main([name, "--help"])
    lines = capsys.readouterr().out.splitlines()
    options = [line for line in lines if "(type: " in line]
    assert not [line for line in options if re.search(r"(^|\s{2,})\(type: ", line)]
    said = " ".join(lines)
    assert all(
        word in said
        for word in cli.COMMANDS[name].__annotations__
        if word not in ("return", "settings")
    )


def test_completion_knows_commands_and_settings():
    ran = subprocess.run(
        [sys.executable, "-m", "fastcov_detection.cli", "--print_completion", "shtab-bash"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ran.returncode == 0, ran.stderr
    assert "--model.norm" in ran.stdout
    assert "pretrain" in ran.stdout


WRONG = [
    (["serch"], "unknown command 'serch'; did you mean 'search'?"),
    (
        ["train", "--out", "x", "--wdiths", "w"],
        "unknown option '--wdiths'; did you mean '--widths'",
    ),
    (["export", "runs/x"], "the following arguments are required"),
    (["train", "--out", "x", "--seed", "one"], "seed is one; expected int"),
    (["train", "--out"], "option --out has no value"),
    ([], 'expected "command" to be one of'),
]


@pytest.mark.parametrize(("words", "message"), WRONG, ids=[message for _, message in WRONG])
def test_wrong_words_end_with_status_2_and_the_closest_names(words, message, capsys):
    assert cli.main(words) == 2
    assert message in capsys.readouterr().err


BAD = [
    (["--set", "stepz=3"], "unknown option '--stepz'; did you mean '--steps'"),
    (["--set", "steps"], "--set 'steps' has no value; write NAME=VALUE"),
    (["--set", "steps=many"], "steps"),
    (["--model", "fastrcnn_resnet50_fpn"], "unknown detector 'fastrcnn_resnet50_fpn'"),
    (["--preset", "mimi"], "unknown preset 'mimi'; did you mean 'mini'"),
    (["--data", "/no/such/folder"], "data folder /no/such/folder is missing"),
    (["--widths", "/no/widths.json"], "no widths file at /no/widths.json"),
    (["--config", "/no/config.json"], "no configuration at /no/config.json"),
]


@pytest.mark.parametrize(("words", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_settings_are_one_line_that_names_them(words, message, capsys, tmp_path):
    assert cli.main(["train", "--out", str(tmp_path / "run"), *words]) == 2
    err = capsys.readouterr().err
    assert err.startswith("fastcov-detection: error: ")
    assert message in err
    assert "Traceback" not in err
    assert not (tmp_path / "run").exists()


def test_unknown_arms_and_rules_are_named(capsys, tmp_path):
    words = ["search", "--out", str(tmp_path / "s")]
    assert cli.main([*words, "--arms", "searched,unifrom"]) == 2
    assert "unknown arm 'unifrom'; did you mean 'uniform'" in capsys.readouterr().err
    assert cli.main([*words, "--rules", "dogs"]) == 2
    assert "rule is 'dogs'; did you mean 'dof'?" in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("command", ["report", "export"])
def test_folders_without_a_search_are_named(command, capsys, tmp_path):
    words = [command, str(tmp_path)] + ([str(tmp_path / "out")] if command == "export" else [])
    assert cli.main(words) == 2
    err = capsys.readouterr().err
    assert str(tmp_path) in err
    assert "result.json" in err


def test_train_trains_and_a_finished_run_is_returned_at_once(tiny_run, tmp_path, capsys):
    save_config(tiny_run, tmp_path / "tiny.json")
    words = ["train", "--quiet", "--config", str(tmp_path / "tiny.json"), "--out"]
    words += [str(tmp_path / "run"), "--seed", "5", "--set", "steps=2"]
    assert cli.main(words) == 0
    first = capsys.readouterr().out
    assert first.startswith("AP 0.")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["seed"] == 5
    assert cli.main(words) == 0
    assert capsys.readouterr().out == first


def test_defects_keep_their_traceback(monkeypatch, tmp_path):
    def broken(dir: str) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setitem(cli.COMMANDS, "report", broken)
    with pytest.raises(RuntimeError, match="a defect"):
        cli.main(["report", str(tmp_path)])


def test_every_command_has_help_and_starts_fast():
    ran = subprocess.run(
        [sys.executable, "-m", "fastcov_detection.cli", "--help"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ran.returncode == 0
    for command in ("train", "pretrain", "search", "demo", "compare", "report", "export"):
        assert command in ran.stdout
