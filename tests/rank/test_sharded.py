"""A model sharded over processes (FSDP2) ranks as a whole one, and each process holds its part; gloo on the CPU."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import transformers

from fillm.errors import UsageError
from fillm.rank.__main__ import main
from fillm.rank.config import RankConfig, check_sharded
from tests.families import VOCAB_SIZE, build_family
from tests.rank.conftest import word_tokenizer
from tests.rank.test_several_processes import alone as alone
from tests.rank.test_several_processes import as_they_have as as_they_have
from tests.rank.test_several_processes import assert_same, run_jobs
from tests.rank.test_several_processes import command as command
from tests.runs.jobs import torchrun

FAMILIES = ("llama", "llama-tied", "gpt2", "gemma2")
METHODS: dict[str, tuple[str, list[str]]] = {  # family and settings
    "damage": ("llama", ["--objective", "retain"]),
    "damage by rows": ("gpt2", ["--objective", "retain", "--granularity", "row"]),
    "damage by heads": ("llama", ["--objective", "retain", "--granularity", "head"]),
    "damage by weights": ("llama-tied", ["--objective", "retain", "--granularity", "element"]),
    "traded off": ("llama", ["--objective", "trade-off", "--save-update"]),
    "traded off by rows": ("llama-tied", ["--objective", "trade-off", "--granularity", "row"]),
    "rows": ("llama", ["--granularity", "row"]),
    "rows by size": ("gemma2", ["--granularity", "row", "--score", "mean-abs"]),
    "heads": ("gpt2", ["--granularity", "head"]),
    "weights": ("gpt2", ["--granularity", "element"]),
    "size": ("llama", ["--score", "mean-abs"]),
    "damage by rows, diagonal": (
        "llama-tied",
        ["--curvature", "diagonal", "--granularity", "row", "--objective", "retain"],
    ),
    "soir-sum": ("gpt2", ["--method", "soir-sum"]),
    "traded off soir-sum": ("llama", ["--method", "soir-sum", "--objective", "trade-off", "--save-update"]),
    "gradient": ("gpt2", ["--method", "gradient"]),
    "gradient by weights": ("llama", ["--method", "gradient", "--granularity", "element", "--tokens-per-batch", "1"]),
    "saliency": ("llama-tied", ["--method", "saliency", "--granularity", "row"]),
    "fisher-ratio": ("llama", ["--method", "fisher-ratio"]),
    "fisher-ratio by weights": ("gpt2", ["--method", "fisher-ratio", "--granularity", "element"]),
    "wagle": ("llama", ["--method", "wagle", "--granularity", "head"]),
    "memflex": ("gemma2", ["--method", "memflex"]),
    "parameter-shift": ("llama", ["--method", "parameter-shift", "--granularity", "row"]),
    "random": ("llama", ["--method", "random"]),
    "none": ("gpt2", ["--method", "none"]),
}
SETTINGS: dict[str, list[str]] = {
    "certified": [],
    "all of them exact": ["--tolerance", "1e-9"],
    "u": ["--save-update"],
    "packed": ["--layout", "packed"],
    "recomputed": ["--gradient-checkpointing", "--save-update"],
    "mlp alone": ["--include", "mlp", "--save-update"],
    "groups": ["--groups", "3", "--save-update"],
    "groups, recomputed": ["--groups", "4", "--gradient-checkpointing"],
    "one sample a batch": ["--tokens-per-batch", "1", "--save-update"],
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A model folder of each family."""
    found = {}
    for family in FAMILIES:
        folder = tmp_path_factory.mktemp("model") / family
        build_family(family).save_pretrained(folder)
        word_tokenizer().save_pretrained(folder)
        found[family] = str(folder)
    return found


