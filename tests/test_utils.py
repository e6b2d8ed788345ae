import argparse
import errno
import functools
import hashlib
import http.server
import os
import random
import re
import stat
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import utils
from utils import MetricLogger, SmoothedValue, UserError, load_checkpoint

WEIGHTS = {"a": torch.arange(3.0)}


@pytest.mark.parametrize(
    "content", [WEIGHTS, {"model": WEIGHTS}, {"state_dict": WEIGHTS, "epoch": 3}]
)
def test_weights_are_found_at_the_top_or_under_their_usual_names(tmp_path, content):
    torch.save(content, tmp_path / "c.pth")
    assert torch.equal(load_checkpoint(str(tmp_path / "c.pth"))["model"]["a"], WEIGHTS["a"])


def test_deits_own_checkpoints_with_their_arguments_are_read(tmp_path):
    torch.save(
        {"model": WEIGHTS, "args": argparse.Namespace(lr=1.0, model="deit")}, tmp_path / "c.pth"
    )
    assert load_checkpoint(str(tmp_path / "c.pth"))["args"].lr == 1.0


@pytest.mark.parametrize("content", [[1], {"model": {}}, {"model": {"a": 1}}, {"a": "text"}])
def test_a_file_without_weights_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "c.pth")
    with pytest.raises(UserError, match="c.pth"):
        load_checkpoint(str(tmp_path / "c.pth"))


def test_a_truncated_checkpoint_is_refused_in_one_line(tmp_path):
    torch.save({"model": WEIGHTS}, tmp_path / "whole.pth")
    whole = (tmp_path / "whole.pth").read_bytes()
    for length in range(0, len(whole), 97):
        (tmp_path / "c.pth").write_bytes(whole[:length])
        with pytest.raises(UserError, match="c.pth") as error:
            load_checkpoint(str(tmp_path / "c.pth"))
        assert "\n" not in str(error.value)


def test_a_file_system_that_cannot_sync_folders_keeps_checkpoints(tmp_path, monkeypatch):
    sync = os.fsync

    def files_only(number):
        if stat.S_ISDIR(os.fstat(number).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        sync(number)

    monkeypatch.setattr(os, "fsync", files_only)
    utils.save_checkpoint({"model": WEIGHTS}, tmp_path / "c.pth")
    assert torch.equal(load_checkpoint(str(tmp_path / "c.pth"))["model"]["a"], WEIGHTS["a"])


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A web server for the files of a folder; torch.hub's cache is in another one."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    (tmp_path / "www").mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path / "www")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield tmp_path / "www", f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_checkpoint_by_url_is_checked_against_the_hash_in_its_name(server):
    folder, url = server
    torch.save({"model": WEIGHTS}, folder / "c.pth")
    content = (folder / "c.pth").read_bytes()
    digest = hashlib.sha256(content).hexdigest()[:8]
    for name in (f"deit-{digest}.pth", "deit-00000000.pth"):
        (folder / name).write_bytes(content)
    assert torch.equal(load_checkpoint(f"{url}/deit-{digest}.pth")["model"]["a"], WEIGHTS["a"])
    for name in ("deit-00000000.pth", "missing.pth"):
        with pytest.raises(UserError, match=name):
            load_checkpoint(f"{url}/{name}")


def test_files_of_one_name_from_two_addresses_are_two_files(server):
    folder, url = server
    for number in (1, 2):
        (folder / f"host{number}").mkdir()
        torch.save({"a": torch.full((1,), float(number))}, folder / f"host{number}/checkpoint.pth")
    for number in (1, 2):
        assert load_checkpoint(f"{url}/host{number}/checkpoint.pth")["model"]["a"] == number


def test_one_of_many_readers_downloads(server, monkeypatch):
    folder, url = server
    torch.save({"model": WEIGHTS}, folder / "c.pth")
    download = torch.hub.download_url_to_file
    downloaded = []

    def slowly(*args, **options):
        time.sleep(0.2)
        downloaded.append(args[0])
        download(*args, **options)

    monkeypatch.setattr(torch.hub, "download_url_to_file", slowly)
    with ThreadPoolExecutor(4) as readers:
        found = list(readers.map(load_checkpoint, [f"{url}/c.pth"] * 4))
    assert all(torch.equal(each["model"]["a"], WEIGHTS["a"]) for each in found)
    assert downloaded == [f"{url}/c.pth"]


def test_a_damaged_file_in_the_cache_is_fetched_again(server, tmp_path):
    folder, url = server
    torch.save({"model": WEIGHTS}, folder / "c.pth")
    load_checkpoint(f"{url}/c.pth")
    (cached,) = (tmp_path / "hub").rglob("*c.pth")
    cached.write_bytes(cached.read_bytes()[:-100])
    assert torch.equal(load_checkpoint(f"{url}/c.pth")["model"]["a"], WEIGHTS["a"])

    # One that is whole is not fetched again
    (folder / "c.pth").unlink()
    assert torch.equal(load_checkpoint(f"{url}/c.pth")["model"]["a"], WEIGHTS["a"])


def test_a_smoothed_value_shows_the_median_of_the_last_and_the_mean_of_all():
    value = SmoothedValue(window=3)
    for number in (10, 1, 2, 3):
        value.update(torch.tensor(float(number)))
    assert str(value) == "2.0000 (4.0000)"


def test_progress_lines_are_deits(capsys):
    logger = MetricLogger()
    for _ in logger.log_every(range(12), 10, "Epoch: [0]"):
        logger.update(loss=1.5)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    line = r"Epoch: \[0\]  \[10/12\]  eta: 0:00:00  loss: 1.5000 \(1.5000\)  time: [\d.]+  data: [\d.]+"
    assert re.match(line, lines[1])
    assert re.match(r"Epoch: \[0\] Total time: 0:00:00 \([\d.]+ s / it\)", lines[3])


def test_seeds_of_different_keys_differ_and_of_equal_keys_agree():
    def draw(*key):
        utils.seed_everything(*key)
        return torch.rand(()).item(), random.random(), np.random.rand()

    assert draw(utils.SAMPLE, 0, 1, 2) == draw(utils.SAMPLE, 0, 1, 2)
    keys = [
        (utils.INIT, 0),
        (utils.SAMPLE, 0, 0, 0),
        (utils.SAMPLE, 0, 0, 1),
        (utils.SAMPLE, 0, 1, 0),
        (utils.STEP, 0, 0, 0, 0),
        (utils.STEP, 0, 0, 0, 1),
    ]
    assert len({draw(*key) for key in keys}) == len(keys)
