"""What every `run.yaml` holds, and what a resumed run has to share with the interrupted one."""

import hashlib
from dataclasses import asdict, dataclass

import pytest
import torch
import yaml

import fillm
from fillm.config import read_settings
from fillm.errors import RunFolderError
from fillm.runs import RUN_RECORD, check_recorded, read_record, run_identity, run_record, write_record


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


def test_a_record_knows_its_own_bytes_and_those_of_the_files_beside_it(tmp_path):
    (tmp_path / "rows.parquet").write_bytes(b"rows")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    write_record(tmp_path, run_record(Settings(), {}, [], torch.device("cpu")))
    path = tmp_path / RUN_RECORD
    record = read_record(path, "make it again")
    sha256 = hashlib.sha256(b"rows").hexdigest()
    assert record["files"] == {"rows.parquet": {"bytes": 4, "sha256": sha256}}
    check_recorded(tmp_path / "rows.parquet", record, "make it again")
    (tmp_path / "rows.parquet").write_bytes(b"row ")
    with pytest.raises(RunFolderError, match=r"rows.parquet: damaged \(its checksum differs\); make it again"):
        check_recorded(tmp_path / "rows.parquet", record, "make it again")
    mark, _, text = path.read_text(encoding="utf-8").partition("\n")
    assert mark == f"# sha256 of what follows: {hashlib.sha256(text.encode()).hexdigest()}"
    path.write_text(f"{mark}\n{text.replace('lr: 0.1', 'lr: 0.3')}", encoding="utf-8")
    with pytest.raises(RunFolderError, match=r"run.yaml: damaged \(its checksum differs; if it was changed by hand"):
        read_record(path, "make it again")
    path.write_text(text.replace("lr: 0.1", "lr: 0.3"), encoding="utf-8")
    assert read_record(path, "make it again")["settings"]["lr"] == 0.3
