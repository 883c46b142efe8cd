"""Run folders: what is refused, what is kept, and what Weights & Biases gets to see."""

import getpass
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import nn

from flatmin_nb.lab.errors import OneLineError
from flatmin_nb.lab.files import DiskFullError, FolderError, written_whole
from flatmin_nb.lab.results import Run, commit, histories, load, load_weights


def one_line(error) -> str:
    assert isinstance(error.value, OneLineError)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("parent", ["a_file", "/proc"])  # root may write to any folder that can be written at all
def test_a_folder_that_cannot_be_written(parent, tmp_path):
    (tmp_path / "a_file").touch()
    with pytest.raises(OSError) as error:
        Run(tmp_path / parent / "run", {"lr": 0.1})
    assert "cannot be written" in one_line(error) and "choose another folder" in one_line(error)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can become somebody else")
def test_a_read_only_folder_for_somebody_who_is_not_root():
    with tempfile.TemporaryDirectory() as parent:
        os.chmod(parent, 0o555)
        reader, writer = os.pipe()
        if (child := os.fork()) == 0:  # a process that may read the folder but not write to it
            os.setuid(65534)
            try:
                Run(Path(parent) / "run", {})
            except BaseException as error:
                os.write(writer, f"{type(error).__name__}: {error}".encode())
            os._exit(0)
        os.waitpid(child, 0)
        told = os.read(reader, 1000).decode()
    assert told == f"FolderError: the run folder '{parent}/run' cannot be written (Permission denied); choose another folder"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a device that is always full")
@pytest.mark.parametrize("write", [lambda file: torch.save({"weights": torch.zeros(100_000)}, file), lambda file: file.write(bytes(100_000))], ids=["torch", "bytes"])
def test_a_full_disk_is_one_line_and_keeps_what_is_there(write, tmp_path):
    "torch.save hides it behind an error of its own."
    (tmp_path / "model.pt").write_bytes(b"the old one")
    (tmp_path / "model.pt.part").symlink_to("/dev/full")
    with pytest.raises(DiskFullError) as error, written_whole(tmp_path / "model.pt") as file:
        write(file)
    assert "No space left for 'model.pt'" in one_line(error) and str(tmp_path) in one_line(error)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("model.pt", b"the old one")]


@pytest.mark.parametrize("status", ["finished", "diverged"])
def test_what_is_over_is_not_lost(status, tmp_path):
    Run(tmp_path, {"lr": 0.1}).finish(nn.Linear(2, 1), None, status=status, test_error=1.0)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(OSError) as error:
        Run(tmp_path, {"lr": 0.1})
    assert f"holds a run that is {status}" in one_line(error) and "overwrite=True" in one_line(error)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert Run(tmp_path, {"lr": 0.2}, overwrite=True).status == "running"
    assert load(tmp_path).lr.tolist() == [0.2]
    assert not (tmp_path / "model.safetensors").exists()


def test_overwriting_that_is_killed_halfway_resumes_nothing_old(tmp_path):
    run = Run(tmp_path, {"lr": 0.1})
    run.save_checkpoint({"step": 7})
    run.note(status="replaced", parameters={})  # the first thing that overwriting does
    run.close()
    assert Run(tmp_path, {"lr": 0.2}).checkpoint() is None


def test_folders_of_something_else_are_left_alone(tmp_path):
    (tmp_path / "history.csv").write_text("mine")
    with pytest.raises(OSError) as error:
        Run(tmp_path, {})
    assert "holds history.csv but no run.json" in one_line(error)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(OSError) as error:
        Run(tmp_path, {})
    assert "is not a record of a run" in one_line(error)
    assert load(tmp_path).status.tolist() == ["unreadable"]
    assert (tmp_path / "history.csv").read_text() == "mine"


