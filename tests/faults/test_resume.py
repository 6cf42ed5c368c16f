"""A run that was killed, at any moment and several times, ends with the bytes of one that was left alone."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import runs
import torch
from runs import BATCH, Run, both, checkpoints, end_both, losses, pretrain, resume, weights

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipe")
    return runs.write_recipe(folder / "tiny.yaml", runs.write_data(folder / "data"))


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory) -> Run:
    """The run that nothing interrupts."""
    run = pretrain(recipe, tmp_path_factory.mktemp("whole") / "run")
    assert run.end() == 0, run.said()
    return run


def assert_same_end(run: Run, whole: Run) -> None:
    """Equal bytes of the weights, equal optimizer and average, equal records, none of them twice."""
    assert [path.name for path in checkpoints(run.folder)] == [path.name for path in checkpoints(whole.folder)]
    assert weights(run.folder) == weights(whole.folder)
    found, wanted = (
        torch.load(checkpoints(one.folder)[-1] / "train_state.pt", weights_only=True) for one in (run, whole)
    )
    assert found["seen"] == wanted["seen"] == 20 * BATCH
    torch.testing.assert_close(found["optimizer"], wanted["optimizer"], rtol=0, atol=0)
    torch.testing.assert_close(found["average"], wanted["average"], rtol=0, atol=0)
    assert [record["seen"] for record in losses(run.folder)] == [2 * BATCH * (n + 1) for n in range(10)]
    assert losses(run.folder) == losses(whole.folder)


@pytest.mark.parametrize("workers", [0, 2])
def test_killed_twice_at_any_moment(recipe, whole, tmp_path, workers):
    """Also proves that workers change nothing: the run to compare with has none."""
    run = pretrain(recipe, tmp_path / "run", "--data.workers", str(workers))
    for seen in (4 * BATCH, 10 * BATCH):
        run.wait_for(seen)
        time.sleep(random.uniform(0, 0.1))  # any moment: within a step, or while a checkpoint is written
        run.kill()
        assert run.end() == -signal.SIGKILL
        run = resume(tmp_path / "run")
    assert run.end() == 0, run.said()
    assert "no longer exactly" not in run.said()
    assert_same_end(run, whole)


@pytest.mark.parametrize(("number", "workers"), [(signal.SIGTERM, 0), (signal.SIGTERM, 2), (signal.SIGINT, 2)])
def test_a_signal_saves_and_ends(recipe, whole, tmp_path, number, workers):
    """Sent to the process group, as a terminal, `timeout` and Slurm do: the loader's workers get it too."""
    run = pretrain(recipe, tmp_path / "run", "--data.workers", str(workers), "--train.save-every", "none")
    run.wait_for(4 * BATCH)
    os.killpg(run.process.pid, number)
    assert run.end() == 0, run.said()
    assert f"go on with --resume {run.folder}" in run.said() and "Traceback" not in run.said()
    (saved,) = checkpoints(run.folder)
    assert 4 * BATCH <= int(saved.name) < 20 * BATCH
    run = resume(run.folder, "--train.save-every", str(3 * BATCH))
    assert run.end() == 0, run.said()
    assert "no longer exactly" not in run.said()
    assert_same_end(run, whole)


