"""`--method path` from the command line: what it refuses, plans and records."""

import re

import pytest
import yaml

from fillm.rank import Ranking
from fillm.rank.__main__ import main

COMMAND = ["--method", "path", "--granularity", "element", "--path-rise", "0.1", "--path-points", "2"]


@pytest.mark.usefixtures("nothing_drawn")
def test_the_record_has_what_the_weights_add_up_to(arguments, capsys, tmp_path):
    assert main(arguments(*COMMAND)) == 0
    record = yaml.safe_load((tmp_path / "run" / "run.yaml").read_text(encoding="utf-8"))
    path = record["path"]
    stages = [one["pass"] for one in record["passes"]]
    search = [f"length-{n + 1}" for n in range(path["lengths_tried"])]
    assert stages == ["forget", "retain", *search, "forget-1", "retain-1", "forget-2", "retain-2", "retain-end"]
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("at a change of")]
    for key in ("length", "forget_rise", "retain_rise", "forget_contributions", "retain_contributions"):
        assert f"{path[key]:.3g}" in line or f"{path[key]:.4g}" in line
    mask = Ranking.load(tmp_path / "run").select(0.3)
    assert 0.25 < mask.count / sum(row["numel"] for row in Ranking.load(tmp_path / "run")) <= 0.3


@pytest.mark.usefixtures("nothing_drawn")
def test_a_dry_run_tells_the_passes_of_the_run(arguments, capsys, tmp_path):
    assert main(arguments(*COMMAND, "--dry-run")) == 0
    out = capsys.readouterr().out
    assert main(arguments(*COMMAND)) == 0
    record = yaml.safe_load((tmp_path / "run" / "run.yaml").read_text(encoding="utf-8"))
    done = {one["pass"]: (one["samples"], one["tokens"], one["batches"]) for one in record["passes"]}
    lines = {
        "forget pass": ["forget"],
        "retain pass, forward": ["retain"],
        "forget passes along the step, 2 x": ["forget-1", "forget-2"],
        "retain passes along the step, 2 x": ["retain-1", "retain-2"],
        "retain pass at the end of the step, forward": ["retain-end"],
        "search of the length, 18 x forward": 18 * ["length-1"],
    }
    for label, stages in lines.items():
        found = re.search(rf"^{label} +(\d+) samples, ([\d,]+) tokens, (\d+) batches$", out, re.MULTILINE)
        planned = tuple(int(part.replace(",", "")) for part in found.groups())
        assert planned == tuple(sum(parts) for parts in zip(*(done[stage] for stage in stages), strict=True)), label
    assert record["path"]["lengths_tried"] <= 18


@pytest.mark.usefixtures("nothing_drawn")
def test_rounds_are_recorded_told_and_planned(arguments, capsys, tmp_path):
    command = arguments(*COMMAND, "--path-rounds", "2", "--path-keep", "0.25")
    assert main([*command, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert main(command) == 0
    record = yaml.safe_load((tmp_path / "run" / "run.yaml").read_text(encoding="utf-8"))
    rounds = record["path"]["rounds"]
    stages = [one["pass"] for one in record["passes"]]
    expected = ["forget", "retain"]
    for prefix, one in zip(("", "round-2-"), rounds, strict=True):
        search = [f"length-{n + 1}" for n in range(one["lengths_tried"])]
        own = [*search, "forget-1", "retain-1", "forget-2", "retain-2", "retain-end"]
        expected += [prefix + stage for stage in own]
    assert stages == expected
    told = [line for line in capsys.readouterr().err.splitlines() if "at a change of" in line]
    assert [line.partition(",")[0] for line in told] == ["round 1 of 2", "round 2 of 2"]
    total = sum(row["numel"] for row in Ranking.load(tmp_path / "run"))
    assert rounds[1]["weights_moved"] == total // 2 and Ranking.load(tmp_path / "run").select(0.25).count == total // 4
    done = {one["pass"]: (one["samples"], one["tokens"], one["batches"]) for one in record["passes"]}
    lines = {
        "forget passes along the step, 4 x": ["forget-1", "forget-2", "round-2-forget-1", "round-2-forget-2"],
        "retain passes at the ends of the steps, 2 x, forward": ["retain-end", "round-2-retain-end"],
        "search of the length, 36 x forward": 36 * ["length-1"],
    }
    for label, parts in lines.items():
        found = re.search(rf"^{label} +(\d+) samples, ([\d,]+) tokens, (\d+) batches$", out, re.MULTILINE)
        planned = tuple(int(part.replace(",", "")) for part in found.groups())
        assert planned == tuple(sum(sizes) for sizes in zip(*(done[stage] for stage in parts), strict=True)), label
    assert "scores of what is left out, and its round" in out


@pytest.mark.parametrize(
    ("further", "said"),
    [
        (["--method", "path", "--objective", "retain"], "--objective retain needs a method with an update"),
        (["--method", "path", "--save-update"], "--save-update needs a method with an update"),
        (["--method", "path", "--curvature", "diagonal"], "--curvature diagonal is a choice of --method soir"),
        (["--method", "path", "--score", "l2"], "--score l2 has no effect: --method path has a score of its own"),
        (["--method", "path", "--damping", "0.2"], "--damping 0.2 has no effect: it is a choice of --method soir"),
        (["--method", "path", "--tolerance", "0.2"], "--tolerance 0.2 has no effect: it is a choice of --method"),
        (["--method", "path", "--compression", "sjlt"], "--method path cannot be answered from sketches"),
        (["--method", "path", "--store", "s"], "--method path cannot be answered from sketches"),
        (["--method", "path", "--memory", "8GiB"], "--memory has no effect here"),
        (["--method", "path", "--dtype", "bfloat16"], "--method path moves weights by less than bfloat16 can tell"),
        (["--method", "path", "--path-rise", "0"], "--path-rise must be above 0, not 0.0"),
        (["--method", "path", "--path-weight", "nan"], "--path-weight must be above 0, not nan"),
        (["--method", "path", "--path-points", "0"], "--path-points must be at least 1, not 0"),
        (["--method", "path", "--path-rounds", "2"], "--path-rounds 2 leaves out single weights; use --granularity el"),
        (["--method", "path", "--path-keep", "0.2"], "--path-keep 0.2 has no effect without --path-rounds; leave it"),
        ([*COMMAND, "--path-rounds", "0"], "--path-rounds must be at least 1, not 0"),
        ([*COMMAND, "--path-rounds", "2", "--path-keep", "1"], "--path-keep must be between 0 and 1, not 1.0"),
        (["--path-rounds", "8"], "--path-rounds 8 has no effect: it is a choice of --method path, not of soir"),
        (["--path-points", "8"], "--path-points 8 has no effect: it is a choice of --method path, not of soir"),
        (["--method", "saliency", "--path-rise", "2"], "--path-rise 2.0 has no effect: it is a choice of --method"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(arguments, fails, further, said):
    assert said in fails(arguments(*further))


def test_a_rise_that_is_never_reached_is_one_line(arguments, capsys, tmp_path):
    assert main(arguments("--method", "path", "--include", "*model.norm*", "--path-rise", "1e6")) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("fillm rank: --path-rise 1e+06: along the sign of its gradient the forget loss rises by")
    assert line.endswith("give less, or a wider --include") and not (tmp_path / "run").exists()