@pytest.fixture(scope="module")
def started(folders: dict[str, str], forget_file: str, retain_file: str) -> Callable[..., list[str]]:
    """The command line of a run of one family."""

    def build(out: Path, family: str, *further: str) -> list[str]:
        given = ["--model", folders[family], "--forget", forget_file, "--retain", retain_file, "--device", "cpu"]
        return [*given, "--tokens-per-batch", "48", "--out", str(out), *further]

    return build


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_the_ranking_is_that_of_the_whole_model(processes, started, as_they_have, tmp_path) -> None:
    runs = {f"{family} u": (family, ["--save-update"]) for family in FAMILIES[1:]}
    runs |= {name: ("llama", further) for name, further in SETTINGS.items()}
    runs |= {f"{family} in groups": (family, ["--groups", "2", "--save-update"]) for family in FAMILIES[1:]}
    if processes == 3:
        runs = {name: runs[name] for name in ("certified", "groups", "one sample a batch", "llama-tied u")}
    jobs = []
    for name, (family, further) in runs.items():
        assert main(started(tmp_path / "whole" / name, family, *further)) == 0, name
        jobs.append({"argv": started(tmp_path / name, family, *further, "--shard")})
    codes, said = run_jobs(processes, jobs, tmp_path)
    assert codes == [[0] * processes] * len(jobs), said
    for name in runs:
        assert_same(tmp_path / name, tmp_path / "whole" / name)


def assert_sharded_as_whole(started, model: Path, runs: dict[str, list[str]], folder: Path) -> None:
    """Two processes that share a model rank as one that has all of it, with every run's settings."""
    jobs = []
    for name, further in runs.items():
        argv = [*started(folder / name, "llama", *further), "--model", str(model)]
        assert main([*argv, "--out", str(folder / "whole" / name)]) == 0, name
        jobs.append({"argv": [*argv, "--shard"]})
    codes, said = run_jobs(2, jobs, folder)
    assert codes == [[0, 0]] * len(jobs), said
    for name in runs:
        assert_same(folder / name, folder / "whole" / name)


@pytest.mark.slow
def test_a_stack_of_experts_is_complete_when_its_layer_is(started, as_they_have, tmp_path) -> None:
    """Every expert is a use of the stack; gpt-oss stores it as one tensor, which shards take."""
    config = transformers.GptOssConfig(
        vocab_size=VOCAB_SIZE, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=64,
    )  # fmt: skip
    transformers.GptOssForCausalLM(config).save_pretrained(tmp_path / "oss")
    word_tokenizer().save_pretrained(tmp_path / "oss")
    runs = {"u": ["--save-update"], "in groups": ["--groups", "2", "--gradient-checkpointing"]}
    assert_sharded_as_whole(started, tmp_path / "oss", runs, tmp_path)


@pytest.mark.slow
def test_tensors_that_no_gradient_reaches_are_unused(started, as_they_have, tmp_path) -> None:
    """A decoder's attention to an encoder that is not there; alone in scope, and alone in a group."""
    config = transformers.BartConfig(
        vocab_size=VOCAB_SIZE, d_model=16, decoder_layers=2, encoder_layers=1, decoder_attention_heads=2,
        encoder_attention_heads=2, decoder_ffn_dim=24, encoder_ffn_dim=24, max_position_embeddings=64,
        is_decoder=True, is_encoder_decoder=False,
    )  # fmt: skip
    transformers.BartForCausalLM(config).save_pretrained(tmp_path / "bart")
    word_tokenizer().save_pretrained(tmp_path / "bart")
    alone, mixed = ["--include", "*encoder_attn*"], ["--include", "*layers.0.encoder_attn*,*layers.1.fc1*"]
    runs = {"alone": alone, "mixed": mixed, "mixed, in groups": [*mixed, "--groups", "2"]}
    assert_sharded_as_whole(started, tmp_path / "bart", runs, tmp_path)


