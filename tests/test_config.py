"""One dataclass per command: flags, YAML and Python arguments say the same; mistakes get one line and exit code 2."""

import dataclasses
import sys
from dataclasses import dataclass
from typing import Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import fillm
from fillm.config import (
    arguments,
    flag_name,
    from_mapping,
    one_line,
    option,
    parse,
    printable,
    run_command,
    to_yaml,
)
from fillm.errors import DataError, FillmError, InterruptedRun, UsageError


@dataclass
class Settings:
    """Does 100 % of nothing."""

    forget_rows: str | None = option(None, "what to forget", "SPEC")
    num_retain: int = option(10, "how many")
    limit: int | None = option(None, "at most")
    damping: float = option(0.1, "a fraction, not a %")
    method: Literal["soir", "wagle"] = option("soir", "which")
    norm: Literal["l2", "max"] | None = option(None, "which norm")
    label: str = option("50%", "a default with a %")
    save: bool = option(False, "keep it")
    debug: bool = option(False, "tracebacks")


def _run(argv, main=lambda config: None):
    return run_command(Settings, main, argv, "fillm test")


def test_a_closed_stdout_is_written_to_in_vain(monkeypatch):
    seen = []
    with monkeypatch.context() as closed:
        closed.setattr(sys, "stdout", None)
        assert _run([], lambda config: seen.append(sys.stdout.isatty())) == 0
        closed.setattr(sys, "stderr", None)
        assert _run(["--nonsense"]) == 2
        assert sys.stdout is None and sys.stderr is None
    assert seen == [False]


