"""One process has nobody to meet; what several cannot be is refused before they join."""

import pytest
import torch

from fillm.errors import EndedByAnother, InterruptedRun, NumericsError, UsageError
from fillm.finetune.__main__ import main as finetune
from fillm.report.__main__ import main as report
from fillm.runs import processes
from fillm.runs.processes import Processes


def test_one_process_hears_itself_and_sums_nothing() -> None:
    one = Processes("cpu")
    assert (one.first, one.index, one.count) == (True, 0, 1)
    assert one.meet(3, -4) == [[3, -4]] and one.tell("möglich") == ["möglich"]
    one.agree("anything")
    tensor = torch.arange(5.0)
    assert torch.equal(one.add_up_in_order(tensor), torch.arange(5.0))
    one.add_up_all([tensor])
    assert torch.equal(tensor, torch.arange(5.0))
    with pytest.raises(NumericsError, match="nan"), one.together():
        one.meet(error=NumericsError("nan"))
    with pytest.raises(UsageError, match="over"):
        one.end(UsageError("over"))


def test_an_end_told_elsewhere_has_the_others_exit_code() -> None:
    assert EndedByAnother(3).exit_code == 3


def started(monkeypatch: pytest.MonkeyPatch, count: str, index: str = "0") -> None:
    """As torchrun starts a process."""
    of_one = {"WORLD_SIZE": count, "RANK": index, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in of_one.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("count", "said"), [("two", "WORLD_SIZE=two: start"), ("2", "WORLD_SIZE=2 without RANK, MASTER_ADDR, MASTER_PORT:")]
)
def test_what_a_scheduler_left_half_set_is_one_line(count: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", count)
    with pytest.raises(UsageError, match=f"the environment says {said}"):
        Processes("cpu")


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    started(monkeypatch, "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(processes, "resolve_device", lambda device: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UsageError, match="4 processes on this machine, which has 2 CUDA devices"):
        Processes("cuda")
    assert Processes("cuda", alone=True).count == 1


@pytest.mark.parametrize("index", ["0", "1"])
@pytest.mark.parametrize(
    ("main", "argv"),
    [
        (finetune, ["--architecture", "tiny", "--data", "fictional-small:forget05", "--out", "never"]),
        (report, ["runs", "--out", "never"]),
    ],
)
def test_a_command_of_one_process_is_refused_in_several(index, main, argv, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    started(monkeypatch, "2", index)
    assert main(argv) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == (1 if index == "0" else 0)
    assert all("runs in one process; start it without torchrun" in line for line in said)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("told", [True, False])
def test_a_signal_after_a_lost_process_does_not_hide_it(told: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun stops the others as soon as one is gone, maybe while they are finding that out."""

    class Stopped(KeyboardInterrupt):
        pass

    def gone(*_: object, **__: object) -> None:
        raise RuntimeError("gloo: Connection closed by peer")

    class Board:
        def check(self, keys: object) -> bool:
            if not told:  # the signal comes in first
                raise Stopped
            return False

    two = Processes("cpu")
    monkeypatch.setattr(torch.distributed, "all_gather", gone)
    monkeypatch.setattr(two, "_disband", lambda done: None)
    two.count, two._board = 2, Board()
    with pytest.raises(InterruptedRun, match="another process of the run has died"), two.together():
        try:
            two.meet()
        except InterruptedRun as lost:
            raise Stopped from lost
        except Stopped:
            two._board.check = lambda keys: False
            raise


def test_a_signal_by_itself_stays_one(monkeypatch: pytest.MonkeyPatch) -> None:
    two = Processes("cpu")
    monkeypatch.setattr(two, "_disband", lambda done: None)
    two.count, two.ended = 2, True
    with pytest.raises(KeyboardInterrupt), two.together():
        raise KeyboardInterrupt