@pytest.fixture(scope="module")
def before_tuning(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model of the Llama's shape with other weights."""
    folder = tmp_path_factory.mktemp("model") / "before"
    build_family("llama", seed=1).save_pretrained(folder)
    return str(folder)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_every_method_ranks_as_on_the_whole_model(processes, started, before_tuning, as_they_have, tmp_path) -> None:
    some = ("damage by weights", "traded off by rows", "heads", "fisher-ratio by weights", "memflex", "parameter-shift")
    runs = METHODS if processes == 2 else {name: METHODS[name] for name in some}
    jobs = []
    for name, (family, further) in runs.items():
        base = ["--base-model", before_tuning] if name == "parameter-shift" else []
        assert main(started(tmp_path / "whole" / name, family, *further, *base)) == 0, name
        jobs.append({"argv": started(tmp_path / name, family, *further, *base, "--shard")})
    codes, said = run_jobs(processes, jobs, tmp_path)
    assert codes == [[0] * processes] * len(jobs), said
    for name in runs:
        assert_same(tmp_path / name, tmp_path / "whole" / name)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2"])
def test_each_process_holds_its_part(family, folders, tmp_path) -> None:
    out = tmp_path / "parts.json"
    done = torchrun(2, "-m", "tests.rank.sharded_parts", folders[family], str(out))
    assert done.returncode == 0, done.stderr
    first, second = json.loads(out.read_text(encoding="utf-8"))
    for what in ("weights", "accumulators"):
        assert first[what] + second[what] >= first[f"whole {what}"]
        assert max(first[what], second[what]) <= 0.51 * first[f"whole {what}"]  # 97 rows are 49 and 48, padded
    assert first["gathered"] == second["gathered"] == 0  # between two passes no layer is


@pytest.mark.slow
def test_an_end_in_one_process_ends_all_and_resumes(started, as_they_have, tmp_path) -> None:
    further = ["--tokens-per-batch", "1", "--save-update"]
    assert main(started(tmp_path / "whole", "llama", *further)) == 0
    always = ["--shard", "--checkpoint-seconds", "1e-9"]
    update = ["llama", *further, *always]
    damage, ratio = METHODS["damage by weights"], METHODS["fisher-ratio"]
    damage, ratio = ([family, *given, "--tokens-per-batch", "1"] for family, given in (damage, ratio))
    for name, given in (("damage by weights", damage), ("ratio", ratio)):
        assert main(started(tmp_path / "alone" / name, *given)) == 0
    jobs = [
        {"argv": started(tmp_path / "error", *update), "fault": "error", "when": "after"},
        {"argv": started(tmp_path / "error", *update, "--resume")},
        {"argv": started(tmp_path / "stop", *update), "fault": "stop"},
        {"argv": started(tmp_path / "stop", *update, "--resume")},
        {"argv": started(tmp_path / "forget", *update), "fault": "stop", "pass": "forget pass", "batch": 1},
        {"argv": started(tmp_path / "forget", *update, "--resume")},
        {"argv": started(tmp_path / "groups", *update, "--groups", "2"), "fault": "stop"},
        {"argv": started(tmp_path / "groups", *update, "--groups", "2", "--resume")},
        {"argv": started(tmp_path / "damage by weights", *damage, *always), "fault": "stop", "pass": "damage pass"},
        {"argv": started(tmp_path / "damage by weights", *damage, *always, "--resume")},
        {"argv": started(tmp_path / "ratio", *ratio, *always), "fault": "stop"},
        {"argv": started(tmp_path / "ratio", *ratio, *always, "--resume")},
        {"argv": started(tmp_path / "path", "llama", "--shard", "--method", "path")},
    ]
    codes, said = run_jobs(2, jobs, tmp_path)
    assert codes == [[code] * 2 for code in (2, 0, 3, 0, 3, 0, 3, 0, 3, 0, 3, 0, 2)], said
    told = [line.removeprefix("fillm rank: ") for line in said.splitlines() if line.startswith("fillm rank: ")]
    assert told == [
        "a number is nan",
        "stopped by a signal to another process in the retain pass; continue with --resume",
        "stopped by a signal to another process in the forget pass; continue with --resume",
        "stopped by a signal to another process in the retain pass, group 1 of 2; continue with --resume",
        "stopped by a signal to another process in the damage pass; continue with --resume",
        "stopped by a signal to another process in the retain pass; continue with --resume",
        "--shard does not take --method path: it ranks by means and sums of gradients alone; leave one of them out",
    ]
    for name in ("error", "stop", "forget", "groups"):
        assert_same(tmp_path / name, tmp_path / "whole")
    for name in ("damage by weights", "ratio"):
        assert_same(tmp_path / name, tmp_path / "alone" / name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "line"),
    [
        ("error", "a number is nan"),
        ("kill", "another process of the run has died; continue with --resume"),
    ],
)
def test_an_end_in_the_midst_of_a_batch_is_told_once(fault, line, started, as_they_have, tmp_path) -> None:
    further = ["--tokens-per-batch", "1", "--save-update"]
    argv = started(tmp_path / "run", "llama", *further, "--shard", "--checkpoint-seconds", "1e-9")
    jobs = tmp_path / "jobs.json"
    jobs.write_text(json.dumps([{"argv": argv, "fault": fault, "when": "within", "batch": 3}]), encoding="utf-8")
    done = torchrun(2, "-m", "tests.rank.several_processes", str(jobs))
    assert done.returncode != 0
    told = [said for said in done.stderr.splitlines() if said.startswith("fillm rank: ")]
    assert told == [f"fillm rank: {line}"], done.stderr
    codes, said = run_jobs(2, [{"argv": [*argv, "--resume"]}], tmp_path)
    assert codes == [[0, 0]], said
    assert main(started(tmp_path / "whole", "llama", *further)) == 0
    assert_same(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
def test_an_end_between_two_batches_does_not_leave_the_others_waiting(started, as_they_have, tmp_path) -> None:
    """As where nobody reads any more what the first process says: the others are on the way to the next batch."""
    argv = started(tmp_path / "run", "llama", "--tokens-per-batch", "1", "--shard")
    job = {"command": "rank", "argv": argv, "fault": "error", "hook": "telling of a batch", "process": 0, "at": 2}
    jobs = tmp_path / "jobs.json"
    jobs.write_text(json.dumps([job]), encoding="utf-8")
    done = torchrun(2, "-m", "tests.runs.jobs", str(jobs))
    assert done.returncode != 0
    told = [said for said in done.stderr.splitlines() if said.startswith("fillm rank: ")]
    assert told == ["fillm rank: a number is nan"], done.stderr


def test_a_plan_of_shards_is_for_several_devices(arguments, fails) -> None:
    asked = "--shard --dry-run plans for several devices; say for how many with --plan-devices N"
    assert fails(arguments("--shard", "--dry-run")) == asked


@pytest.mark.parametrize("devices", [(), ("--plan-devices", "1")])
def test_one_device_receives_nothing_from_others(devices, arguments, fails) -> None:
    assert fails(arguments("--dry-run", "--plan-link", "1e9", *devices)) == (
        "--plan-link 1000000000.0 has no effect on one device; say on how many with --plan-devices N, or leave it out"
    )


def test_one_process_shards_nothing(arguments, fails) -> None:
    assert fails(arguments("--shard")) == (
        "--shard spreads the model over several processes; start them with torchrun --nproc-per-node N"
    )


@pytest.mark.parametrize(
    "given",
    [
        {"method": "path"},
        {"method": "first-order"},
        {"method": "soir-per-sample"},
        {"curvature": "woodbury"},
        {"adapter": "folder"},
        {"compression": "sjlt"},
        {"store": "folder"},
    ],
)
def test_what_is_not_sharded_is_refused_by_name(given) -> None:
    (value,) = given.values()
    with pytest.raises(
        UsageError, match=f"--shard does not take --{next(iter(given))}.*{'' if value == 'folder' else value}"
    ):
        check_sharded(RankConfig(model="m", shard=True, **given), 2)