def test_overwriting_removes_the_run_and_nothing_else(tmp_path):
    mine = ["notes.txt", "epoch-of-reason.safetensors", "epoch-3-of-my-other-net.safetensors", "epoch-0007.safetensors.bak", "epoch-12.safetensors", "notes.part"]
    for name in mine:
        (tmp_path / name).write_text("mine")
    (tmp_path / "below").mkdir()
    run = Run(tmp_path, {})
    for name in ("best.safetensors", "epoch-0000.safetensors", "epoch-12345.safetensors"):
        run.save_weights(nn.Linear(2, 1).state_dict(), name)
    run.finish(nn.Linear(2, 1), None)
    for name in ("epoch-0003.safetensors.part", "checkpoint.pt.part", "history.csv.part"):
        (tmp_path / name).write_text("left by a process that was killed")
    Run(tmp_path, {}, overwrite=True)
    assert all((tmp_path / name).read_text() == "mine" for name in mine)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "below", *sorted(mine), "run.json"]


def test_what_a_kill_left_of_the_first_record_blocks_nothing(tmp_path):
    (tmp_path / "run.json.part").write_text("{")
    assert Run(tmp_path, {}).status == "running" and not (tmp_path / "run.json.part").exists()


@pytest.mark.parametrize("name", ["best.safetensors", "epoch-0007.safetensors"])
def test_weights_on_the_way_are_something_to_lose(name, tmp_path):
    run = Run(tmp_path, {"lr": 0.1})
    run.save_weights(nn.Linear(2, 1).state_dict(), name)
    run.close()
    with pytest.raises(OSError, match="an unfinished run with lr = 0.1, not 0.2"):
        Run(tmp_path, {"lr": 0.2})
    (tmp_path / "run.json").unlink()
    with pytest.raises(OSError, match=f"holds {name} but no run.json"):
        Run(tmp_path, {"lr": 0.1})


def test_weights_of_any_layout_come_back(tmp_path):
    net, other = (nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last) for _ in range(2))
    Run(tmp_path, {}).finish(net, None)
    load_weights(other, tmp_path / "model.safetensors")
    assert torch.equal(net.weight, other.weight) and other.weight.is_contiguous(memory_format=torch.channels_last)


def test_a_folder_is_no_file_of_weights(tmp_path):
    with pytest.raises(ValueError) as error:
        load_weights(nn.Linear(2, 1), tmp_path)
    assert "no safetensors file" in one_line(error)


def test_a_refused_run_does_not_hold_the_folder(tmp_path):
    Run(tmp_path, {}).finish(None, None)
    with pytest.raises(OSError):
        Run(tmp_path, {})
    script = f"from flatmin_nb.lab.results import Run; Run({str(tmp_path)!r}, {{}}, overwrite=True)"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_no_record_names_this_machine(tmp_path):
    run = Run(tmp_path, {"lr": 0.1}, tag="a")
    run.save_checkpoint({"step": 1, "weight": torch.ones(3)})
    text = (tmp_path / "run.json").read_text()
    for name in (str(tmp_path), socket.gethostname(), getpass.getuser()):
        assert f'"{name}' not in text and f"/{name}" not in text
    assert str(tmp_path).encode() not in (tmp_path / "checkpoint.pt").read_bytes()


def test_a_checkpoint_runs_no_code(tmp_path):
    class Trap:
        def __reduce__(self):
            return (print, ("trapped",))

    run = Run(tmp_path, {})
    torch.save({"step": Trap()}, tmp_path / "checkpoint.pt")
    with pytest.raises(Exception, match="[Ww]eights"):
        run.checkpoint()


def test_tied_weights_are_written(tmp_path):
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].weight = net[0].weight
    Run(tmp_path, {}).finish(net, None)
    assert (tmp_path / "model.safetensors").exists()


WANDB = """
import sys
from flatmin_nb.lab.results import Run
run = Run({folder!r}, {{"lr": 0.1}}, wandb_mode={mode!r}, tag="a tag")
run.log({{"step": 1, "test_error": 2.5}})
other = Run({folder!r} + "-2", {{"lr": 0.2}}, wandb_mode={mode!r}, tag="another")  # while the first one goes on
other.log({{"step": 1, "loss_of_the_other": 0.5}})
run.finish(None, None, test_error=2.5)
other.finish(None, None)
print("imported" if "wandb" in sys.modules else "not imported")
"""


def in_process(folder, mode, tmp_path):
    "Run in a process with no key, no network and a home of its own."
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    environment |= {"HOME": str(tmp_path / "home"), "https_proxy": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"}
    script = WANDB.format(folder=str(folder), mode=mode)
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=60)


