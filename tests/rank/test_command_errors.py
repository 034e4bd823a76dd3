"""Every row of the error table, provoked through the command: the line, the exit code, nothing left behind."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import fillm.rank.command as command
from fillm.rank.__main__ import main
from fillm.rank.config import RankConfig
from fillm.statistics import MeanGradient, RetainMoments
from tests.rank.conftest import question_row, write_rows

GOOD = [question_row(number) for number in range(5)]


@pytest.fixture
def no_model(monkeypatch):
    """Loading a model fails the test: what is wrong has to be said before."""

    def load(*arguments, **options):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(command, "load_model", load)


class TestData:
    @pytest.fixture(autouse=True)
    def before_the_model(self, no_model):
        pass

    def test_a_missing_file(self, arguments, fails):
        assert "no/such.jsonl: no such file" in fails(arguments(retain="no/such.jsonl"))

    def test_an_empty_file(self, arguments, fails, tmp_path):
        (tmp_path / "empty.jsonl").touch()
        assert "the file is empty" in fails(arguments(forget=str(tmp_path / "empty.jsonl")))

    def test_a_folder_for_a_file(self, arguments, fails, tmp_path):
        (tmp_path / "rows.jsonl").mkdir()
        assert "is a folder" in fails(arguments(forget=str(tmp_path / "rows.jsonl")))

    def test_a_file_without_rights(self, arguments, fails, tmp_path):
        path = tmp_path / "rows.jsonl"
        write_rows(path, GOOD)
        path.chmod(0)
        if os.access(path, os.R_OK):
            pytest.skip("this user may read every file")
        assert "cannot be read" in fails(arguments(forget=str(path)))

    def test_bad_json_is_named_with_its_row(self, arguments, fails, tmp_path):
        (tmp_path / "rows.jsonl").write_text(json.dumps(GOOD[0]) + '\n{"question": \n', encoding="utf-8")
        assert "rows.jsonl, line 2: bad JSON" in fails(arguments(forget=str(tmp_path / "rows.jsonl")))

    def test_a_missing_field(self, arguments, fails, tmp_path):
        path = write_rows(tmp_path / "rows.jsonl", [*GOOD[:2], {"question": "w1 w2"}])
        line = fails(arguments(forget=path))
        assert "rows.jsonl, line 3: no field 'answer'" in line and "--skip-bad-rows" in line

    def test_an_answer_that_truncation_leaves_nothing_of(self, arguments, fails, tmp_path):
        ids = list(range(10, 40))
        row = {"input_ids": ids, "labels": [-100] * 29 + [ids[29]]}
        # Ready-made ids that have nothing but their first token before the answer cannot be shortened in front.
        early = {"input_ids": ids, "labels": [ids[0]] + [-100] * 29}
        path = write_rows(tmp_path / "rows.jsonl", [row, early])
        assert "line 2: field 'labels' has no token that counts" in fails(arguments("--max-length", "8", forget=path))

    def test_no_row_is_usable(self, arguments, fails, tmp_path):
        path = write_rows(tmp_path / "rows.jsonl", [{"question": "w1"}] * 3)
        assert "none of 3 rows can be used" in fails(arguments("--skip-bad-rows", forget=path))

    def test_shared_rows_with_strict(self, arguments, fails, tmp_path):
        path = write_rows(tmp_path / "rows.jsonl", GOOD)
        line = fails(arguments("--strict", forget=f"{path}[:3]", retain=f"{path}[1:]"))
        assert "forget and retain share 2 rows" in line and "--strict" in line

    @pytest.mark.parametrize("name", ["forget", "retain"])
    def test_a_set_that_is_not_given(self, arguments, fails, name):
        assert f"--{name} is needed" in fails(arguments(**{name: None}))

    def test_more_rows_asked_for_than_there_are(self, arguments, fails):
        assert "forget.jsonl has 6 samples; give 1 to 6" in (line := fails(arguments("--num-forget", "1000")))
        assert line.startswith("--num-forget 1000: ")

    def test_a_folder_without_a_tokenizer(self, arguments, fails, tmp_path):
        (tmp_path / "words").mkdir()
        line = fails(arguments("--tokenizer", str(tmp_path / "words")))
        assert line.startswith("--tokenizer ") and "words: holds no tokenizer" in line

    def test_a_spec_that_is_none(self, arguments, fails):
        assert "not a data spec" in fails(arguments(forget="somewhere"))

    def test_bad_data_are_named_before_the_default_model_is_made(self, arguments, fails, monkeypatch):
        monkeypatch.setattr(command, "default_model", lambda console: pytest.fail("the default model was asked for"))
        assert "no such file" in fails(arguments(model=None, forget="no/such.jsonl"))


def test_bad_rows_are_counted_and_listed(arguments, capsys, tmp_path):
    rows = [GOOD[0], {"question": "w1"}, GOOD[1], {"question": "w1", "answer": 3}, GOOD[2]]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    assert main(arguments("--skip-bad-rows", forget=path, method="saliency")) == 0
    err = capsys.readouterr().err
    assert "rows.jsonl, line 2: no field 'answer'" in err and "rows.jsonl, line 4: field 'answer' has to be text" in err
    assert "--forget: 2 of 5 rows skipped" in err
    record = yaml.safe_load((tmp_path / "run" / "run.yaml").read_text(encoding="utf-8"))
    assert [line.partition(": ")[0] for line in record["skipped_rows"]] == [f"{path}, line 2", f"{path}, line 4"]
    assert all(f"skipped {line}" in err for line in record["skipped_rows"])
    assert record["passes"][0]["samples"] == 3


def test_shared_rows_are_a_warning_with_their_count(arguments, capsys, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", GOOD)
    assert main(arguments(forget=f"{path}[:3]", retain=f"{path}[1:]")) == 0
    assert "warning: forget and retain share 2 rows" in capsys.readouterr().err.splitlines()


class TestUsage:
    @pytest.fixture(autouse=True)
    def before_the_model(self, no_model):
        pass

    @pytest.mark.parametrize(
        ("further", "said"),
        [
            (["--method", "magic"], "--method: 'magic' is none of"),
            (["--objective", "both"], "--objective: 'both' is none of"),
            (["--damping", "much"], "--damping: 'much' is not of type float"),
            (["--damping", "0"], "--damping must be above 0"),
            (["--damping", "inf"], "--damping must be finite, not inf"),
            (["--damping", "nan"], "--damping must be above 0"),
            (["--tolerance", "-1"], "--tolerance must be above 0"),
            (["--num-retain", "0"], "--num-retain must be at least 1"),
            (["--seed", "1.5"], "--seed: '1.5' is not of type int"),
            (["--max-length", "1"], "--max-length 1"),
            (["--no-such-option"], "--no-such-option"),
            (["--retai", "x"], "--retai"),
            (["--out"], "--out"),
            (["--template", "no placeholder"], "no placeholder"),
            (["--resume", "--overwrite"], "give one"),
            (["--groups", "-1"], "--groups must be at least 1"),
            (["--offload"], "--offload is not taken here: the model lies in CPU memory itself; leave it out"),
            (["--method", "parameter-shift"], "--base-model"),
            (["--method", "memflex", "--save-update"], "--save-update needs a method with an update"),
            (["--method", "saliency", "--objective", "retain"], "--objective retain needs a method with an update"),
            (["--method", "random", "--granularity", "row"], "--granularity tensor"),
            (
                ["--score", "mean-abs", "--method", "wagle"],
                "mean-abs has no effect: --method wagle has a score",
            ),
            (["--score", "mean-abs", "--method", "saliency"], "--method saliency has a score of its own"),
            (["--score", "l2", "--method", "memflex"], "--score l2 has no effect: --method memflex has a score"),
            (["--score", "mean-abs", "--granularity", "element"], "has no effect: at --granularity element"),
            (["--score", "mean-abs", "--objective", "retain"], "has no effect: --objective retain scores"),
        ],
    )
    def test_options_and_values_that_cannot_be(self, arguments, fails, further, said):
        assert said in fails(arguments(*further))

    @pytest.mark.parametrize(
        "further, said",
        [
            (["--compression", "sjlt", "--method", "wagle"], "--method wagle cannot be answered from sketches"),
            (["--compression", "sjlt", "--method", "soir-sum"], "--method soir-sum cannot be answered from sketches"),
            (["--compression", "sjlt", "--granularity", "row"], "--granularity row: sketches know whole tensors"),
            (["--compression", "sjlt", "--granularity", "element"], "--granularity element: sketches know whole"),
            (["--compression", "sjlt", "--curvature", "diagonal"], "--curvature diagonal: sketches do not know"),
            (["--compression", "sjlt", "--score", "mean-abs"], "--score mean-abs: sketches know the length of u"),
            (["--compression", "sjlt", "--save-update"], "--save-update: sketches do not hold u"),
            (["--compression", "sjlt", "--sketch-dim", "0"], "--sketch-dim must be between 1 and"),
            (["--compression", "factored", "--sketch-dim", "26"], "half of a factored sketch of 26 would be 1 x 13"),
            (["--compression", "tensorsketch", "--sketch-dim", "63"], "its size must be even; got 63"),
            (["--compression", "sjlt", "--tolerance", "0.1"], "--tolerance has no effect"),
            (["--curvature", "woodbury", "--tolerance", "0.1"], "--tolerance has no effect"),
            (["--sketch-dim", "64"], "--sketch-dim has no effect without --compression"),
            (["--sketch-dtype", "bfloat16"], "--sketch-dtype has no effect without --compression"),
            (["--damping-dimension", "sketch"], "--damping-dimension has no effect without --compression"),
            (
                ["--compression", "oporp", "--damping-dimension", "sketch", "--curvature", "woodbury"],
                "--damping-dimension sketch restates published code",
            ),
            (["--memory", "8GiB"], "--memory has no effect here"),
            (["--memory", "much", "--compression", "auto"], "--memory much: give a size such as 8GiB"),
            (["--memory", "0", "--compression", "auto"], "--memory 0: give a size such as 8GiB"),
            (["--store", "nowhere"], "--store nowhere: there is no store yet; give --compression to build one"),
            (["--method", "soir-per-sample", "--granularity", "row"], "--method soir-per-sample ranks whole tensors"),
            (["--method", "fo-influence", "--curvature", "woodbury"], "--curvature woodbury is a choice of --method"),
            (["--method", "soir-per-sample", "--objective", "retain"], "--objective retain needs a method with an"),
            (["--method", "first-order", "--damping", "0.2"], "--damping 0.2 has no effect"),
        ],
    )
    def test_what_sketches_and_gram_matrices_cannot_be_asked(self, arguments, fails, further, said):
        assert said in fails(arguments(*further))

    def test_settings_that_are_none(self, arguments, fails, tmp_path):
        path = tmp_path / "run.yaml"
        for text, said in [
            ("colour: red\n", "no setting is called 'colour'"),
            ("seed: many\n", "--seed: 'many' is not of type int"),
            ("- a\n", "expected a mapping"),
            ("a: [", "not YAML"),
        ]:
            path.write_text(text, encoding="utf-8")
            assert said in fails(arguments("--config", str(path)))
        assert "no.yaml: No such file" in fails(arguments("--config", str(tmp_path / "no.yaml")))


class TestModels:
    @pytest.fixture
    def folder(self, model_folder, tmp_path):
        return Path(shutil.copytree(model_folder, tmp_path / "copy"))

    def test_a_missing_folder(self, arguments, fails):
        assert "no/such/model/folder: no such folder" in fails(arguments(model="no/such/model/folder"))

    def test_no_configuration(self, arguments, fails, folder):
        (folder / "config.json").unlink()
        assert "no config.json" in fails(arguments(model=str(folder)))

    def test_an_empty_folder(self, arguments, fails, tmp_path):
        (tmp_path / "nothing").mkdir()
        assert "nothing: no config.json in it" in fails(arguments(model=str(tmp_path / "nothing")))

    def test_pickled_weights_only(self, arguments, fails, folder):
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
        line = fails(arguments(model=str(folder)))
        assert "only pickled weights (pytorch_model.bin), which are never loaded" in line

    @pytest.mark.parametrize("keep", [100, -1000])
    def test_damaged_weights(self, arguments, fails, folder, keep):
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:keep])
        assert "damaged weights in model.safetensors" in fails(arguments(model=str(folder)))

    def test_a_tensor_is_missing(self, arguments, fails, folder):
        tensors = load_file(folder / "model.safetensors")
        del tensors["model.layers.1.mlp.up_proj.weight"]
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        assert "the weights lack model.layers.1.mlp.up_proj.weight" in fails(arguments(model=str(folder)))

    def test_a_model_with_code_of_its_own(self, arguments, fails, folder):
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        settings |= {"model_type": "ours", "auto_map": {"AutoConfig": "ours.Config", "AutoModelForCausalLM": "ours.M"}}
        (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
        (folder / "ours.py").write_text("raise SystemExit('code of a model folder was run')\n", encoding="utf-8")
        assert "give --trust-remote-code" in fails(arguments(model=str(folder)))

    def test_a_tokenizer_of_another_model(self, arguments, fails, tmp_path):
        path = write_rows(tmp_path / "rows.jsonl", [{"input_ids": [5, 6, 200], "labels": [-100, 6, 200]}])
        retain = write_rows(tmp_path / "retain.jsonl", [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}])
        line = fails(arguments(forget=path, retain=retain))
        assert "rows.jsonl#0 has token id 200, the model's vocabulary ends at 96" in line and "--tokenizer" in line

    def test_nothing_in_scope(self, arguments, fails):
        assert "nothing*" in fails(arguments("--include", "nothing*"))

    def test_no_such_device(self, arguments, fails):
        assert "--device quantum" in fails(arguments(device="quantum"))

    def test_a_base_model_of_another_shape(self, arguments, capsys, folder, tmp_path):
        tensors = load_file(folder / "model.safetensors")
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8")) | {"num_hidden_layers": 1}
        (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
        kept = {name: tensor for name, tensor in tensors.items() if "layers.1." not in name}
        save_file(kept, folder / "model.safetensors", {"format": "pt"})
        assert main(arguments("--base-model", str(folder), method="parameter-shift")) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert "--base-model: has no tensor model.layers.1." in line and not (tmp_path / "run").exists()


class TestNumbers:
    def spoil(self, model_folder, tmp_path, name, value):
        folder = Path(shutil.copytree(model_folder, tmp_path / "copy"))
        tensors = load_file(folder / "model.safetensors")
        tensors[name].view(-1)[0] = value
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return str(folder)

    def test_a_weight_that_is_nan(self, arguments, model_folder, tmp_path, capsys):
        folder = self.spoil(model_folder, tmp_path, "model.layers.0.mlp.up_proj.weight", float("nan"))
        assert main(arguments(model=folder)) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith("fillm rank: the loss of sample ") and "forget.jsonl#" in line and "nan" in line
        assert not (tmp_path / "run").exists() and not (tmp_path / "run.partial").exists()

    @pytest.mark.parametrize(("statistic", "stage"), [(MeanGradient, "forget"), (RetainMoments, "retain")])
    def test_a_gradient_that_is_not_finite(self, arguments, monkeypatch, capsys, statistic, stage, tmp_path):
        """One sample's gradient of one tensor overflows although its loss is finite."""
        target, observe, spoilt = "model.layers.1.mlp.down_proj.weight", statistic.observe, 3
        from fillm.capture.gradients import DenseGradients
        from fillm.statistics import SquaredNorms

        def overflowing(original):
            def wrapped(self, name, gradients, positions):
                if name == target and spoilt in positions.tolist():
                    rows = [gradients.materialise(row) for row in range(len(positions))]
                    rows[positions.tolist().index(spoilt)].view(-1)[5] = float("inf")
                    gradients = DenseGradients(torch.stack(rows))
                original(self, name, gradients, positions)

            return wrapped

        monkeypatch.setattr(statistic, "observe", overflowing(observe))
        monkeypatch.setattr(SquaredNorms, "observe", overflowing(SquaredNorms.observe))
        assert main(arguments()) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert f"{stage}.jsonl#{spoilt} with respect to {target} is not finite" in line
        assert not (tmp_path / "run").exists()


