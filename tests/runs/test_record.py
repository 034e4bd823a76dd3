"""What every `run.yaml` holds, and what a resumed run has to share with the interrupted one."""

from dataclasses import asdict, dataclass

import torch
import yaml

import fillm
from fillm.config import read_settings
from fillm.runs import RUN_RECORD, run_identity, run_record, write_record


@dataclass(frozen=True)
class Settings:
    lr: float = 0.1
    num_retain: int | None = None
    out: str = "x"
    resume: bool = True
    overwrite: bool = True
    debug: bool = True


def test_a_record_says_what_was_done_and_on_what(tmp_path):
    prints = {"model": "ab", "eval_data": None}
    record = run_record(Settings(), prints, ["rows.jsonl, line 2: empty"], torch.device("cpu"))
    write_record(tmp_path, {**record, "result": {"loss": 0.5}})
    read = yaml.safe_load((tmp_path / RUN_RECORD).read_text(encoding="utf-8"))
    assert read["fingerprints"] == prints
    assert read["skipped_rows"] == ["rows.jsonl, line 2: empty"]
    assert (read["device"], read["threads"]) == ("cpu", torch.get_num_threads())
    assert read["versions"]["torch"] == torch.__version__ and read["versions"]["fillm"] == fillm.__version__
    assert read["result"] == {"loss": 0.5}


def test_a_replay_has_every_setting_but_what_was_said_about_the_folder(tmp_path):
    write_record(tmp_path, run_record(Settings(lr=3e-7), {}, [], torch.device("cpu")))
    replayed = Settings(**read_settings(str(tmp_path / RUN_RECORD)))
    assert asdict(replayed) == asdict(Settings(3e-7, None, "x", resume=False, overwrite=False, debug=False))


def test_the_identity_has_flags_and_fingerprints_but_not_what_is_free():
    found = run_identity(Settings(), {"data": "cd", "eval_data": None}, ("out", "resume", "overwrite", "debug"))
    expected = {"--lr": "0.1", "--num-retain": "None", "data fingerprint": "cd", "eval_data fingerprint": "None"}
    assert found == expected
