"""A disk that fills up while a checkpoint is written ends the run, and the checkpoint before it
is as good as it was. No file may grow beyond a limit: as if the disk were full."""

from __future__ import annotations

import pytest

from tests import dying_train, small_run
from yolos_jax import checkpoint
from yolos_jax import checkpoint_files as files

# At the second checkpoint, step 3's. What is printed then is a file too, and needs less; half of
# the parameters, which is what one of two processes writes, need more.
FULL = {"place": "saving", "number": 2, "bytes": 100_000}
WIDE = {"model.width": 64, "model.mlp_width": 256}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("compiled"))


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "full"), [(1, [0]), (2, [0]), (2, [1]), (2, [0, 1])])
def test_a_full_disk_is_said_and_the_previous_checkpoint_is_intact(
    tmp_path, cache, processes, full
):
    pictures = small_run.write_pictures(tmp_path / "pictures")
    flags = small_run.flags(pictures, tmp_path / "run", **WIDE, **{"compile.cache": cache})
    plans = [FULL if process in full else {} for process in range(processes)]
    with dying_train.Group(tmp_path / "first", flags, plans) as group:
        codes = group.wait(small_run.PATIENCE)
        printed = group.printed()
        assert all(codes) and None not in codes, f"{codes}\n{printed}"
    for process in full:
        said = group.outputs[process].read_text()
        assert f"train.py: checkpoint 3 could not be written to {tmp_path / 'run'}" in said
        assert "File too large" in said and "intact there: steps [2]" in said
    assert checkpoint.load_params(tmp_path / "run")[1]["step"] == 2
    folder = files.absolute(tmp_path / "run" / checkpoint.FOLDER)
    assert files.steps(folder) == [2] and files.damage(folder / "2") is None