def test_wandb_disabled_is_not_imported(tmp_path):
    result = in_process(tmp_path / "run", "disabled", tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (0, "not imported\n", "")
    assert not (tmp_path / "run" / "wandb").exists()


def test_wandb_offline_writes_a_run_into_the_folder(tmp_path):
    pytest.importorskip("wandb")
    result = in_process(tmp_path / "run", "offline", tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (0, "imported\n", "")
    (written,) = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    data = written.read_bytes()
    assert b"test_error" in data and b"a tag" in data
    (other,) = (tmp_path / "run-2" / "wandb").glob("offline-run-*/*.wandb")
    assert b"loss_of_the_other" in other.read_bytes() and b"loss_of_the_other" not in data
    assert str(tmp_path).encode() not in data
    assert load(tmp_path / "run").status.tolist() == ["finished"]


def test_wandb_online_without_a_key_fails_at_once(tmp_path):
    pytest.importorskip("wandb")
    result = in_process(tmp_path / "run", "online", tmp_path)
    assert result.returncode == 1
    assert (
        result.stderr.strip()
        .splitlines()[-1]
        .endswith("wandb_mode = 'online' needs a key; run `wandb login`, set WANDB_API_KEY, or give 'offline'")
    )
    assert not (tmp_path / "run").exists()


def points(folder) -> dict[str, list[tuple[int, float]]]:
    "The curves that TensorBoard reads in a folder."
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator").EventAccumulator(str(folder))
    reader.Reload()
    return {name: [(point.step, point.value) for point in reader.Scalars(name)] for name in reader.Tags()["scalars"]}


def rows(count) -> pd.DataFrame:
    return pd.DataFrame({"step": 8 * step, "seconds": step / 2, "val_error": 0.5 * step} for step in range(count))


@pytest.mark.parametrize("cut", [0, 1, 20, 60])
def test_events_after_a_kill_have_each_point_once(cut, tmp_path):
    "The process is killed while it writes its sixth row; its checkpoint knows of four."
    whole = Run(tmp_path / "whole", {}, tensorboard=True)
    for count in range(1, 8):
        whole.save_history(rows(count))
    run = Run(tmp_path / "killed", {}, tensorboard=True)
    for count in range(1, 7):
        run.save_history(rows(count))
    run.save_checkpoint({"rows": 4})
    run.close()
    file = tmp_path / "killed" / "events.out.tfevents"
    file.write_bytes(file.read_bytes()[: file.stat().st_size - cut])
    run = Run(tmp_path / "killed", {}, tensorboard=True)
    for count in range(5, 8):
        run.save_history(rows(count))
    assert points(tmp_path / "killed") == points(tmp_path / "whole")
    assert points(tmp_path / "whole")["val_error"] == [(8 * step, 0.5 * step) for step in range(7)]
    Run(tmp_path / "killed", {}, overwrite=True)
    assert not file.exists()


def test_events_name_no_machine(tmp_path):
    run = Run(tmp_path, {}, tensorboard=True)
    run.save_history(rows(2))
    data = (tmp_path / "events.out.tfevents").read_bytes()
    for name in (socket.gethostname(), getpass.getuser(), str(tmp_path)):
        assert name.encode() not in data
    run.finish(None, rows(2))  # no row is new
    assert (tmp_path / "events.out.tfevents").read_bytes() == data


def test_events_of_no_rows_are_no_file(tmp_path):
    run = Run(tmp_path, {}, tensorboard=True)
    run.save_history(rows(2))
    run.finish(None, pd.DataFrame([]), status="diverged")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "run.json"]


def test_events_do_not_outlive_the_wish_for_them(tmp_path):
    "Taken up again without events, a run would leave those of its first part beside a longer history."
    run = Run(tmp_path, {}, tensorboard=True)
    run.save_history(rows(2))
    run.save_checkpoint({"rows": 2})
    run.close()
    Run(tmp_path, {}).save_history(rows(3))
    assert not (tmp_path / "events.out.tfevents").exists()


def test_events_begin_anew_after_a_history_without_rows(tmp_path):
    run = Run(tmp_path, {}, tensorboard=True)
    for count in (2, 0, 1):
        run.save_history(rows(count))
    assert points(tmp_path)["val_error"] == [(0, 0.0)]


def test_tensorboard_is_imported_by_those_who_ask_for_it_and_may_be_missing(tmp_path):
    script = """
import importlib.util, sys
import pandas as pd
from flatmin_nb.lab.results import Run
Run({folder!r}, {{}}).finish(None, pd.DataFrame({{"step": [1]}}))
assert not any("tensorboard" in name for name in sys.modules)
importlib.util.find_spec = lambda name: None
Run({folder!r} + "-2", {{}}, tensorboard=True)
"""
    result = subprocess.run([sys.executable, "-c", script.format(folder=str(tmp_path / "run"))], capture_output=True, text=True)
    assert result.stderr.strip().endswith("TensorBoardError: tensorboard = True needs the package tensorboard; install it, or give False")
    assert not (tmp_path / "run-2").exists()


def test_records_are_strict_json(tmp_path):
    Run(tmp_path, {"cap": float("inf")}).finish(None, None, status="diverged", test_loss=float("nan"))

    def refuse(word):
        raise AssertionError(word)

    json.loads((tmp_path / "run.json").read_text(), parse_constant=refuse)
    assert load(tmp_path).cap.tolist() == [float("inf")]


def test_namesakes_hide_nothing(tmp_path):
    Run(tmp_path, {"run": 7, "status": "mine", "lr": 0.1, "seconds": 5}).finish(None, None, lr=0.05)
    (row,) = load(tmp_path).to_dict("records")
    assert [row[name] for name in ("run", "status", "run_", "status_", "lr", "lr_", "seconds")] == [
        ".",
        "finished",
        7,
        "mine",
        0.1,
        0.05,
        5,
    ]
    assert row["seconds_"] < 5


def test_a_run_without_a_row_has_no_history(tmp_path):
    run = Run(tmp_path / "early", {})
    run.save_history(pd.DataFrame({"step": [7]}))  # of steps that a resumed run has yet to take again
    run.finish(None, pd.DataFrame([]), status="diverged")
    assert not (tmp_path / "early" / "history.csv").exists()
    Run(tmp_path / "whole", {}).finish(None, pd.DataFrame({"step": [1, 2]}))
    Run(tmp_path / "blank", {}).finish(None, None)
    (tmp_path / "blank" / "history.csv").write_text("\n")
    assert histories(tmp_path).values.tolist() == [["whole", 1], ["whole", 2]]


def test_a_run_without_a_checkpoint_or_a_result_blocks_nothing(tmp_path):
    Run(tmp_path, {"batch_size": 5000}).close()
    run = Run(tmp_path, {"batch_size": 50})
    assert (run.record["parameters"], run.record["resumed"]) == ({"batch_size": 50}, [])
    run.finish(nn.Linear(2, 1), None, status="fitted")  # weights are something to lose
    with pytest.raises(OSError, match="an unfinished run with batch_size = 50, not 5"):
        Run(tmp_path, {"batch_size": 5})


def test_the_commit_of_code_without_git_is_what_the_environment_says(tmp_path, monkeypatch):
    file = tmp_path / "code.py"
    file.touch()
    monkeypatch.delenv("FLATMIN_COMMIT", raising=False)
    assert commit(file) == ""
    monkeypatch.setenv("FLATMIN_COMMIT", "0123abc")
    assert commit(file) == "0123abc"
    monkeypatch.setenv("PATH", str(tmp_path))  # git is not even installed
    assert commit(file) == "0123abc"


def test_a_history_without_a_checkpoint_stops_no_other_run(tmp_path):
    "What is left of a run that was refused at its first row: the corrected command may use the folder."
    first = Run(tmp_path / "run", {"plateau": "val_los"})
    first.save_history(pd.DataFrame({"step": [0], "val_loss": [1.0]}))
    first.close()
    again = Run(tmp_path / "run", {"plateau": "val_loss"})
    assert again.status == "running" and not (tmp_path / "run" / "history.csv").exists()
    again.save_checkpoint({"step": 1})
    again.close()
    with pytest.raises(FolderError, match="holds an unfinished run with plateau = val_loss"):
        Run(tmp_path / "run", {"plateau": "other"})
