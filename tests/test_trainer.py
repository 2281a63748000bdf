"""Runs from pictures to boxes at the smallest size: trained, stopped, resumed, refused."""

from __future__ import annotations

import json
import shutil

import jax
import numpy as np
import pytest

from configs import finetune
from configs import shapes as shapes_config
from configs.common import CHANGEABLE_ON_RESUME, get_config
from yolos_jax import checkpoint, claim, launch, startup, trainer
from yolos_jax.data import shapes


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    root = tmp_path_factory.mktemp("shapes")
    shapes.write(root, seed=3, train=48, val=10, size=32)
    return root


def tiny(pictures, **overrides):
    """Three steps an epoch, two epochs, on the eight devices of the tests."""
    config = shapes_config.get_config()
    config.data.root = str(pictures)
    config.epochs = 2
    config.batch_size = 16
    config.model.width = 32
    config.model.depth = 2
    config.model.heads = 2
    config.model.mlp_width = 64
    config.model.position_grid = (4, 4)
    config.preprocess.size = config.preprocess.max_size = 32
    config.augment.scales = (32,)
    config.augment.max_size = 32
    config.optimizer.warmup_steps = 2
    config.eval.every_epochs = 1
    config.eval.batch_size = 8
    config.log.every_steps = 1
    config.log.pictures = 2
    config.update_from_flattened_dict(overrides)
    return config


def train(config, workdir):
    return trainer.train(config, str(workdir), changeable_on_resume=CHANGEABLE_ON_RESUME)


def stop_at(monkeypatch, step):
    monkeypatch.setattr(launch.Preemption, "requested", lambda self, now: now >= step)


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(pictures, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("finished")
    return workdir, train(tiny(pictures), workdir)


def test_a_run_leaves_what_its_summary_says(finished):
    workdir, summary = finished
    assert summary["finished"] and summary["step"] == 6
    assert 0 <= summary["AP"] <= summary["AP50"] <= 1
    params, metadata = checkpoint.load_params(summary["checkpoint"])
    assert metadata["label_map"]["names"] == ["rectangle", "ellipse", "triangle"]
    assert params["backbone"]["blocks"]["norm1"]["scale"].shape == (2, 32)
    assert all((workdir / "pictures").joinpath(p).exists() for p in summary["pictures"])
    assert len(summary["pictures"]) == 1


def test_metrics_have_every_step_and_every_evaluation(finished):
    records = lines(finished[0])
    steps = [record for record in records if record["kind"] == "train"]
    assert [record["step"] for record in steps] == [1, 2, 3, 4, 5, 6]
    assert all(np.isfinite(record["loss"]) and record["images"] == 16 for record in steps)
    assert steps[0]["lr"] < steps[2]["lr"]
    assert [record["step"] for record in records if record["kind"] == "eval"] == [3, 6]


def test_a_finished_run_finds_nothing_left_to_do(finished, pictures):
    workdir, first = finished
    before = lines(workdir)
    again = train(tiny(pictures), workdir)
    assert {**again, "seconds": 0} == {**first, "seconds": 0}
    assert lines(workdir) == before


def test_a_stopped_run_ends_where_an_unbroken_one_does(finished, pictures, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        summary = train(tiny(pictures), tmp_path)
    assert not summary["finished"] and summary["step"] == 2
    assert train(tiny(pictures), tmp_path)["finished"]
    unbroken, _ = checkpoint.load_params(finished[0], prefer="last")
    resumed, _ = checkpoint.load_params(tmp_path, prefer="last")
    assert jax.tree.all(jax.tree.map(np.array_equal, unbroken, resumed))
    assert [r["step"] for r in lines(tmp_path) if r["kind"] == "train"] == [1, 2, 3, 4, 5, 6]


def test_a_run_that_began_here_meanwhile_is_not_begun_again(
    finished, pictures, tmp_path, monkeypatch
):
    build, folder = startup.build, tmp_path / "run"

    def slowly(*arguments):
        run = build(*arguments)
        shutil.copytree(finished[0], folder)
        return run

    monkeypatch.setattr(startup, "build", slowly)
    with pytest.raises(ValueError, match="another run began here meanwhile, and has saved step 6"):
        train(tiny(pictures), folder)
    assert lines(folder) == lines(finished[0])


def test_a_run_does_not_write_where_it_starts_from(finished, pictures, tmp_path):
    params, metadata = checkpoint.load_params(finished[0])
    checkpoint.save_params(tmp_path / "start", params, metadata)
    with pytest.raises(ValueError, match=r"is config\.init too; choose another folder"):
        train(tiny(pictures, init=str(tmp_path / "start")), tmp_path / "start")


@pytest.mark.slow
def test_microbatches_give_the_same_run(finished, pictures, tmp_path):
    summary = train(tiny(pictures, microbatches=2), tmp_path)
    whole, _ = checkpoint.load_params(finished[0], prefer="last")
    parts, _ = checkpoint.load_params(tmp_path, prefer="last")
    assert summary["step"] == 6
    difference = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), whole, parts)
    assert max(jax.tree.leaves(difference)) < 1e-3, "lr x steps is 9e-3"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"optimizer.lr": 1e-3}, r"optimizer\.lr.*0\.0015.*0\.001"),
        ({"seed": 1}, r"seed.*0.*1"),
        ({"model.depth": 3}, r"model\.depth.*2.*3"),
    ],
)
def test_another_configuration_may_not_resume(finished, pictures, overrides, message):
    with pytest.raises(ValueError, match=message):
        train(tiny(pictures, **overrides), finished[0])


