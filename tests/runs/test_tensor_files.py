import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fillm.runs import tensor_files
from fillm.runs.tensor_files import StreamedTensor, read_streamed, save_streamed, write_streamed


def test_what_is_written_in_pieces_any_reader_opens(tmp_path):
    path = tmp_path / "x.safetensors"
    tensors = {
        "b": StreamedTensor("U8", (5,), [b"\x01\x02", b"", b"\x03\x04\x05"]),
        "a": StreamedTensor("BOOL", (2, 1), iter([b"\x01\x00"])),
        "none": StreamedTensor("U8", (0,), []),
        "scalar": StreamedTensor("U8", (), [b"\x07"]),
    }
    write_streamed(path, tensors, {"key": 'a "text"\n'})
    found = load_file(path)
    assert {name: tensor.tolist() for name, tensor in found.items()} == {
        "b": [1, 2, 3, 4, 5], "a": [[True], [False]], "none": [], "scalar": 7,
    }  # fmt: skip
    with safe_open(str(path), "pt") as opened:
        assert opened.metadata() == {"key": 'a "text"\n'}
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.safetensors"]


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "x.safetensors"
    write_streamed(path, {"a": StreamedTensor("U8", (1,), [b"\x01"])}, {})
    before = path.read_bytes()

    def failing():
        yield b"\x02"
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        write_streamed(path, {"a": StreamedTensor("U8", (2,), failing())}, {})
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_pieces_are_those_of_the_tensor(tmp_path, dtype):
    tensors = {"a": torch.randn(7, 3).to(dtype), "b": torch.randn(40).to(dtype), "none": torch.zeros(0, dtype=dtype)}
    save_file(tensors, tmp_path / "x")
    for name, tensor in tensors.items():
        pieces = list(read_streamed(tmp_path / "x", name, 8))
        assert [len(piece) for piece in pieces] == [len(part) for part in tensor.flatten().split(8) if len(part)]
        assert all(piece.dtype == dtype for piece in pieces)
        assert torch.equal(torch.cat([*pieces, tensor.new_zeros(0)]), tensor.flatten())
    with pytest.raises(KeyError):
        next(read_streamed(tmp_path / "x", "c", 8))


def test_tensors_in_pieces_are_the_bytes_of_the_library(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_files, "_PIECE", 4)
    tensors = {
        "b": torch.randn(3, 5), "a": torch.randn(7, dtype=torch.float64), "c": torch.randn(9, dtype=torch.bfloat16),
        "scalar": torch.tensor(2.0), "none": torch.zeros(0, 2), "half": torch.randn(3).half(),
        "turned": torch.randn(2, 6).T,
    }  # fmt: skip
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "library.safetensors")
    save_streamed(tmp_path / "x.safetensors", tensors)
    assert (tmp_path / "x.safetensors").read_bytes() == (tmp_path / "library.safetensors").read_bytes()
    save_streamed(tmp_path / "y.safetensors", load_file(tmp_path / "x.safetensors"))
    assert (tmp_path / "y.safetensors").read_bytes() == (tmp_path / "library.safetensors").read_bytes()