def out_of_memory(limit, real):
    """Fails like an allocator for batches of more than `limit` samples."""

    def run(self, batch, samples, observe):
        if len(batch.indices) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return real(self, batch, samples, observe)

    return run


class TestMemory:
    @pytest.fixture(autouse=True)
    def real(self, monkeypatch):
        monkeypatch.setattr(command, "verify", lambda *arguments: command_verification())
        self.run = command.Capture.run

    def test_batches_are_halved_and_it_is_said_once(self, arguments, monkeypatch, capsys, tmp_path):
        assert main(arguments("--save-update", tokens_per_batch="200")) == 0
        capsys.readouterr()
        monkeypatch.setattr(command.Capture, "run", out_of_memory(2, self.run))
        assert main(arguments("--save-update", tokens_per_batch="200", out=str(tmp_path / "halved"))) == 0
        err = capsys.readouterr().err
        assert err.count("out of memory: batches are halved") == 1
        whole, halved = (load_file(tmp_path / name / "update.safetensors") for name in ("run", "halved"))
        for name, u in whole.items():
            assert torch.allclose(halved[name], u, rtol=1e-4, atol=1e-5 * float(u.abs().max())), name

    def test_when_not_even_one_sample_fits(self, arguments, monkeypatch, capsys, tmp_path):
        monkeypatch.setattr(command.Capture, "run", out_of_memory(0, self.run))
        assert main(arguments()) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert "out of memory with 1 sample(s) of up to" in line and "--max-length" in line
        assert not (tmp_path / "run").exists()

    def test_the_allocator_of_the_cpu_is_understood(self, arguments, monkeypatch, capsys):
        real = self.run

        def run(capture, batch, samples, observe):
            if len(batch.indices) > 1:
                torch.empty(1 << 60)
            return real(capture, batch, samples, observe)

        monkeypatch.setattr(command.Capture, "run", run)
        assert main(arguments(method="saliency")) == 0
        assert "out of memory: batches are halved" in capsys.readouterr().err


