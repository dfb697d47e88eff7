"""`lcp options` and the help of `lcp train`: what they show, and that nothing is missing."""

from __future__ import annotations

import pytest

from lcp_plugin import cli
from lcp_plugin.commands.front import main
from lcp_plugin.config.network_args import NETWORK_ARGS
from lcp_plugin.config.option_text import is_rare
from lcp_plugin.config.options import option_fields

FIELDS = option_fields()


def told_by(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """What `lcp` prints when it succeeds."""
    assert main(list(argv)) == 0
    return capsys.readouterr().out


def help_of(capsys: pytest.CaptureFixture[str], flag: str) -> list[str]:
    """The lines of a help of training."""
    with pytest.raises(SystemExit) as stop:
        main(["train", flag])
    assert stop.value.code == 0
    return capsys.readouterr().out.splitlines()


def shown(lines: list[str]) -> list[str]:
    """The options that a help lists, in order."""
    flags = [line.split()[0] for line in lines if line.startswith("  --")]
    return [flag[2:] for flag in flags if flag[2:] in FIELDS]


# ------------------------------------------------------------------------------ the help of train


def test_help_shows_ours_first_then_kohyas_common_options_by_theme(
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = help_of(capsys, "--help")
    names = shown(lines)
    ours = [name for name, field in FIELDS.items() if field.metadata["grade"] == "ours"]
    assert sorted(names[: len(ours)]) == sorted(ours)
    assert set(names) == {name for name, field in FIELDS.items() if not is_rare(field)}
    assert len(names) < len(FIELDS) / 2
    titles = [line for line in lines if line.startswith("kohya: ")]
    assert "kohya: Optimizer and learning rate:" in titles
    assert len(titles) == len(set(titles))


@pytest.mark.parametrize("flag", ["--help-all", "--help_all"])
def test_help_all_shows_every_option(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert set(shown(help_of(capsys, flag))) == set(FIELDS)


def test_a_rare_option_is_hidden_and_works(capsys: pytest.CaptureFixture[str]) -> None:
    assert "zero_terminal_snr" not in shown(help_of(capsys, "--help"))
    assert main(["train", "--zero_terminal_snr", "--list_strategies"]) == 0


def test_the_script_has_the_same_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    assert capsys.readouterr().out.splitlines() == help_of(capsys, "--help")


def test_a_config_without_its_option_is_recognised(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "mine.toml"]) == 2
    assert "Did you mean --config mine.toml?" in capsys.readouterr().err


# ------------------------------------------------------------------------------ lcp options


def test_options_prints_all_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    text = told_by(capsys, "options")
    entries = {line.split()[0] for line in text.splitlines() if line[:2] == "  " and line[2] != " "}
    assert entries == {*FIELDS, *NETWORK_ARGS}
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize("words", [["min", "snr", "gamma"], ["--min-snr-gamma"], ["MIN_SNR_GAMMA"]])
def test_options_are_found_by_words_in_any_spelling(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    # "--" keeps a word that looks like an option of `lcp options` itself
    text = told_by(capsys, "options", "--", *words)
    assert "  min_snr_gamma  (number, task)" in text
    assert "1 of " in text


def test_options_say_default_marks_and_the_difference_from_kohya(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = told_by(capsys, "options", "network_alpha")
    assert "  network_alpha  (number, default 1, task)" in text
    text = told_by(capsys, "options", "--differing", "huber")
    assert "differs from kohya: holds for huber_schedule=snr too" in text
    assert "huber_c " not in text  # the same as kohya's
    assert "(whole number, default 100, new)" in told_by(capsys, "options", "resume_every")
    assert "no effect here: " in told_by(capsys, "options", "zero_stage")


def test_a_word_that_no_option_has_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["options", "learning_rte"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: no option has 'learning_rte'")
    assert "Did you mean learning_rate?" in told
