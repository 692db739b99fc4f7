"""Studies: cells and their names, resuming, failures, pools and clusters."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from datamodules.errors import InputError
from experiments.registry import configs_folder
from experiments.studies.cells import plan
from experiments.studies.command import study
from experiments.studies.results import write_results
from experiments.studies.spec import read_study

TIMES = ("seconds",)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cells run in this process with one thread: other tests fork it, and a pool of threads does not survive that."""
    monkeypatch.setattr("os.cpu_count", lambda: 1)


def write(path: Path, content: dict[str, Any]) -> Path:
    path.write_text("# A study for the tests\n" + yaml.safe_dump(content, sort_keys=False))
    return path


def small(**stage: Any) -> dict[str, Any]:
    """Two points and two seeds on the digits, two batches each."""
    return {
        "stages": {
            "attack": {
                "configs": ["badnets_digits", "debug/smoke"],
                "grid": {"data.poison_fraction": [0.05, 0.1]},
                "seeds": [0, 1],
                "seeded": ["seed_everything", "data.seed"],
                **stage,
            }
        }
    }


def trials(folder: Path, seed: int, **arguments: Any) -> list[dict[str, Any]]:
    """Bulk trials: three rows."""
    (folder / "note.txt").write_text("kept")
    if arguments.get("fails"):
        raise RuntimeError("no such luck")
    return [{"trial": number, "score": number * seed + arguments["data_size"]} for number in range(3)]


def die(folder: Path, seed: int, **arguments: Any) -> list[dict[str, Any]]:
    """A cell whose process is killed, for the first seed."""
    if seed == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return [{"trial": 0}]


def table(out: Path) -> list[dict[str, str]]:
    with (out / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def without_times(out: Path) -> list[dict[str, str]]:
    return [{key: value for key, value in row.items() if key not in TIMES} for row in table(out)]


# --- reading ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"stagse": {}}, "did you mean 'stages'"),
        (small(gird={}), "did you mean 'grid'"),
        (small(grid={"data.seed": 3}), "give a list"),
        (small(seeds=["a"]), "whole numbers"),
        (small(configs=["badnets_digit"]), "did you mean 'badnets_digits'"),
        (small(inputs={"model.weights": "victim"}), "no earlier stage"),
        (small(configs=[], function=None), "one of the two"),
        (small(exclude=[{"data.poison_fractoin": 1}]), "no such key"),
        ({**small(), "executor": {"kind": "slrum"}}, "did you mean 'slurm'"),
        ({**small(), "workers": 0}, "1 or more"),
        ({"stages": {}}, "one stage or more"),
    ],
)
def test_a_wrong_study_is_refused_in_one_line(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError) as caught:
        read_study(write(tmp_path / "s.yaml", change))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_size_changes_what_it_names_and_nothing_else(tmp_path: Path) -> None:
    content = small() | {"sizes": {"quick": {"stages": {"attack": {"seeds": [5]}}}, "paper": {}}}
    path = write(tmp_path / "s.yaml", content)
    assert read_study(path).stages[0].seeds == (5,)  # the first is the default
    assert read_study(path, "paper").stages[0].seeds == (0, 1)
    assert read_study(path, "quick").stages[0].grid == read_study(path, "paper").stages[0].grid
    with pytest.raises(InputError, match="did you mean 'quick'"):
        read_study(path, "qiuck")