def command_verification():
    from fillm.capture.verification import Verification

    return Verification()


@pytest.mark.parametrize("place", ["verify", "load_model"])
def test_out_of_memory_outside_of_a_pass(arguments, monkeypatch, fails, place):
    monkeypatch.setattr(command, place, lambda *arguments, **options: torch.empty(1 << 60))
    line = fails(arguments())
    assert "out of memory" in line and "--dry-run" in line


class TestTraces:
    def test_debug_shows_where_the_error_came_from(self, arguments, capsys):
        assert main(arguments("--debug", forget="no/such.jsonl")) == 2
        err = capsys.readouterr().err
        assert "Traceback (most recent call last)" in err and "DataError" in err
        assert err.splitlines()[-1].startswith("fillm rank: no/such.jsonl: no such file")

    def test_a_keyboard_interrupt_before_the_first_pass(self, arguments, monkeypatch, fails):
        def stop(*given, **options):
            raise KeyboardInterrupt

        monkeypatch.setattr(command.Reading, "rows", stop)
        assert "interrupted" in fails(arguments(), code=3)

    def test_a_fault_of_ours_keeps_its_traceback(self, arguments, monkeypatch):
        monkeypatch.setattr(command, "rank", lambda job: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            main(arguments())


def test_every_option_is_described():
    assert all(field.metadata["help"] for field in dataclasses.fields(RankConfig))