def test_a_kill_while_a_checkpoint_is_written_costs_nothing(whole, tmp_path):
    """What such a kill leaves: a half written folder; and, on a bad disk, a newest checkpoint that is torn."""
    folder = tmp_path / "run"
    shutil.copytree(whole.folder, folder)
    newest = checkpoints(folder)[-1]
    stored = (newest / "model.safetensors").read_bytes()
    (newest / "model.safetensors").write_bytes(stored[: len(stored) // 2])
    shutil.copytree(newest, newest.with_name(f".{newest.name}.partial"))
    with (folder / "metrics.jsonl").open("a") as log:
        log.write('{"seen": 12')  # a record torn by the kill
    run = resume(folder)
    assert run.end() == 0, run.said()
    assert run.said().count(f"{newest} is torn (model.safetensors has") == 1
    assert_same_end(run, whole)
    assert not list(newest.parent.glob(".*"))


def test_a_torn_later_checkpoint_never_pushes_out_the_new_one(whole, tmp_path):
    """With one checkpoint to keep, that one is the newest whole one."""
    folder = tmp_path / "run"
    shutil.copytree(whole.folder, folder)
    older, newest = checkpoints(folder)
    (newest / "model.safetensors").write_bytes(b"")
    flags = ("--train.keep", "1", "--train.save-every", str(BATCH), "--train.samples", str(19 * BATCH))
    run = resume(folder, *flags)
    assert run.end() == 0, run.said()
    assert [int(path.name) for path in checkpoints(folder)] == [19 * BATCH, 20 * BATCH]
    assert int(older.name) == 18 * BATCH


def test_a_kill_before_the_first_checkpoint(recipe, whole, tmp_path):
    """There is nothing to go on from, which is said; the same command begins again in the same folder."""
    run = pretrain(recipe, tmp_path / "run", "--train.save-every", "none")
    run.wait_for(2 * BATCH)
    run.kill()
    assert run.end() == -signal.SIGKILL
    run = resume(tmp_path / "run")
    assert run.end() == 2
    assert (
        run.said() == f"error: {run.folder} holds no checkpoint (no manifest.json, no checkpoints/); give a "
        "checkpoint or run folder\n"
    )
    run = pretrain(recipe, tmp_path / "run")
    assert run.end() == 0, run.said()
    assert_same_end(run, whole)


def test_two_ranks_killed_and_resumed(recipe, tmp_path):
    """A step of 5 samples: 3 for the first rank and 2 for the second, each in two micro-batches; workers or not."""
    folders = {0: tmp_path / "whole", 2: tmp_path / "run"}
    flags = ("--device", "cpu", "--train.global-batch", "5", "--train.micro-batch", "2", "--train.save-every", "15")
    for workers, folder in folders.items():
        more = ("--data.workers", str(workers), "--out", folder)
        ranks = both(runs.start, folder, "pretrain", recipe, *flags, *more)
        if folder.name == "run":
            ranks[0].wait_for(40)
            for run in ranks:
                run.kill()
            assert end_both(ranks) == [-signal.SIGKILL] * 2
            ranks = both(runs.start, folder, "pretrain", "--resume", folder, "--device", "cpu")
        assert end_both(ranks) == [0, 0], "".join(run.said() for run in ranks)
    assert weights(folders[0]) == weights(folders[2])
    assert losses(folders[0]) == losses(folders[2])


def torchrun(folder: Path, *words: str | Path) -> subprocess.Popen[bytes]:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python")
    program = (sys.executable, "-c", "import sys; from vlp.cli import main; sys.exit(main())", "pretrain")
    output = folder.with_suffix(".out").open("wb")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *launcher, *program, *words, "--device", "cpu"], stdout=output, stderr=output, env=env
    )


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_torchrun_killed_and_resumed(recipe, tmp_path, number):
    """One rank dies at once, which ends the other; or torchrun is told to stop, and both save first."""
    folders = [tmp_path / name for name in ("whole", "run")]
    for folder in folders:
        process = torchrun(folder, recipe, "--out", folder)
        if folder.name == "run":
            while not any(record["seen"] >= 6 * BATCH for record in runs.records(folder)):
                assert process.poll() is None, folder.with_suffix(".out").read_text()
                time.sleep(0.002)
            ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            os.kill(process.pid if number == signal.SIGTERM else int(ranks[-1]), number)
            assert process.wait(120) != 0
            if number == signal.SIGTERM:
                assert f"go on with --resume {folder}" in folder.with_suffix(".out").read_text()
            process = torchrun(folder, "--resume", folder)
        assert process.wait(120) == 0, folder.with_suffix(".out").read_text()
    assert weights(folders[0]) == weights(folders[1])
    assert losses(folders[0]) == losses(folders[1])