@pytest.mark.parametrize("path", sorted((configs_folder() / "studies").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_shipped_studies_have_both_sizes_and_a_line(path: Path) -> None:
    for size in ("quick", "paper"):
        spec = read_study(path, size)
        assert spec.description
        assert spec.figures
        assert spec.stages


# --- cells -----------------------------------------------------------------------------------------------------------
def test_a_plan_is_the_product_less_what_is_excluded(tmp_path: Path) -> None:
    grid = {"data.source_label": [1, 2], "data.target_label": [1, 2, 3]}
    exclude = [{"data.source_label": 1, "data.target_label": 1}, {"data.source_label": 2, "data.target_label": 2}]
    path = write(tmp_path / "s.yaml", small(grid=grid, exclude=exclude, overrides={"data.poison_fraction": 0.01}))
    cells = plan(read_study(path), threads=1)
    points = [(cell.point["data.source_label"], cell.point["data.target_label"], cell.seed) for cell in cells]
    assert points == [(s, t, k) for s, t in ((1, 2), (1, 3), (2, 1), (2, 3)) for k in (0, 1)]
    assert len({cell.identity for cell in cells}) == len(cells)


def test_an_identity_depends_on_all_that_determines_the_result(tmp_path: Path) -> None:
    def identities(threads: int = 1, **stage: Any) -> list[str]:
        return [cell.identity for cell in plan(read_study(write(tmp_path / "s.yaml", small(**stage))), threads)]

    base = identities()
    assert base == identities()
    assert base[0] == identities(seeds=[0])[0]  # what else is in the grid does not matter
    for other in (
        identities(threads=2),
        identities(overrides={"trainer.max_epochs": 2}),
        identities(overrides={"data.base.split_seed": 5}),  # other data
        identities(configs=["badnets_digits"]),
        identities(seeded=["seed_everything"]),
    ):
        assert not set(base) & set(other)


# --- running ---------------------------------------------------------------------------------------------------------
def test_a_study_runs_once_and_its_rows_can_be_traced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = write(tmp_path / "s.yaml", small()), tmp_path / "out"
    assert study(["study", "--config", str(path), "--out", str(out), "--no-report"]) == 0
    rows = table(out)
    assert [row["status"] for row in rows] == ["finished"] * 4
    assert [(row["data.poison_fraction"], row["seed"]) for row in rows] == [
        ("0.05", "0"), ("0.05", "1"), ("0.1", "0"), ("0.1", "1"),
    ]  # fmt: skip
    assert len({row["data_hash"] for row in rows}) == 1
    for name in ("config_hash", "poison_hash", "weights_hash"):
        assert len({row[name] for row in rows}) == 4
    assert all("--data.seed=" in row["command"] for row in rows)
    metrics = json.loads((out / "cells" / rows[2]["cell"] / "metrics.json").read_text())
    assert float(rows[2]["clean_accuracy"]) == metrics["measures"]["clean_accuracy"]["value"]
    pictures = [cell.name for cell in (out / "cells").iterdir() if (cell / "poisons.png").exists()]
    assert pictures == [rows[0]["cell"]]  # the first cell's, once a study
    from pyarrow import parquet

    assert parquet.read_table(out / "results.parquet").num_rows == 4
    before = {cell: cell.stat().st_mtime_ns for cell in (out / "cells").iterdir()}
    text = (out / "results.csv").read_bytes()
    assert study(["study", "--config", str(path), "--out", str(out), "--no-report"]) == 0
    assert {cell: cell.stat().st_mtime_ns for cell in (out / "cells").iterdir()} == before
    assert (out / "results.csv").read_bytes() == text
    assert study(["study", "--config", str(path), "--out", str(out), "--dry-run"]) == 0
    assert "finished" in capsys.readouterr().out


def test_a_failure_is_recorded_and_the_others_go_on(tmp_path: Path) -> None:
    # the second asks for more images than there are
    path = write(tmp_path / "s.yaml", small(grid={"data.poison_fraction": [0.1, 0.99]}, seeds=[0]))
    out = tmp_path / "out"
    args = ["study", "--config", str(path), "--out", str(out), "--no-report"]
    assert study(args) == 1
    good, failed = table(out)
    assert (good["status"], failed["status"]) == ("finished", "failed")
    assert "poison_fraction" in failed["error"]
    assert study(args) == 1  # it is not tried again …
    record = out / "failed" / f"{failed['cell']}.json"
    record.write_text(json.dumps({"error": "of an earlier day"}))
    assert study(args) == 1
    assert table(out)[1]["error"] == "of an earlier day"
    assert study([*args, "--retry-failed"]) == 1  # … unless one asks for it
    assert "poison_fraction" in table(out)[1]["error"]


def test_a_stage_gets_the_weights_of_an_earlier_one(tmp_path: Path) -> None:
    content = small(grid={}, inputs={"model.honest": "victim"})
    victim = {"configs": ["victim_digits", "debug/smoke"], "seeds": [0, 1]}
    content["stages"] = {"victim": victim, **content["stages"]}
    out = tmp_path / "out"
    path = write(tmp_path / "s.yaml", content)
    assert study(["study", "--config", str(path), "--out", str(out), "--no-report"]) == 0
    rows = table(out)
    assert [row["stage"] for row in rows] == ["victim", "victim", "attack", "attack"]
    for victim_row, attack_row in zip(rows[:2], rows[2:], strict=True):
        assert victim_row["cell"] in attack_row["command"]
        assert float(attack_row["honest_clean_accuracy"]) == float(victim_row["clean_accuracy"])
    # an input that failed fails what needs it, and only that
    import shutil

    shutil.rmtree(out / "cells")
    (out / "failed").mkdir(exist_ok=True)
    (out / "failed" / f"{rows[0]['cell']}.json").write_text(json.dumps({"error": "lost"}))
    assert study(["study", "--config", str(path), "--out", str(out), "--no-report"]) == 1
    assert [row["status"] for row in table(out)] == ["failed", "finished", "failed", "finished"]
    assert "its input" in table(out)[2]["error"]


def test_bulk_trials_return_many_rows(tmp_path: Path) -> None:
    stage = {
        "function": "tests.experiments.test_studies.trials", "grid": {"data.size": [10, 20]}, "seeds": [3],
        "arguments": {"fails": False},
    }  # fmt: skip
    out = tmp_path / "out"
    path = write(tmp_path / "s.yaml", {"stages": {"craft": stage}})
    assert study(["study", "--config", str(path), "--out", str(out), "--no-report"]) == 0
    found = [(int(row["data.size"]), int(row["trial"]), int(row["score"])) for row in table(out)]
    assert found == [(size, trial, size + 3 * trial) for size in (10, 20) for trial in range(3)]


@pytest.mark.parametrize("executor", [{"kind": "local"}, {"kind": "submitit_local", "timeout_min": 5}])
def test_a_process_that_dies_fails_its_cell_alone(tmp_path: Path, executor: dict[str, Any]) -> None:
    stage = {"function": "tests.experiments.test_studies.die", "seeds": [0, 1, 2]}
    out = tmp_path / "out"
    path = write(tmp_path / "s.yaml", {"stages": {"craft": stage}, "workers": 2, "executor": executor})
    assert study(["study", "--config", str(path), "--out", str(out), "--no-report"]) == 1
    assert [row["status"] for row in table(out)] == ["failed", "finished", "finished"]


def test_the_pool_and_submitit_give_the_rows_of_one_process(tmp_path: Path) -> None:
    path = write(tmp_path / "s.yaml", small(seeds=[0]))
    threads = max(1, (os.cpu_count() or 1) // 2)
    tables = []
    for kind, workers in (("local", 2), ("submitit_debug", 2)):
        content = small(seeds=[0]) | {"executor": {"kind": kind}, "workers": workers}
        path = write(tmp_path / "s.yaml", content)
        out = tmp_path / kind
        assert study(["study", "--config", str(path), "--out", str(out), "--no-report"]) == 0
        tables.append([{k: v for k, v in row.items() if k != "command"} for row in without_times(out)])
    assert tables[0] == tables[1]
    assert all(row["threads"] == str(threads) for row in tables[0])


def test_only_one_study_at_a_time_in_a_folder(tmp_path: Path) -> None:
    import fcntl

    out = tmp_path / "out"
    out.mkdir()
    path = write(tmp_path / "s.yaml", small())
    with (out / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another study"):
            study(["study", "--config", str(path), "--out", str(out)])


def test_a_sweep_runs_the_same_points(tmp_path: Path) -> None:
    path = write(tmp_path / "s.yaml", small(seeded=["seed_everything"], overrides={"trainer.max_epochs": 1}))
    study(["study", "--config", str(path), "--sweep", str(tmp_path / "sweep.yaml")])
    sweep = yaml.safe_load((tmp_path / "sweep.yaml").read_text())
    assert sweep["method"] == "grid"
    assert sweep["parameters"]["data.poison_fraction"] == {"values": [0.05, 0.1]}
    assert sweep["parameters"]["seed_everything"] == {"values": [0, 1]}
    assert sweep["command"][:2] == ["lightning", "fit"]
    assert sweep["command"][-2:] == ["--trainer.max_epochs=1", "${args}"]


@pytest.mark.slow
def test_a_study_that_is_killed_again_and_again_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    path = write(tmp_path / "s.yaml", small(seeds=[0, 1, 2]))
    one, other = tmp_path / "killed", tmp_path / "undisturbed"
    code = "import sys; from experiments.studies.command import study; sys.exit(study(sys.argv[1:]))"

    def begin(out: Path) -> subprocess.Popen[bytes]:
        args = [sys.executable, "-c", code, "study", "--config", str(path), "--out", str(out), "--no-report"]
        return subprocess.Popen(args, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    for number in range(3):
        process = begin(one)
        wanted = 1 + number
        until = time.monotonic() + 120
        while len(list((one / "cells").glob("*"))) < wanted and process.poll() is None and time.monotonic() < until:
            time.sleep(0.02)
        process.kill()
        process.wait()
        assert not [cell for cell in (one / "cells").iterdir() if not (cell / "cell.json").is_file()]
    assert begin(one).wait(240) == 0
    assert begin(other).wait(240) == 0
    same = [{k: v for k, v in row.items() if k != "command"} for row in without_times(one)]
    assert same == [{k: v for k, v in row.items() if k != "command"} for row in without_times(other)]


def test_columns_of_mixed_types_are_kept_as_text(tmp_path: Path) -> None:
    from pyarrow import parquet

    rows = [{"a": 1, "b": "x", "c": [1]}, {"a": 2.5, "b": 3, "c": None}]
    write_results(rows, tmp_path)
    read = parquet.read_table(tmp_path / "results.parquet").to_pydict()
    assert read["a"] == [1.0, 2.5]
    assert read["b"] == ["x", "3"]
    assert read["c"] == ["[1]", None]
