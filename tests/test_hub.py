"""What is heard while the Hub is asked."""

import logging

import pytest

from fillm import hub


@pytest.fixture(autouse=True)
def nothing_said_yet():
    hub.announce.cache_clear()
    yield
    hub.announce.cache_clear()


def test_one_line_before_the_first_question(capsys, monkeypatch):
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("RANK", raising=False)
    for _ in range(2):
        hub.announce("locuslab/TOFU", "not among the files here")
    assert capsys.readouterr() == ("", "locuslab/TOFU: not among the files here; asking the Hub\n")


@pytest.mark.parametrize(("offline", "rank"), [(True, "0"), (False, "1")])
def test_nothing_offline_or_from_the_second_of_several_processes(offline, rank, capsys, monkeypatch):
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", offline)
    monkeypatch.setenv("RANK", rank)
    hub.announce("owner/model", "no such folder")
    assert capsys.readouterr() == ("", "")


def test_the_client_tells_of_errors_alone_and_talks_again_afterwards(caplog):
    client, other = logging.getLogger("huggingface_hub.utils._http"), logging.getLogger("other.kernels")
    caplog.set_level(logging.INFO, "huggingface_hub")
    with pytest.raises(ConnectionError), hub.quiet_loggers("other"):
        client.warning("Retrying in 8s [Retry 5/5].")
        other.warning("a faster kernel")
        client.error("gone")
        raise ConnectionError
    client.info("back")
    assert [record.message for record in caplog.records] == ["gone", "back"]