def test_flags_over_file_over_defaults(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text("num_retain: 3\ndamping: 1e-3\nsave: true\nlimit: null\n")
    config = parse(Settings, ["--config", str(path), "--damping", "0.5", "--no-save", "--method", "wagle"], "x")
    assert config == Settings(num_retain=3, damping=0.5, save=False, method="wagle")
    assert parse(Settings, ["--config", str(path)], "x").damping == 1e-3
    assert parse(Settings, [], "x") == Settings()


def test_a_run_yaml_replays(tmp_path):
    settings = Settings(forget_rows="tofu:forget01[:3]", limit=7, damping=3e-5, norm="max", save=True)
    path = tmp_path / "run.yaml"
    path.write_text(to_yaml({"settings": dataclasses.asdict(settings), "seconds": 3.0}))
    assert parse(Settings, ["--config", str(path)], "x") == settings


@given(
    st.builds(
        Settings,
        forget_rows=st.none() | st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
        num_retain=st.integers(-(10**12), 10**12),
        limit=st.none() | st.integers(),
        damping=st.floats(allow_nan=False),
        method=st.sampled_from(["soir", "wagle"]),
        norm=st.sampled_from([None, "l2", "max"]),
        save=st.booleans(),
    )
)
def test_yaml_gives_back_what_was_written(settings):
    assert from_mapping(Settings, yaml.safe_load(to_yaml(dataclasses.asdict(settings)))) == settings


@given(st.integers(), st.floats(allow_nan=False))
def test_command_line_gives_back_what_was_typed(number, fraction):
    config = parse(Settings, [f"--num-retain={number}", f"--damping={fraction!r}"], "x")
    assert (config.num_retain, config.damping) == (number, fraction)


def test_print_config_prints_what_replays(tmp_path, capsys):
    called = []
    assert _run(["--limit", "4", "--print_config"], called.append) == 0
    assert called == []
    path = tmp_path / "printed.yaml"
    path.write_text(capsys.readouterr().out)
    assert parse(Settings, ["--config", str(path)], "x") == Settings(limit=4)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--num-retain", "ten"], "--num-retain: 'ten' is not of type int"),
        (["--num-retain", "1.5"], "--num-retain: '1.5' is not of type int"),
        (["--damping", "much"], "--damping: 'much' is not of type float"),
        (["--method", "guess"], "--method: 'guess' is none of soir, wagle"),
        (["--norm", "l3"], "--norm: 'l3' is none of l2, max"),
        (["--no-such-flag", "1"], "--no-such-flag"),
        (["--num-ret", "1"], "--num-ret"),
        (["--damping"], "--damping"),
        (["--config", "nowhere.yaml"], "nowhere.yaml: No such file or directory"),
    ],
)
def test_mistakes_on_the_command_line(argv, said, capsys):
    assert _run(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("fillm test: ")
    assert said in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("num_retain: true", "--num-retain: True is not of type int"),
        ("num_retain: [1]", "--num-retain"),
        ("num_retain: null", "--num-retain: None is not of type int"),
        ("damping: false", "--damping: False is not of type float"),
        ("save: 'yes'", "--save: 'yes' is not of type bool"),
        ("forget_rows: 7", "--forget-rows: 7 is not of type str"),
        ("methd: soir", "no setting is called 'methd'"),
        ("3: soir\nb: 1", "no setting is called 3, 'b'"),
        ("{a: 1, b: 1, c: 1, d: 1, e: 1, f: 1}", "called 'a', 'b', 'c', 'd' and 2 more; are they another command's"),
        ("- 1", "expected a mapping"),
        ("", "expected a mapping"),
        (
            "a: [",
            "while parsing a flow node, expected the node content, but found '<stream end>' (line 1, column 5)",
        ),
        ("!!python/object/apply:os.getcwd []", "not YAML"),
    ],
)
def test_mistakes_in_the_file(text, said, tmp_path, capsys):
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    assert _run(["--config", str(path)]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


def test_file_that_is_not_text(tmp_path, capsys):
    path = tmp_path / "settings.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    assert _run(["--config", str(path)]) == 2
    assert "not YAML" in capsys.readouterr().err


def test_version(capsys):
    with pytest.raises(SystemExit) as ended:
        _run(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr() == (f"fillm {fillm.__version__}\n", "")


def test_help_names_every_flag_and_default(capsys):
    with pytest.raises(SystemExit) as ended:
        _run(["--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    for field in dataclasses.fields(Settings):
        assert flag_name(field.name) in printed
    assert "100 % of nothing" in printed
    assert "(default: 50%)" in printed
    assert "soir|wagle" in printed


@pytest.mark.parametrize(
    ("error", "code"),
    [(UsageError("a"), 2), (DataError("a\nb"), 2), (InterruptedRun("a"), 3), (KeyboardInterrupt(), 3)],
)
def test_exit_codes(error, code, capsys):
    def fail(config):
        raise error

    assert _run([], fail) == code
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "Traceback" not in err


def test_debug_shows_the_traceback(capsys):
    def fail(config):
        raise DataError("row 3")

    assert _run(["--debug"], fail) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.endswith("fillm test: row 3\n")


def test_a_fault_of_ours_keeps_its_traceback():
    def fail(config):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        _run([], fail)


def test_every_named_error_has_an_exit_code():
    errors = [FillmError, *FillmError.__subclasses__()]
    assert {error.exit_code for error in errors} == {2, 3}
    assert [error.__name__ for error in errors if error.exit_code == 3] == ["InterruptedRun"]


@dataclass(frozen=True)
class Listing:
    """Names things."""

    names: tuple[str, ...] = arguments("what to name, 100 % of it", "NAME")
    loud: bool = option(False, "in capitals")


def test_words_without_a_flag_are_a_list_of_strings(tmp_path, capsys):
    assert parse(Listing, ["a", "--loud", "b c"], "x") == Listing(("a", "b c"), loud=True)
    assert parse(Listing, [], "x") == Listing()
    path = tmp_path / "settings.yaml"
    path.write_text(to_yaml(dataclasses.asdict(Listing(("a", "1")))))
    assert parse(Listing, ["--config", str(path)], "x") == Listing(("a", "1"))
    assert parse(Listing, ["b", "--config", str(path)], "x").names == ("b",)
    assert from_mapping(Listing, {"names": ["a"]}) == Listing(("a",))
    assert parse(Listing, ["a", "--print_config"], "x") is None
    assert yaml.safe_load(capsys.readouterr().out) == {"names": ["a"], "loud": False}


@pytest.mark.parametrize("names", ["a", [1], None, {"a": 1}])
def test_what_is_no_list_of_strings_is_refused(names):
    with pytest.raises(UsageError, match="names: .* is not a list of strings"):
        from_mapping(Listing, {"names": names})


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[2Jb", "a\\x1b[2Jb"),
        ("a\n\t b", "a b"),
        ("\u202eabc", "\\u202eabc"),
        ("\udcff", "\\udcff"),
        ("模型 ä", "模型 ä"),
    ],
)
def test_messages_leave_a_terminal_as_it_is(text, shown):
    assert one_line(UsageError(text)) == printable(text) == shown