def test_some_keys_may_change_on_resume(finished, pictures):
    config = tiny(pictures, **{"log.every_steps": 7, "data.prefetch": 3, "model.remat": "none"})
    assert train(config, finished[0])["finished"]


def test_what_was_set_in_vain_is_said(finished, pictures, capfd):
    config = tiny(pictures, **{"log.watchdog_seconds": 0, "log.watchdog_exit": True})
    defaults = get_config().to_dict()
    trainer.train(
        config, str(finished[0]), changeable_on_resume=CHANGEABLE_ON_RESUME, defaults=defaults
    )
    said = capfd.readouterr().out
    assert said.count("note: log.watchdog_exit=True is not used with log.watchdog_seconds=0") == 1
    assert said.count("is not used with") == 1


def test_other_data_may_not_resume(finished, tmp_path):
    shapes.write(tmp_path, seed=4, train=48, val=10, size=32)
    with pytest.raises(ValueError, match="begun with other pictures or annotations"):
        train(tiny(tmp_path), finished[0])


def test_a_batch_larger_than_the_set_is_refused(pictures, tmp_path):
    with pytest.raises(ValueError, match=r"64.*48"):
        train(tiny(pictures, batch_size=64), tmp_path / "run")
    with pytest.raises(ValueError, match="multiple of 8"):
        train(tiny(pictures, batch_size=12), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_work_directory_in_use_is_left_alone(finished, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(claim, "LOST_HOST_SECONDS", 0)
    for folder in (finished[0], tmp_path / "new"):
        with claim.Claim() as other:
            other.take(folder)
            before = sorted(folder.rglob("*"))
            with pytest.raises(ValueError, match=f"^{folder} is in use by another run"):
                train(tiny(pictures), folder)
            assert sorted(folder.rglob("*")) == before


@pytest.mark.slow
def test_an_evaluation_that_was_left_is_made_up_for(pictures, tmp_path, monkeypatch):
    config = tiny(pictures, **{"epochs": 1, "log.pictures": 0})
    asked = iter([False] * 4)  # three steps, one batch of the evaluation; then asked to stop
    with monkeypatch.context() as patch:
        patch.setattr(launch.Preemption, "requested", lambda self, now: next(asked, True))
        assert train(config, tmp_path)["finished"] is False
    assert checkpoint.load_params(tmp_path)[1]["ap"] is None
    summary = train(config, tmp_path)
    assert summary["finished"] and summary["step"] == 3
    metadata = checkpoint.load_params(tmp_path)[1]
    assert metadata["ap"] == summary["AP"] == metadata["evaluation"]["AP"]
    assert train(config, tmp_path)["AP"] == summary["AP"]


@pytest.mark.slow
def test_finetuning_takes_what_is_open_from_its_start(finished, pictures, tmp_path):
    config = finetune.get_config()
    small = tiny(pictures)
    for section in ("data", "augment", "eval", "buckets", "log"):
        config[section].update(small[section])
    config.init = str(finished[0])
    config.epochs = 1
    config.model.num_queries = 4
    config.model.dtype = "float32"
    assert train(config, tmp_path)["finished"]
    params, metadata = checkpoint.load_params(tmp_path)
    assert metadata["model"]["width"] == 32
    assert params["backbone"]["det_tokens"].shape == (4, 32)


@pytest.mark.slow
def test_unreadable_pictures_cost_their_rows_and_are_named(pictures, tmp_path):
    root = tmp_path / "data"
    shapes.write(root, seed=3, train=48, val=10, size=32)
    broken = sorted((root / "train2017").iterdir())[:2]
    broken[0].write_bytes(broken[0].read_bytes()[:100])
    broken[1].unlink()
    summary = train(tiny(root, **{"data.max_bad_fraction": 0.05, "epochs": 1}), tmp_path / "run")
    assert summary["finished"]
    named = (tmp_path / "run" / "unreadable.txt").read_text()
    assert broken[0].name in named and broken[1].name in named
    assert sum(16 - r["images"] for r in lines(tmp_path / "run") if "loss" in r) == 2
    with pytest.raises(ValueError, match=r"data\.max_bad_fraction=0\.01"):
        train(tiny(root), tmp_path / "strict")
